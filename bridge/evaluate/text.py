"""Pack documents into rows of tokens, with the document and byte offset of every token."""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Int32, UInt64

from bridge import stored_text
from bridge.evaluate import syntax
from bridge.nanochat import units
from bridge.nanochat.corpus import token_ids
from bridge.nanochat.tokenizer import Tokenizer
from bridge.nanochat.units import Split, Unit, find_units

HELDOUT_FRACTION = 0.05
"""The fraction that `bridge.nanochat.corpus.Corpus` holds out by default."""


class Document(NamedTuple):
    """The name of the unit of data that contains a document, and its tokens without BOS."""

    unit: str
    ids: Int32[np.ndarray, " t"]


@dataclasses.dataclass(frozen=True)
class Text:
    """Rows of tokens, (R, T), packed as training packs them: BOS before every row and every document."""

    tokens: Int32[np.ndarray, "R T"]
    document: Int32[np.ndarray, "R T"]
    """Index into `sources`; -1 for BOS."""
    place: Int32[np.ndarray, "R T"]
    """Byte offset in the document at which the token's text begins, after its leading blanks; 0 for BOS."""
    sources: list[bytes]
    """The documents as bytes, without special tokens."""

    def by_document(self) -> Iterator[tuple[Int[np.ndarray, " n"], bytes]]:
        """Yield the flat indices of every document's tokens, with the document's bytes."""
        order = np.argsort(self.document, axis=None, kind="stable")
        bounds = np.searchsorted(self.document.reshape(-1)[order], np.arange(len(self.sources) + 1))
        for index, source in enumerate(self.sources):
            yield order[bounds[index] : bounds[index + 1]], source

    @functools.cached_property
    def syntax(self) -> tuple[UInt64[np.ndarray, " N"], Bool[np.ndarray, " N"]]:
        """For every token, flattened, the bits of `syntax.contexts`, and whether its document parses as Python."""
        marks = np.zeros(self.tokens.size, np.uint64)
        known = np.zeros(self.tokens.size, bool)
        for indices, source in self.by_document():
            contexts = syntax.contexts(source)
            if contexts is not None:
                marks[indices] = contexts[self.place.reshape(-1)[indices]]
                known[indices] = True
        return marks, known


def documents(spec: str, split: Split, tokenizer: Tokenizer) -> Iterator[Document]:
    """Yield the documents of a corpus (see `units.find_units`), or of a store's text, in a shuffled but fixed order.

    Raises:
      FileNotFoundError, ValueError: as `find_units`, or `bridge.stored_text.open_text`.
    """
    if stored_text.is_stored(spec):
        for document in stored_text.documents(stored_text.open_text(spec, split, tokenizer)):
            yield Document(document.name, document.ids)
        return
    corpus_units = find_units(spec, split, HELDOUT_FRACTION)
    for i in np.random.default_rng(0).permutation(len(corpus_units)):
        yield from unit_documents(corpus_units[i], tokenizer)


def unit_documents(unit: Unit, tokenizer: Tokenizer) -> Iterator[Document]:
    """Yield the documents of one unit; long ones in pieces, chats as nanochat renders them."""
    for document in units.documents(unit):
        ids = token_ids(document, tokenizer)
        if len(ids):
            yield Document(unit.name, ids)


def read(documents: Iterable[Document], tokenizer: Tokenizer, row_len: int, max_tokens: int) -> Text:
    """Return at most `max_tokens` tokens of the documents, in rows of `row_len`; an incomplete last row is dropped.

    Raises:
      ValueError: the documents do not fill one row.
    """
    raw_documents: list[bytes] = []

    def cells() -> Iterator[np.ndarray]:
        for index, document in enumerate(documents):
            raw, places = locate(document.ids, tokenizer)
            raw_documents.append(raw)
            yield np.stack([document.ids, np.full_like(document.ids, index), places], axis=1)

    packed = list(itertools.islice(_pack(cells(), tokenizer.bos_token_id, row_len), max(max_tokens // row_len, 1)))
    if not packed:
        raise ValueError(
            f"this split of the text does not fill one row of {row_len} tokens: give more text, another split "
            "(a small text may have no held-out part) or shorter rows"
        )
    tokens, document, place = np.moveaxis(np.stack(packed), 2, 0)
    return Text(
        np.ascontiguousarray(tokens), np.ascontiguousarray(document), np.ascontiguousarray(place), raw_documents
    )


def locate(ids: Int32[np.ndarray, " t"], tokenizer: Tokenizer) -> tuple[bytes, Int32[np.ndarray, " t"]]:
    """Return the bytes of the ids, without special tokens, and the offset in them at which each token's text begins."""
    length, blank = _sizes(tokenizer)
    special = tokenizer.vocab_size - len(tokenizer.special_tokens)
    raw = b"".join(tokenizer.token_bytes_of(int(i)) for i in ids if i < special)
    start = np.cumsum(length[ids]) - length[ids]
    return raw, (start + blank[ids]).astype(np.int32)


@functools.lru_cache(maxsize=2)
def _sizes(tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Return for every token its length in bytes, and the number of leading blanks (0 if all bytes are blanks)."""
    text = [tokenizer.token_bytes_of(i) for i in range(tokenizer.vocab_size - len(tokenizer.special_tokens))]
    none = [0] * len(tokenizer.special_tokens)
    blanks = [len(b) - len(b.lstrip()) if b.strip() else 0 for b in text]
    return np.array([len(b) for b in text] + none), np.array(blanks + none)


def _pack(documents: Iterable[np.ndarray], bos: int, row_len: int) -> Iterator[np.ndarray]:
    """Pack cells (token, document, place) of documents, (t, 3) each, into rows of (row_len, 3)."""
    first = np.array([bos, -1, 0], np.int32)
    row, position = np.tile(first, (row_len, 1)), 1
    for cells in documents:
        position += position > 1  # keep the BOS before a document in the middle of a row
        while True:
            part = cells[: row_len - position]
            row[position : position + len(part)] = part
            position, cells = position + len(part), cells[len(part) :]
            if position < row_len:
                break
            yield row
            row, position = np.tile(first, (row_len, 1)), 1
            if not len(cells):
                break
