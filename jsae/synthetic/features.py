"""The fixed parts of a synthetic world: feature vectors, firing probabilities, correlations, magnitudes."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Bool, Float

from jsae.settings import require
from jsae.synthetic.config import WorldConfig

_LEAST_OWN_VARIANCE = 0.01


class Parts(NamedTuple):
    """The arrays that the samples of a world are computed from. F features, d dimensions, r shared dimensions."""

    features: Float[Array, "F d"]
    """Unit vectors."""
    bias: Float[Array, " d"]
    probabilities: Float[Array, " F"]
    """Firing probability of every feature before the rules of the trees are applied."""
    loadings: Float[Array, "F r"]
    """Weights on the shared dimensions; the sum of squares of a row is below 1."""
    means: Float[Array, " F"]
    """Mean magnitude where a feature fires, before negative magnitudes are set to 0."""
    spreads: Float[Array, " F"]
    """Standard deviation of the magnitudes."""
    exclusive: Bool[Array, " F"]
    """Whether at most one child of a feature fires."""


def make(config: WorldConfig) -> Parts:
    """Return the arrays of a world, drawn with its seed."""
    keys = jax.random.split(jax.random.key(config.seed), 5)
    n = config.num_features
    exclusive = _exclusive(config, keys[4])
    base = zipf(n, config.zipf_exponent, config.max_probability, config.min_probability)
    raised = np.minimum(base * corrections(config, base, exclusive), 1) if config.compensate else base
    bias = jax.random.normal(keys[1], (config.d_in,))
    start = _unit(jax.random.normal(keys[0], (n, config.d_in)))
    spreads = jnp.abs(config.spread_mean + config.spread_std * jax.random.normal(keys[3], (n,)))
    return Parts(
        features=orthogonalized(start, config.orthogonal_steps, config.orthogonal_rate),
        bias=bias / jnp.linalg.norm(bias) * config.bias_norm,
        probabilities=jnp.asarray(raised, jnp.float32),
        loadings=_loadings(keys[2], n, config.correlation_rank, config.correlation_scale),
        means=jnp.linspace(config.first_magnitude, config.last_magnitude, n),
        spreads=spreads,
        exclusive=jnp.asarray(exclusive),
    )


def check(parts: Parts, config: WorldConfig) -> None:
    """Check the shapes and values of given arrays.

    Raises:
      ConfigError: an array of another shape, a probability outside [0, 1], or correlations of more than 1.
    """
    n, d, rank = config.num_features, config.d_in, parts.loadings.shape[-1]
    shapes = {"features": (n, d), "bias": (d,), "loadings": (n, rank)}
    for name, array in parts._asdict().items():
        shape = shapes.get(name, (n,))
        require(array.shape == shape, f"{name} has the shape {array.shape}: this world needs {shape}")
    low, high = float(parts.probabilities.min()), float(parts.probabilities.max())
    require(low >= 0 and high <= 1, f"firing probabilities lie in [{low:g}, {high:g}]: they must lie in [0, 1]")
    shared = float(jnp.square(parts.loadings).sum(1).max(initial=0))
    require(shared < 1, f"a feature has loadings whose squares sum to {shared:g}: it must be less than 1")


def zipf(n: int, exponent: float, high: float, low: float) -> Float[np.ndarray, " n"]:
    """Return probabilities affine in rank^-exponent, from `high` for the first feature to `low` for the last."""
    if n == 1:
        return np.array([high])
    law = np.arange(1, n + 1, dtype=np.float64) ** -exponent
    return low + (high - low) * (law - law[-1]) / (law[0] - law[-1])


def corrections(
    config: WorldConfig, base: Float[np.ndarray, " F"], exclusive: Bool[np.ndarray, " F"]
) -> Float[np.ndarray, " F"]:
    """Return the factors on firing probabilities that make up for the rules of the trees.

    A child with parent p fires only where p does: factor 1 / base_p. Where p's children exclude each other, each of
    them also competes with (sum of its siblings' base probabilities) / base_p others on average: factor 1 plus that.
    """
    factors = np.ones_like(base)
    for level in levels(config):
        parents, children = base[level.parents], base[level.children].reshape(-1, config.branching)
        rivals = children.sum(1, keepdims=True) - children
        competition = np.where(exclusive[level.parents, None], 1 + rivals / parents[:, None], 1)
        factors[level.children] = (competition / parents[:, None]).ravel()
    return factors


class Level(NamedTuple):
    """One level of the trees below the roots. The children of the n-th parent are the n-th group."""

    parents: slice
    children: slice


def levels(config: WorldConfig) -> list[Level]:
    """Return the levels of the trees, from the children of the roots down."""
    found, start, count = [], 0, config.roots
    for _ in range(config.depth if count else 0):
        parents = slice(start, start + count)
        start, count = start + count, count * config.branching
        found.append(Level(parents, slice(start, start + count)))
    return found


def orthogonalized(features: Float[Array, "F d"], steps: int, rate: float) -> Float[Array, "F d"]:
    """Return unit vectors made more orthogonal by Adam on sum_{i != j} (d_i . d_j)^2 + F sum_i (|d_i|^2 - 1)^2.

    The gradient of the first sum is 4 (D (D^T D) - |d_i|^2 d_i), with D^T D of (d, d), so the F^2 products are never
    computed.
    """
    adam = optax.adam(rate)

    def step(_: Array, carry: tuple[Array, optax.OptState]) -> tuple[Array, optax.OptState]:
        vectors, state = carry
        squares = jnp.square(vectors).sum(1, keepdims=True)
        overlap = _matmul(vectors, _matmul(vectors.T, vectors)) - squares * vectors
        gradient = 4 * overlap + 4 * len(vectors) * (squares - 1) * vectors
        updates, state = adam.update(gradient, state)
        return vectors + updates, state

    return _unit(lax.fori_loop(0, steps, step, (features, adam.init(features)))[0])


def mean_max_cosine(features: Float[Array, "F d"]) -> float:
    """Return the mean over features of the largest |cosine| with another one, a measure of superposition."""
    unit = _unit(features)

    def largest(row: Array) -> Array:
        cosines = jnp.abs(_matmul(unit, unit[row])).at[row].set(0)
        return cosines.max()

    return float(lax.map(largest, jnp.arange(len(unit)), batch_size=256).mean())


def _exclusive(config: WorldConfig, key: Array) -> Bool[np.ndarray, " F"]:
    """Return which features are parents whose children exclude each other: a random part of all parents."""
    parents = levels(config)[-1].parents.stop if config.roots else 0
    chosen = math.floor(parents * config.exclusive_fraction)
    exclusive = np.zeros(config.num_features, bool)
    exclusive[np.asarray(jax.random.permutation(key, parents))[:chosen]] = True
    return exclusive


def _loadings(key: Array, n: int, rank: int, scale: float) -> Float[Array, "F r"]:
    """Return random loadings, rows shortened where less than a hundredth of the variance would be a feature's own."""
    loadings = scale * jax.random.normal(key, (n, rank))
    shared = jnp.square(loadings).sum(1, keepdims=True)
    return loadings * jnp.sqrt(jnp.minimum(1, (1 - _LEAST_OWN_VARIANCE) / jnp.maximum(shared, 1e-30)))


def _unit(rows: Float[Array, "F d"]) -> Float[Array, "F d"]:
    return rows / jnp.maximum(jnp.linalg.norm(rows, axis=1, keepdims=True), 1e-8)


def _matmul(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
