"""Follow latents through SAEs of successive checkpoints, each trained from the one before: which survive."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from bridge.run.exports import alive
from bridge.run.saes import exports_at
from jsae import saelens, stability
from jsae.saelens.settings import TRANSCODERS
from jsae.settings import require


class Link(NamedTuple):
    """Latents of one SAE and their matches in the next, by optimal assignment. f: latents of the earlier SAE."""

    match: Int[np.ndarray, " f"]
    """Latent of the next SAE; -1 for one that is dead in the earlier, or has none left to be matched with."""
    cosine: Float[np.ndarray, " f"]
    """Cosine of their decoder rows; 0 without a match."""
    survived: Bool[np.ndarray, " f"]
    """True if it is at least the bar."""
    born: Int[np.ndarray, " b"]
    """Living latents of the next SAE that continue none."""


class Snapshot(NamedTuple):
    """An SAE of one checkpoint."""

    path: str
    decoder: Float[np.ndarray, "f d"]
    alive: Bool[np.ndarray, " f"]
    """True for latents that fire, by `sparsity.safetensors` beside the SAE; all where there is no such file."""


def read(path: str | Path, name: str | None = None) -> Snapshot:
    """Read the SAE of a checkpoint.

    Args:
      path: a run with one SAE, or an export.
      name: of the export, where the run has several.

    Raises:
      ConfigError: several SAEs and no name, a transcoder or a crosscoder.
      FileNotFoundError: there is no SAE.
      ValueError: it is broken.
    """
    folders = {folder.name: folder for folder in exports_at(Path(path))}
    require(
        name in folders or (name is None and len(folders) == 1),
        f"{path} has SAEs of {', '.join(folders)}: choose one with --hook",
    )
    folder = folders[name] if name is not None else next(iter(folders.values()))
    plain = saelens.read(folder)
    require(
        plain.layers == 1 and plain.cfg["architecture"] not in TRANSCODERS,
        f"{folder} is no SAE of one activation: survival is followed through SAEs of successive checkpoints",
    )
    return Snapshot(str(folder), plain.weights["W_dec"], alive(folder, len(plain.weights["W_dec"])))


def follow(snapshots: Sequence[Snapshot], bar: float = stability.SAME) -> list[Link]:
    """Return the links between each SAE and the next.

    Args:
      snapshots: in the order of the checkpoints.
      bar: the least cosine at which a latent survives.

    Raises:
      ConfigError: fewer than two, or SAEs of other widths.
      ValueError: more latents than can be matched (`jsae.stability.match`).
    """
    require(len(snapshots) >= 2, f"{len(snapshots)} SAE(s): survival needs at least two")
    first = snapshots[0].decoder.shape[1]
    for other in snapshots[1:]:
        require(
            other.decoder.shape[1] == first,
            f"{other.path} reads {other.decoder.shape[1]} channels, {snapshots[0].path} {first}: give SAEs of one hook",
        )
    return [_link(earlier, later, bar) for earlier, later in itertools.pairwise(snapshots)]


def report(snapshots: Sequence[Snapshot], bar: float = stability.SAME) -> dict[str, Any]:
    """Return the links and their summary as JSON values.

    `lineage` has a line for every latent of the first SAE that lives: the latents that continue it, up to the last that
    does; `steps` says of each pair how many latents survive, die and are born. A pair of independently trained SAEs has
    the same form, so the share that survives there is what chance and the method alone leave.
    """
    links = follow(snapshots, bar)
    steps = [
        {
            "from": earlier.path,
            "to": later.path,
            "alive": int(earlier.alive.sum()),
            "survived": int(link.survived.sum()),
            "died": int((earlier.alive & ~link.survived).sum()),
            "born": len(link.born),
            "kept_index": int((link.match[link.survived] == np.flatnonzero(link.survived)).sum()),
            "mean_cosine": float(link.cosine[link.match >= 0].mean()) if (link.match >= 0).any() else 0.0,
        }
        for (earlier, later), link in zip(itertools.pairwise(snapshots), links, strict=True)
    ]
    return {
        "saes": [snapshot.path for snapshot in snapshots],
        "same_from_cosine": bar,
        "steps": steps,
        "born": [link.born.tolist() for link in links],
        "lineage": {str(latent): _lineage(int(latent), links) for latent in np.flatnonzero(snapshots[0].alive)},
    }


def _link(earlier: Snapshot, later: Snapshot, bar: float) -> Link:
    pairs = stability.match(earlier.decoder, later.decoder, (earlier.alive, later.alive))
    match = np.full(len(earlier.decoder), -1)
    cosine = np.zeros(len(earlier.decoder))
    match[pairs.first], cosine[pairs.first] = pairs.second, pairs.cosine
    survived = (match >= 0) & (cosine >= bar)
    continued = np.zeros(len(later.decoder), bool)
    continued[match[survived]] = True
    return Link(match, cosine, survived, np.flatnonzero(later.alive & ~continued))


def _lineage(latent: int, links: Sequence[Link]) -> list[dict[str, int | float]]:
    """Return the latents that continue one through the SAEs, with the cosines from each to the next."""
    line = []
    for link in links:
        if not link.survived[latent]:
            break
        line.append({"latent": int(link.match[latent]), "cosine": round(float(link.cosine[latent]), 4)})
        latent = int(link.match[latent])
    return line
