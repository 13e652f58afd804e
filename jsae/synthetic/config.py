"""Settings of a synthetic world, and presets."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from jsae.settings import FRACTION, RATE, SEED, WEIGHT, Json, Range, at_least, check_fields, number, require

_PROBABILITY = Range(1e-9, 1, "lie above 0, from 1e-9, and at most at 1")
_SCALE = Range(0, 1e6, "lie between 0 and 1e6")


@dataclasses.dataclass(frozen=True)
class WorldConfig(Json):
    """Settings of activations with known features, `x = sum_i a_i d_i + bias`.

    After SynthSAEBench (Chanin and Garriga-Alonso 2026, arXiv 2602.14687); the defaults are those of its benchmark
    SynthSAEBench-16k.

    Features are numbered by their firing probability, the most frequent first. The first ones form trees, level by
    level: `roots` roots, then `branching` children of each, down to `depth`. The rest are independent.

    Raises:
      ConfigError: values out of range, or trees with more features than there are.
    """

    num_features: int = number(16_384, at_least(1, 2**24))
    d_in: int = number(768, at_least(1, 2**20))
    """Width of the activations."""
    zipf_exponent: float = number(0.5, Range(1e-3, 100, "lie between 0.001 and 100"))
    """s: the probabilities are affine in rank^-s."""
    max_probability: float = number(0.4, _PROBABILITY)
    """Firing probability of the first feature."""
    min_probability: float = number(5e-4, _PROBABILITY)
    """Firing probability of the last feature."""
    correlation_rank: int = number(25, at_least(0, 4096))
    """Dimensions of the Gaussian that all features share; 0 makes them independent."""
    correlation_scale: float = number(0.1, _SCALE)
    """Standard deviation of a feature's weight on each shared dimension."""
    roots: int = number(128, at_least(0, 2**24))
    """Number of trees; 0 is no hierarchy."""
    branching: int = number(4, at_least(2, 2**16))
    """Children per parent."""
    depth: int = number(3, at_least(1, 16))
    """Levels below the roots."""
    exclusive_fraction: float = number(1.0, FRACTION)
    """Fraction of the parents of which at most one child fires."""
    compensate: bool = True
    """Whether the probabilities of children are raised so that, approximately, they fire as often as the Zipf law says
    although their parents must fire and their siblings must not."""
    scale_children: bool = True
    """Whether a child's magnitude is multiplied by the magnitude of its parent over the parent's mean."""
    first_magnitude: float = number(5.0, _SCALE)
    """Mean magnitude of the first feature, in the units of the activations; linear in the number of the feature."""
    last_magnitude: float = number(4.0, _SCALE)
    """Mean magnitude of the last feature."""
    spread_mean: float = number(0.5, _SCALE)
    """Every feature has its own standard deviation of magnitudes, |N(spread_mean, spread_std^2)|."""
    spread_std: float = number(0.5, _SCALE)
    orthogonal_steps: int = number(100, at_least(0, 1_000_000))
    """Steps of Adam that make the random feature vectors more orthogonal; 0 leaves them random."""
    orthogonal_rate: float = number(3e-4, RATE)
    """Learning rate of these steps."""
    bias_norm: float = number(0.5, WEIGHT)
    """Norm of the bias, in the units of the activations."""
    seed: int = number(42, SEED)
    """Random seed of everything that is fixed: vectors, correlations, magnitudes and exclusive groups."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(
            self.min_probability <= self.max_probability,
            f"min_probability={self.min_probability} is above max_probability={self.max_probability}",
        )
        require(
            self.tree_features <= self.num_features,
            f"roots={self.roots}, branching={self.branching} and depth={self.depth} make trees of "
            f"{self.tree_features} features, more than num_features={self.num_features}: lower one of them",
        )
        require(
            self.roots == 0 or not self.scale_children or min(self.first_magnitude, self.last_magnitude) > 0,
            "scale_children divides by the mean magnitude of parents: first_magnitude and last_magnitude must be "
            "positive",
        )

    @property
    def tree_features(self) -> int:
        """Number of features that are in trees."""
        return self.roots * sum(self.branching**level for level in range(self.depth + 1))


PRESETS: Mapping[str, WorldConfig] = {
    "published": WorldConfig(),
    "small": WorldConfig(
        num_features=256,
        d_in=96,
        max_probability=0.3,
        min_probability=0.01,
        correlation_rank=10,
        correlation_scale=0.15,
        roots=12,
        depth=2,
        orthogonal_steps=200,
        orthogonal_rate=3e-3,
    ),
}
"""`published`: SynthSAEBench-16k, for SAEs of 4,096 latents on a GPU. `small`: for SAEs of 256 latents on two cores."""
