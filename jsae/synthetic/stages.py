"""Activations of two stages of training with known differences: the ground truth of model diffing."""

import dataclasses
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from jsae.settings import COUNT, SEED, Range, check_fields, number, require

Kind = Literal["shared", "rotated", "weakened", "removed", "new"]
KINDS: tuple[Kind, ...] = ("shared", "rotated", "weakened", "removed", "new")

_NORM, _OFFSET, _NOISE = 5.0, 0.3, 0.05  # of a feature, of all channels, and per channel


@dataclasses.dataclass(frozen=True)
class StagesConfig:
    """Sizes of a world of two stages. Directions are random; so many of them overlap a little.

    Raises:
      ConfigError: numbers that are out of range, or a feature that would be active more often than always.
    """

    width: int = number(64, COUNT)
    shared: int = number(36, COUNT)
    """Features with the same direction in both stages."""
    rotated: int = number(8, COUNT)
    """Features whose direction is turned by `angle` in the second stage."""
    weakened: int = number(4, COUNT)
    """Features that are `weakness` times as strong in the first stage as in the second."""
    exclusive: int = number(6, COUNT)
    """Features that are removed after the first stage, and as many that are new in the second."""
    angle: float = number(30.0, Range(0, 90, "lie between 0 and 90 degrees"))
    weakness: float = number(0.1, Range(0, 1, "lie between 0 and 1"))
    active: float = number(4.0, Range(1e-6, 1e6, "be positive"))
    """Mean number of active features of a token, if all are equally frequent."""
    rarity: float = number(1.0, Range(1e-6, 1, "lie between 0 and 1"))
    """Frequency of removed and new features, relative to that of all others."""
    seed: int = number(0, SEED)

    def __post_init__(self) -> None:
        check_fields(self)
        require(self.active <= self.features, f"active={self.active} of {self.features} features: lower it")

    @property
    def features(self) -> int:
        """Number of all features."""
        return self.shared + self.rotated + self.weakened + 2 * self.exclusive


class StageSamples(NamedTuple):
    """Activations of the same tokens in both stages."""

    before: Float[np.ndarray, "n d"]
    after: Float[np.ndarray, "n d"]


class StageWorld:
    """Two stages whose features and differences are known.

        x_stage = 5 sum_i s_i d_i,stage + 0.3 + 0.05 noise, where s_i is uniform in [0.5, 1.5] or 0

    Args:
      config: its sizes.

    Attributes:
      config: its sizes.
      kinds: of every feature, (features,).
      before, after: direction of every feature in the two stages, (features, width): of norm 1, but 0 where a feature
        is absent, and `weakness` where it is weak.
    """

    def __init__(self, config: StagesConfig | None = None):
        self.config = c = config or StagesConfig()
        counts = {"rotated": c.rotated, "weakened": c.weakened, "shared": c.shared}
        counts |= {"removed": c.exclusive, "new": c.exclusive}
        self.kinds = np.repeat(list(counts), list(counts.values()))
        random = np.random.default_rng(c.seed)
        directions = _unit(random.normal(size=(c.features, c.width)))
        self.before, self.after = directions.copy(), directions.copy()
        rotated = self.kinds == "rotated"
        other = random.normal(size=(c.rotated, c.width))
        other = _unit(other - (other * directions[rotated]).sum(1, keepdims=True) * directions[rotated])
        angle = np.radians(c.angle)
        self.after[rotated] = np.cos(angle) * directions[rotated] + np.sin(angle) * other
        self.before[self.kinds == "weakened"] *= c.weakness
        self.before[self.kinds == "new"] = 0
        self.after[self.kinds == "removed"] = 0
        self._chances = np.full(c.features, c.active / c.features)
        self._chances[np.isin(self.kinds, ("removed", "new"))] *= c.rarity

    def sample(self, tokens: int, seed: int = 0) -> StageSamples:
        """Return activations of random tokens, float32; the same for the same seed."""
        random = np.random.default_rng((self.config.seed, seed))
        active = random.random((tokens, len(self.kinds))) < self._chances
        strengths = active * random.uniform(0.5, 1.5, active.shape)
        return StageSamples(
            *(
                (_NORM * strengths @ rows + _OFFSET + _NOISE * random.standard_normal((tokens, rows.shape[1]))).astype(
                    np.float32
                )
                for rows in (self.before, self.after)
            )
        )


def _unit(rows: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)
