"""The documents that a nanochat was trained on between two of its checkpoints, as far as its files say.

Upstream's checkpoints say up to which row group of which parquet shard they were trained; the shards are read in the
order of their names. Checkpoints of `bridge.nanochat.pretraining` name data and seed, from which the order follows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from bridge.nanochat.corpus import Corpus
from bridge.nanochat.tokenizer import Tokenizer
from bridge.nanochat.units import Document, Split, Unit, all_units, documents, split_units
from jsae.settings import require

HELDOUT_FRACTION = 0.05
"""The fraction that is held out where documents are chosen by their content."""
_ROWS_AT_ONCE = 64

_SETTINGS: dict[str, tuple[Any, float, float]] = {  # of a pretraining: type, least and largest value
    "seed": (int, 0, 2**63),
    "sequence_len": (int, 1, 2**17),
    "batch_rows": (int, 1, 2**20),
    "heldout_fraction": (float, 0, 1),
    "data": (str, 0, 0),
}
MOST_REPLAYED = 2**31
"""Tokens from the start of a pretraining that are read again to find what followed."""

Order = Literal["shards", "replayed", "unknown"]


@dataclass(frozen=True)
class Part:
    """Documents of a unit; the pieces of long ones count singly."""

    unit: Unit
    first: int = 0
    end: int | None = None
    """The number after the last; None is all."""

    def documents(self) -> Iterator[tuple[int, Document]]:
        """Yield the documents with their numbers in the unit."""
        yield from itertools.islice(enumerate(documents(self.unit)), self.first, self.end)


@dataclass(frozen=True)
class Reading:
    """The documents that were read between two checkpoints."""

    parts: list[Part]
    order: Order
    """"shards": row groups of nanochat's shards. "replayed": exactly these documents. "unknown": the whole text."""
    note: str
    """A sentence on it, for people."""


def between(
    spec: str, split: Split, earlier: Mapping[str, Any], later: Mapping[str, Any], tokenizer: Tokenizer
) -> Reading:
    """Return what a nanochat was trained on between two checkpoints; the whole text where that is not known.

    Args:
      spec: the text, see `bridge.nanochat.units.find_units`.
      split: of the text, where the whole of it is returned.
      earlier: the meta file of the earlier checkpoint.
      later: that of the later one.
      tokenizer: of both.

    Raises:
      ConfigError: the checkpoints name shards that the text does not have.
      FileNotFoundError, ValueError: text that cannot be read.
    """
    places = [_place(meta) for meta in (earlier, later)]
    if places[0] is not None and places[1] is not None:
        shards = [unit for unit in all_units(spec) if unit.side == "train"]
        if shards:
            return _of_shards(shards, places[0], places[1])
        return _whole(spec, split, "the text is not the folder of shards that the checkpoints were trained on")
    if (settings := _replayable(earlier, later)) is not None:
        if settings["data"] != spec:
            return _whole(spec, split, f"the checkpoints were trained on {settings['data']!r:.80}: give it with --data")
        return _replayed(spec, settings, int(earlier["step"]), int(later["step"]), tokenizer)
    return _whole(spec, split, "the checkpoints do not say how far into their text they were trained")


def _whole(spec: str, split: Split, why: str) -> Reading:
    units = split_units(all_units(spec), split, HELDOUT_FRACTION)
    return Reading([Part(unit) for unit in units], "unknown", f"all of the text was searched: {why}")


# ---- shards of parquet ----------------------------------------------------------------------------------------------


def _place(meta: Mapping[str, Any]) -> tuple[int, int, int] | None:
    """Return epoch, shard and row group up to which a checkpoint was trained; None where its meta file does not say."""
    state = meta.get("dataloader_state_dict")
    if not isinstance(state, dict):
        return None
    numbers = (state.get("epoch", 0), state.get("pq_idx"), state.get("rg_idx"))
    if not all(isinstance(number, int) and number >= 0 for number in numbers):
        return None
    return numbers


def _of_shards(units: list[Unit], earlier: tuple[int, int, int], later: tuple[int, int, int]) -> Reading:
    """Return the row groups between two places, both included: documents wait in a buffer for a while."""
    files = list(dict.fromkeys(unit.source for unit in units))
    for _, shard, _ in (earlier, later):
        require(
            shard < len(files),
            f"a checkpoint was trained up to shard {shard}, counted from 0, and the folder has {len(files)} to train "
            "on: give the folder that it was trained on with --data",
        )
    require(earlier <= later, "the earlier checkpoint was trained further into the text than the later one: swap them")
    places = [(files.index(unit.source), unit.number) for unit in units]
    begin, end = earlier[1:], later[1:]
    epochs = later[0] - earlier[0]
    if epochs == 0:
        chosen = [begin <= place <= end for place in places]
    elif epochs == 1:
        chosen = [place >= begin or place <= end for place in places]
    else:
        chosen = [True] * len(places)
    first, last = (f"row group {group} of {files[shard][0]}" for shard, group in (begin, end))
    wraps = f", over the end of {epochs} epoch(s)" if epochs else ""
    note = (
        f"{first} to {last}, in the order of the shards{wraps}; other ranks of the training may have been a few row "
        "groups further"
    )
    return Reading([Part(unit) for unit, is_in in zip(units, chosen, strict=True) if is_in], "shards", note)


# ---- pretraining of this project --------------------------------------------------------------------------------


def _replayable(earlier: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the settings of a pretraining of this project, if both checkpoints are of the same; else None."""
    metas = (earlier, later)
    settings = [meta.get("user_config") for meta in metas]
    if not all(isinstance(one, dict) and _is_valid(one, meta) for one, meta in zip(settings, metas, strict=True)):
        return None
    first, second = ({name: one[name] for name in _SETTINGS} for one in settings)
    return first if first == second and earlier["step"] < later["step"] else None


def _is_valid(settings: Mapping[str, Any], meta: Mapping[str, Any]) -> bool:
    """Return whether a pretraining can be replayed, by its settings and the step of a checkpoint."""
    values = {name: settings.get(name) for name in _SETTINGS} | {"step": meta.get("step")}
    for name, (kind, least, most) in (_SETTINGS | {"step": (int, 0, 2**31)}).items():
        value = values[name]
        if kind is str:
            if not isinstance(value, str):
                return False
        elif isinstance(value, bool) or not isinstance(value, kind) or not least <= value <= most:
            return False
    return values["step"] * values["batch_rows"] * values["sequence_len"] <= MOST_REPLAYED


def _replayed(spec: str, settings: Mapping[str, Any], first: int, last: int, tokenizer: Tokenizer) -> Reading:
    """Return the documents of the rows between two steps; the text is read from the start to find them."""
    corpus = Corpus(
        spec,
        tokenizer,
        split="train",
        row_len=settings["sequence_len"] + 1,
        seed=settings["seed"],
        heldout_fraction=settings["heldout_fraction"],
    )
    before = _state_after(corpus, first * settings["batch_rows"])
    after = _state_after(corpus, (last - first) * settings["batch_rows"])
    parts = [part for lane in zip(before, after, strict=True) for part in _of_lane(corpus, *lane)]
    note = f"the rows of steps {first + 1} to {last}, replayed with the seed of the pretraining"
    return Reading(parts, "replayed", note)


def _state_after(corpus: Corpus, rows: int) -> list[list[int]]:
    """Read so many rows; return the states of all lanes: unit, document in it, token in that."""
    while rows:
        rows -= len(corpus.next_rows(min(rows, _ROWS_AT_ONCE)))
    return corpus.position()["lanes"]


def _of_lane(corpus: Corpus, before: list[int], after: list[int]) -> Iterator[Part]:
    """Yield what one lane read between two states."""
    if before == after:
        return
    (first, start, _), (last, document, token) = before, after
    for number in range(first, last + 1, corpus.lanes):
        end = document + (token > 0) if number == last else None
        part = Part(corpus.unit(number), start if number == first else 0, end)
        if end is None or end > part.first:
            yield part
