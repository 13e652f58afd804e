"""Collectives of a compiled step: the scheme's bytes, and no weights, pre-activations or codes."""

import math

import jax
import pytest

from experiments.benches import scaling, shapes, traffic
from jsae import axes, loop
from jsae.config import TrainConfig
from jsae.testing.collectives import collectives

SIZE = shapes.Size(96, 1536, 8, 1024)
MESHES = {"2x1": (2, 1), "1x2": (1, 2), "2x2": (2, 2), "1x4": (1, 4)}
ARCHITECTURES = ("topk", "batchtopk", "abstopk", "matryoshka", "relu", "gated", "jumprelu")

PROGRAM = """\
%body (arg: f32[8]) -> f32[8] {
  %r = f32[8]{0} all-reduce(f32[8]{0} %x), replica_groups={{0,1}}, to_apply=%add, metadata={op_name="inner"}
}
%taken (arg: f32[8]) -> f32[8] {
  %g = bf16[4,6]{1,0} all-gather(bf16[2,6]{1,0} %x), replica_groups=[2,2]<=[4], dimensions={0}
}
%other (arg: f32[8]) -> f32[8] {
  %a = (f32[3]{0}, s32[]) all-reduce(%x, %y), replica_groups={}, to_apply=%add
}
ENTRY %main (arg: f32[8]) -> f32[8] {
  %w = f32[8]{0} while(f32[8]{0} %arg), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %alone = f32[8]{0} all-reduce(f32[8]{0} %x), replica_groups={{0},{1}}, to_apply=%add
  %lonely = f32[8]{0} all-reduce(f32[8]{0} %x), replica_groups=[2,1]<=[2], to_apply=%add
  %c = f32[8]{0} conditional(s32[] %i, %a, %b), branch_computations={%other, %taken}
}
"""


def test_collectives_are_counted_with_their_trips_and_branches():
    found = collectives(PROGRAM)
    assert [(one.kind, one.bytes, one.times, one.where) for one in found] == [
        ("all-reduce", 5 * 32, 5, "inner"),
        ("all-gather", 48, 1, ""),
        ("all-reduce", 16, 1, ""),
    ]
    assert [one.bytes for one in collectives(PROGRAM, branches=False)] == [160, 16]


def compiled(architecture: str, data: int, latent: int, **train: object) -> str:
    """Return the text of a step's program."""
    mesh = axes.make_mesh(latent, jax.devices()[: data * latent])
    run = TrainConfig(SIZE.batch * 1000, SIZE.batch, dead_after=2 * SIZE.batch, **train)
    member = loop.Member(shapes.sae_config(architecture, SIZE), run)
    batch = jax.ShapeDtypeStruct((SIZE.batch, SIZE.d_in), "float32", sharding=jax.NamedSharding(mesh, axes.BATCH))
    program = loop.Programs([member], mesh=mesh).at(1000)
    return program.lower(loop.abstract_states([member], mesh=mesh), (batch,)).compile().as_text()


@pytest.mark.parametrize(
    ("architecture", "mesh"), [("topk", "2x1"), ("topk", "1x2"), ("topk", "2x2"), ("batchtopk", "2x2")]
)
def test_a_step_sends_what_the_scheme_says(architecture, mesh):
    data, latent = MESHES[mesh]
    found = sum(one.bytes for one in collectives(compiled(architecture, data, latent), branches=False))
    scheme = traffic.sent(SIZE, data, latent, architecture).total
    assert scheme <= found <= 1.1 * scheme


@pytest.mark.parametrize(("architecture", "mesh"), [("topk", "1x4"), *((name, "2x2") for name in ARCHITECTURES)])
def test_no_collective_moves_weights_pre_activations_or_codes(architecture, mesh):
    """Not even where latents are dead or are resampled: all branches are read."""
    data, latent = MESHES[mesh]
    n, d, f, k = SIZE.batch // data, SIZE.d_in, SIZE.d_sae // latent, SIZE.k
    found = collectives(compiled(architecture, data, latent, resample_every=SIZE.batch * 10))
    assert found
    for one in found:
        for _, shape in one.shapes:
            # Gradients of a device's own latents are added over `data`, and rows of tokens have the width d.
            is_gradient = math.prod(shape) == f * d and one.kind == "all-reduce" and data > 1
            is_rows = shape[-1:] == (d,) and math.prod(shape) <= 2 * n * data * d
            assert is_gradient or is_rows or math.prod(shape) < min(f * d, n * f), one
            assert shape[:2] != (n, k), one


def test_the_measurement_says_the_same(monkeypatch):
    (two, latents, _) = scaling.measured_traffic("topk", SIZE)
    assert (two["mesh"], latents["mesh"]) == ("2x1", "1x2")
    assert two["scheme"] == traffic.sent(SIZE, 2, 1).total
    assert 1 <= two["bytes"] / two["scheme"] <= 1.1


def test_the_plan_is_made_of_the_schemes_bytes():
    size = shapes.Size(1280, 131_072, 64, 16_384)
    alone, eight, sixteen = (traffic.plan(size, *mesh) for mesh in ((1, 1), (8, 1), (16, 1)))
    assert alone.communication == alone.nvlink_bytes == alone.network_bytes == 0
    assert alone.efficiency == 1
    assert eight.work == sixteen.work == alone.work
    gradients = traffic.sent(size, 8, 1).total
    assert eight.nvlink_bytes == sixteen.nvlink_bytes == pytest.approx(2 * 7 / 8 * gradients)
    assert eight.network_bytes == 0
    assert sixteen.network_bytes == pytest.approx(2 * 1 / 2 * gradients / 8)
    assert sixteen.efficiency < eight.efficiency < 1
    assert max(traffic.plan(size, 8 // latent, latent).efficiency for latent in (1, 2, 4, 8)) >= 0.9
