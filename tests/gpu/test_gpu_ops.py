"""The operations that a GPU chooses against the reference on the same GPU, at real and at odd sizes.

Products of float32 are computed in full float32 on both sides, so that what differs is the kernels' own.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from card import REHEARSED, distance, show

from jsae import auxk, formulas
from jsae.ops import AdamScalars, AdamSettings, Codes, Input, Moments, Ops, Reference, choose

DTYPES = ("float32", "bfloat16")
NEAR = {"float32": 1e-5, "bfloat16": 1e-2}
"""Largest relative distance of sums of rows; with the 8 bits of bfloat16 a sum of rounded terms is off by 0.003."""


class Size(NamedTuple):
    """Tokens, latents, codes per token, width."""

    n: int
    f: int
    k: int
    d: int


SIZES = {
    "reference": Size(128, 2560, 16, 160) if REHEARSED else Size(2048, 20480, 64, 1280),
    "few tokens": Size(64, 2560, 8, 160) if REHEARSED else Size(512, 20480, 32, 1280),
    "odd": Size(300, 1000, 7, 200),
    "narrow": Size(61, 97, 5, 33),
    "one code": Size(128, 4096, 1, 768),
}


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.fixture(autouse=True)
def full_float32() -> Iterator[None]:
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(params=SIZES)
def size(request) -> Size:
    return SIZES[request.param]


@pytest.fixture(params=DTYPES)
def pair(request) -> tuple[Ops, Ops]:
    """What the device chooses, and the reference."""
    return choose(request.param), Reference(request.param)


def both(pair: tuple[Ops, Ops], results: Callable[..., Any], *arrays: Any) -> list[Any]:
    """Return `results(ops, *arrays)` of both; the compiler would fold constant arrays for minutes."""
    return [jax.jit(functools.partial(results, ops))(*arrays) for ops in pair]


def skewed(size: Size, seed: int = 3) -> Codes:
    """Return codes whose latents fire unevenly: latent 0 on a third of the tokens, the others ever more rarely."""
    random = np.random.default_rng(seed)
    rare = (size.f * random.random((size.n, size.k)) ** 4).astype(np.int32)
    rare = (rare + np.arange(size.k) * 7919) % size.f
    rare[:, 0] = np.where(random.random(size.n) < 1 / 3, 0, rare[:, 0])
    return Codes(jnp.asarray(random.standard_normal((size.n, size.k)), jnp.float32), jnp.asarray(rare, jnp.int32))


def evenly(size: Size) -> Codes:
    """Return codes whose latents fire about equally often."""
    return Reference().top_k(normal(4, size.n, size.f), size.k)


def test_the_device_has_its_own_operations_or_the_fallback_and_both_say_their_names():
    for dtype in DTYPES:
        ops = choose(dtype)
        show(f"chosen for {dtype}: {ops.name} {ops}")
        assert ops.matmul_dtype == dtype
        assert ops.name != "reference"


# ---- selection -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["top_k", "abs_top_k", "batch_top_k"])
def test_the_largest_are_selected(pair, size, name):
    pre, k = normal(1, size.n, size.f), size.k
    found, wanted = both(pair, lambda ops, pre: getattr(ops, name)(pre, k), pre)
    tokens = [np.broadcast_to(np.asarray(codes.tokens), codes.values.shape) for codes in (found, wanted)]
    pairs = [
        set(zip(where.ravel().tolist(), np.asarray(codes.indices).ravel().tolist(), strict=True))
        for where, codes in zip(tokens, (found, wanted), strict=True)
    ]
    assert pairs[0] == pairs[1]
    np.testing.assert_array_equal(np.sort(np.ravel(found.values)), np.sort(np.ravel(wanted.values)))
    np.testing.assert_array_equal(np.asarray(found.values), np.asarray(pre)[tokens[0], np.asarray(found.indices)])


def test_equal_values_are_selected_as_often_as_there_is_room(pair):
    ours, _ = pair
    pre = jnp.tile(jnp.float32([0, 1, 1, 1, 2, -1, 1, 0]), (128, 12))
    codes = jax.jit(functools.partial(ours.top_k, k=20))(pre)
    indices = np.asarray(codes.indices)
    assert all(len(set(row)) == 20 for row in indices.tolist())
    np.testing.assert_array_equal(np.sort(codes.values, axis=1), np.tile(np.float32([1] * 8 + [2] * 12), (128, 1)))


@pytest.mark.parametrize("name", ["top_k", "batch_top_k"])
def test_an_encoder_selects_the_best_up_to_rounding(pair, size, name):
    ours, _ = pair
    x, W, b_enc, b_in = (
        normal(1, size.n, size.d),
        normal(2, size.f, size.d) / size.d**0.5,
        normal(3, size.f),
        normal(5, size.d),
    )
    inputs = Input(x, jnp.float32(1.25), b_in)

    def codes(ops: Ops, inputs: Input, W: jax.Array, b_enc: jax.Array) -> Codes:
        return ops.encode(inputs, W, b_enc, functools.partial(getattr(ops, name), k=size.k), by_token=name == "top_k")

    exact = jax.jit(Reference().pre_activations)(inputs, W, b_enc)
    found, wanted = both(pair, codes, inputs, W, b_enc)
    picked = exact[found.tokens, found.indices]
    near = 1e-4 if ours.matmul_dtype == "float32" else 0.12
    error = float(jnp.abs(found.values - picked).max())
    lost = float(jnp.sort(exact[wanted.tokens, wanted.indices].ravel()).sum() - picked.sum()) / picked.size
    show(f"encode {name} {size} {ours.matmul_dtype}", error=error, lost=lost)
    assert error < near
    assert abs(lost) < near / 10
    assert len(np.unique(np.asarray(found.tokens) * size.f + np.asarray(found.indices))) == picked.size


# ---- sums of rows --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codes_of", [evenly, skewed])
def test_the_decoder_and_its_gradients_are_the_references(pair, size, codes_of):
    ours, _ = pair
    codes, W, g, start = codes_of(size), normal(1, size.f, size.d), normal(2, size.n, size.d), normal(6, size.n, size.d)

    def results(ops: Ops, codes: Codes, W: jax.Array, start: jax.Array, g: jax.Array) -> tuple[jax.Array, ...]:
        def decoded(values, W, start):
            return ops.decode(codes._replace(values=values), W, start)

        out, back = jax.vjp(decoded, codes.values, W, start)
        return out, *back(g)

    found = both(pair, results, codes, W, start, g)

    far = dict(zip(("output", "values", "W_dec", "start"), map(distance, *found), strict=True))
    show(f"decode {codes_of.__name__} {size} {ours.matmul_dtype}", **far)
    assert {name: gap for name, gap in far.items() if not gap < NEAR[ours.matmul_dtype]} == {}


def test_the_encoders_gradients_are_the_references(pair, size):
    ours, _ = pair
    x, W, b_enc, b_in = normal(1, size.n, size.d), normal(2, size.f, size.d), normal(3, size.f), normal(5, size.d)
    picked, g = evenly(size), normal(7, size.n, size.k)

    def results(ops: Ops, x: jax.Array, W: jax.Array, b_enc: jax.Array, b_in: jax.Array, picked: Codes, g: jax.Array):
        def select(pre, limit=None, bias=None):  # the same codes, however products are rounded
            values = pre[picked.tokens, picked.indices].astype(jnp.float32)
            return picked._replace(values=values if bias is None else values + bias[picked.indices])

        def encoded(W, b_enc, b_in):
            return ops.encode(Input(x, jnp.float32(0.5), b_in), W, b_enc, select, by_token=False).values

        out, back = jax.vjp(encoded, W, b_enc, b_in)
        return out, *back(g)

    found = both(pair, results, x, W, b_enc, b_in, picked, g)
    far = dict(zip(("values", "W_enc", "b_enc", "b_in"), map(distance, *found), strict=True))
    show(f"encode {size} {ours.matmul_dtype}", **far)
    assert {name: gap for name, gap in far.items() if not gap < NEAR[ours.matmul_dtype]} == {}


@pytest.mark.parametrize("name", ["reference", "odd"])
def test_nested_levels_are_the_references(pair, name):
    ours, _ = pair
    size = SIZES[name]
    codes, W = evenly(size), normal(1, size.f, size.d)
    widths = (size.f // 16, size.f // 4, size.f)
    g = normal(2, len(widths), size.n, size.d)

    def results(ops: Ops, codes: Codes, W: jax.Array, g: jax.Array) -> tuple[jax.Array, ...]:
        def decoded(values, W):
            return ops.decode_levels(codes._replace(values=values), W, widths, size.n)

        out, back = jax.vjp(decoded, codes.values, W)
        return out, *back(g)

    found = both(pair, results, codes, W, g)
    far = dict(zip(("output", "values", "W_dec"), map(distance, *found), strict=True))
    show(f"levels {size} {ours.matmul_dtype}", **far)
    assert {what: gap for what, gap in far.items() if not gap < 2 * NEAR[ours.matmul_dtype]} == {}


@pytest.mark.parametrize("dead_of", [1.0, 0.5, 0.001, 0.0], ids=["all dead", "half dead", "few dead", "none dead"])
def test_auxk_of_dead_latents_is_the_references(pair, dead_of):
    ours, _ = pair
    size = SIZES["few tokens"]
    x, W_enc, W_dec = normal(1, size.n, size.d), normal(2, size.f, size.d) / size.d**0.5, normal(3, size.f, size.d)
    dead = jnp.arange(size.f) < dead_of * size.f

    def results(ops: Ops, x: jax.Array, W_enc: jax.Array, W_dec: jax.Array, dead: jax.Array) -> jax.Array:
        return jnp.stack(auxk.decode_dead(ops, Input(x), W_enc, jnp.zeros(size.f), W_dec, dead, 8, 5)).sum(0)

    ours_out, reference_out = both(pair, results, x, W_enc, W_dec, dead)
    far = distance(ours_out, reference_out) if dead_of else float(jnp.abs(ours_out).max())
    show(f"dead {dead_of} {ours.matmul_dtype}", distance=far)
    assert far < (1e-3 if ours.matmul_dtype == "float32" else 0.1)  # rounding decides between the last tokens


# ---- optimiser -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit_rows", [False, True], ids=["free rows", "unit rows"])
def test_adam_is_the_references(pair, size, unit_rows):
    p, g = normal(1, size.f, size.d), normal(2, size.f, size.d)
    p = p / jnp.linalg.norm(p, axis=1, keepdims=True) if unit_rows else p
    moments = Moments(p, 0.1 * normal(3, size.f, size.d), jnp.square(0.1 * normal(4, size.f, size.d)))
    scalars = AdamScalars(jnp.float32(0.3), jnp.float32(1e-2), jnp.float32(1.5))
    settings = AdamSettings(0.9, 0.999, 1e-8, 1.0, unit_rows)
    found, wanted = both(pair, lambda ops, g, moments: ops.adam(scalars, settings, g, moments), g, moments)
    far = {name: distance(a, b) for name, a, b in zip(Moments._fields, found, wanted, strict=True)}
    show(f"adam {size}", **far)
    assert max(far.values()) < 1e-5
    if unit_rows:
        np.testing.assert_allclose(np.linalg.norm(np.asarray(found.p), axis=1), 1, rtol=1e-5)


# ---- elementwise parts of dense architectures ----------------------------------------------------------------------

FORMULAS = {
    "rectified": (formulas.Rectified(), 0),
    "gated": (formulas.GatedMagnitude(), 3),
    "tanh jump": (formulas.TanhJump(0.8), 2),
    "counted jump": (formulas.CountedJump(0.8), 1),
    "log rectified": (formulas.LogRectified(), 1),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_latents_are_mapped_and_summed_with_all_gradients(size, name):
    formula, count = FORMULAS[name]
    arrays = tuple(jnp.abs(normal(6 + i, size.f)) / 2 for i in range(count))
    x, W, bias = normal(1, size.n, size.d), normal(2, size.f, size.d) / size.d**0.5, normal(3, size.f) / 4

    def results(ops: Ops, x: jax.Array, W: jax.Array, bias: jax.Array, arrays: tuple[jax.Array, ...]) -> Any:
        def total(x, W, bias, arrays):
            maps, sums = ops.map_latents(Input(x), W, bias, formula, arrays)
            return sum(jnp.square(one).mean() for one in (*maps, *sums)), sums

        return jax.value_and_grad(total, (1, 2, 3), has_aux=True)(x, W, bias, arrays)

    found, wanted = both((choose("float32"), Reference("float32")), results, x, W, bias, arrays)
    far = [distance(a, b) for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)]
    show(f"map {name} {size}", far=max(far))
    assert max(far) < 2e-3


def test_latents_are_counted_and_added(size):
    latents = jnp.maximum(normal(1, size.n, size.f) - 1, 0)
    (counts, sums), (their_counts, their_sums) = both(
        (choose("float32"), Reference("float32")), lambda ops, latents: ops.latent_totals(latents), latents
    )
    np.testing.assert_array_equal(counts, their_counts)
    np.testing.assert_allclose(sums, their_sums, rtol=1e-5)


@pytest.mark.parametrize("name", FORMULAS)
def test_numbers_that_are_not_finite_stay_so(name):
    formula, count = FORMULAS[name]
    x = normal(1, 700, 40).at[3, 2].set(jnp.nan)
    arrays = tuple(jnp.full(300, 0.3) for _ in range(count))
    (_, sums), (_, theirs) = both(
        (choose("float32"), Reference("float32")),
        lambda ops, x: ops.map_latents(Input(x), normal(2, 300, 40), jnp.zeros(300), formula, arrays),
        x,
    )
    assert [bool(jnp.isnan(a).any()) for a in sums] == [bool(jnp.isnan(a).any()) for a in theirs]
