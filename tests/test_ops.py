"""Every implementation of the operations of a step against dense formulas and the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from implementations import ALL, FAST, PIECES

from jsae import auxk
from jsae.ops import IMPLEMENTATIONS, PLAIN, AdamScalars, AdamSettings, Cpu, Input, Moments, Ops, Reference, Xla, choose
from jsae.ops.cpu import sorting_order
from jsae.ops.rows import divisor

pytestmark = pytest.mark.usefixtures("quickly_compiled")
REFERENCE = Reference()
SELECTIONS = ("top_k", "abs_top_k", "batch_top_k")
SIZES = {"divided": (60, 96, 5, 16), "odd": (97, 101, 7, 13)}  # n, f, k, d; the odd ones divide nothing


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.fixture(params=ALL)
def ops(request) -> Ops:
    return ALL[request.param]


@pytest.fixture(params=FAST)
def fast(request) -> Ops:
    return FAST[request.param]


@pytest.fixture(params=SIZES)
def sizes(request) -> tuple[int, int, int, int]:
    return SIZES[request.param]


def close(ours, theirs, **tolerances) -> None:
    """Both trees are the same, to rounding."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, **({"rtol": 1e-4, "atol": 1e-4} | tolerances))


# ---- decoder -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SELECTIONS)
def test_sparse_decode_and_its_gradients_equal_the_dense_product(ops, name, sizes):
    n, f, k, d = sizes
    W, g, start = normal(1, f, d), normal(2, n, d), normal(4, n, d)
    picked = getattr(REFERENCE, name)(normal(3, n, f), k)

    def sparse(values, W, start):
        return (ops.decode(picked._replace(values=values), W, start) * g).sum()

    def dense(values, W, start):
        return ((start + picked._replace(values=values).dense(n, f) @ W) * g).sum()

    ours = jax.jit(jax.value_and_grad(sparse, (0, 1, 2)))(picked.values, W, start)
    close(ours, jax.value_and_grad(dense, (0, 1, 2))(picked.values, W, start), rtol=1e-5, atol=1e-3)
    decoded = ops.decode(picked, W, start)
    close(decoded, start + picked.dense(n, f) @ W, rtol=1e-5, atol=1e-5)
    close(ops.decode(picked, W, 0 * start) + start, decoded, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SELECTIONS)
def test_levels_decode_the_codes_of_so_many_first_latents_with_their_gradients(ops, name, sizes):
    n, f, k, d = sizes
    W, g, widths = normal(1, f, d), normal(2, 3, n, d), (1, f // 5, f // 2)
    picked = getattr(REFERENCE, name)(normal(3, n, f), k)

    def sparse(values, W):
        levels = ops.decode_levels(picked._replace(values=values), W, widths, n)
        return (levels * g).sum(), levels

    def dense(values, W):
        latents = picked._replace(values=values).dense(n, f)
        levels = jnp.stack([latents[:, :width] @ W[:width] for width in widths])
        return (levels * g).sum(), levels

    ours = jax.jit(jax.grad(sparse, (0, 1), has_aux=True))(picked.values, W)
    close(ours, jax.grad(dense, (0, 1), has_aux=True)(picked.values, W))


# ---- encoder -------------------------------------------------------------------------------------------------------


ENCODED = ["", "masked", "centred", "scaled", "centred scaled", "masked centred scaled"]


@pytest.mark.parametrize("given", ENCODED)
@pytest.mark.parametrize("name", SELECTIONS)
def test_sparse_encoder_and_its_gradients_equal_the_dense_ones(ops, name, given):
    n, f, k, d = 60, 96, 5, 16
    x, W, b_enc, g = normal(1, n, d), normal(2, f, d), normal(3, f), normal(5, n, f)
    centred = "centred" in given
    b_in, scale = normal(4, d) if centred else None, 1 + jnp.arange(d) / d if "scaled" in given else None
    allowed = jnp.arange(f) % 4 == 0 if "masked" in given else None
    by_token = name != "batch_top_k"

    def sparse(x, W, b_enc, b_in):
        select = functools.partial(getattr(ops, name), k=k)
        codes = ops.encode(Input(x, scale, b_in), W, b_enc, select, allowed=allowed, by_token=by_token)
        return (codes.dense(n, f) * g).sum()

    def dense(x, W, b_enc, b_in):
        read = x if scale is None else x * scale
        pre = (read if b_in is None else read - b_in) @ W.T + b_enc
        picked = getattr(REFERENCE, name)(pre if allowed is None else jnp.where(allowed, pre, -jnp.inf), k).dense(n, f)
        return (jnp.where(picked != 0, pre, 0) * g).sum()

    args = (x, W, b_enc, b_in)
    wanted = (0, 1, 2, 3) if centred else (0, 1, 2)
    close(jax.jit(jax.value_and_grad(sparse, wanted))(*args), jax.value_and_grad(dense, wanted)(*args), atol=1e-3)


@pytest.mark.parametrize("name", SELECTIONS)
def test_an_encoder_of_sizes_that_divide_nothing_equals_the_reference(fast, name):
    n, f, k, d = SIZES["odd"]
    inputs = Input(normal(1, n, d), jnp.float32(1.5), normal(4, d))
    W, b_enc, g, limit = normal(2, f, d), normal(3, f), normal(5, n, f), jnp.int32(4)

    def made(ops, W, b_enc, b_in):
        select = functools.partial(getattr(ops, name), k=k)
        codes = ops.encode(
            inputs._replace(b_in=b_in), W, b_enc, select, limit=limit, by_token=name != "batch_top_k"
        ).dense(n, f)
        return (codes * g).sum(), codes

    def gradients(ops):
        return jax.jit(jax.grad(functools.partial(made, ops), (0, 1, 2), has_aux=True))(W, b_enc, inputs.b_in)

    close(gradients(fast), gradients(REFERENCE), atol=1e-3)


def test_no_gradient_reaches_the_scale(ops):
    x, W, scale = normal(1, 60, 16), normal(2, 96, 16), jnp.float32(1.5)

    def made(scale):
        return ops.encode(Input(x, scale), W, jnp.zeros(96), functools.partial(ops.top_k, k=5)).values.sum()

    assert float(jax.grad(made)(scale)) == 0


def test_fewer_allowed_latents_than_k_leave_zeros_without_gradient(ops):
    x, W = normal(1, 4, 6), normal(2, 20, 6)
    allowed = jnp.arange(20) < 3

    def picked(W):
        return ops.encode(Input(x), W, jnp.zeros(20), functools.partial(ops.top_k, k=8), allowed=allowed).values

    assert (np.asarray(picked(W) != 0).sum(1) == 3).all()
    gradient = jax.grad(lambda W: picked(W).sum())(W)
    assert np.isfinite(gradient).all()
    assert not np.asarray(gradient[3:]).any()


@pytest.mark.parametrize("centred", [False, True])
def test_pre_activations_and_their_gradients_equal_the_reference(fast, centred, sizes):
    n, f, _, d = sizes
    b_in = normal(4, d) if centred else None
    args = (normal(1, n, d), normal(2, f, d), normal(3, f), b_in)

    def made(ops, x, W, b_enc, b_in):
        return jnp.sin(ops.pre_activations(Input(x, jnp.float32(2), b_in), W, b_enc)).sum()

    wanted = (0, 1, 2, 3) if centred else (0, 1, 2)
    ours, theirs = (jax.jit(jax.grad(functools.partial(made, o), wanted))(*args) for o in (fast, REFERENCE))
    close(ours, theirs, rtol=1e-3, atol=1e-3)


# ---- dead latents --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lifted", [False, True])
@pytest.mark.parametrize("n_dead", [0, 1, 6, 40])
def test_dead_latents_decode_as_in_the_reference_whether_none_few_or_many_are_dead(fast, n_dead, lifted, sizes):
    n, f, k, d = sizes
    W_enc, b_enc, W_dec = normal(1, f, d), normal(2, f), normal(3, f, d - 3)
    inputs, g = Input(normal(4, n, d), jnp.float32(0.7), normal(5, d)), normal(6, n, d - 3)
    dead = jnp.zeros(f, bool).at[jnp.arange(n_dead) * 2].set(True)

    def made(ops, W_enc, b_enc, W_dec):
        parts = auxk.decode_dead(ops, inputs, W_enc, b_enc, W_dec, dead, k, 3, lifted=lifted)
        return sum((weight * part * g).sum() for weight, part in enumerate(parts, 1)), sum(parts)

    def gradients(ops):
        return jax.jit(jax.grad(functools.partial(made, ops), (0, 1, 2), has_aux=True))(W_enc, b_enc, W_dec)

    ours, theirs = gradients(fast), gradients(REFERENCE)
    close(ours, theirs, atol=1e-3)
    assert np.asarray(ours[1]).any() == (n_dead > 0)
    assert not np.asarray(ours[0][0])[~np.asarray(dead)].any()


# ---- whole step ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradients", [False, True])
def test_a_sum_over_tokens_is_that_of_the_whole_batch(ops, gradients, sizes):
    n, f, _, d = sizes
    arrays = {"acts": (normal(0, n, d), normal(1, n, 3)), "count": jnp.arange(n)}

    def sums(arrays):
        a, b = arrays["acts"]
        return {"product": a.T @ b, "count": arrays["count"].sum(), "rows": len(a)}

    ours = jax.jit(lambda arrays: ops.sum_over_tokens(sums, arrays, d, f, gradients=gradients))(arrays)
    assert (int(ours["rows"]), int(ours["count"])) == (n, n * (n - 1) // 2)
    close(ours["product"], sums(arrays)["product"])


@pytest.mark.parametrize("condition", [False, True])
def test_what_costs_less_where_it_changes_nothing_is_decided_on_the_device(fast, condition):
    decide = jax.jit(lambda c: fast.if_any(c, lambda: jnp.float32(1), lambda: jnp.float32(0)))
    assert float(decide(jnp.asarray(condition))) == condition


UPDATED = [
    ((96, 16), True),
    ((97, 13), True),
    ((96, 16), False),
    ((97, 13), False),
    ((101,), False),
    ((7, 5, 3), False),
]


@pytest.mark.parametrize(("shape", "unit_rows"), UPDATED, ids=str)
def test_adam_equals_the_reference(fast, shape, unit_rows):
    p, g, mu, nu = normal(0, *shape), normal(1, *shape), 0.1 * normal(2, *shape), jnp.square(0.1 * normal(3, *shape))
    p = p / jnp.linalg.norm(p, axis=1, keepdims=True) if unit_rows else p
    scalars = AdamScalars(jnp.float32(0.3), jnp.float32(0.02), jnp.float32(1.7))
    settings = AdamSettings(0.9, 0.99, 1e-8, 10.0, unit_rows)

    def update(ops):
        return jax.jit(lambda g, moments: ops.adam(scalars, settings, g, moments))(g, Moments(p, mu, nu))

    ours, theirs = update(fast), update(REFERENCE)
    close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert not np.allclose(ours.p, p, atol=1e-3)
    if unit_rows:
        np.testing.assert_allclose(np.linalg.norm(ours.p, axis=1), 1, atol=1e-6)


def test_the_training_path_never_holds_an_array_of_all_tokens_and_latents_nor_a_copy_of_its_input():
    """Seen in the compiled program's own account: a chunk of pre-activations, the error, some rows of a gradient."""
    n, f, d, k = 512, 4096, 256, 8
    ops = Cpu(chunk=2**18, least=8)

    def loss(W_enc, W_dec, b_dec, x):
        scale = jnp.float32(2)
        picked = ops.encode(Input(x, scale, b_dec), W_enc, jnp.zeros(f), functools.partial(ops.top_k, k=k))
        return jnp.square(ops.decode(picked, W_dec, b_dec - x * scale)).sum() / 2

    gradients = jax.jit(jax.grad(loss, (0, 1, 2)))
    compiled = gradients.lower(normal(1, f, d), normal(2, f, d), normal(3, d), normal(0, n, d)).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    assert temporary < 0.2 * n * f * 4  # the dense form takes 4
    assert temporary < 2.5 * n * d * 4


# ---- choices -------------------------------------------------------------------------------------------------------


def test_latents_are_put_in_order_where_number_and_place_fit_no_word_too():
    indices = jax.random.randint(jax.random.key(0), (500,), 0, 96)
    short = sorting_order(indices, 96)
    long = sorting_order(indices, 2**32 // 500 + 1)  # as if of so many latents
    np.testing.assert_array_equal(indices[short], np.sort(indices))
    np.testing.assert_array_equal(short, long)


@pytest.mark.parametrize(("whole", "most", "part"), [(6144, 341, 256), (100, 100, 100), (97, 50, 97), (96, 12, 12)])
def test_parts_are_of_one_size_or_the_whole(whole, most, part):
    assert divisor(whole, most) == part


def test_the_device_chooses_the_implementation():
    assert choose() == choose(platform="cpu") == Cpu()
    assert choose("bfloat16", platform="gpu") == Xla("bfloat16")
    assert IMPLEMENTATIONS["plain"] is PLAIN
    assert all(ops.matmul_dtype == "float32" for ops in IMPLEMENTATIONS.values())
    assert len({hash(ops) for ops in (*ALL.values(), Cpu("bfloat16"))}) == len(ALL) + 1
    assert PIECES.encode_chunk(60, 16, 96) == PIECES.sum_chunk(60, 16, 96, gradients=True) == 20  # it does cut


def test_latents_are_counted_and_added(ops, sizes):
    n, f, _, _ = sizes
    latents = np.asarray(normal(0, n, f)) * (np.asarray(normal(1, n, f)) > 1)
    counts, sums = ops.latent_totals(jnp.asarray(latents))
    np.testing.assert_array_equal(counts, (latents != 0).sum(0))
    np.testing.assert_allclose(sums, np.abs(latents).sum(0), rtol=1e-5)
