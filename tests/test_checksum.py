"""Checksums of arrays: every bit and every place counts, the sharding does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jsae import axes, checksum

DTYPES = ["float32", "bfloat16", "float16", "float8_e4m3fn", "int32", "int8", "uint8", "uint16", "bool", "int4"]


def array(dtype: str, shape: tuple[int, ...] = (7, 13)) -> jax.Array:
    return jax.random.bits(jax.random.key(0), shape, jnp.uint32).astype(jnp.int32).astype(dtype)


def of(x: jax.Array) -> str:
    return checksum.checksums((x,))["[0]"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_element_of_any_type_changes_every_word_of_the_checksum(dtype):
    x = array(dtype)
    before = of(x)
    for place in [(0, 0), (3, 5), (6, 12)]:
        other = jnp.logical_not(x[place]) if dtype == "bool" else (x[place].astype(jnp.float32) == 0).astype(dtype)
        after = of(x.at[place].set(other))
        assert all(before[i : i + 8] != after[i : i + 8] for i in range(0, 32, 8))


def test_every_bit_of_a_float_counts_even_those_that_comparisons_do_not_see():
    x = np.array([0.0, 1.0, np.nan], np.float32)
    found = {of(jnp.asarray(x))}
    for element in range(3):
        for bit in range(32):
            flipped = x.copy()
            flipped.view(np.uint32)[element] ^= np.uint32(1 << bit)
            found.add(of(jnp.asarray(flipped)))
    assert len(found) == 97


def test_the_places_of_numbers_count():
    x = array("float32")
    for other in (x[::-1], x[:, ::-1], jnp.roll(x, 1, 1), x.at[0, 0].set(x[0, 1]).at[0, 1].set(x[0, 0])):
        assert of(other) != of(x)
    assert of(jnp.zeros((64, 32)).at[3, 4].set(1.0)) != of(jnp.zeros((64, 32)).at[4, 3].set(1.0))


def test_a_page_of_zeros_is_noticed_and_so_is_a_swap_of_pages():
    x = array("float32", (64, 1024))
    assert len({of(x), *(of(x.at[row].set(0)) for row in range(64))}) == 65
    assert of(x.at[2].set(x[3]).at[3].set(x[2])) != of(x)


def test_a_sharded_array_has_the_checksum_of_the_whole():
    mesh = axes.make_mesh(latent=2)
    x = array("float32", (8, 16))
    for names in (("data", "latent"), ("latent", None), (None, ("data", "latent"))):
        cut = jax.device_put(x, jax.NamedSharding(mesh, jax.P(*names)))
        assert of(cut) == of(x)


def test_numbers_keys_and_empty_arrays_have_checksums_of_their_own():
    tree = {
        "number": jnp.int32(3),
        "next": jnp.int32(4),
        "key": jax.random.key(0),
        "other": jax.random.key(1),
        "complex": jnp.array([1 + 2j]),
        "conjugate": jnp.array([1 - 2j]),
    }
    assert len(set(checksum.checksums(tree).values())) == len(tree)
    assert of(jnp.zeros((0, 3))) == "0" * 32


def test_arrays_are_named_by_their_path():
    assert list(checksum.checksums({"a": (jnp.zeros(2), {"b": jnp.zeros(1)})})) == ["['a'][0]", "['a'][1]['b']"]
