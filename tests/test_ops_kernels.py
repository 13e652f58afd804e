"""The Triton kernels, in Triton's interpreter on the processor, against the reference."""

import functools
import importlib.metadata
import importlib.util
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packaging.version import Version

if importlib.util.find_spec("triton") is None or Version(importlib.metadata.version("triton")) < Version("3.7"):
    if os.environ.get("JSAE_REQUIRE_TRITON"):
        raise ModuleNotFoundError("JSAE_REQUIRE_TRITON is set, but there is no triton 3.7 or newer: install it")
    pytest.skip("needs triton 3.7 or newer, which is not installed", allow_module_level=True)

from triton_interpreter import interpreted

from jsae import axes, formulas, loop
from jsae.architectures import sae_config
from jsae.config import TrainConfig
from jsae.loop import Member
from jsae.ops import AdamScalars, AdamSettings, Codes, Gpu, Input, Moments, Ops, Reference, Sharded
from jsae.ops.formulas import Formula, evaluate
from jsae.ops.kernels import latents, launch, pairs, selection

REFERENCE = Reference()
DTYPES = ("float32", "bfloat16")
SIZES = {"powers of two": (4, 64, 4, 16), "odd": (3, 101, 7, 13), "long": (2, 300, 20, 40)}  # n, f, k, d


@pytest.fixture(autouse=True)
def on_the_processor(monkeypatch):
    monkeypatch.setattr(launch, "outputs_follow_aliases", lambda: True)
    monkeypatch.setattr(selection, "_TURNS", 2)
    with interpreted():
        yield


@pytest.fixture(params=DTYPES)
def ops(request) -> Gpu:
    return Gpu(request.param)


@pytest.fixture(params=SIZES)
def sizes(request) -> tuple[int, int, int, int]:
    return SIZES[request.param]


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def rounded(array: jax.Array, ops: Gpu) -> jax.Array:
    """The numbers that the dtype of the products can hold."""
    return array.astype(ops.storage).astype(jnp.float32)


def close(ours, theirs, ops: Gpu) -> None:
    """Both trees are the same, to the rounding of the products."""
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        error = np.linalg.norm(np.ravel(a - b)) / (np.linalg.norm(np.ravel(b)) + 1e-20)
        assert error < (1e-5 if ops.matmul_dtype == "float32" else 1e-2), error


# ---- selection -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["top_k", "abs_top_k"])
def test_the_largest_of_every_row_are_selected_with_and_without_a_bias(ops, sizes, name):
    n, f, k, _ = sizes
    pre, bias = rounded(normal(1, n, f), ops), normal(2, f).at[3].set(-jnp.inf)
    for added in (None, bias):
        ours = getattr(ops, name)(pre.astype(ops.storage), k, bias=added)
        theirs = getattr(REFERENCE, name)(pre, k, bias=added)
        np.testing.assert_array_equal(ours.dense(n, f), theirs.dense(n, f))
        assert all(len(set(row)) == k for row in np.asarray(ours.indices).tolist())


def test_of_equal_values_exactly_k_are_selected_and_with_a_limit_only_the_largest_count(ops):
    pre = (jnp.round(normal(0, 6, 96) * 2) / 2).at[:, ::3].set(-jnp.inf).at[0, 5].set(jnp.inf)
    ours = ops.top_k(pre.astype(ops.storage), 40)
    np.testing.assert_array_equal(-np.sort(-ours.values), jax.lax.top_k(pre, 40)[0])
    np.testing.assert_array_equal(jnp.take_along_axis(pre, ours.indices, 1), ours.values)
    assert all(len(set(row)) == 40 for row in np.asarray(ours.indices).tolist())
    limited = ops.top_k(pre.astype(ops.storage), 40, jnp.int32(3))
    np.testing.assert_array_equal(limited.values, REFERENCE.top_k(pre, 40, jnp.int32(3)).values)


def test_a_selection_too_long_for_a_program_is_left_to_xla(ops):
    pre = rounded(normal(0, 2, 20_000), ops)
    assert not selection.fits(20_000, 19_000)
    np.testing.assert_array_equal(
        ops.top_k(pre.astype(ops.storage), 19_000).values, REFERENCE.top_k(pre, 19_000).values
    )


@pytest.mark.parametrize(("name", "shift"), [("odd", 0.0), ("long", -1.5), ("powers of two", -9.0)])
def test_the_largest_of_a_batch_are_selected_in_the_order_of_their_tokens(ops, name, shift):
    n, f, k, _ = SIZES[name]
    pre = rounded(normal(3, n, f) + shift, ops)
    ours, theirs = ops.batch_top_k(pre.astype(ops.storage), k), REFERENCE.batch_top_k(pre, k)
    np.testing.assert_array_equal(jnp.sort(ours.values.ravel()), jnp.sort(theirs.values.ravel()))
    kept = ours.values.ravel() > 0
    np.testing.assert_array_equal(pre[ours.rows.ravel()[kept], ours.indices.ravel()[kept]], ours.values.ravel()[kept])
    codes = list(zip(ours.rows.ravel()[kept].tolist(), ours.indices.ravel()[kept].tolist(), strict=True))
    assert len(set(codes)) == len(codes)
    assert [row for row, _ in codes] == sorted(row for row, _ in codes)


def test_codes_that_fill_up_a_batch_are_work_for_no_token_and_for_no_single_latent():
    n, f, k, d = 6, 40, 8, 16
    pre = normal(0, n, f).at[2:].add(-9.0)  # only two tokens have positive latents
    codes = selection.batch_top_k(pre, k, None, None)
    real = int((pre > 0).sum())
    starts = pairs.starts_of_tokens(codes, n)
    assert real < n * k
    assert int(starts[-1]) == int((codes.values != 0).sum()) == real
    assert np.bincount(codes.indices.ravel()[real:], minlength=f).max() == 1
    dots = pairs.dots(codes, normal(1, n, d), normal(2, f, d)).ravel()
    assert np.all(dots[:real] != 0)
    assert np.all(dots[real:] == 0)


def test_a_batch_with_a_bias_a_limit_and_equal_values_keeps_exactly_as_many(ops):
    n, f, k = 5, 60, 8
    pre, bias = jnp.round(normal(4, n, f) * 2) / 2, jnp.round(normal(5, f))
    limit = jnp.int32(3)
    ours = ops.batch_top_k(pre.astype(ops.storage), k, limit, bias)
    theirs = REFERENCE.batch_top_k(pre, k, limit, bias)
    assert int((ours.values > 0).sum()) == int((theirs.values > 0).sum()) == n * 3
    np.testing.assert_array_equal(jnp.sort(ours.values.ravel()), jnp.sort(theirs.values.ravel()))


def test_the_threshold_of_many_numbers_is_found_exactly():
    values = normal(6, 4, 700) ** 3
    for count in (1, 1000):
        bits = selection.kth_largest(values, count)
        assert float(jax.lax.bitcast_convert_type(bits, jnp.float32)) == float(np.sort(values.ravel())[-count])
    assert int(selection.kth_largest(values, 2800)) == 0


# ---- sums of rows --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["top_k", "batch_top_k"])
def test_decode_and_its_gradients_equal_the_reference(ops, sizes, name):
    n, f, k, d = sizes
    codes = getattr(REFERENCE, name)(normal(3, n, f), k)
    W, g, start = (rounded(a, ops) for a in (normal(1, f, d), normal(2, n, d), normal(4, n, d)))

    def total(ops, values, W, start):
        return (ops.decode(codes._replace(values=values), W, start) * g).sum()

    given = (codes.values, W, start)
    ours, theirs = (jax.value_and_grad(functools.partial(total, o), (0, 1, 2))(*given) for o in (ops, REFERENCE))
    close(ours, theirs, ops)


def test_levels_and_their_gradients_equal_the_reference(ops):
    n, f, k, d = 4, 60, 5, 16
    codes, widths = REFERENCE.batch_top_k(normal(3, n, f), k), (7, 30)
    W, g = rounded(normal(1, f, d), ops), rounded(normal(2, 2, n, d), ops)

    def total(ops, values, W):
        return (ops.decode_levels(codes._replace(values=values), W, widths, n) * g).sum()

    ours, theirs = (jax.value_and_grad(functools.partial(total, o), (0, 1))(codes.values, W) for o in (ops, REFERENCE))
    close(ours, theirs, ops)


def test_a_latent_that_fires_on_most_tokens_is_summed_in_parts_that_give_the_same():
    n, f, d = 90, 8, 5
    indices = jnp.where(jnp.arange(n)[:, None] % 9 < 7, 3, jnp.arange(n)[:, None] % f).astype(jnp.int32)
    codes, rows = Codes(normal(1, n, 1), indices), normal(2, n, d)
    expected = codes.dense(n, f).T @ rows
    for span in (4, 16, 256):
        np.testing.assert_allclose(pairs.latent_sums(codes, rows, f, span=span), expected, rtol=1e-5, atol=1e-5)
    sums, counts = pairs.value_sums(codes, f)
    np.testing.assert_allclose(sums, codes.dense(n, f).sum(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(counts, (codes.dense(n, f) != 0).sum(0))


@pytest.mark.parametrize("allowed", [None, "some"])
def test_encoder_and_its_gradients_equal_the_reference(ops, sizes, allowed):
    n, f, k, d = sizes
    x, W, b_enc, b_in = normal(7, n, d), normal(8, f, d), 0.3 * normal(5, f), normal(6, d)
    mask = None if allowed is None else jnp.arange(f) % 2 == 0

    def ours(W, b_enc, b_in):
        inputs = Input(x, jnp.float32(1.3), b_in)
        codes = ops.encode(inputs, W, b_enc, functools.partial(ops.top_k, k=k), allowed=mask)
        return jnp.square(codes.values).sum()

    def dense(W, b_enc, b_in):
        pre = Reference(ops.matmul_dtype).pre_activations(Input(x, jnp.float32(1.3), b_in), W, b_enc)
        shown = rounded(pre, ops) if mask is None else jnp.where(mask, rounded(pre, ops), -jnp.inf)
        indices = jax.lax.top_k(shown, k)[1]
        exact = jnp.take_along_axis(pre, indices, 1)
        kept = jnp.take_along_axis(shown, indices, 1)
        return jnp.where(jnp.isneginf(kept), 0, jnp.square(exact + jax.lax.stop_gradient(kept - exact))).sum()

    given = (W, b_enc, b_in)
    close(jax.value_and_grad(ours, (0, 1, 2))(*given), jax.value_and_grad(dense, (0, 1, 2))(*given), ops)


def test_a_batch_encoded_in_chunks_gives_the_same_codes(ops):
    n, f, k, d = 12, 64, 4, 16
    inputs, W, b_enc = Input(normal(7, n, d)), normal(8, f, d), normal(5, f)
    select = functools.partial(ops.top_k, k=k)
    whole = ops.encode(inputs, W, b_enc, select)
    chunked = Gpu(ops.matmul_dtype, chunk=3 * f).encode(inputs, W, b_enc, select)
    np.testing.assert_array_equal(chunked.dense(n, f), whole.dense(n, f))


# ---- whole steps ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [16, 40])
def test_adam_of_unit_rows_equals_the_reference(d):
    W = normal(1, 13, d)
    moments = Moments(W / jnp.linalg.norm(W, axis=1, keepdims=True), normal(2, 13, d), jnp.square(normal(3, 13, d)))
    scalars = AdamScalars(jnp.float32(0.7), jnp.float32(0.01), jnp.float32(1.2))
    settings = AdamSettings(0.9, 0.999, 1e-8, 1.5, True)
    ours, theirs = (o.adam(scalars, settings, normal(4, 13, d), moments) for o in (Gpu(), REFERENCE))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


# ---- elementwise parts of dense architectures ----------------------------------------------------------------------

FORMULAS = (
    formulas.Rectified(),
    formulas.GatedMagnitude(),
    formulas.TanhJump(0.8),
    formulas.CountedJump(0.8),
    formulas.LogRectified(),
)


def test_every_formula_has_a_kernel():
    assert [latents.FORMULAS[formula.name].number for formula in FORMULAS] == [0, 1, 2, 3, 4]
    assert len(latents.FORMULAS) == len(FORMULAS)


@pytest.mark.parametrize("formula", FORMULAS, ids=lambda formula: formula.name)
@pytest.mark.parametrize("shape", [(37, 300), (16, 8), (3, 5)], ids=str)
def test_maps_sums_and_all_gradients_equal_the_formulas(ops, formula, shape, monkeypatch):
    monkeypatch.setattr(latents, "_SPAN", 16)
    form, (n, f) = latents.FORMULAS[formula.name], shape
    pre, bias = normal(0, n, f).astype(ops.storage), normal(2, f) / 4
    arrays = tuple(jnp.abs(normal(3 + i, f)) / 2 for i in range(form.arrays))
    weights = [rounded(normal(6 + i, n, f), ops) for i in range(form.maps)]
    weights += [normal(9 + i, f) for i in range(form.terms)]

    def total(evaluate, pre, bias, arrays):
        maps, sums = evaluate(formula, pre, bias, arrays)
        outputs = [*(one.astype(jnp.float32) for one in maps), *sums]
        return sum((output * weight).sum() for output, weight in zip(outputs, weights, strict=True)), outputs

    def plain(formula, pre, bias, arrays):
        return evaluate(formula, pre.astype(jnp.float32) + bias, arrays)

    (ours, theirs) = (
        jax.grad(functools.partial(total, function), (0, 1, 2), has_aux=True)(pre, bias, arrays)
        for function in (latents.evaluate, plain)
    )
    close(ours, theirs, ops)


@pytest.mark.parametrize("formula", FORMULAS, ids=lambda formula: formula.name)
def test_latents_are_mapped_with_their_bias_and_gradients_reach_encoder_and_input(formula):
    arrays = tuple(jnp.abs(normal(3 + i, 30)) / 2 for i in range(latents.FORMULAS[formula.name].arrays))

    def total(ops, x, W, bias, b_in):
        maps, sums = ops.map_latents(Input(x, None, b_in), W, bias, formula, arrays)
        return sum(jnp.square(one).sum() for one in (*maps, *sums))

    of_all = jax.value_and_grad(total, (1, 2, 3, 4))
    ours, theirs = (
        of_all(o, normal(0, 9, 7), normal(1, 30, 7), normal(2, 30), normal(5, 7)) for o in (Gpu(), REFERENCE)
    )
    close(ours, theirs, Gpu())


@pytest.mark.parametrize("formula", FORMULAS, ids=lambda formula: formula.name)
def test_numbers_that_are_not_finite_stay_so(formula):
    odd = jnp.float32([jnp.nan, jnp.inf, -jnp.inf, 0.0, 0.3, -0.3, 1.0])
    pre, bias = jnp.tile(odd, (3, 1)), jnp.zeros(len(odd))
    arrays = tuple(jnp.full(len(odd), 0.3) for _ in range(latents.FORMULAS[formula.name].arrays))
    (maps, sums), (their_maps, their_sums) = (
        latents.evaluate(formula, pre, bias, arrays),
        evaluate(formula, pre, arrays),
    )
    for ours, theirs in zip((*maps, *sums), (*their_maps, *their_sums), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("formula", ["squared", "rectified"])
def test_a_formula_without_a_kernel_is_left_to_xla(ops, formula):
    x, W, bias = rounded(normal(0, 6, 7), ops), rounded(normal(1, 9, 7), ops), normal(2, 9)
    formula = {"squared": Squared(), "rectified": Leaky()}[formula]
    ours, theirs = (o.map_latents(Input(x), W, bias, formula, ()) for o in (ops, REFERENCE))
    close(ours, theirs, ops)


@pytest.mark.parametrize("shape", [(37, 300), (16, 8)], ids=str)
def test_latents_are_counted_and_added_as_by_the_reference(ops, shape, monkeypatch):
    monkeypatch.setattr(latents, "_SPAN", 16)
    values = rounded(jnp.maximum(normal(0, *shape), 0), ops).at[:, 3].set(0)
    (counts, sums), (their_counts, their_sums) = (o.latent_totals(values) for o in (ops, REFERENCE))
    np.testing.assert_array_equal(counts, their_counts)
    np.testing.assert_allclose(sums, their_sums, rtol=1e-6)


class Squared(Formula):
    """A formula of a user's own."""

    name = "squared"

    def __call__(self, pre, *arrays):
        return (pre * pre,), (pre,)


class Leaky(formulas.Rectified):
    """A formula derived from one that has a kernel."""

    def __call__(self, pre, *arrays):
        return (jnp.where(pre > 0, pre, pre / 8),), (pre,)


STEPPED = {
    "topk": sae_config("topk", 12, 40, k=4),
    "a transcoder": sae_config("topk", 12, 40, k=4, d_out=9, skip=True),
    "matryoshka": sae_config("matryoshka", 12, 40, k=4, nested_widths=(5, 20)),
    "abstopk": sae_config("abstopk", 12, 40, k=4),
    "relu": sae_config("relu", 12, 40, l1_coefficient=0.1),
    "relu with L1": sae_config("relu", 12, 40, l1_coefficient=0.1, sparsity_penalty="l1"),
    "gated": sae_config("gated", 12, 40, l1_coefficient=0.1),
    "jumprelu": sae_config("jumprelu", 12, 40),
    "jumprelu by its count": sae_config("jumprelu", 12, 40, jump_recipe="l0"),
}


@pytest.mark.parametrize("name", STEPPED)
def test_training_steps_equal_those_of_the_reference(name):
    config = STEPPED[name]
    member = Member(config, TrainConfig(64 * 24, 24, learning_rate=3e-3, dead_after=30))
    targets = normal(1, 24, config.width_out)
    batch = (normal(0, 24, 12), targets) if config.is_transcoder else normal(0, 24, 12)
    sides = []
    for ops in (Gpu(), REFERENCE):
        states, program = loop.init([member], (batch,), ops), loop.Programs([member], ops)
        for number in range(1, 4):
            states, sums = program.at(number)(states, (batch,))
        sides.append((states[0], sums[0]))
    (ours, our_sums), (theirs, their_sums) = sides
    close(ours.sae, theirs.sae, Gpu())
    np.testing.assert_allclose(our_sums.squared_error, their_sums.squared_error, rtol=1e-4)
    np.testing.assert_array_equal(our_sums.fired, their_sums.fired)


@pytest.mark.parametrize("name", ["relu", "gated", "jumprelu", "jumprelu by its count"])
def test_a_step_on_activations_that_are_not_finite_is_marked(name):
    config = STEPPED[name]
    member = Member(config, TrainConfig(64 * 24, 24))
    ops, batch = Gpu(), normal(0, 24, 12)
    states, program = loop.init([member], (batch,), ops), loop.Programs([member], ops)
    (state,), _ = program.at(1)(states, (batch.at[3, 2].set(jnp.nan),))
    assert int(state.bad_step) == 1


# ---- the import of jax-triton --------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [None, "/a/folder"])
def test_the_folder_of_tritons_cache_stays_as_it_was(monkeypatch, tmp_path, before):
    (tmp_path / "jax_triton.py").write_text('import os\nos.environ["TRITON_CACHE_DIR"] = ""\n')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "jax_triton", raising=False)
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    if before is not None:
        monkeypatch.setenv("TRITON_CACHE_DIR", before)
    assert launch.jax_triton().__name__ == "jax_triton"
    assert os.environ.get("TRITON_CACHE_DIR") == before


@pytest.mark.parametrize("shape", [(2, 1), (1, 2)])
@pytest.mark.parametrize("name", ["top_k", "batch_top_k"])
def test_kernels_on_a_mesh_select_decode_and_differentiate_as_the_reference(name, shape):
    n, f, k, d = 8, 32, 3, 8
    mesh = axes.make_mesh(shape[1], jax.devices()[:2])
    x, W_enc, b_enc, W_dec = normal(0, n, d), normal(1, f, d), normal(2, f), normal(3, f, d)

    def run(ops: Ops):
        def loss(W_enc, b_enc, W_dec):
            select = functools.partial(getattr(ops, name), k=k)
            codes = ops.encode(Input(x), W_enc, b_enc, select, by_token=name == "top_k")
            return jnp.square(ops.decode(codes, W_dec, -x)).sum(), codes.dense(n, f)

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(W_enc, b_enc, W_dec)

    ours, expected = run(Sharded(inner=Gpu(), mesh=mesh)), run(REFERENCE)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)
