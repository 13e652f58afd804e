"""Rows of tokens from documents, in an order that depends on the seed alone and can be resumed at any row."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, final, get_args

import numpy as np
from jaxtyping import Int32

from bridge.nanochat.tokenizer import Tokenizer
from bridge.nanochat.units import Document, Split, Unit, all_units, documents, is_split_by_place, split_units

_MAX_ENTRIES = 256  # of Corpus.files


@final
class Corpus:
    """An endless sequence of token rows, read by several lanes so that neighbouring rows come from different documents.

    Every row starts with BOS, and so does every document. A document that does not fit into its row continues in the
    next row of its lane, after that row's BOS.

    The units of the data (see `units`) are shuffled in each epoch by (seed, epoch). Lane r reads the units r,
    r + lanes, r + 2 lanes, ... of the sequence of all epochs, and rows are taken from the lanes in turn. If there are
    fewer units than lanes, the number of lanes is halved until every lane has a unit.

    Several processes divide the lanes among themselves by data shards: lane r is in shard r modulo their number, and
    every process has equally many consecutive shards. So the rows of a shard do not depend on the number of processes.

    Args:
        spec: the data, see `units.find_units`.
        tokenizer: the tokenizer of the model that reads the rows.
        split: "train", "heldout" or "all". Which documents are held out does not depend on the seed.
        row_len: tokens per row, at least 2.
        seed: determines the order of the units.
        lanes: number of documents read at the same time by all processes.
        heldout_fraction: fraction of the documents that is held out.
        process_index, process_count: the share of the rows that this process reads.
        data_shards: number of shards; None: one per process.

    Raises:
        FileNotFoundError: no file matches spec.
        ValueError: the data is unreadable or empty, the split has no document, or an argument is out of range; while
            reading, as `contents.DataChangedError`, a file has changed since it was opened.
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
        data_shards: int | None = None,
    ):
        _check(split, row_len, lanes, heldout_fraction)
        self.spec, self.split, self.row_len = spec, split, row_len
        self.tokenizer, self._seed, self._fraction = tokenizer, seed, heldout_fraction
        units = all_units(spec)
        self.split_by_place = split != "all" and is_split_by_place(units, heldout_fraction)
        self._sources = list(dict.fromkeys(unit.source for unit in units))
        self._units = split_units(units, split, heldout_fraction)
        if not any(any(True for _ in unit.read()) for unit in self._units):
            raise ValueError(_empty_split_message(spec, split, units, heldout_fraction))
        shards = process_count if data_shards is None else data_shards
        self.lanes = _lanes(lanes, len(self._units), shards)
        self._order = functools.lru_cache(maxsize=8)(self._order_of_epoch)
        self.divide(process_count if data_shards is None else data_shards, process_index, process_count)

    def divide(self, data_shards: int, process_index: int = 0, process_count: int = 1) -> None:
        """Take this process's share of the rows, and start at the first of them.

        Args:
            data_shards: number of shards.
            process_index: number of this process, from 0.
            process_count: number of processes.

        Raises:
            ValueError: the lanes cannot be divided into so many shards, or the shards among so many processes.
        """
        if not 0 <= process_index < process_count:
            raise ValueError(f"process_index must be in 0..{process_count - 1}, got {process_index}")
        if data_shards < 1 or self.lanes % data_shards:
            raise ValueError(
                f"{self.lanes} lanes over {len(self._units)} units cannot be divided into {data_shards} data shards: "
                "give more text, or a number of shards that divides the lanes"
            )
        if data_shards % process_count:
            raise ValueError(
                f"{data_shards} data shards cannot be divided among {process_count} processes: their number must be a "
                "multiple"
            )
        self._process, self.data_shards = (process_index, process_count), data_shards
        self.own_shards = shards_of_process(data_shards, process_index, process_count)
        self._numbers = [lane for lane in range(self.lanes) if lane % data_shards in self.own_shards]
        self._readers = [
            _Lane(number, self.lanes, self.tokenizer.bos_token_id, self._documents_of_unit, self._ids)
            for number in self._numbers
        ]
        self._turn = 0

    @functools.cached_property
    def fingerprint(self) -> str:
        """Sixteen hex digits that identify the content and the split of the data, independent of its path."""
        description = json.dumps([self.split, self._fraction, [unit.name for unit in self._units]])
        return hashlib.sha256(description.encode("utf-8", "surrogatepass")).hexdigest()[:16]

    @property
    def files(self) -> list[list[str]]:
        """[name, digest] of every source file in order, as JSON values; of many files, in groups."""
        group_size = -(-len(self._sources) // _MAX_ENTRIES)
        entries = []
        for start in range(0, len(self._sources), max(group_size, 1)):
            group = self._sources[start : start + group_size]
            names = group[0][0] if len(group) == 1 else f"{group[0][0]} to {group[-1][0]} ({len(group)} files)"
            digests = group[0][1] if len(group) == 1 else hashlib.sha256(json.dumps(group).encode()).hexdigest()[:12]
            entries.append([names, digests])
        return entries

    def next_rows(self, n: int) -> Int32[np.ndarray, "n row_len"]:
        """Return the next n rows of this process."""
        rows = np.empty((n, self.row_len), np.int32)
        for row in rows:
            self._readers[self._turn].fill(row)
            self._turn = (self._turn + 1) % len(self._readers)
        return rows

    def position(self) -> dict[str, Any]:
        """Return the position in the data as JSON values, for `seek` of an equal corpus.

        Lanes of other processes are None; `whole_position` puts the positions of all processes together.
        """
        states: list[list[int] | None] = [None] * self.lanes
        for number, lane in zip(self._numbers, self._readers, strict=True):
            states[number] = lane.state
        return {**self._identity(), "turn": self._numbers[self._turn], "lanes": states}

    def seek(self, position: dict[str, Any]) -> None:
        """Continue from a position: the next rows are those that followed when `position()` was called.

        The number of processes may differ if the position has the states of all lanes, and every shard has given
        equally many rows.

        Raises ValueError if data, split, seed, tokenizer, row length or shards differ from those of the position.
        """
        identity = self._identity()
        if "process" in position:  # of a version in which every process was a shard
            position = {**position, "data_shards": position["process"][1]}
        differing = [key for key, value in identity.items() if position.get(key) != value]
        if differing:
            differences = ", ".join(f"{key} {position.get(key)!r} (here {identity[key]!r})" for key in differing)
            raise ValueError(f"the position is of another corpus: {differences}")
        for number, lane in zip(self._numbers, self._readers, strict=True):
            lane.seek(*position["lanes"][number])
        own = [number for number in self._numbers if number >= position["turn"]]
        self._turn = self._numbers.index(own[0]) if own else 0

    def one_pass(self, max_rows: int | None = None) -> Iterator[Int32[np.ndarray, " row_len"]]:
        """Yield this process's rows of one pass through the split, for evaluation; they do not depend on the seed.

        The units are in a fixed shuffled order, so that the first max_rows are a fair sample. Tokens that do not fill
        the last row are dropped. `position` does not change.
        """
        order = np.random.default_rng(0).permutation(len(self._units))
        token_ids = (ids for u in order for ids in map(self._ids, documents(self._units[u])))
        rows = _pack(token_ids, self.tokenizer.bos_token_id, self.row_len)
        yield from itertools.islice(rows, self._process[0], max_rows and max_rows * self._process[1], self._process[1])

    def documents(self) -> Iterator[str]:
        """Yield every text of the split once, in the order of the data; chats as rendered."""
        for unit in self._units:
            for document in documents(unit):
                yield document if isinstance(document, str) else self.tokenizer.decode(self._ids(document).tolist())

    def _identity(self) -> dict[str, Any]:
        return {
            "corpus": self.fingerprint,
            "tokenizer": self.tokenizer.fingerprint,
            "row_len": self.row_len,
            "seed": self._seed,
            "lane_count": self.lanes,
            "data_shards": self.data_shards,
        }

    def _ids(self, document: Document) -> Int32[np.ndarray, " t"]:
        return token_ids(document, self.tokenizer)

    def _order_of_epoch(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self._seed, epoch]).permutation(len(self._units))

    def unit(self, number: int) -> Unit:
        """Return a unit by its number in the endless sequence of all epochs."""
        epoch, i = divmod(number, len(self._units))
        return self._units[self._order(epoch)[i]]

    def _documents_of_unit(self, number: int) -> Iterator[Document]:
        return documents(self.unit(number))


@final
class _Lane:
    """One reader. Its state is (number of the unit, document in the unit, token in the document).

    Args:
        first, step: the lane reads the units first, first + step, first + 2 step, ...
        bos: the token at the start of rows and documents.
        read: returns the documents of a unit by its number.
        encode: returns the tokens of a document.
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
        self._remaining: Iterator[Document] | None = None  # the unit's documents from this one on, opened on demand
        self._ids: np.ndarray | None = None

    def fill(self, row: np.ndarray) -> None:
        """Write BOS and the lane's next tokens into row."""
        row[0] = self._bos
        filled = 1
        while filled < len(row):
            ids = self._current()
            if self._token == 0 and filled > 1:
                row[filled] = self._bos
                filled += 1
            chunk = ids[self._token : self._token + len(row) - filled]
            row[filled : filled + len(chunk)] = chunk
            filled += len(chunk)
            self._token += len(chunk)
            if self._token >= len(ids):
                self._document, self._token, self._ids = self._document + 1, 0, None

    def _current(self) -> np.ndarray:
        """Return the tokens of the current document; move on to the next unit at the end of this one."""
        while self._ids is None:
            if self._remaining is None:
                self._remaining = itertools.islice(self._read(self._s), self._document, None)
            document = next(self._remaining, None)
            if document is None:
                self.seek(self._s + self._step, 0, 0)
            else:
                self._ids = self._encode(document)
        return self._ids


def token_ids(document: Document, tokenizer: Tokenizer) -> Int32[np.ndarray, " t"]:
    """Return a document's tokens without the leading BOS; those of a chat as nanochat renders it."""
    if isinstance(document, str):
        return np.array(tokenizer.encode(document), np.int32)
    return np.array(tokenizer.render_conversation(document, max_tokens=2**31)[0][1:], np.int32)


def bestfit_rows(
    documents: Iterable[str], tokenizer: Tokenizer, row_len: int, buffer_size: int = 1000
) -> Iterator[Int32[np.ndarray, " row_len"]]:
    """Yield rows packed by best fit, as nanochat does to measure bits per byte.

    A row repeatedly takes the longest buffered document that still fits. If none fits, the shortest is cut to fill the
    row, and the rest of it is dropped. The last row is dropped unless it is full.

    Args:
        documents: the texts.
        tokenizer: encodes them, with BOS before each.
        row_len: tokens per row.
        buffer_size: number of documents to choose from.
    """
    remaining = iter(documents)
    buffer: list[list[int]] = []
    while True:
        row: list[int] = []
        while len(row) < row_len:
            new = itertools.islice(remaining, max(0, buffer_size - len(buffer)))
            buffer.extend(tokenizer.encode(text, prepend_bos=True) for text in new)
            if not buffer:
                return
            space = row_len - len(row)
            fitting = [i for i, ids in enumerate(buffer) if len(ids) <= space]
            chosen = (
                max(fitting, key=lambda i: len(buffer[i]))
                if fitting
                else min(range(len(buffer)), key=lambda i: len(buffer[i]))
            )
            row += buffer.pop(chosen)[:space]
        yield np.array(row, np.int32)


def _pack(documents: Iterable[np.ndarray], bos: int, row_len: int) -> Iterator[np.ndarray]:
    """Yield the rows of one stream of documents, filled as in a lane; tokens that do not fill the last are dropped."""
    row = np.full(row_len, bos, np.int32)
    filled = 1
    for ids in documents:
        if filled > 1 and len(ids):
            row[filled] = bos
            filled += 1
        while filled + len(ids) >= row_len:
            row[filled:], ids = ids[: row_len - filled], ids[row_len - filled :]
            yield row
            row, filled = np.full(row_len, bos, np.int32), 1
        row[filled : filled + len(ids)] = ids
        filled += len(ids)


def _lanes(most: int, units: int, shards: int) -> int:
    """Return the number of lanes: at most so many, halved until every lane has a unit; every shard has equally many."""
    if shards < 1 or most % shards:
        shards = 1
    each = most // shards
    while each > 1 and shards * each > units:
        each //= 2
    return shards * each if shards * each <= units else max(units, 1)


def _check(split: str, row_len: int, lanes: int, fraction: float) -> None:
    if split not in get_args(Split):
        raise ValueError(f"split must be one of {', '.join(get_args(Split))}, got {split!r}")
    if row_len < 2:
        raise ValueError(f"row_len must be at least 2 (BOS and a token), got {row_len}")
    if lanes < 1:
        raise ValueError(f"lanes must be at least 1, got {lanes}")
    if not 0 <= fraction <= 1:
        raise ValueError(f"heldout_fraction must be in 0..1, got {fraction}")


def _empty_split_message(spec: str, split: str, units: list[Unit], fraction: float) -> str:
    if split == "all" or not units:
        return f"the corpus {spec!r} contains no text"
    if any(unit.side for unit in units):
        why = "in nanochat's own data directories (base_data*) the last shard is held out: provide at least two shards"
    elif not 0 < fraction < 1:
        why = f"the held-out fraction is {fraction}"
    else:
        why = "its documents are too short to be divided: provide more text"
    return f"the corpus {spec!r} has no document in its {split} split; {why}"


def shards_of_process(data_shards: int, process_index: int, process_count: int) -> range:
    """Return the numbers of a process's shards: equally many consecutive ones for every process."""
    each = data_shards // process_count
    return range(process_index * each, (process_index + 1) * each)


def whole_position(positions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the position of all processes together.

    Args:
        positions: of every process, in their order, after each shard has given equally many rows.
    """
    lanes = [
        next((state for state in states if state is not None), None)
        for states in zip(*(p["lanes"] for p in positions), strict=True)
    ]
    return {**positions[0], "lanes": lanes}


def changed(before: list[list[str]], now: list[list[str]]) -> str:
    """Describe how `Corpus.files` has changed; '' if it has not.

    Args:
        before: an earlier value of `Corpus.files`.
        now: the current value.
    """
    if before == now:
        return ""
    old, new = dict(before), dict(now)
    changes = [f"{name} has changed" for name in old if name in new and old[name] != new[name]]
    changes += [f"{name} is missing" for name in old if name not in new]
    changes += [f"{name} is new" for name in new if name not in old]
    if not changes:
        return "its files have another order"
    return ", ".join(changes[:5]) + (f" and {len(changes) - 5} more" if len(changes) > 5 else "")
