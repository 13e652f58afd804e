"""Documents as rows of tokens in which every token knows the document and the byte it stands for."""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from bridge.nanochat import units
from bridge.nanochat.tokenizer import Tokenizer
from bridge.nanochat.units import Split, Unit, find_units

HELDOUT_FRACTION = 0.05
"""The part that `bridge.nanochat.corpus.Corpus` holds out unless told otherwise."""


class Document(NamedTuple):
    """The name of the unit of data that it is from, and its tokens without the BOS before them."""

    unit: str
    ids: Int32[np.ndarray, " t"]


@dataclasses.dataclass(frozen=True)
class Text:
    """Rows of tokens, (R, T), packed as training packs them: BOS before every row and every document."""

    tokens: Int32[np.ndarray, "R T"]
    document: Int32[np.ndarray, "R T"]
    """Index into `sources`; -1 for BOS."""
    place: Int32[np.ndarray, "R T"]
    """The byte of the document at which the token's text begins, blanks before it skipped; 0 for BOS."""
    sources: list[bytes]
    """The documents as bytes, special tokens left out."""


def documents(spec: str, split: Split, tokenizer: Tokenizer) -> Iterator[Document]:
    """The documents of a corpus (see `units.find_units`), in an order that is shuffled but always the same.

    Raises:
      FileNotFoundError, ValueError: as `find_units`.
    """
    parts = find_units(spec, split, HELDOUT_FRACTION)
    for u in np.random.default_rng(0).permutation(len(parts)):
        yield from of_unit(parts[u], tokenizer)


def of_unit(unit: Unit, tokenizer: Tokenizer) -> Iterator[Document]:
    """Yield the documents of one unit, long ones in pieces; chats as nanochat renders them."""
    for document in units.documents(unit):
        if isinstance(document, str):
            ids = tokenizer.encode(document)
        else:
            ids = tokenizer.render_conversation(document, max_tokens=2**31)[0][1:]
        if ids:
            yield Document(unit.name, np.array(ids, np.int32))


def read(found: Iterable[Document], tokenizer: Tokenizer, row_len: int, max_tokens: int) -> Text:
    """At most `max_tokens` tokens of the documents in rows of `row_len`; what does not fill the last row is dropped.

    Raises:
      ValueError: not even one row is full.
    """
    raw_documents: list[bytes] = []

    def cells() -> Iterator[np.ndarray]:
        for index, document in enumerate(found):
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
    """The bytes of the ids, special tokens left out, and where each token's text begins in them."""
    length, blank = _sizes(tokenizer)
    special = tokenizer.vocab_size - len(tokenizer.special_tokens)
    raw = b"".join(tokenizer.token_bytes_of(int(i)) for i in ids if i < special)
    start = np.cumsum(length[ids]) - length[ids]
    return raw, (start + blank[ids]).astype(np.int32)


@functools.lru_cache(maxsize=2)
def _sizes(tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Of every token, its length in bytes, and how many of them are blanks before its text (0 if all are)."""
    text = [tokenizer.token_bytes_of(i) for i in range(tokenizer.vocab_size - len(tokenizer.special_tokens))]
    none = [0] * len(tokenizer.special_tokens)
    blanks = [len(b) - len(b.lstrip()) if b.strip() else 0 for b in text]
    return np.array([len(b) for b in text] + none), np.array(blanks + none)


def _pack(documents: Iterable[np.ndarray], bos: int, row_len: int) -> Iterator[np.ndarray]:
    """Cells (token, document, place) of documents, (t, 3), in rows of (row_len, 3)."""
    first = np.array([bos, -1, 0], np.int32)
    row, at = np.tile(first, (row_len, 1)), 1
    for cells in documents:
        at += at > 1  # over the BOS before a document in the middle of a row
        while True:
            taken = cells[: row_len - at]
            row[at : at + len(taken)] = taken
            at, cells = at + len(taken), cells[len(taken) :]
            if at < row_len:
                break
            yield row
            row, at = np.tile(first, (row_len, 1)), 1
            if not len(cells):
                break
