"""What jax is predicted to need on a GPU, and what is refused with which advice before a run."""

import dataclasses
from pathlib import Path

import pytest

from bridge.training import device, memory, plan
from bridge.training.config import RunConfig
from jsae.architectures import sae_config
from jsae.config import TrainConfig
from jsae.loop import Member
from jsae.ops import Gpu, Ops, Xla
from jsae.settings import ConfigError

GIB = 2**30
D, F, K, N = 1280, 20480, 64, 16384
WEIGHTS = 4 * F * 2 * D
HOOK = "blocks.10.hook_resid_post"


KERNELS = Gpu("bfloat16")


CODES = 24 * N * K + 2 * 4 * N * (F // 8)
"""Bytes of the codes, and of the dead latents that learn in a step."""


def member(architecture: str = "topk", n: int = N, d_sae: int = F, site: int = 0, **settings) -> Member:
    own = {"k": K} if architecture in ("topk", "batchtopk", "abstopk") else {}
    average = settings.pop("average_fraction", None)
    train = TrainConfig(100 * n, n, matmul_dtype="bfloat16", average_fraction=average)
    return Member(sae_config(architecture, D, d_sae, **own | settings), train, site)


def need(*members: Member, ops: Ops | None = None, **how) -> memory.Need:
    return memory.of_steps(members, ops or KERNELS, **how)


def test_a_step_of_the_reference_size_fits_4_gib_and_its_parts_are_the_arrays():
    found = need(member(), saving=False)
    assert found.state == 3 * WEIGHTS
    assert found.saved == 0
    assert found.gradients == round(1.35 * WEIGHTS)
    assert found.latents == 2 * KERNELS.encode_chunk(N, D, F) * F + CODES
    wide = need(member(d_sae=131072), ops=KERNELS, saving=False)
    assert wide.total == pytest.approx(6.66 * GIB, rel=0.1)  # measured on an H200
    assert need(member()).total - found.total == 3 * WEIGHTS


@pytest.mark.parametrize(
    ("architecture", "measured"),
    [("topk", 1.79), ("batchtopk", 2.27), ("relu", 2.37), ("gated", 2.83), ("jumprelu", 2.37)],
)
def test_what_was_measured_on_an_h200_is_predicted(architecture, measured):
    assert need(member(architecture), saving=False).total == pytest.approx(measured * GIB, rel=0.1)


def test_a_batch_that_is_encoded_at_once_holds_all_pre_activations():
    assert need(member("batchtopk")).latents - need(member()).latents == 2 * (N - KERNELS.encode_chunk(N, D, F)) * F


def test_float32_needs_twice_the_pre_activations():
    assert need(member(), ops=Gpu("float32")).latents - CODES == 2 * (need(member()).latents - CODES)


def test_a_dense_architecture_holds_the_latents_of_a_part():
    assert need(member("relu")).latents == 4 * 2 * KERNELS.sum_chunk(N, D, F, True) * F


def test_without_kernels_rows_of_all_codes_or_all_pre_activations_exist():
    at_once = need(member(), ops=Xla("bfloat16", decoding="at once"), saving=False)
    dense = need(member(), ops=Xla("bfloat16", decoding="dense"), saving=False)
    assert 45 * GIB < at_once.total < 58 * GIB  # measured on an H100: 51
    assert 5.5 * GIB < dense.total < 8.3 * GIB  # measured: 6.9


def test_several_saes_add_up_in_what_stays_and_not_in_what_a_step_makes():
    one, two = need(member()), need(member(), member(site=1))
    assert two.state == 2 * one.state
    assert two.saved == 2 * one.saved
    assert (two.gradients, two.latents) == (one.gradients, one.latents)
    assert two.batch - one.batch == 2 * 4 * N * D
    assert need(member(), member()).batch == one.batch  # of the same site


def test_an_average_is_one_more_copy_of_the_weights():
    assert need(member(average_fraction=0.1)).state == 4 * WEIGHTS


@pytest.mark.parametrize(("architecture", "arrays"), [("relu", 4), ("jumprelu", 4), ("gated", 6)])
@pytest.mark.parametrize(("dtype", "size"), [("bfloat16", 2), ("float32", 4)])
def test_kernels_of_dense_architectures_hold_latents_and_maps_and_their_gradients(architecture, arrays, dtype, size):
    dense = Member(sae_config(architecture, D, F), TrainConfig(10 * N, N, matmul_dtype=dtype))
    assert need(dense, ops=Gpu(dtype)).latents == arrays * size * 8192 * F
    assert need(dense, ops=Xla(dtype)).latents == 4 * 4 * N * F


def test_more_codes_while_k_comes_down_need_more():
    annealed = member()
    annealed = annealed._replace(train=dataclasses.replace(annealed.train, k_start=2 * K))
    assert need(annealed).latents - need(member()).latents == 24 * N * K


def trainees(config: RunConfig, count: int = 1) -> list[plan.Trainee]:
    sae, train = config.sae_config(D), config.train_config()
    return [plan.Trainee(config, False, Path("runs/some"), (HOOK,), Member(sae, train, i)) for i in range(count)]


FLAGSHIP = RunConfig(
    expansion_factor=16,
    k=(64,),
    batch_size=16384,
    block_size=2**18,
    tokens_per_forward=32768,
    matmul_dtype="bfloat16",
    device="cuda",
)


@pytest.mark.parametrize(("kernels", "least", "most"), [(True, 2, 4), (False, 6, 60)])
def test_the_flagship_run_leaves_the_rest_of_a_card_to_torch(monkeypatch, kernels, least, most):
    """A d20 with 20,480 latents on an H100, before jax starts."""
    monkeypatch.setattr(memory, "kernels_are_likely", lambda: kernels)
    monkeypatch.setattr(memory, "likely_ops", lambda dtype, kernels: Gpu(dtype) if kernels else Xla(dtype))
    jax_need = plan.saes_memory(FLAGSHIP, trainees(FLAGSHIP))
    torch_need = plan.stream_memory(FLAGSHIP, D, 2, 2048, 1)
    assert least * GIB < jax_need < most * GIB
    assert 3 * GIB < torch_need < 6 * GIB
    fraction = device.jax_fraction(80 * GIB, 77 * GIB, jax_need, torch_need)
    assert jax_need < fraction * 80 * GIB < 80 * GIB - torch_need


def test_the_implementation_is_guessed_without_starting_jax():
    assert memory.likely_ops("bfloat16", False) == Xla("bfloat16")
    assert memory.likely_ops("float32", True) == Gpu("float32")


def test_what_does_not_fit_is_refused_with_the_flag_that_helps():
    ops = KERNELS
    (one,) = trainees(FLAGSHIP)
    enough = memory.of_steps([one.member], ops).total
    plan.check_gpu_memory([one], enough, ops)
    with pytest.raises(
        ConfigError, match=r"1 SAEs need about 2\.\d GiB of the GPU .*lower --expansion_factor; where torch"
    ):
        plan.check_gpu_memory([one], enough - 1, ops)
    with pytest.raises(ConfigError, match=r"lower --batch_size; .* need less \(extra \[cuda\]\)"):
        plan.check_gpu_memory([one], enough, Xla("bfloat16"))
    with pytest.raises(ConfigError, match=r"need less \(triton is too old\)"):
        plan.check_gpu_memory([one], enough, Xla("bfloat16"), "triton is too old")
    with pytest.raises(ConfigError, match="lower --expansion_factor or the number of SAEs; where"):
        plan.check_gpu_memory(trainees(FLAGSHIP, 8), enough, ops)


def test_on_a_gpu_blocks_of_activations_are_no_part_of_jaxs_memory(monkeypatch):
    wider = dataclasses.replace(FLAGSHIP, block_size=2**22)
    enough = memory.of_steps([trainees(wider)[0].member]).total
    plan.check_memory(wider, trainees(wider), D, enough)
    with pytest.raises(ConfigError, match="1 SAEs need about"):
        plan.check_memory(wider, trainees(wider), D, enough - 1)


def test_a_card_without_room_is_refused_with_the_flags_that_help_and_other_processes_on_it():
    plan.check_card(80 * GIB, 77 * GIB, 2 * GIB, 4 * GIB, 5 * GIB)
    with pytest.raises(
        ConfigError, match=r"needs about 9\.0 GiB .* and 7\.0 of 8\.0 are free: lower --tokens_per_forward"
    ):
        plan.check_card(8 * GIB, 7 * GIB, GIB // 2, 4 * GIB, 5 * GIB)
    with pytest.raises(
        ConfigError, match=r"about 68\.0 are taken outside .*: lower --expansion_factor or --batch_size"
    ):
        plan.check_card(80 * GIB, 10 * GIB, 2 * GIB, 6 * GIB, 5 * GIB)
