"""The operations over a mesh of devices against those of one device: values, gradients, ties, and own selections."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from jsae import auxk, axes
from jsae.formulas import GatedMagnitude, LogRectified, Rectified, TanhJump
from jsae.ops import AdamScalars, AdamSettings, Codes, Cpu, Input, Moments, Reference, Sharded, Xla
from jsae.settings import ConfigError

pytestmark = pytest.mark.usefixtures("quickly_compiled")
N, F, D, K = 32, 48, 12, 5
MESHES = {"4x1": 1, "2x2": 2, "1x4": 4}
SELECTIONS = ("top_k", "abs_top_k", "batch_top_k")
INNER = {"cpu": Cpu(chunk=4 * F, least=2, tokens=4, block=4 * D, sorts=2), "xla": Xla()}


@pytest.fixture(params=MESHES)
def mesh(request) -> jax.sharding.Mesh:
    return axes.make_mesh(MESHES[request.param])


@pytest.fixture(params=INNER)
def ops(request, mesh) -> Sharded:
    return Sharded(inner=INNER[request.param], mesh=mesh)


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def on(mesh: jax.sharding.Mesh, array: jax.Array, *names: str) -> jax.Array:
    """Place an array on the devices by the letters of its axes."""
    return jax.device_put(array, NamedSharding(mesh, axes.spec(names)))


def weights(mesh: jax.sharding.Mesh) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Return x, W_enc, b_enc and W_dec."""
    x, W_enc, b_enc, W_dec = normal(0, N, D), normal(1, F, D), normal(2, F), normal(3, F, D)
    return on(mesh, x, "n", "d"), on(mesh, W_enc, "f", "d"), on(mesh, b_enc, "f"), on(mesh, W_dec, "f", "o")


def close(ours, theirs, **tolerances) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, **({"rtol": 1e-4, "atol": 1e-4} | tolerances))


def reconstruction(ops, name, limit, x, W_enc, b_enc, W_dec, b_in):
    """Return the latents of a selection, the squared error of their decoding, and times fired."""
    inputs = Input(x, jnp.float32(0.7), b_in)
    select = functools.partial(getattr(ops, name), k=K)
    codes = ops.encode(inputs, W_enc, b_enc, select, limit=limit, by_token=name != "batch_top_k")
    error = ops.decode(codes, W_dec, b_in - x)
    levels = ops.decode_levels(codes, W_dec, (6, 30), len(x))
    loss = jnp.square(error).sum() + jnp.square(levels * jnp.arange(1, 3)[:, None, None]).sum()
    return loss, (codes.dense(len(x), len(W_enc)), error, levels, ops.times_fired(codes, len(W_enc)))


@pytest.mark.parametrize("skew", [0, 9], ids=["even", "one device has most"])
@pytest.mark.parametrize("limit", [None, 3])
@pytest.mark.parametrize("name", SELECTIONS)
def test_selections_decodings_and_gradients_equal_those_of_one_device(ops, mesh, name, limit, skew):
    x, W_enc, b_enc, W_dec = weights(mesh)
    arrays = (x, W_enc, b_enc + skew * (jnp.arange(F) < F // 4), W_dec, 0.1 * normal(4, D))
    limit = None if limit is None else jnp.int32(limit)

    def run(ops):
        function = functools.partial(reconstruction, ops, name, limit)
        return jax.jit(jax.value_and_grad(function, (1, 2, 3, 4), has_aux=True))(*arrays)

    close(run(ops), run(Reference()), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("n_dead", [3, 200])
@pytest.mark.parametrize("lifted", [False, True])
def test_dead_latents_decode_as_on_one_device_whether_few_or_many(ops, mesh, n_dead, lifted):
    f = 1024
    x, W_enc = on(mesh, normal(0, N, D), "n", "d"), on(mesh, normal(1, f, D), "f", "d")
    W_dec, b_enc = on(mesh, normal(2, f, D), "f", "d"), on(mesh, normal(3, f), "f")
    dead = on(mesh, jnp.arange(f) % 5 < n_dead * 5 / f, "f")

    def run(ops):
        def loss(W_enc, b_enc, W_dec):
            parts = auxk.decode_dead(ops, Input(x), W_enc, b_enc, W_dec, dead, 3, 2, lifted=lifted)
            return sum(weight * jnp.square(part).sum() for weight, part in enumerate(parts, 1)), parts

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(W_enc, b_enc, W_dec)

    close(run(ops), run(Reference()), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "formula", [Rectified(), LogRectified(), GatedMagnitude(), TanhJump(0.5)], ids=lambda formula: formula.name
)
def test_maps_of_all_latents_and_their_gradients_equal_those_of_one_device(ops, mesh, formula):
    x, W_enc, b_enc, _ = weights(mesh)
    count = {"rectified": 0, "log rectified": 1, "gated": 3, "tanh jump": 2}[formula.name]
    arrays = tuple(on(mesh, jnp.abs(normal(10 + i, F)), "f") for i in range(count))

    def run(ops):
        def loss(W_enc, b_enc, arrays):
            maps, sums = ops.map_latents(Input(x), W_enc, b_enc, formula, arrays)
            totals = ops.latent_totals(maps[0])
            return sum(jnp.square(a).sum() for a in (*maps, *sums)), (maps, sums, totals)

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(W_enc, b_enc, arrays)

    close(run(ops), run(Reference()), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shape", [(F, D), (D, D), (F,)])
def test_adam_updates_every_devices_rows(ops, mesh, shape):
    of_latents = shape[0] == F
    names = ("f", "d")[: len(shape)] if of_latents else ("d", "o")
    arrays = [on(mesh, normal(i, *shape), *names) for i in range(4)]
    arrays[3] = jnp.abs(arrays[3])
    settings = AdamSettings(0.9, 0.99, 1e-8, 2.0, shape == (F, D), of_latents)
    scalars = AdamScalars(jnp.float32(0.5), jnp.float32(1e-2), jnp.float32(3.0))

    def run(ops):
        return jax.jit(lambda g, *rest: ops.adam(scalars, settings, g, Moments(*rest)))(*arrays)

    ours = run(ops)
    close(ours, run(Reference()), rtol=1e-5, atol=1e-6)
    assert ours.p.sharding.is_equivalent_to(arrays[0].sharding, len(shape))


def test_exactly_k_are_selected_where_many_are_equal(ops, mesh):
    """Small whole numbers: nearly every threshold is shared by latents of several devices."""
    x = on(mesh, jnp.round(normal(0, N, D)), "n", "d")
    W_enc, b_enc = on(mesh, jnp.round(normal(1, F, D)), "f", "d"), on(mesh, jnp.zeros(F), "f")
    for name in SELECTIONS:
        select = functools.partial(getattr(ops, name), k=K)
        codes = jax.jit(lambda x, s=select, b=name != "batch_top_k": ops.encode(Input(x), W_enc, b_enc, s, by_token=b))(
            x
        )
        latents, pre = np.asarray(codes.dense(N, F)), np.asarray(x @ W_enc.T)
        sizes = np.abs(pre) if name == "abs_top_k" else pre
        ours, best = np.sort(np.where(latents != 0, sizes, 0), 1)[:, ::-1], np.sort(sizes, 1)[:, ::-1]
        if name == "batch_top_k":
            assert (latents != 0).sum() == N * K
            np.testing.assert_array_equal(np.sort(latents[latents != 0])[::-1], np.sort(pre.ravel())[::-1][: N * K])
        else:
            np.testing.assert_array_equal(ours[:, :K], np.where(best[:, :K] == 0, 0, best[:, :K]))
            assert not ours[:, K:].any()


def test_another_selection_of_every_token_is_made_on_whole_rows(ops, mesh):
    x, W_enc, b_enc, W_dec = weights(mesh)

    def second_largest(pre, *, bias=None, limit=None) -> Codes:
        values, indices = jax.lax.top_k(pre if bias is None else pre + bias, 2)
        return Codes(values[:, 1:], indices[:, 1:])

    def run(ops):
        def loss(W_enc, W_dec):
            codes = ops.encode(Input(x), W_enc, b_enc, second_largest)
            return jnp.square(ops.decode(codes, W_dec, -x)).sum(), codes.dense(N, F)

        return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(W_enc, W_dec)

    close(run(ops), run(Reference()), rtol=1e-3, atol=1e-3)


def test_another_selection_of_the_whole_batch_is_refused(ops, mesh):
    x, W_enc, b_enc, _ = weights(mesh)

    def select(pre, *, bias=None, limit=None):
        return Reference().batch_top_k(pre, K, limit, bias)

    with pytest.raises(ConfigError, match=r"runs on one device only: select with context\.ops\.batch_top_k"):
        jax.jit(lambda x: ops.encode(Input(x), W_enc, b_enc, select, by_token=False))(x)


def test_a_device_keeps_its_largest_where_its_tokens_have_far_more_than_their_share():
    """All of the batch's codes are due to the tokens of one device, which has room for twice its share."""
    mesh = axes.make_mesh(1)
    ops = Sharded(inner=Xla(), mesh=mesh)
    scale = jnp.where(jnp.arange(N) < N // 4, 1.0, 1e-3)[:, None]
    x, W_enc, b_enc, _ = weights(mesh)
    x = on(mesh, x * scale, "n", "d")
    select = functools.partial(ops.batch_top_k, k=2)
    codes = jax.jit(lambda x: ops.encode(Input(x), W_enc, 0 * b_enc, select, by_token=False))(x)
    latents, pre = np.asarray(codes.dense(N, F)), np.asarray(x @ W_enc.T)
    first = latents[: N // 4]
    assert (first != 0).sum() == 2 * 2 * N // 4
    np.testing.assert_allclose(
        np.sort(first[first != 0]), np.sort(pre[: N // 4].ravel())[-(2 * 2 * N // 4) :], rtol=1e-5
    )


def test_rows_of_tokens_come_to_the_latents(ops, mesh):
    x, tokens = on(mesh, normal(0, N, D), "n", "d"), on(mesh, jnp.arange(F) * 7 % N, "f")
    np.testing.assert_array_equal(jax.jit(ops.rows_of_tokens)(x, tokens), x[tokens])
