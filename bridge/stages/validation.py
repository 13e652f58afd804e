"""Score model diffing where the differences of two stages are known (`jsae.synthetic.StageWorld`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float

from bridge.stages import latents, sums
from bridge.stages.latents import Thresholds
from bridge.torch_sae import TorchSAE
from jsae.saelens import Plain, layers

if TYPE_CHECKING:
    from jsae.synthetic import StageWorld

FOUND = 0.9
"""Cosine from which a latent stands for a feature."""
_RELATED = 0.7
_CHUNK = 4096


class Finding(NamedTuple):
    """Score of a crosscoder: which differences of two stages it shows."""

    found: dict[str, int]
    """Features of every kind for which there is a latent of this kind, in the right stage and direction."""
    features: dict[str, int]
    """Number of features of every kind."""
    false_alarms: list[str]
    """For every exclusive latent that stands for no feature which is exclusive to its stage: what it resembles most."""
    exclusive: int
    """Latents that are judged exclusive."""
    fvu: tuple[float, float]
    """Of the two stages."""
    own_fvu: tuple[float, float]
    """Of the stages' own SAEs."""

    @property
    def recall(self) -> float:
        """Share of the removed and new features that are found."""
        return self.share("removed", "new")

    def share(self, *kinds: str) -> float:
        """Return the share of the features of some kinds that are found."""
        return sum(self.found[kind] for kind in kinds) / sum(self.features[kind] for kind in kinds)

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return self._asdict() | {"recall": self.recall}


def score(world: StageWorld, crosscoder: Plain, tokens: int = 60_000, thresholds: Thresholds | None = None) -> Finding:
    """Return how well a crosscoder of two layers shows the differences of a world's stages.

    Args:
      world: the truth.
      crosscoder: trained on samples of the world, before and after.
      tokens: other samples, on which latents are measured.
      thresholds: bounds between the kinds.

    Raises:
      ValueError: a crosscoder of another width.
    """
    sae = _module(crosscoder)
    own = [_module(layers.single(crosscoder, stage)) for stage in range(2)]
    total = sums.add_up(sae, own, _samples(world, tokens))
    rows = crosscoder.weights["W_dec"].reshape(sae.d_sae, 2, -1)
    found = latents.measure(rows, total)
    kinds = np.asarray(latents.kinds(found, thresholds))
    cosines = _cosines(world, rows)
    return Finding(
        found={
            kind: int(_is_found(kind, world, found, kinds, cosines).sum())
            for kind in map(str, dict.fromkeys(world.kinds))
        },
        features={kind: int((world.kinds == kind).sum()) for kind in map(str, dict.fromkeys(world.kinds))},
        false_alarms=_false_alarms(world, found, kinds, cosines),
        exclusive=int((kinds == "exclusive").sum()),
        fvu=tuple(map(float, total.fvu)),  # type: ignore[arg-type]  # two
        own_fvu=tuple(map(float, total.own_fvu)),  # type: ignore[arg-type]
    )


def _module(plain: Plain) -> TorchSAE:
    weights = {name: torch.from_numpy(np.array(weight)) for name, weight in plain.weights.items()}
    return TorchSAE(dict(plain.cfg), weights, plain.layers).eval()


def _samples(world: StageWorld, tokens: int) -> Iterator[Float[torch.Tensor, "n d"]]:
    """Yield activations of both stages side by side, other than those of training (`sample` with seed 0)."""
    for number, start in enumerate(range(0, tokens, _CHUNK), 1):
        yield torch.from_numpy(np.concatenate(world.sample(min(_CHUNK, tokens - start), seed=number), axis=1))


def _cosines(world: StageWorld, rows: Float[np.ndarray, "f 2 d"]) -> Float[np.ndarray, "2 features f"]:
    """Return the cosines of features and latents in both stages; 0 where a feature is absent."""
    directions = np.stack([world.before, world.after])
    norms = np.linalg.norm(directions, axis=2, keepdims=True) * np.linalg.norm(rows, axis=2).T[:, None]
    products = directions @ np.moveaxis(rows, 0, 2)
    return np.divide(products, norms, out=np.zeros_like(products), where=norms > 0)


def _is_found(
    kind: str,
    world: StageWorld,
    found: latents.Latents,
    kinds: np.ndarray,
    cosines: Float[np.ndarray, "2 features f"],
) -> np.ndarray:
    """Return for every feature of a kind whether some latent of this kind stands for it."""
    before, after = cosines[:, world.kinds == kind] > FOUND
    if kind in ("removed", "new"):
        stage = int(kind == "new")
        return ((before, after)[stage] & (kinds == "exclusive") & (found.strongest == stage)).any(1)
    if kind == "weakened":
        return (after & (kinds == "weakened") & (found.strongest == 1)).any(1)
    return (before & after & (kinds == kind)).any(1)


def _false_alarms(
    world: StageWorld, found: latents.Latents, kinds: np.ndarray, cosines: Float[np.ndarray, "2 features f"]
) -> list[str]:
    """Return what the exclusive latents that stand for no exclusive feature of their stage resemble most."""
    alarms = []
    for latent in np.flatnonzero(kinds == "exclusive"):
        stage = found.strongest[latent]
        nearest = cosines[stage, :, latent].argmax()
        kind = str(world.kinds[nearest]) if cosines[stage, nearest, latent] > _RELATED else "nothing"
        if kind != ("removed", "new")[stage]:
            alarms.append(kind)
    return alarms
