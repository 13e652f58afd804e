"""Checksums of arrays, computed where the arrays are: on the device, in shards, without a copy on the host."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped, UInt

_SALTS = (0x9E3779B9, 0x85EBCA6B, 0xC2B2AE35)


def of(tree: Any) -> dict[str, str]:
    """Return the checksum of every array of a tree: 128 bits in hexadecimal digits by the array's path in the tree.

    A checksum depends on every bit of the array and on its place, but not on the sharding, the device or the number of
    processes, because it consists of sums modulo 2**32. A change within one element always changes it; any other change
    is missed with a probability of about 2**-128. It notices damage, not forgery.
    """
    words = jax.device_get({name: _sums(leaf) for name, leaf in named(tree).items()})
    return {name: "".join(f"{int(word):08x}" for word in sums) for name, sums in words.items()}


def named(tree: Any) -> dict[str, Any]:
    """Return the leaves of a tree, arrays or abstract ones, by their path in it, such as `[0].sae.W_enc`."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


@jax.jit
def _sums(array: Shaped[Array, "..."]) -> UInt[Array, "4"]:
    """Return four sums of the words of an array, each over another bijection of a word that its place has changed."""
    words = _words(array)
    mixed = _mix(words ^ _places(words.shape))
    sums = [mixed.sum(dtype=jnp.uint32)]
    for salt in _SALTS:
        mixed = (mixed ^ jnp.uint32(salt)) * jnp.uint32(0x2C1B3C6D)
        mixed ^= mixed >> 15
        sums.append(mixed.sum(dtype=jnp.uint32))
    return jnp.stack(sums)


def _words(array: Shaped[Array, "..."]) -> UInt[Array, "..."]:
    """Return the bits of every element as a 32-bit word; wider elements become several along another axis."""
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        array = jnp.stack([array.real, array.imag], axis=-1)
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    bits = min(jax.dtypes.itemsize_bits(array.dtype), 32)
    return jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{bits}")).astype(jnp.uint32)


def _places(shape: tuple[int, ...]) -> UInt[Array, "..."]:
    """Return a word for every place of an array of this shape: no counter overflows, however large the array is."""
    places = jnp.zeros((), jnp.uint32)
    for axis in range(len(shape)):
        along = tuple(size if axis == other else 1 for other, size in enumerate(shape))
        numbers = jax.lax.broadcasted_iota(jnp.uint32, along, axis)
        # Without the barrier XLA works the words out anew for every element.
        places = places ^ jax.lax.optimization_barrier(_mix((numbers + jnp.uint32(axis + 1)) * jnp.uint32(0x9E3779B1)))
    return places


def _mix(word: UInt[Array, "..."]) -> UInt[Array, "..."]:
    """Return a bijection of 32-bit words in which every bit depends on every other."""
    word = (word ^ (word >> 16)) * jnp.uint32(0x7FEB352D)
    word = (word ^ (word >> 15)) * jnp.uint32(0x846CA68B)
    return word ^ (word >> 16)
