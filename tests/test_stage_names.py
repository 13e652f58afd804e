"""`--checkpoints`: its names and paths, and what is refused before anything is loaded."""

import dataclasses

import pytest

from bridge.stages import loading
from bridge.stages.names import Stage, parse
from bridge.training.config import RunConfig
from jsae.settings import ConfigError


def test_steps_of_one_path_and_named_stages_are_told_apart():
    assert parse(("runs/d12@1000", "2000", "40000")) == (
        Stage("d12-1000", "runs/d12", 1000),
        Stage("d12-2000", "runs/d12", 2000),
        Stage("d12-40000", "runs/d12", 40000),
    )
    assert parse(("base=a/d12", "sft=b/d12@7")) == (Stage("base", "a/d12", None), Stage("sft", "b/d12", 7))


def test_an_equals_sign_or_at_within_a_path_is_part_of_it():
    found = parse(("x/lr=3/d12@5", "hf://me/model@v1/folder"))
    assert found == (Stage("d12-5", "x/lr=3/d12", 5), Stage("folder", "hf://me/model@v1/folder", None))


def test_variables_and_home_are_expanded_within_a_stage(monkeypatch):
    monkeypatch.setenv("CHECKPOINTS", "/data")
    monkeypatch.setenv("HOME", "/home/me")
    config = RunConfig(checkpoints=("base=$CHECKPOINTS/d12@10", "20", "sft=~/d12"))
    assert [stage.path for stage in config.stages] == ["/data/d12", "/data/d12", "/home/me/d12"]
    assert [stage.name for stage in config.stages] == ["base", "d12-20", "sft"]


def test_a_record_is_read_back():
    stages = parse(("base=a", "sft=b@3"))
    record = [stage._asdict() | {"fingerprint": "00"} for stage in stages]
    assert loading.of_record(record) == list(stages)
    for broken in (None, [], [{}], [record[0] | {"step": "3"}], "text"):
        with pytest.raises(ConfigError, match="does not name the checkpoints"):
            loading.of_record(broken)


BAD = {
    "one checkpoint": (("a/d12",), r"names 1 checkpoint\(s\): give 2"),
    "a step without a path": (("1000", "2000"), "1000 is a step without a path"),
    "a step after a path without one": (("a/d12", "2000"), "2000 is a step without a path"),
    "no path": (("base=", "b"), "is not .NAME=.PATH"),
    "a step twice": (("a/d12@5", "5"), "names step 5 of a/d12 twice"),
    "steps out of order": (("a/d12@2000", "1000"), "step 1000 of a/d12 comes after step 2000"),
    "a stage before the one that it was tuned from": (
        ("a/chatsft_checkpoints/d4", "base=a/base_checkpoints/d4"),
        "base_checkpoints/d4 is no successor of a/chatsft_checkpoints/d4: name base",
    ),
    "two of one name": (("a/d12", "b/d12"), "a/d12 and b/d12 have the name 'd12': give others"),
    "a name that is no folder's": (("ba se=a", "b"), "'ba se' is no name"),
    "a step of too many digits": (("a/d12@1", "9" * 30), "is no step"),
}


@pytest.mark.parametrize("what", BAD)
def test_checkpoints_that_cannot_be_compared_are_refused_by_their_names(what):
    items, complaint = BAD[what]
    with pytest.raises(ConfigError, match=complaint):
        RunConfig(checkpoints=items)


TWO = {"checkpoints": ("a@1", "2")}
TOGETHER = {
    "another model": (TWO | {"checkpoint": "runs/d12"}, "--checkpoints names the models: leave out --checkpoint"),
    "another step": (TWO | {"step": 3}, "leave out --step"),
    "a store": (TWO | {"activations": "acts"}, "leave out --activations"),
    "a transcoder": (TWO | {"hook_type": "mlp_in", "target_hook": "mlp"}, "leave out --target_hook"),
    "layers too": (TWO | {"crosscoder": True, "layer": ("1", "2")}, "leave out --crosscoder"),
    "dashboards": (TWO | {"prepare_neuronpedia": True}, "--prepare_neuronpedia is for SAEs of one activation"),
    "dedicated latents of an SAE": ({"exclusive_latents": 3}, "--exclusive_latents are of a crosscoder"),
    "dedicated latents of an old one": (TWO | {"exclusive_latents": 3, "init_from": "x"}, "leave out one"),
}


@pytest.mark.parametrize("what", TOGETHER)
def test_flags_that_contradict_checkpoints_are_refused_by_name(what):
    flags, complaint = TOGETHER[what]
    with pytest.raises(ConfigError, match=complaint):
        RunConfig(**flags)


def test_dedicated_latents_must_leave_some_to_share():
    config = RunConfig(**TWO, exclusive_latents=16, expansion_factor=4)
    assert config.sae_config(16, 2).exclusive == 16
    with pytest.raises(ConfigError, match="leave none of d_sae=32"):
        dataclasses.replace(config, expansion_factor=2, k=(4,)).sae_config(16, 2)
