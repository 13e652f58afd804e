"""Counts, histograms and examples of all latents, gathered in one pass over the text.

`Recorder.add` takes sparse codes in batches, as numpy arrays, from any SAE in any framework. `Recorder.finish` returns
the columns of `store.COLUMNS` that depend on the text. They are exact except for `together`, which is counted on a
sample of each latent's tokens (`Settings.together_sample`; exact for latents that fire less often).
"""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int64, Integer, UInt16, UInt64

from jsae.records.correlation import Moments, correlations
from jsae.records.spill import Block, Spill
from jsae.records.store import NON_ACTIVATING, TOP
from jsae.settings import Json, require

INTERVALS = 5


@dataclasses.dataclass(frozen=True)
class Settings(Json):
    """Settings of a recorder: what it records of each latent."""

    top: int = 20
    """Number of examples with the strongest activations."""
    per_interval: int = 5
    """Number of random examples whose strongest activation is in each fifth of [0, max]."""
    non_activating: int = 10
    """Number of random examples without an activation."""
    window: int = 10
    """Examples count as equal if this many tokens before and after their strongest token are equal."""
    bins: int = 50
    """Bins of the histograms."""
    nearest: int = 20
    """Number of neighbours, and of latents that fire together."""
    together_sample: int = 1024
    """Number of a latent's tokens on which other latents are counted."""
    seed: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, minimum = getattr(self, field.name), int(field.name in ("top", "bins", "nearest", "together_sample"))
            require(value >= minimum, f"{field.name} is {value}: it must be at least {minimum}")


class Recorder:
    """The records of one SAE while they are gathered. `add` and `close` are those of `spill.Spill`.

    Args:
      scratch: an empty folder for temporary files; the caller removes it.
      tokens: the text, (R, T).
      d_sae: number of latents.
      settings: what is recorded of each latent.

    Raises:
      ConfigError: the text has too many tokens, or its rows are too long.
    """

    def __init__(self, scratch: Path, tokens: UInt16[np.ndarray, "R T"], d_sae: int, settings: Settings):
        require(tokens.size < 2**32, f"the text has {tokens.size} tokens; at most {2**32 - 1} are recorded: give fewer")
        require(tokens.shape[1] < 2**16, f"the rows have {tokens.shape[1]} tokens; they must have less than {2**16}")
        self._tokens, self._settings = tokens, settings
        self._spill = Spill(scratch, tokens.size, d_sae)
        self.add, self.close = self._spill.add, self._spill.close

    @property
    def shape(self) -> tuple[int, int]:
        """Number of rows, and of tokens per row."""
        return self._tokens.shape

    @property
    def counted(self) -> int:
        """Number of tokens that were added."""
        return int(self._spill.counted.sum())

    def finish(
        self,
        moments: Moments,
        store: Callable[[np.ndarray, np.ndarray], None] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> dict[str, np.ndarray]:
        """Return the columns. May be called once.

        Args:
          moments: sums over the same tokens.
          store: called with the cells and values of all activations, ordered by latent, in blocks of latents.
          progress: called from time to time with the number of finished latents.

        Raises:
          ConfigError: no token was added.
        """
        self._spill.close()
        counted = self.counted
        require(counted > 0, "no token of this text is counted: give more text")
        text = _Text(self._tokens, self._spill.counted.reshape(self._tokens.shape), self._settings.window)
        columns = _Columns(self._spill.d_sae, self._settings)
        partners = _Partners(self._spill, self._settings)
        for block in self._spill.blocks():
            if store is not None:
                store(block.cells, block.values)
            for latent, cells, values in _latents(block):
                random = np.random.default_rng([self._settings.seed, latent])
                if len(cells):
                    columns.add_statistics(latent, values, counted)
                    columns.add_examples(text.examples(cells, values, self._settings, random))
                    columns.together[latent], columns.together_share[latent] = partners.most(latent, cells, random)
                else:
                    columns.add_examples([])
                if progress is not None and latent % 64 == 63:
                    progress(latent + 1)
        return columns.by_name(self._spill.counts) | correlations(moments, columns.sum, columns.square)


def _latents(block: Block) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield (latent, cells, values) of each latent in a block."""
    for i in range(len(block.offsets) - 1):
        part = slice(block.offsets[i], block.offsets[i + 1])
        yield block.first + i, block.cells[part], block.values[part]


def interval(values: np.ndarray, top: float) -> Int64[np.ndarray, " n"]:
    """Return the fifth of [0, top] that each value is in, from 1 for the highest (including top) to 5."""
    edges = np.linspace(0, top, INTERVALS + 1)
    return INTERVALS - np.searchsorted(edges[1:-1], values, side="right")


# ---- examples -----------------------------------------------------------------------------------------------------


class Example(NamedTuple):
    """An example of one latent; `positions` and `values` are its activations in the row."""

    group: int
    row: int
    position: int
    value: float
    positions: np.ndarray
    values: np.ndarray


class _Rows(NamedTuple):
    """The rows in which one latent fires."""

    row: np.ndarray
    strongest: np.ndarray
    cell: np.ndarray
    """The first cell with the strongest value."""
    starts: np.ndarray
    """Offsets of the rows' activations, with the end of the last."""


def distinct_rows(rows: Integer[np.ndarray, "R T"]) -> Integer[np.ndarray, "distinct T"]:
    """Return the rows without duplicates of earlier rows, in the same order."""
    keys = np.ascontiguousarray(rows).view(f"V{rows.shape[1] * rows.itemsize}")[:, 0]
    return rows[np.sort(np.unique(keys, return_index=True)[1])]


class _Text:
    """The token rows from which examples are selected."""

    def __init__(self, tokens: UInt16[np.ndarray, "R T"], counted: Bool[np.ndarray, "R T"], window: int):
        self._length = tokens.shape[1]
        self._windows = window_hashes(tokens, window).reshape(-1)
        self._counted = np.flatnonzero(counted)
        self._ends = np.concatenate([[0], np.cumsum(counted.sum(1))])

    def examples(
        self, cells: np.ndarray, values: np.ndarray, settings: Settings, random: np.random.Generator
    ) -> list[Example]:
        """Return the strongest examples, some of each interval and some without activation, with distinct tokens."""
        rows = self._rows(cells, values)
        seen: set[int] = set()

        def select(group: int, candidates: np.ndarray, limit: int) -> Iterator[Example]:
            chosen = self._distinct(rows.cell, candidates, limit, seen)
            for i in sorted(chosen, key=lambda i: -rows.strongest[i]):
                part = slice(rows.starts[i], rows.starts[i + 1])
                row, position = divmod(int(rows.cell[i]), self._length)
                yield Example(
                    group, row, position, float(rows.strongest[i]), cells[part] - row * self._length, values[part]
                )

        strong = np.argsort(-rows.strongest, kind="stable")
        examples = list(select(TOP, strong, settings.top))
        order = random.permutation(len(rows.row))
        groups = interval(rows.strongest, float(values.max()))[order]
        for group in range(1, INTERVALS + 1):
            examples += select(group, order[groups == group], settings.per_interval)
        return examples + list(self._non_activating(rows.row, settings.non_activating, seen, random))

    def _rows(self, cells: np.ndarray, values: np.ndarray) -> _Rows:
        """Return the rows of a latent's activations."""
        row = cells // self._length
        starts = np.flatnonzero(np.concatenate([[True], row[1:] != row[:-1]]))
        strongest = np.maximum.reduceat(values, starts)
        starts = np.append(starts, len(cells))
        number = np.repeat(np.arange(len(strongest)), np.diff(starts))
        maxima = np.flatnonzero(values == strongest[number])
        first = maxima[np.concatenate([[True], number[maxima][1:] != number[maxima][:-1]])]
        return _Rows(row[first], strongest, cells[first], starts)

    def _distinct(self, cell: np.ndarray, candidates: np.ndarray, limit: int, seen: set[int]) -> list[int]:
        """Return the first `limit` candidates whose windows are not in `seen`, and add their windows to it."""
        chosen: list[int] = []
        for start in range(0, len(candidates), 4 * limit or 1):
            part = candidates[start : start + 4 * limit]
            for i, window in zip(part.tolist(), self._windows[cell[part]].tolist(), strict=True):
                if len(chosen) == limit:
                    return chosen
                if window not in seen:
                    seen.add(window)
                    chosen.append(i)
        return chosen

    def _non_activating(
        self, fired: np.ndarray, limit: int, seen: set[int], random: np.random.Generator
    ) -> Iterator[Example]:
        """Yield examples of rows in which the latent does not fire, with a random counted token in each."""
        quiet = np.diff(self._ends) > 0
        quiet[fired] = False
        rows = random.permutation(np.flatnonzero(quiet))
        starts, ends = self._ends[rows], self._ends[rows + 1]
        cell = self._counted[starts + (random.random(len(rows)) * (ends - starts)).astype(np.int64)]
        none = np.zeros(0, np.int64), np.zeros(0, np.float32)
        for i in self._distinct(cell, np.arange(len(rows)), limit, seen):
            row, position = divmod(int(cell[i]), self._length)
            yield Example(NON_ACTIVATING, row, position, 0.0, *none)


def window_hashes(tokens: Integer[np.ndarray, "R T"], window: int) -> UInt64[np.ndarray, "R T"]:
    """Return a hash of each token with `window` tokens before and after it in the row, equal for equal tokens."""
    factors = np.random.default_rng(0).integers(2**63, size=2 * window + 1, dtype=np.uint64) | np.uint64(1)
    padded = np.pad(tokens.astype(np.uint64) + np.uint64(1), ((0, 0), (window, window)))
    length = tokens.shape[1]
    hashes = np.zeros(tokens.shape, np.uint64)
    for i, factor in enumerate(factors):
        hashes += padded[:, i : i + length] * factor
    return hashes


# ---- latents that fire together -----------------------------------------------------------------------------------


class _Partners:
    """An index of the latents that fire on each cell, to find those that fire together with a latent."""

    def __init__(self, spill: Spill, settings: Settings):
        self._offsets, self._codes = spill.codes()
        self._shares = spill.counts / spill.counted.sum()
        self._sample, self._nearest = settings.together_sample, settings.nearest

    def most(self, latent: int, cells: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Return the latents that fire on these cells more often than on all tokens, and their shares of the cells.

        They are ranked by the difference of the two shares: ranked by the share on the cells alone, all lists would
        begin with the same few dense latents.
        """
        if len(cells) > self._sample:
            cells = cells[random.choice(len(cells), self._sample, replace=False)]
        starts, ends = self._offsets[cells], self._offsets[cells.astype(np.int64) + 1]
        lengths = ends - starts
        before = np.cumsum(lengths) - lengths
        codes = self._codes[np.arange(lengths.sum()) + np.repeat(starts - before, lengths)]
        share = np.bincount(codes, minlength=len(self._shares)) / len(cells)
        share[latent] = 0
        excess = share - self._shares
        threshold = np.partition(excess, -self._nearest)[-self._nearest] if self._nearest < len(excess) else 0
        others = np.flatnonzero((excess > 0) & (excess >= threshold))
        others = others[np.argsort(-excess[others], kind="stable")][: self._nearest]
        latents, shares = np.full(self._nearest, latent), np.full(self._nearest, np.nan)
        latents[: len(others)], shares[: len(others)] = others, share[others]
        return latents, shares


# ---- columns ------------------------------------------------------------------------------------------------------


class _Columns:
    """The columns, filled in the order of the latents."""

    def __init__(self, d_sae: int, settings: Settings):
        self.max, self.mean, self.sum, self.square = (np.zeros(d_sae) for _ in range(4))
        self.hist_range = np.zeros((d_sae, 2), np.float32)
        self.hist = np.zeros((d_sae, settings.bins), np.uint32)
        self.group_share = np.zeros((d_sae, INTERVALS + 1))
        self.together = np.repeat(np.arange(d_sae)[:, None], settings.nearest, axis=1)
        self.together_share = np.full((d_sae, settings.nearest), np.nan)
        self._counts: list[int] = []
        self._examples: list[tuple[np.ndarray, ...]] = []

    def add_statistics(self, latent: int, values: np.ndarray, tokens: int) -> None:
        """Set the statistics of a latent with at least one activation; `values` are all of them."""
        low, top = float(values.min()), float(values.max())
        self.max[latent] = top
        exact = values.astype(np.float64)
        self.sum[latent], self.square[latent] = exact.sum(), np.square(exact).sum()
        self.mean[latent] = self.sum[latent] / len(values)
        self.hist_range[latent] = low, top
        self.hist[latent] = np.histogram(exact, self.hist.shape[1], (low, top))[0]
        shares = np.bincount(interval(values, top), minlength=INTERVALS + 1)
        shares[0] = len(values)
        self.group_share[latent] = shares / tokens

    def add_examples(self, examples: list[Example]) -> None:
        """Append the examples of the next latent."""
        self._counts.append(len(examples))
        if not examples:
            return
        *heads, positions, values = zip(*examples, strict=True)
        lengths = np.array([len(p) for p in positions])
        self._examples.append((*map(np.array, heads), lengths, np.concatenate(positions), np.concatenate(values)))

    def by_name(self, counts: np.ndarray) -> dict[str, np.ndarray]:
        """Return all columns by name; `counts` are the numbers of activations."""
        empty = [()] * 7 if not self._examples else []
        columns = [np.concatenate(parts) for parts in zip(*self._examples, strict=True)] or empty
        names = ("group", "row", "position", "value")
        return {
            "count": counts,
            **{name: getattr(self, name) for name in ("max", "mean", "hist_range", "hist", "group_share")},
            "example_offsets": np.concatenate([[0], np.cumsum(self._counts)]),
            **{f"example_{name}": column for name, column in zip(names, columns, strict=False)},
            "activation_offsets": np.concatenate([[0], np.cumsum(columns[4], dtype=np.int64)]),
            "activation_position": columns[5],
            "activation_value": columns[6],
            "together": self.together,
            "together_share": self.together_share,
        }
