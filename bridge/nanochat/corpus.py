"""Rows of tokens from documents, in an order that depends on the seed alone and can be continued from any point."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any, final, get_args

import numpy as np
from jaxtyping import Int32

from bridge.nanochat.tokenizer import Tokenizer
from bridge.nanochat.units import Document, Split, Unit, all_units, documents, is_split_by_place, split_units

_MOST_FILES = 256


@final
class Corpus:
    """An endless sequence of token rows, read by several lanes at once so that near rows come from many documents.

    Every row starts with BOS, and so does every document. A document that a row's end cuts goes on in its lane's next
    row, after that row's BOS.

    The units of the data (see `sources`) are shuffled anew in each epoch by (seed, epoch). Lane r reads numbers r,
    r + lanes, r + 2 lanes, ... of the sequence of all epochs, and rows are taken from the lanes in turn. Processes
    share the lanes: process p has lanes p, p + process_count, ... With fewer units than lanes, lanes are halved
    until each has a unit of its own.

    Args:
        spec: what to read, see `sources.find_units`.
        tokenizer: the tokenizer of the model that will read the rows.
        split: "train", "heldout" or "all". What is held out never depends on the seed.
        row_len: tokens of a row, at least 2.
        seed: orders the units.
        lanes: documents read at once, over all processes.
        heldout_fraction: part of the documents held out.
        process_index, process_count: which share of the rows this process reads.

    Raises:
        FileNotFoundError: nothing matches spec.
        ValueError: the data is unreadable or empty, the split has no document, or an argument is out of range; later,
            as `contents.DataChangedError`, a file changed after it was read first.
    """

    def __init__(
        self,
        spec: str,
        tokenizer: Tokenizer,
        *,
        split: Split = "train",
        row_len: int,
        seed: int = 0,
        lanes: int = 32,
        heldout_fraction: float = 0.05,
        process_index: int = 0,
        process_count: int = 1,
    ):
        _check(split, row_len, lanes, heldout_fraction, process_index, process_count)
        self.spec, self.split, self.row_len = spec, split, row_len
        self._tokenizer, self._seed, self._fraction = tokenizer, seed, heldout_fraction
        units = all_units(spec)
        self.split_by_place = split != "all" and is_split_by_place(units, heldout_fraction)
        self._sources = list(dict.fromkeys(unit.source for unit in units))
        self._units = split_units(units, split, heldout_fraction)
        if not any(any(True for _ in unit.read()) for unit in self._units):
            raise ValueError(_nothing(spec, split, units, heldout_fraction))
        while lanes > len(self._units):
            lanes //= 2
        if lanes % process_count:
            raise ValueError(
                f"{lanes} lanes over {len(self._units)} units cannot be shared by {process_count} processes"
            )
        self._order = functools.lru_cache(maxsize=8)(self._order_of_epoch)
        self._process, self._lanes = (process_index, process_count), lanes
        self._readers = [
            _Lane(r, lanes, tokenizer.bos_token_id, self._numbered, self._ids)
            for r in range(process_index, lanes, process_count)
        ]
        self._turn = 0

    @functools.cached_property
    def fingerprint(self) -> str:
        """Sixteen hex digits that name the content of the data and the split, wherever the data lies."""
        described = json.dumps([self.split, self._fraction, [unit.name for unit in self._units]])
        return hashlib.sha256(described.encode("utf-8", "surrogatepass")).hexdigest()[:16]

    @property
    def files(self) -> list[list[str]]:
        """Name and digest of what the data is from, in its order: files, of many some together; JSON values."""
        together = -(-len(self._sources) // _MOST_FILES)
        found = []
        for at in range(0, len(self._sources), max(together, 1)):
            group = self._sources[at : at + together]
            names = group[0][0] if len(group) == 1 else f"{group[0][0]} to {group[-1][0]} ({len(group)} files)"
            digests = group[0][1] if len(group) == 1 else hashlib.sha256(json.dumps(group).encode()).hexdigest()[:12]
            found.append([names, digests])
        return found

    def next_rows(self, n: int) -> Int32[np.ndarray, "n row_len"]:
        """The next n rows of this process."""
        rows = np.empty((n, self.row_len), np.int32)
        for row in rows:
            self._readers[self._turn].fill(row)
            self._turn = (self._turn + 1) % len(self._readers)
        return rows

    def position(self) -> dict[str, Any]:
        """Where the rows stand, as JSON: what `seek` of an equal corpus needs to go on from here."""
        return {**self._identity(), "turn": self._turn, "lanes": [lane.state for lane in self._readers]}

    def seek(self, position: dict[str, Any]) -> None:
        """Goes on from position: the next rows are those that followed when `position()` was called.

        Raises ValueError if the position is not of this data, split, seed, tokenizer, row length or share of processes.
        """
        ours = self._identity()
        differing = [key for key, value in ours.items() if position.get(key) != value]
        if differing:
            told = ", ".join(f"{key} {position.get(key)!r} (here {ours[key]!r})" for key in differing)
            raise ValueError(f"this position is of another corpus: {told}")
        for lane, state in zip(self._readers, position["lanes"], strict=True):
            lane.seek(*state)
        self._turn = position["turn"]

    def one_pass(self, max_rows: int | None = None) -> Iterator[Int32[np.ndarray, " row_len"]]:
        """One reading of the split, for evaluation: this process's share of its rows, the same for every seed.

        The units come in a fixed shuffled order, so that the first max_rows are a fair sample; tokens that do not
        fill the last row are dropped. Does not move `position`.
        """
        order = np.random.default_rng(0).permutation(len(self._units))
        found = (ids for u in order for ids in map(self._ids, documents(self._units[u])))
        rows = _pack(found, self._tokenizer.bos_token_id, self.row_len)
        yield from itertools.islice(rows, self._process[0], max_rows and max_rows * self._process[1], self._process[1])

    def documents(self) -> Iterator[str]:
        """The texts of the split, once each, in the order of the data; chats as rendered."""
        for unit in self._units:
            for document in documents(unit):
                yield document if isinstance(document, str) else self._tokenizer.decode(self._ids(document).tolist())

    def _identity(self) -> dict[str, Any]:
        return {
            "corpus": self.fingerprint,
            "tokenizer": self._tokenizer.fingerprint,
            "row_len": self.row_len,
            "seed": self._seed,
            "lane_count": self._lanes,
            "process": list(self._process),
        }

    def _ids(self, document: Document) -> Int32[np.ndarray, " t"]:
        """A document's tokens without the BOS before them."""
        if isinstance(document, str):
            return np.array(self._tokenizer.encode(document), np.int32)
        ids, _ = self._tokenizer.render_conversation(document, max_tokens=2**31)
        return np.array(ids[1:], np.int32)

    def _order_of_epoch(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self._seed, epoch]).permutation(len(self._units))

    def _numbered(self, s: int) -> Iterator[Document]:
        """The documents of number s in the endless sequence of units."""
        epoch, i = divmod(s, len(self._units))
        return documents(self._units[self._order(epoch)[i]])


@final
class _Lane:
    """One reader: its state is (s, document of the unit, token of the document); it holds what lies there.

    Args:
        first, step: it reads the units number first, first + step, first + 2 step, ...
        bos: the token that rows and documents start with.
        read: gives the documents of a unit by its number.
        encode: gives the tokens of a document.
    """

    def __init__(
        self,
        first: int,
        step: int,
        bos: int,
        read: Callable[[int], Iterator[Document]],
        encode: Callable[[Document], np.ndarray],
    ):
        self._step, self._bos, self._read, self._encode = step, bos, read, encode
        self.seek(first, 0, 0)

    @property
    def state(self) -> list[int]:
        return [self._s, self._document, self._token]

    def seek(self, s: int, document: int, token: int) -> None:
        self._s, self._document, self._token = s, document, token
        self._waiting: Iterator[Document] | None = None  # the unit's documents from this one on, read when asked for
        self._ids: np.ndarray | None = None

    def fill(self, row: np.ndarray) -> None:
        """Writes BOS and the lane's next tokens into row."""
        row[0] = self._bos
        at = 1
        while at < len(row):
            ids = self._current()
            if self._token == 0 and at > 1:
                row[at] = self._bos
                at += 1
            taken = ids[self._token : self._token + len(row) - at]
            row[at : at + len(taken)] = taken
            at += len(taken)
            self._token += len(taken)
            if self._token >= len(ids):
                self._document, self._token, self._ids = self._document + 1, 0, None

    def _current(self) -> np.ndarray:
        """The tokens of the document at hand, moving on to the next unit when this one is read."""
        while self._ids is None:
            if self._waiting is None:
                self._waiting = itertools.islice(self._read(self._s), self._document, None)
            document = next(self._waiting, None)
            if document is None:
                self.seek(self._s + self._step, 0, 0)
            else:
                self._ids = self._encode(document)
        return self._ids


def bestfit_rows(
    documents: Iterable[str], tokenizer: Tokenizer, row_len: int, buffer_size: int = 1000
) -> Iterator[Int32[np.ndarray, " row_len"]]:
    """Packs rows as nanochat does where it measures bits per byte: of whole documents, as far as they fit.

    Each row takes, again and again, the longest document of a buffer that still fits; when none does, the shortest
    is cut to fill the row and its rest is thrown away. Ends when the documents end and no full row is left.
    """
    waiting = iter(documents)
    buffer: list[list[int]] = []
    while True:
        row: list[int] = []
        while len(row) < row_len:
            new = itertools.islice(waiting, max(0, buffer_size - len(buffer)))
            buffer.extend(tokenizer.encode(text, prepend_bos=True) for text in new)
            if not buffer:
                return
            room = row_len - len(row)
            fitting = [i for i, ids in enumerate(buffer) if len(ids) <= room]
            chosen = (
                max(fitting, key=lambda i: len(buffer[i]))
                if fitting
                else min(range(len(buffer)), key=lambda i: len(buffer[i]))
            )
            row += buffer.pop(chosen)[:room]
        yield np.array(row, np.int32)


def _pack(documents: Iterable[np.ndarray], bos: int, row_len: int) -> Iterator[np.ndarray]:
    """The rows of one stream of documents, as a lane fills them; what does not fill the last row is dropped."""
    row = np.full(row_len, bos, np.int32)
    at = 1
    for ids in documents:
        if at > 1 and len(ids):
            row[at] = bos
            at += 1
        while at + len(ids) >= row_len:
            row[at:], ids = ids[: row_len - at], ids[row_len - at :]
            yield row
            row, at = np.full(row_len, bos, np.int32), 1
        row[at : at + len(ids)] = ids
        at += len(ids)


def _check(split: str, row_len: int, lanes: int, fraction: float, process_index: int, process_count: int) -> None:
    if split not in get_args(Split):
        raise ValueError(f"split must be one of {', '.join(get_args(Split))}, got {split!r}")
    if row_len < 2:
        raise ValueError(f"row_len must be at least 2 (BOS and a token), got {row_len}")
    if lanes < 1:
        raise ValueError(f"lanes must be at least 1, got {lanes}")
    if not 0 <= fraction <= 1:
        raise ValueError(f"heldout_fraction must be in 0..1, got {fraction}")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index must be in 0..{process_count - 1}, got {process_index}")


def _nothing(spec: str, split: str, units: list[Unit], fraction: float) -> str:
    if split == "all" or not units:
        return f"the corpus {spec!r} holds no text"
    if any(unit.side for unit in units):
        why = "of nanochat's own data directories (base_data*) the last shard is held out: have two shards at least"
    elif not 0 < fraction < 1:
        why = f"the held-out fraction is {fraction}"
    else:
        why = "its documents are too short to be divided: give more text"
    return f"the corpus {spec!r} has no document in its {split} split; {why}"


def changed(before: list[list[str]], now: list[list[str]]) -> str:
    """Say how `Corpus.files` differs from what it was; '' if it does not."""
    if before == now:
        return ""
    old, new = dict(before), dict(now)
    told = [f"{name} has changed" for name in old if name in new and old[name] != new[name]]
    told += [f"{name} is missing" for name in old if name not in new]
    told += [f"{name} is new" for name in new if name not in old]
    if not told:
        return "its files have another order"
    return ", ".join(told[:5]) + (f" and {len(told) - 5} more" if len(told) > 5 else "")
