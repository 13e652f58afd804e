"""Flags of a training run, combined: the SAEs, their folders, and refused combinations."""

import dataclasses
from pathlib import Path

import pytest

import bridge.nanochat
from bridge.training import device, plan
from bridge.training.config import RunConfig
from jsae.architectures import sae_config
from jsae.config import TrainConfig
from jsae.settings import ConfigError

RUN = Path("runs/some")


@pytest.fixture(scope="module")
def nano():
    return bridge.nanochat.load("demo")  # 6 layers of width 128


def planned(nano, **flags) -> list[plan.Trainee]:
    return plan.trainees(RUN, RunConfig(**flags), nano)


def names(**flags) -> list[str]:
    config = RunConfig(**flags)
    return [config.variant_name(variant) for variant in config.variants()]


# ---- which SAEs ----------------------------------------------------------------------------------------------------


def test_one_value_of_every_flag_is_one_sae_in_the_run_itself(nano):
    (only,) = planned(nano)
    assert (only.folder, only.label, only.hooks) == (RUN, "blocks.2.hook_resid_post", ("blocks.2.hook_resid_post",))
    assert only.member.sae == sae_config("topk", 128, 1024, k=32)
    assert only.member.train == TrainConfig(10_000_000)


def test_every_value_of_every_flag_meets_every_other_at_every_layer(nano):
    found = planned(nano, layer=("1", "3"), k=(8, 16), seed=(0, 5), learning_rate=(1e-3,), num_activations=100_000)
    assert [(str(t.folder), t.name) for t in found] == [
        (f"runs/some/{variant}", f"blocks.{layer}.hook_resid_post")
        for variant in ("k8-seed0", "k8-seed5", "k16-seed0", "k16-seed5")
        for layer in (1, 3)
    ]
    assert [(t.member.sae.k, t.member.train.seed, t.member.site) for t in found[:4]] == [
        (8, 0, 0),
        (8, 0, 1),
        (8, 5, 0),
        (8, 5, 1),
    ]
    assert {t.member.train.learning_rate for t in found} == {1e-3}
    assert plan.sites(found) == [("blocks.1.hook_resid_post",), ("blocks.3.hook_resid_post",)]
    assert found[2].label == "k8-seed5 blocks.1.hook_resid_post"


def test_a_variant_is_the_run_with_one_value_of_each_flag():
    config = RunConfig(k=(8, 16), layer=("1", "2"))
    first, second = config.variants()
    assert second == dataclasses.replace(config, k=(16,))
    assert (first.layer, first.learning_rate) == (("1", "2"), ())
    assert list(second.variants()) == [second]
    assert second.variant_name(second) == ""


def test_all_layers_are_all_of_the_models(nano):
    assert [t.hooks[0] for t in planned(nano, layer=("all",), hook_type="mlp")] == [
        f"blocks.{layer}.hook_mlp_out" for layer in range(6)
    ]


def test_variants_are_named_by_what_sets_them_apart():
    assert names() == [""]
    assert names(activation="relu", l1_coefficient=(1.0, 0.5)) == ["l1_1", "l1_0.5"]
    assert names(activation="jumprelu", target_l0=(16.0, 32.5)) == ["l0_16", "l0_32.5"]
    assert names(activation="jumprelu", l0_coefficient=(2.0, 4.0)) == ["l0c2", "l0c4"]
    assert names(learning_rate=(1e-3, 2e-5)) == ["lr0.001", "lr2e-05"]


def test_values_that_are_nearly_alike_have_folders_of_their_own():
    assert names(seed=(12345678, 12345679)) == ["seed12345678", "seed12345679"]
    assert names(learning_rate=(1e-3, 1.0000001e-3)) == ["lr0.001", "lr0.0010000001"]


def test_a_transcoder_reads_and_makes_the_same_layer(nano):
    found = planned(nano, layer=("1", "2"), hook_type="mlp_in", target_hook="mlp", skip=True)
    assert [t.hooks for t in found] == [
        (f"blocks.{layer}.ln2.hook_normalized", f"blocks.{layer}.hook_mlp_out") for layer in (1, 2)
    ]
    assert all(t.member.sae == sae_config("batchtopk", 128, 1024, k=32, d_out=128, skip=True) for t in found)
    assert found[0].name == "blocks.1.ln2.hook_normalized"


def test_a_crosscoder_reads_all_layers_at_once_and_is_named_by_them(nano):
    (only,) = planned(nano, layer=("1", "2", "4"), crosscoder=True, expansion_factor=4)
    assert only.member.sae == sae_config("topk", 3 * 128, 512, layers=3)
    assert only.hooks == tuple(f"blocks.{layer}.hook_resid_post" for layer in (1, 2, 4))
    assert only.name == "blocks.1-2-4.hook_resid_post"
    (every,) = planned(nano, layer=("all",), crosscoder=True)
    assert every.member.sae.layers == 6


def test_the_widths_of_a_matryoshka_sae_are_parts_of_it_unless_given(nano):
    (only,) = planned(nano, activation="matryoshka", expansion_factor=2)
    assert only.member.sae.nested_widths == (16, 32, 64, 128)
    (given,) = planned(nano, activation="matryoshka", nested_widths=(100, 1000))
    assert given.member.sae.all_widths == (100, 1000, 1024)


def test_a_run_comes_back_from_its_record():
    config = RunConfig(layer=("1", "2"), k=(8, 16), learning_rate=(1e-3,))
    assert config.to_json()["k"] == (8, 16)
    assert RunConfig.from_json(config.to_json()) == config


# ---- what is refused -----------------------------------------------------------------------------------------------

# Seen in the flags alone, before a model is loaded.
BAD_FLAGS = {
    "a value twice": ({"k": (8, 16, 8)}, r"--k=8,16,8 has a value twice"),
    "no value": ({"seed": ()}, "--seed needs at least one value"),
    "a layer twice": ({"layer": ("1", "01")}, "--layer=1,01 names a layer twice"),
    "a layer beside all of them": ({"layer": ("all", "2")}, "--layer=all,2 names layers beside all of them"),
    "a layer that is no number": ({"layer": ("first",)}, "layer 'first' is neither a number from 0 nor 'all'"),
    "a layer in other digits": ({"layer": ("\u0663",)}, "neither a number"),
    "a layer of too many digits": ({"layer": ("9" * 5000,)}, "neither a number"),
    "a list of k for what has none": ({"activation": "relu", "k": (8, 16)}, "--k means nothing to relu"),
    "a k for what has none": ({"activation": "gated", "k": (8,)}, "gated has --l1_coefficient, --target_l0"),
    "a recipe for what has none": ({"activation": "relu", "jump_recipe": "l0"}, "--jump_recipe means nothing to relu"),
    "an architecture that is none": (
        {"activation": "topp"},
        "unknown activation .topp.: choose one of topk",
    ),
    "a list of L1 for what has none": ({"l1_coefficient": (1.0, 2.0)}, "--l1_coefficient means nothing to topk"),
    "a list of L0 for what has none": (
        {"activation": "gated", "l0_coefficient": (1.0, 2.0)},
        "--l0_coefficient means nothing to gated",
    ),
    "an aligned transcoder": (
        {"aligned": True, "hook_type": "mlp_in", "target_hook": "mlp"},
        "--aligned is for autoencoders",
    ),
    "a skip path of no transcoder": ({"skip": True}, "--skip is for a transcoder: give --target_hook"),
    "a transcoder to what it reads": ({"target_hook": "resid_post"}, "--target_hook=resid_post equals --hook_type"),
    "a crosscoder of one layer": ({"crosscoder": True, "layer": ("2",)}, "--crosscoder reads several layers"),
    "a crosscoder of no layer": ({"crosscoder": True}, "--crosscoder reads several layers"),
    "a crosscoder that is a transcoder": (
        {"crosscoder": True, "layer": ("1", "2"), "hook_type": "mlp_in", "target_hook": "mlp"},
        "leave out --target_hook",
    ),
    "dashboards of a transcoder": (
        {"prepare_neuronpedia": True, "hook_type": "mlp_in", "target_hook": "mlp"},
        "--prepare_neuronpedia is for SAEs of one activation",
    ),
    "dashboards of a crosscoder": (
        {"prepare_neuronpedia": True, "crosscoder": True, "layer": ("1", "2")},
        "--prepare_neuronpedia is for SAEs of one activation",
    ),
    "a rate that is none": ({"learning_rate": (1e-3, float("nan"))}, "learning_rate is nan: it must be positive"),
    "a seed out of range": ({"seed": (0, 2**31)}, "seed is 2147483648"),
    "no activations until death": ({"dead_after": 0}, "dead_after is 0: it must lie between 1"),
    "fewer activations than a batch": ({"num_activations": 100}, "num_activations=100 is less than one batch of 2048"),
}


@pytest.mark.parametrize("what", BAD_FLAGS)
def test_flags_that_mean_nothing_together_are_refused_at_once(what):
    flags, complaint = BAD_FLAGS[what]
    with pytest.raises(ConfigError, match=complaint):
        RunConfig(**flags)


# Seen when the model's sizes are known: width 128, expansion 8.
BAD_SAES = {
    "k above the latents": (
        {"k": (32, 1025)},
        "k=1025 active latents out of d_sae=1024: k must be between 1 and d_sae",
    ),
    "a k of none": ({"k": (0,)}, "k is 0: it must be at least 1"),
    "widths that do not increase": (
        {"activation": "matryoshka", "nested_widths": (256, 128)},
        r"nested widths must increase strictly from at least 1 up to d_sae: \(256, 128, 1024\) do not",
    ),
    "widths beyond the latents": (
        {"activation": "matryoshka", "nested_widths": (128, 2048)},
        r"up to d_sae: \(128, 2048, 1024\) do not",
    ),
    "widths of what has none": ({"nested_widths": (128,)}, r"--nested_widths means nothing to topk"),
    "a target above the latents": (
        {"activation": "jumprelu", "target_l0": (1025.0,)},
        "target_l0 is 1025.0: it must lie between 0 and d_sae=1024",
    ),
    "a target of nothing": ({"activation": "relu", "target_l0": (0.0,)}, "target_l0 is 0.0"),
    "a target of what has a k": (
        {"target_l0": (32.0, 64.0)},
        "--target_l0 means nothing to topk: leave it out. topk has --k",
    ),
    "a transcoder without an exported form": (
        {"activation": "topk", "hook_type": "mlp_in", "target_hook": "mlp"},
        "no exported form of a topk transcoder: use batchtopk, matryoshka, relu, jumprelu",
    ),
    "k that starts below its end": ({"k": (8, 16), "k_start": 12}, "k_start=12 must lie between k=16 and d_sae=1024"),
    "k that starts where there is none": (
        {"activation": "relu", "k_start": 64},
        "--k_start means nothing to relu: leave it out",
    ),
    "a layer that is not there": ({"layer": ("1", "6")}, "blocks.6.hook_resid_post: the model has 6 layers, 0 to 5"),
    "a penalty that pulls": ({"activation": "relu", "l1_coefficient": (-1.0,)}, "l1_coefficient is -1.0"),
    "a window of no width": ({"activation": "jumprelu", "bandwidth": 0.0}, "bandwidth is 0.0"),
}


@pytest.mark.parametrize("what", BAD_SAES)
def test_saes_that_cannot_be_are_refused_with_the_numbers(what, nano):
    flags, complaint = BAD_SAES[what]
    with pytest.raises(ValueError, match=complaint):
        planned(nano, **flags)


# ---- memory --------------------------------------------------------------------------------------------------------


def test_a_sweep_that_does_not_fit_the_memory_is_refused_with_what_it_needs_and_what_there_is(nano):
    config = RunConfig(k=(8, 16, 32), seed=(0, 1), layer=("1", "2"), expansion_factor=64)
    trainees = plan.trainees(RUN, config, nano)
    # 12 SAEs of 2 x 8192 x 128 numbers, five copies; latents of a batch and gradients; two layers of three blocks.
    weights, batch, blocks = 12 * 4 * 8192 * 256, 2 * 4 * 2048 * 8192, 3 * 4 * 65536 * 128 * 2
    needed = 5 * weights + batch + blocks
    plan.check_memory(config, trainees, 128, needed)
    plan.check_memory(config, trainees, 128, None)
    with pytest.raises(
        ConfigError,
        match=r"12 SAEs need about 0\.8 GiB \(5 x 0\.09 of weights, 0\.12 for latents of a batch, 0\.19 for blocks of "
        r"activations\), and there are 0\.8: train fewer together",
    ):
        plan.check_memory(config, trainees, 128, needed - 1)


def test_an_average_is_one_more_copy_of_the_weights(nano):
    config = RunConfig(average_fraction=0.1)
    trainees, without = plan.trainees(RUN, config, nano), plan.trainees(RUN, RunConfig(), nano)
    weights = 4 * 1024 * 256
    enough = 5 * weights + 2 * 4 * 2048 * 1024 + 3 * 4 * 65536 * 128
    plan.check_memory(RunConfig(), without, 128, enough)
    with pytest.raises(ConfigError, match=r"6 x 0\.00 of weights"):
        plan.check_memory(config, trainees, 128, enough)


GIB = 2**30


@pytest.mark.parametrize(
    ("card", "free", "jax_need", "torch_need", "gib"),
    [
        (80, 78, 4, 10, 6),  # the need and half of it
        (80, 78, 0.5, 10, 2.5),  # and at least 2 GiB more
        (80, 78, 60, 10, 64),  # no more than torch can spare of what is free
        (80, 30, 20, 10, 16),  # another process is on the card
        (24, 23, 4, 6, 6),
        (8, 7, 4, 6, 0.6),  # it does not fit: check_memory refuses it
        (8, 0, 4, 6, 0.16),
    ],
)
def test_jax_has_the_part_of_a_card_that_it_needs_and_torch_the_rest(card, free, jax_need, torch_need, gib):
    fraction = device.jax_fraction(*(round(value * GIB) for value in (card, free, jax_need, torch_need)))
    assert fraction * card == pytest.approx(gib, abs=0.01)
    assert 0 < fraction < 0.95


@pytest.mark.parametrize("fraction", [0.0, 0.95, 1.5])
def test_a_part_of_the_card_that_leaves_nothing_is_refused(fraction):
    with pytest.raises(ConfigError, match=f"jax_memory_fraction is {fraction}: it must lie between 0 and 0.95"):
        RunConfig(jax_memory_fraction=fraction)


def test_the_processor_says_how_much_memory_it_has():
    available = plan.available_memory(RunConfig())
    assert available is not None
    assert 2**28 < available < 2**50
