"""What each latent fires on: counts, histograms and contexts of all latents, gathered in one pass over the text.

`Recorder.add` takes sparse codes batch by batch, from any SAE in any framework, as numpy arrays; `Recorder.finish`
gives the columns of `store.COLUMNS` that come from the text. All of them are exact but for `together`, which is
counted on a sample of each latent's own tokens (`Settings.together_sample`; exact for latents that fire less often).
"""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int64, Integer, UInt16, UInt64

from jsae.records.correlation import Moments, correlated
from jsae.records.spill import Block, Spill
from jsae.records.store import NON_ACTIVATING, TOP
from jsae.settings import Json, require

INTERVALS = 5


@dataclasses.dataclass(frozen=True)
class Settings(Json):
    """How much of each latent is kept."""

    top: int = 20
    """Strongest texts."""
    per_interval: int = 5
    """Texts drawn at random from each fifth of [0, max], by their own strongest activation."""
    non_activating: int = 10
    """Texts drawn at random from those without an activation."""
    window: int = 10
    """Texts are one and the same if so many tokens before and after their strongest token are."""
    bins: int = 50
    nearest: int = 20
    """Latents that are kept as neighbours, and as firing together."""
    together_sample: int = 1024
    """Of how many of a latent's tokens the others that fire there are counted."""
    seed: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), field.name in ("top", "bins", "nearest", "together_sample")
            require(value >= least, f"{field.name} is {value}: it must be at least {int(least)}")


class Recorder:
    """Gathers the records of one SAE.

    Args:
      scratch: an empty folder for the activations while they are sorted; to be removed by who made it.
      tokens: the text.
      d_sae: how many latents there are.
      settings: how much of each is kept.
    """

    def __init__(self, scratch: Path, tokens: UInt16[np.ndarray, "R T"], d_sae: int, settings: Settings):
        require(tokens.size < 2**32, f"{tokens.size} tokens are beyond what a cell's number holds: give fewer")
        require(tokens.shape[1] < 2**16, f"rows of {tokens.shape[1]} tokens: a position must be below {2**16}")
        self._tokens, self._settings = tokens, settings
        self._spill = Spill(scratch, tokens.size, d_sae)
        self.add, self.close = self._spill.add, self._spill.close

    @property
    def shape(self) -> tuple[int, int]:
        """Rows of the text, and tokens of each."""
        return self._tokens.shape

    @property
    def counted(self) -> int:
        """How many tokens were looked at."""
        return int(self._spill.counted.sum())

    def finish(
        self,
        moments: Moments,
        keep: Callable[[np.ndarray, np.ndarray], None] | None = None,
        tell: Callable[[int], None] | None = None,
    ) -> dict[str, np.ndarray]:
        """The columns; to be called once.

        Args:
          moments: of the same tokens.
          keep: gets all activations, cells and values of a number of latents at a time, by latent.
          tell: gets how many latents are done, now and then.

        Raises:
          ValueError: no token was looked at.
        """
        self._spill.close()
        counted = self.counted
        require(counted > 0, "no token of this text counts: give more text")
        text = _Text(self._tokens, self._spill.counted.reshape(self._tokens.shape), self._settings.window)
        found = _Columns(self._spill.d_sae, self._settings)
        partners = _Partners(self._spill, self._settings)
        for block in self._spill.blocks():
            if keep is not None:
                keep(block.cells, block.values)
            for latent, cells, values in _latents(block):
                random = np.random.default_rng([self._settings.seed, latent])
                if len(cells):
                    found.describe(latent, values, counted)
                    found.place(text.examples(cells, values, self._settings, random))
                    found.together[latent], found.together_share[latent] = partners.of(latent, cells, random)
                else:
                    found.place([])
                if tell is not None and latent % 64 == 63:
                    tell(latent + 1)
        return found.columns(self._spill.counts) | correlated(moments, found.sum, found.square)


def _latents(block: Block) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    for i in range(len(block.offsets) - 1):
        part = slice(block.offsets[i], block.offsets[i + 1])
        yield block.first + i, block.cells[part], block.values[part]


def interval(values: np.ndarray, top: float) -> Int64[np.ndarray, " n"]:
    """Which fifth of [0, top] values lie in, 1 for the uppermost (top itself among it) down to 5."""
    edges = np.linspace(0, top, INTERVALS + 1)
    return INTERVALS - np.searchsorted(edges[1:-1], values, side="right")


# ---- examples -----------------------------------------------------------------------------------------------------


class Example(NamedTuple):
    """A text for one latent; `positions` and `values` are where in its row the latent fires."""

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
    """The first cell that has the strongest value."""
    starts: np.ndarray
    """Where a row's activations begin; one more for the end."""


def distinct(rows: Integer[np.ndarray, "R T"]) -> Integer[np.ndarray, "distinct T"]:
    """The rows without those that came before, in the same order."""
    keys = np.ascontiguousarray(rows).view(f"V{rows.shape[1] * rows.itemsize}")[:, 0]
    return rows[np.sort(np.unique(keys, return_index=True)[1])]


class _Text:
    """The rows of tokens that examples are chosen from."""

    def __init__(self, tokens: UInt16[np.ndarray, "R T"], counted: Bool[np.ndarray, "R T"], window: int):
        self._length = tokens.shape[1]
        self._windows = window_hashes(tokens, window).reshape(-1)
        self._counted = np.flatnonzero(counted)
        self._ends = np.concatenate([[0], np.cumsum(counted.sum(1))])

    def examples(
        self, cells: np.ndarray, values: np.ndarray, settings: Settings, random: np.random.Generator
    ) -> list[Example]:
        """The strongest texts, some of each interval, some without; no two of them show the same tokens."""
        rows = self._rows(cells, values)
        seen: set[int] = set()

        def pick(group: int, candidates: np.ndarray, most: int) -> Iterator[Example]:
            chosen = self._distinct(rows.cell, candidates, most, seen)
            for i in sorted(chosen, key=lambda i: -rows.strongest[i]):
                part = slice(rows.starts[i], rows.starts[i + 1])
                row, position = divmod(int(rows.cell[i]), self._length)
                yield Example(
                    group, row, position, float(rows.strongest[i]), cells[part] - row * self._length, values[part]
                )

        strong = np.argsort(-rows.strongest, kind="stable")
        found = list(pick(TOP, strong, settings.top))
        drawn = random.permutation(len(rows.row))
        of = interval(rows.strongest, float(values.max()))[drawn]
        for group in range(1, INTERVALS + 1):
            found += pick(group, drawn[of == group], settings.per_interval)
        return found + list(self._without(rows.row, settings.non_activating, seen, random))

    def _rows(self, cells: np.ndarray, values: np.ndarray) -> _Rows:
        row = cells // self._length
        starts = np.flatnonzero(np.concatenate([[True], row[1:] != row[:-1]]))
        strongest = np.maximum.reduceat(values, starts)
        starts = np.append(starts, len(cells))
        number = np.repeat(np.arange(len(strongest)), np.diff(starts))
        at = np.flatnonzero(values == strongest[number])
        first = at[np.concatenate([[True], number[at][1:] != number[at][:-1]])]
        return _Rows(row[first], strongest, cells[first], starts)

    def _distinct(self, cell: np.ndarray, candidates: np.ndarray, most: int, seen: set[int]) -> list[int]:
        """The first `most` candidates whose windows were not seen; they are then."""
        chosen: list[int] = []
        for start in range(0, len(candidates), 4 * most or 1):
            part = candidates[start : start + 4 * most]
            for i, window in zip(part.tolist(), self._windows[cell[part]].tolist(), strict=True):
                if len(chosen) == most:
                    return chosen
                if window not in seen:
                    seen.add(window)
                    chosen.append(i)
        return chosen

    def _without(self, fired: np.ndarray, most: int, seen: set[int], random: np.random.Generator) -> Iterator[Example]:
        """Rows in which the latent does not fire, and a random token that counts in each."""
        quiet = np.diff(self._ends) > 0
        quiet[fired] = False
        rows = random.permutation(np.flatnonzero(quiet))
        starts, ends = self._ends[rows], self._ends[rows + 1]
        cell = self._counted[starts + (random.random(len(rows)) * (ends - starts)).astype(np.int64)]
        none = np.zeros(0, np.int64), np.zeros(0, np.float32)
        for i in self._distinct(cell, np.arange(len(rows)), most, seen):
            row, position = divmod(int(cell[i]), self._length)
            yield Example(NON_ACTIVATING, row, position, 0.0, *none)


def window_hashes(tokens: Integer[np.ndarray, "R T"], window: int) -> UInt64[np.ndarray, "R T"]:
    """A number for each token, the same where the token and `window` tokens before and after it in the row are."""
    factors = np.random.default_rng(0).integers(2**63, size=2 * window + 1, dtype=np.uint64) | np.uint64(1)
    padded = np.pad(tokens.astype(np.uint64) + np.uint64(1), ((0, 0), (window, window)))
    length = tokens.shape[1]
    hashes = np.zeros(tokens.shape, np.uint64)
    for i, factor in enumerate(factors):
        hashes += padded[:, i : i + length] * factor
    return hashes


# ---- who fires together -------------------------------------------------------------------------------------------


class _Partners:
    """The latents that fire on each cell, asked for those that fire with a given one."""

    def __init__(self, spill: Spill, settings: Settings):
        self._offsets, self._codes = spill.codes()
        self._shares = spill.counts / spill.counted.sum()
        self._sample, self._nearest = settings.together_sample, settings.nearest

    def of(self, latent: int, cells: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """The latents that fire here more often than elsewhere, by how much, and on what share of these tokens.

        Ranked by the share alone, the list of every latent would begin with the few that fire everywhere.
        """
        if len(cells) > self._sample:
            cells = cells[random.choice(len(cells), self._sample, replace=False)]
        starts, ends = self._offsets[cells], self._offsets[cells.astype(np.int64) + 1]
        lengths = ends - starts
        before = np.cumsum(lengths) - lengths
        there = self._codes[np.arange(lengths.sum()) + np.repeat(starts - before, lengths)]
        share = np.bincount(there, minlength=len(self._shares)) / len(cells)
        share[latent] = 0
        more = share - self._shares
        least = np.partition(more, -self._nearest)[-self._nearest] if self._nearest < len(more) else 0
        others = np.flatnonzero((more > 0) & (more >= least))
        others = others[np.argsort(-more[others], kind="stable")][: self._nearest]
        names, shares = np.full(self._nearest, latent), np.full(self._nearest, np.nan)
        names[: len(others)], shares[: len(others)] = others, share[others]
        return names, shares


# ---- columns ------------------------------------------------------------------------------------------------------


class _Columns:
    """The columns while they are filled, latent after latent."""

    def __init__(self, d_sae: int, settings: Settings):
        self.max, self.mean, self.sum, self.square = (np.zeros(d_sae) for _ in range(4))
        self.hist_range = np.zeros((d_sae, 2), np.float32)
        self.hist = np.zeros((d_sae, settings.bins), np.uint32)
        self.group_share = np.zeros((d_sae, INTERVALS + 1))
        self.together = np.repeat(np.arange(d_sae)[:, None], settings.nearest, axis=1)
        self.together_share = np.full((d_sae, settings.nearest), np.nan)
        self._counts: list[int] = []
        self._examples: list[tuple[np.ndarray, ...]] = []

    def describe(self, latent: int, values: np.ndarray, tokens: int) -> None:
        """Takes all activations of a latent, at least one."""
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

    def place(self, examples: list[Example]) -> None:
        """Takes the examples of the next latent."""
        self._counts.append(len(examples))
        if not examples:
            return
        *heads, positions, values = zip(*examples, strict=True)
        lengths = np.array([len(p) for p in positions])
        self._examples.append((*map(np.array, heads), lengths, np.concatenate(positions), np.concatenate(values)))

    def columns(self, counts: np.ndarray) -> dict[str, np.ndarray]:
        """All of them, by name."""
        none = [()] * 7 if not self._examples else []
        columns = [np.concatenate(parts) for parts in zip(*self._examples, strict=True)] or none
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
