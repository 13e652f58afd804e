"""Checksums of arrays, computed on their device and in their shards, without a copy on the host."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped, UInt

_SALTS = (0x9E3779B9, 0x85EBCA6B, 0xC2B2AE35)


def checksums(tree: Any) -> dict[str, str]:
    """Return the 128-bit checksum of every array in a tree, as hexadecimal digits by the array's path.

    A checksum depends on all bits of the array and their positions, but not on the sharding, the device or the number
    of processes, because it consists of sums modulo 2**32. It detects every change within one element, and misses any
    other change with a probability of about 2**-128. It detects damage, not forgery.
    """
    words = jax.device_get({name: _sums(leaf) for name, leaf in leaves_by_path(tree).items()})
    return {name: "".join(f"{int(word):08x}" for word in sums) for name, sums in words.items()}


def leaves_by_path(tree: Any) -> dict[str, Any]:
    """Return the leaves of a tree, concrete or abstract arrays, by their path, such as `[0].sae.W_enc`."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


@jax.jit
def _sums(array: Shaped[Array, "..."]) -> UInt[Array, "4"]:
    """Return four sums over the words of an array, each word mixed with its position by a different bijection."""
    words = _words(array)
    mixed = _mix(words ^ _position_words(words.shape))
    sums = [mixed.sum(dtype=jnp.uint32)]
    for salt in _SALTS:
        mixed = (mixed ^ jnp.uint32(salt)) * jnp.uint32(0x2C1B3C6D)
        mixed ^= mixed >> 15
        sums.append(mixed.sum(dtype=jnp.uint32))
    return jnp.stack(sums)


def _words(array: Shaped[Array, "..."]) -> UInt[Array, "..."]:
    """Return the bits of every element as a 32-bit word; wider elements become several words along a new axis."""
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        array = jnp.stack([array.real, array.imag], axis=-1)
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    bits = min(jax.dtypes.itemsize_bits(array.dtype), 32)
    return jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{bits}")).astype(jnp.uint32)


def _position_words(shape: tuple[int, ...]) -> UInt[Array, "..."]:
    """Return a word for every position in an array, from one counter per axis, so that large arrays do not overflow."""
    positions = jnp.zeros((), jnp.uint32)
    for axis in range(len(shape)):
        along = tuple(size if axis == other else 1 for other, size in enumerate(shape))
        numbers = jax.lax.broadcasted_iota(jnp.uint32, along, axis)
        # Without the barrier XLA recomputes the words for every element.
        words = jax.lax.optimization_barrier(_mix((numbers + jnp.uint32(axis + 1)) * jnp.uint32(0x9E3779B1)))
        positions = positions ^ words
    return positions


def _mix(word: UInt[Array, "..."]) -> UInt[Array, "..."]:
    """Return each 32-bit word mapped by a bijection in which every output bit depends on every input bit."""
    word = (word ^ (word >> 16)) * jnp.uint32(0x7FEB352D)
    word = (word ^ (word >> 15)) * jnp.uint32(0x846CA68B)
    return word ^ (word >> 16)
