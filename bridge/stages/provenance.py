"""Trace a latent of a crosscoder over checkpoints to the text that made it.

Between the two checkpoints where the latent grew most, the nanochat read a part of its text (`reading_order`). Of that
part: the documents and files on which the latent fires most, and the tokens whose loss fell most where it fires.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from rich.console import Console

from bridge.evaluate import text
from bridge.evaluate.text import Text
from bridge.nanochat import Nanochat
from bridge.nanochat.corpus import token_ids
from bridge.nanochat.loss import losses_of
from bridge.nanochat.reading_order import Reading, between
from bridge.nanochat.units import Split
from bridge.run import Run
from bridge.run.timelines import levels
from bridge.settings import InMemory
from bridge.stages import measuring, origin_tables
from bridge.stages.origin_tables import Firings
from bridge.stages.sums import CHUNK
from bridge.torch_sae import TorchSAE
from jsae.progress import Progress
from jsae.settings import require

MOST_LATENTS = 16
"""Latents that are traced in one pass over the text."""
_LEAST_OF_PART = 4096  # tokens of a text file or row group that are read, if it has so many


@dataclass(frozen=True)
class Extent:
    """The text in which a latent is looked for, and how much of the results is kept."""

    data: str | None = None
    """None is the run's."""
    split: Split = "train"
    """Part of the text, where it is not known what was read between the checkpoints."""
    num_tokens: int = 1_000_000
    """Tokens to read at most, equally many of every file or row group at most."""
    show: int = 20
    """Documents, files, tokens and occurrences to keep."""


class Growth(NamedTuple):
    """The two neighbouring checkpoints between which a latent grew most."""

    earlier: int
    later: int
    levels: list[float]
    """The latent's level in every checkpoint (`bridge.run.timelines.levels`)."""


def growth(table: Mapping[str, Any], latent: int) -> Growth:
    """Return where a latent grew most.

    Args:
      table: of one crosscoder, from `stages.json`.
      latent: its number.

    Raises:
      ConfigError: no such latent, a dead one, or one that does not grow from any checkpoint to the next.
    """
    kinds, measures = table["kinds"], table["latents"]
    require(0 <= latent < len(kinds), f"--latent={latent}: the crosscoder has the latents 0 to {len(kinds) - 1}")
    require(kinds[latent] != "dead", f"--latent={latent} is dead: it fires too rarely to say when it grew")
    course = levels(np.array(measures["strength"][latent], float), np.array(measures["present"][latent], float))
    rises = np.diff(course)
    names = [checkpoint["name"] for checkpoint in table["checkpoints"]]
    later = int(np.argmax(rises)) + 1
    if rises[later - 1] <= 0:
        told = ", ".join(f"{level:.2f} at {name}" for name, level in zip(names, course, strict=True))
        require(False, f"--latent={latent} does not grow between any two checkpoints ({told}): it was there before")
    return Growth(later - 1, later, course.tolist())


def trace(
    run: Run,
    latents: Sequence[int],
    name: str | None = None,
    extent: Extent | None = None,
    device: str = "cpu",
    in_memory: InMemory = "all",
    *,
    show_progress: bool = False,
) -> dict[int, dict[str, Any]]:
    """Return where latents come from, by latent, as JSON values.

    Args:
      run: with crosscoders over checkpoints, and `stages.json`.
      latents: of one crosscoder.
      name: of its export; None is the only one.
      extent: the text, and how much to keep.
      device: of models and crosscoder.
      in_memory: see `bridge.stages.loading.load`.
      show_progress: show progress on stderr.

    Raises:
      ConfigError: a latent that does not exist, is dead or did not grow; or a run whose SAEs do not read checkpoints.
      FileNotFoundError: no such run, export, checkpoint or text, or no `stages.json`.
      ValueError: text that does not fill a row, or a broken file.
    """
    extent = extent or Extent()
    name = run.export(name).name
    table = measuring.table_of(run, name)
    grown = {latent: growth(table, latent) for latent in latents}
    require(len(grown) <= MOST_LATENTS, f"--latent names {len(grown)} latents: at most {MOST_LATENTS} at once")
    subject = measuring.open_subject(run, name, device, in_memory)
    spec = extent.data or run.flags["data"]
    found: dict[int, dict[str, Any]] = {}
    for interval in dict.fromkeys((one.earlier, one.later) for one in grown.values()):
        own = [latent for latent in latents if (grown[latent].earlier, grown[latent].later) == interval]
        earlier, later = (subject.nanos[number] for number in interval)
        reading = between(spec, extent.split, earlier.meta, later.meta, later.tokenizer)
        firings = _read(subject, own, interval, reading, extent, Console(stderr=True, quiet=not show_progress))
        for i, latent in enumerate(own):
            names = [stage.name for stage in subject.stages]
            found[latent] = {
                "latent": latent,
                "crosscoder": name,
                "sha256": table["crosscoder"],
                "kind": table["kinds"][latent],
                "grew": {"from": names[interval[0]], "to": names[interval[1]]},
                "levels": dict(zip(names, grown[latent].levels, strict=True)),
                "text": {
                    "data": spec,
                    "order": reading.order,
                    "note": reading.note,
                    "parts": len(reading.parts),
                    "documents": len(firings.sources),
                    "tokens": int(firings.rows.tokens.size),
                },
            } | origin_tables.of_latent(firings, i, extent.show, subject.nanos[0].tokenizer)
    return {latent: found[latent] for latent in latents}


def _read(
    subject: measuring.Subject,
    latents: Sequence[int],
    interval: tuple[int, int],
    reading: Reading,
    extent: Extent,
    console: Console,
) -> Firings:
    """Run all checkpoints over the text that was read between two of them."""
    rows, sources = _rows(reading, extent, subject.nanos[0], subject.row_len)
    site = subject.site
    values = np.zeros((len(latents), *rows.tokens.shape), np.float32)
    counts = np.zeros(rows.tokens.shape, bool)
    losses = np.full((2, *rows.tokens.shape), np.nan, np.float32)
    with Progress("reading what was trained on", rows.tokens.size, "tokens", console=console) as progress:
        step = site.rows_per_pass(rows.tokens.shape[1], subject.nanos[0].config.vocab_size)
        batches = (rows.tokens[start : start + step] for start in range(0, len(rows.tokens), step))
        for done in site.passes_of_all((site.hook_name,), batches, complete=interval):
            start, end = done[0].first_row, done[0].first_row + len(done[0].tokens)
            mask = torch.stack([one.mask(site.hook_name) for one in done]).all(0)
            counts[start:end] = mask.cpu().numpy()
            acts = torch.cat([one.acts[site.hook_name] for one in done], dim=-1)
            values[:, start:end] = _values(subject.sae, acts, latents) * counts[start:end]
            for kept, number in zip(losses, interval, strict=True):
                logits = done[number].logits
                assert logits is not None
                kept[start:end, :-1] = losses_of(logits[:, :-1], done[number].tokens[:, 1:]).cpu().numpy()
            progress.advance((end - start) * rows.tokens.shape[1])
    inside = rows.document[:, 1:] == -1  # the token after is a BOS: nothing is predicted there
    losses[:, :, :-1][:, inside] = np.nan
    return Firings(rows, sources, values, counts, losses[0], losses[1])


@torch.no_grad()
def _values(sae: TorchSAE, acts: Float[torch.Tensor, "B T D"], latents: Sequence[int]) -> Float[np.ndarray, "L B T"]:
    """Return the values of some latents."""
    index = torch.tensor(list(latents), device=acts.device)
    parts = [sae.encode(part)[:, index] for part in acts.flatten(0, 1).split(CHUNK)]
    return torch.cat(parts).T.reshape(len(latents), *acts.shape[:2]).float().cpu().numpy()


def _rows(reading: Reading, extent: Extent, nano: Nanochat, row_len: int) -> tuple[Text, list[tuple[str, str, int]]]:
    """Return rows of the documents of a reading, and their sources.

    Parts are in a shuffled but fixed order, and each gives equally many tokens at most, so that all have their share.
    """
    sources: list[tuple[str, str, int]] = []
    share = max(extent.num_tokens // max(len(reading.parts), 1), _LEAST_OF_PART)

    def documents() -> Iterator[text.Document]:
        for i in np.random.default_rng(0).permutation(len(reading.parts)):
            part, left = reading.parts[i], share
            for number, document in part.documents():
                if len(ids := token_ids(document, nano.tokenizer)[:left]):
                    sources.append((part.unit.source[0], part.unit.where, number))
                    yield text.Document(part.unit.name, ids)
                    left -= len(ids)
                if not left:
                    break

    rows = text.read(documents(), nano.tokenizer, row_len, extent.num_tokens)
    return rows, sources
