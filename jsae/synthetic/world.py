"""A synthetic world: samples of activations with their true features, and a source of activations for training."""

from __future__ import annotations

import functools
import hashlib
import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Key, UInt

from jsae.data import Filling
from jsae.settings import require
from jsae.synthetic import features
from jsae.synthetic.config import PRESETS, WorldConfig

PIECE = 1024
"""Rows that are sampled by one call on the device, with a key of their own."""


class Samples(NamedTuple):
    """Activations and what they are made of."""

    activations: Float[Array, "n d"]
    """`feature_activations @ features + bias`"""
    feature_activations: Float[Array, "n F"]
    """Magnitudes of the features; 0 where a feature does not fire."""


class SyntheticWorld:
    """An endless stream of activations whose features are known, after SynthSAEBench (arXiv 2602.14687).

    Every feature fires where a Gaussian exceeds its threshold; the Gaussians of a row share a few dimensions, which
    correlates the firing (a Gaussian copula). A feature that fires has the magnitude max(N(mean, std^2),
    0). Then, from the roots of the trees down, a child is set to 0 where its parent is 0 or scaled by it, and of the
    children of an exclusive parent that are left one keeps its magnitude, each with the same probability.

    It is a `jsae.data.Source`: `jsae.train(world, ...)` trains on it, and resumes exactly. Row r is always the same on
    the same device and versions, whatever the size of blocks: rows are sampled in pieces of `PIECE` rows, piece p of
    the stream with seed s with the key `fold_in(fold_in(key(world's seed), s + 1), p)`.

    Args:
      config: the settings, or the name of a preset.
      sample_seed: seed of the samples. Worlds that differ only in it have the same features and independent samples.
      parts: the fixed arrays, to give other ones than those that the seed draws. The hierarchy is that of `config`.

    Raises:
      ConfigError: settings, a name or arrays that are not valid.
    """

    def __init__(
        self, config: WorldConfig | str = "small", *, sample_seed: int = 0, parts: features.Parts | None = None
    ):
        if isinstance(config, str):
            require(config in PRESETS, f"{config!r} is no synthetic world: choose one of {', '.join(PRESETS)}")
            config = PRESETS[config]
        require(0 <= sample_seed < 2**31 - 1, f"sample_seed is {sample_seed}: it must lie in [0, 2**31 - 1)")
        if parts is not None:
            features.check(parts, config)
        self.config, self.sample_seed = config, sample_seed
        self.parts = features.make(config) if parts is None else parts
        self._given = parts is not None
        self._key = jax.random.fold_in(jax.random.key(config.seed), sample_seed + 1)
        self._row = 0
        self.d_in = config.d_in
        self.widths = [config.d_in]

    @property
    def features(self) -> Float[Array, "F d"]:
        """The true features, unit vectors, (F, d)."""
        return self.parts.features

    @property
    def bias(self) -> Float[Array, " d"]:
        """The bias of the activations, (d,)."""
        return self.parts.bias

    def with_samples(self, sample_seed: int) -> SyntheticWorld:
        """Return the same world at the start of another stream of samples, such as held-out ones."""
        world = SyntheticWorld(self.config, sample_seed=sample_seed, parts=self.parts)
        world._given = self._given
        return world

    def sample(self, row: int, n: int) -> Samples:
        """Return the rows from `row` on of the stream: activations (n, d) and feature activations (n, F)."""
        require(row >= 0 and n >= 1, f"row is {row} and n is {n}: give a row from 0 on, and at least one")
        pieces = [
            Samples(*(part[start:stop] for part in _piece(self.config, self.parts, self._key, number)))
            for number, start, stop in _parts_of_pieces(row, n)
        ]
        return Samples(*(jnp.concatenate(arrays) for arrays in zip(*pieces, strict=True)))

    def fill(self, rows: int) -> Filling:
        """Return the next `rows` activations, (rows, d)."""
        pieces, filled = [], 0
        for number, start, stop in _parts_of_pieces(self._row, rows):
            pieces.append(_activations(self.config, self.parts, self._key, number)[start:stop])
            filled += stop - start
            self._row += stop - start
            yield filled / rows
        return jnp.concatenate(pieces)

    def position(self) -> dict[str, Any]:
        """Return the number of the next row, and a digest of what the rows depend on."""
        return {"row": self._row, "world": self._digest}

    def seek(self, position: dict[str, Any]) -> None:
        """Move to a position that `position` returned.

        Raises:
          ConfigError: it is of another world, or of other samples.
        """
        require(
            position.get("world") == self._digest,
            "the position is of another synthetic world, or of samples with another seed: give the same settings",
        )
        self._row = int(position["row"])

    @functools.cached_property
    def _digest(self) -> str:
        """Return a digest of settings, seed of the samples and arrays that were given."""
        digest = hashlib.sha256(json.dumps([self.config.to_json(), self.sample_seed], sort_keys=True).encode())
        for array in self.parts if self._given else ():
            digest.update(np.asarray(array).tobytes())
        return digest.hexdigest()[:16]


def _parts_of_pieces(row: int, n: int) -> list[tuple[UInt[Array, ""], int, int]]:
    """Return the pieces that hold the rows [row, row + n): number, first row and the one after the last in it."""
    numbers = range(row // PIECE, -(-(row + n) // PIECE))
    require(numbers.stop <= 2**32, f"row {row + n} is too far: a stream has {2**32 * PIECE:,} rows")
    return [(jax.device_put(np.uint32(p)), max(row - p * PIECE, 0), min(row + n - p * PIECE, PIECE)) for p in numbers]


@functools.partial(jax.jit, static_argnums=0)
def _piece(config: WorldConfig, parts: features.Parts, key: Key[Array, ""], number: UInt[Array, ""]) -> Samples:
    """Return the rows of one piece of a stream."""
    keys = jax.random.split(jax.random.fold_in(key, number), 4)
    shape = (PIECE, config.num_features)
    shared = jax.random.normal(keys[0], (PIECE, parts.loadings.shape[1]))
    own = jnp.sqrt(1 - jnp.square(parts.loadings).sum(1))
    gaussian = _matmul(shared, parts.loadings.T) + own * jax.random.normal(keys[1], shape)
    threshold = -jax.scipy.special.ndtri(parts.probabilities)
    magnitudes = jax.nn.relu(parts.means + parts.spreads * jax.random.normal(keys[2], shape))
    values = jnp.where(gaussian > threshold, magnitudes, 0)
    if config.roots:
        values = _with_rules(config, parts, values, jax.random.uniform(keys[3], shape))
    return Samples(_matmul(values, parts.features) + parts.bias, values)


def _with_rules(
    config: WorldConfig, parts: features.Parts, values: Float[Array, "n F"], lots: Float[Array, "n F"]
) -> Float[Array, "n F"]:
    """Return the magnitudes after the rules of the trees: parents first, and one child of an exclusive parent.

    Args:
      config: with the trees.
      parts: means of the parents, and which of them are exclusive.
      values: magnitudes, (n, F).
      lots: uniform numbers; of several children that fire, the one with the largest stays.
    """
    n = len(values)
    for level in features.levels(config):
        parent = values[:, level.parents, None]
        child = values[:, level.children].reshape(n, -1, config.branching)
        factor = parent / parts.means[level.parents, None] if config.scale_children else 1
        child = jnp.where(parent > 0, child * factor, 0)
        lot = jnp.where(child > 0, lots[:, level.children].reshape(child.shape), -1)
        winner = jnp.arange(config.branching) == lot.argmax(-1, keepdims=True)
        stays = winner | ~parts.exclusive[level.parents, None]
        child = jnp.where(stays, child, 0)
        values = values.at[:, level.children].set(child.reshape(n, -1))
    return values


@functools.partial(jax.jit, static_argnums=0)
def _activations(
    config: WorldConfig, parts: features.Parts, key: Key[Array, ""], number: UInt[Array, ""]
) -> Float[Array, "n d"]:
    """Return the activations of one piece."""
    return _piece(config, parts, key, number).activations


def _matmul(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
