"""Say what became of every latent of a crosscoder over checkpoints: where it is, how strong, which way, since when.

Decoder norms of a crosscoder mislead where its sparsity shrinks them (complete shrinkage) or where another latent has
the same direction in one checkpoint only (latent decoupling): Minder et al. 2025, "Robustly identifying concepts
introduced during chat fine-tuning using crosscoders" (arXiv 2504.02922). So every latent is fitted again to what all
others leave over, checkpoint by checkpoint, and compared with the reconstruction by the others.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from bridge.run.timelines import levels
from bridge.stages.sums import StageSums
from jsae.settings import Range, check_fields, number, require

Kind = Literal["dead", "exclusive", "weakened", "rotated", "shared"]
KINDS: tuple[Kind, ...] = ("dead", "exclusive", "weakened", "rotated", "shared")
_STEP = 0.25  # change of a level from one checkpoint to the next that is an event
_SHARE = Range(0, 1, "lie between 0 and 1")


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """Bounds between the kinds of latents. All strengths are relative to the checkpoint in which a latent is strongest.

    Raises:
      ConfigError: bounds that contradict each other.
    """

    absent: float = number(0.05, _SHARE)
    """Strength up to which a latent is absent; that of the latent and that with the reconstruction by others."""
    weak: float = number(0.5, _SHARE)
    """Strength up to which it is weak: it appears or disappears where it crosses this."""
    turned: float = number(0.95, _SHARE)
    """Cosine of directions below which it has turned."""
    least_fired: float = number(1e-4, _SHARE)
    """Share of tokens on which a living latent fires at least."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(self.absent <= self.weak, f"absent={self.absent} is above weak={self.weak}: swap them")


class Latents(NamedTuple):
    """Measures of all latents. f: latents, m: checkpoints."""

    density: Float[np.ndarray, " f"]
    """Share of tokens on which the crosscoder's latent fires."""
    strongest: Int[np.ndarray, " f"]
    """The checkpoint in which the decoder row is longest, in the unit of `norm`."""
    norm: Float[np.ndarray, "f m"]
    """Norm of the decoder row over the root mean square norm of the checkpoint's centred activations."""
    corrected_norm: Float[np.ndarray, "f m"]
    """The same of the row that fits best to what all other latents leave over."""
    strength: Float[np.ndarray, "f m"]
    """Projection of that row on the decoder row of the strongest checkpoint, over the strongest's, in the same unit."""
    present: Float[np.ndarray, "f m"]
    """The same with what all latents together reconstruct, as far as it varies with the latent: what others express."""
    cosine: Float[np.ndarray, "f m"]
    """Cosine of the corrected row to that of the strongest checkpoint."""
    turn: Float[np.ndarray, "f m"]
    """Cosine of the corrected row to that of the checkpoint before; 1 in the first."""
    final: Float[np.ndarray, "f m"]
    """Cosine of the corrected row to that of the last checkpoint."""
    own_density: Float[np.ndarray, "f m"]
    """Share of tokens on which the latent fires in the checkpoint's own SAE."""
    own_mean: Float[np.ndarray, "f m"]
    """Mean value there, where it fires."""

    @property
    def level(self) -> Float[np.ndarray, "f m"]:
        """The magnitude of every latent in every checkpoint (`bridge.run.timelines.levels`)."""
        return levels(self.strength, self.present)

    def table(self) -> dict[str, Any]:
        """Return the measures as JSON values, one list for each."""
        return {name: np.round(value, 5).tolist() for name, value in self._asdict().items()}


def measure(decoder: Float[np.ndarray, "f m d"], sums: StageSums) -> Latents:
    """Return the measures of the latents of a crosscoder.

    With e_m = x_m - x_hat_m, the row of latent j that fits best to what the others leave over in checkpoint m is

        d'_jm = d_jm + sum f_j e_m / sum f_j^2

    which the shrinkage of d_jm does not change. `strength` is <d'_jm, r_j> over that of the checkpoint with the longest
    row r_j: nu_epsilon of arXiv 2504.02922, with the latent's part put back in every checkpoint. `present` is
    cov(f_j, <x_hat_m, r_j>) over the same, nu_r with centred sums: independent latents then add nothing.

    Activations, and what is of their unit, are divided by the root mean square norm of the checkpoint's centred
    activations. Norms change in training many times over: a latent that keeps its share of the variance has grown with
    everything else, and is as strong as before. In a checkpoint whose activations are constant, every latent is absent.

    Args:
      decoder: rows in the units of each checkpoint.
      sums: over text.
    """
    every = np.arange(len(decoder))
    unit = np.divide(1, sums.size, out=np.zeros_like(sums.size), where=sums.size > 0)[:, None]
    rows = decoder.astype(np.float64) * unit
    norm = np.linalg.norm(rows, axis=2)
    strongest = norm.argmax(1)
    longest = rows[every, strongest]
    fitted = rows + sums.residual * unit / np.maximum(sums.square, 1e-30)[:, None, None]
    along = np.einsum("fmd,fd->fm", fitted, longest)
    covariance = (sums.together - sums.total[:, None, None] * sums.reconstructions / sums.tokens) * unit
    together = np.einsum("fmd,fd->fm", covariance, longest)
    own_fired = sums.own_fired.T
    return Latents(
        density=sums.fired / sums.tokens,
        strongest=strongest,
        norm=norm,
        corrected_norm=np.linalg.norm(fitted, axis=2),
        strength=_over(along, along[every, strongest][:, None]),
        present=_over(together, together[every, strongest][:, None]),
        cosine=_cosines(fitted, fitted[every, strongest][:, None]),
        turn=np.concatenate([np.ones((len(every), 1)), _cosines(fitted[:, 1:], fitted[:, :-1])], axis=1),
        final=_cosines(fitted, fitted[:, -1:]),
        own_density=own_fired / sums.tokens,
        own_mean=_over(sums.own_total.T, own_fired),
    )


def kinds(latents: Latents, thresholds: Thresholds | None = None) -> list[Kind]:
    """Return what every latent is, judged by the checkpoint where it differs most.

    "exclusive": absent in a checkpoint, by itself and by what others express there. "weakened": weak in one.
    "rotated": as strong, in another direction. "shared": alike in all. "dead": too rare to be judged.
    """
    bounds = thresholds or Thresholds()
    level = latents.level
    turned = np.where(level > bounds.absent, latents.cosine, 1).min(1) < bounds.turned
    found: list[Kind] = []
    for density, low, is_turned in zip(latents.density, level.min(1), turned, strict=True):
        if density < bounds.least_fired:
            found.append("dead")
        elif low <= bounds.absent:
            found.append("exclusive")
        elif low <= bounds.weak:
            found.append("weakened")
        else:
            found.append("rotated" if is_turned else "shared")
    return found


class Event(NamedTuple):
    """A change of a latent from one checkpoint to the next."""

    latent: int
    kind: Literal["appears", "grows", "rotates", "shrinks", "dies"]
    stage: int
    """The later checkpoint."""


def events(latents: Latents, thresholds: Thresholds | None = None) -> list[Event]:
    """Return the changes of all living latents, in the order of latents and checkpoints.

    A latent appears where its level (`Latents.level`) rises above `weak`, and dies where it then falls to `absent`.
    While it is there it rotates where the cosine of the rows of two neighbouring checkpoints is below `turned`, and
    otherwise grows or shrinks where its level changes by more than `_STEP`.
    """
    bounds = thresholds or Thresholds()
    found: list[Event] = []
    level = latents.level
    for latent in np.flatnonzero(latents.density >= bounds.least_fired):
        was_there = bool(level[latent, 0] > bounds.weak)
        for stage in range(1, level.shape[1]):
            before, now = level[latent, stage - 1], level[latent, stage]
            kind: Any = None
            if not was_there and now > bounds.weak:
                kind, was_there = "appears", True
            elif was_there and now <= bounds.absent < before:
                kind, was_there = "dies", False
            elif was_there and min(before, now) > bounds.absent and latents.turn[latent, stage] < bounds.turned:
                kind = "rotates"
            elif was_there and abs(now - before) > _STEP:
                kind = "grows" if now > before else "shrinks"
            if kind is not None:
                found.append(Event(int(latent), kind, stage))
    return found


def _over(a: Float[np.ndarray, "*#n"], b: Float[np.ndarray, "*#n"]) -> Float[np.ndarray, "..."]:
    """Return a / b, broadcast; 0 where b is 0."""
    return np.divide(a, b, out=np.zeros(np.broadcast_shapes(a.shape, b.shape)), where=b != 0)


def _cosines(a: Float[np.ndarray, "f m d"], b: Float[np.ndarray, "f #m d"]) -> Float[np.ndarray, "f m"]:
    """Return the cosines of rows; 0 where one is 0."""
    return _over((a * b).sum(-1), np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))


def summary(names: Sequence[str], latents: Latents, thresholds: Thresholds | None = None) -> dict[str, Any]:
    """Return the number of latents of every kind, and for exclusive ones of two checkpoints in which they are."""
    found = np.asarray(kinds(latents, thresholds))
    counts = {kind: int((found == kind).sum()) for kind in KINDS}
    exclusive = latents.strongest[found == "exclusive"]
    return counts | {"strongest of exclusive": {name: int((exclusive == i).sum()) for i, name in enumerate(names)}}
