"""The numbers that sampling and steering take, wherever they come from; what is out of range is refused by its name."""

import re

import pytest
import torch
from toy_saes import toy_sae

from bridge import ranges
from bridge.nanochat import load
from bridge.nanochat.engine import NotFiniteError, generate
from bridge.runtime import InterpretableModel, Steer
from bridge.steering import LENGTHS, MODES
from experiments import flags
from experiments.steer import SteerConfig

HOOK = "blocks.2.hook_resid_post"
HUGE = 10**400


@pytest.fixture(scope="module")
def im():
    nano = load("demo")
    return InterpretableModel(nano.model, {HOOK: toy_sae("topk", 128, 64)}, nano.tokenizer)


@pytest.mark.parametrize("value", [1e-320, 1e-46, -1e-9, -1, 2e6, float("nan"), float("inf"), HUGE, True])
def test_a_temperature_out_of_range_is_refused(im, value):
    with pytest.raises(ValueError, match="temperature must be 0"):
        im.generate("x", temperature=value)


@pytest.mark.parametrize("value", [0, 1e-45, 1e-9, 1, 1e6])
def test_every_temperature_in_the_range_gives_tokens(im, value):
    assert len(list(im.generate("x", temperature=value, max_tokens=3))) == 3


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1, HUGE, True])
def test_a_seed_out_of_range_is_refused(im, value):
    with pytest.raises(ValueError, match="seed is "):
        im.generate("x", seed=value)
    for seed in (ranges.LOWEST_SEED, -1, ranges.HIGHEST_SEED):
        assert len(list(im.generate("x", seed=seed, max_tokens=2))) == 2


def test_every_mode_is_a_length_or_a_factor():
    assert set(MODES) == {*LENGTHS, *ranges.FACTORS, "ablate"}
    assert set(ranges.MULTIPLIED) <= set(MODES)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "ablate"])
def test_a_strength_out_of_its_modes_range_is_refused_by_name(im, mode):
    largest = ranges.LARGEST_FACTOR if mode in ranges.FACTORS else ranges.LONGEST
    for strength in (1.01 * largest, -1.01 * largest, 1e-320):
        with pytest.raises(ValueError, match=f"strength of feature 3.* is {re.escape(f'{strength}')}"):
            im.generate("x", [Steer(HOOK, 3, mode, strength)])
    for strength in (largest, -largest):
        assert len(list(im.generate("x", [Steer(HOOK, 3, mode, strength)], max_tokens=3))) == 3


def test_the_multiplier_counts(im):
    with pytest.raises(ValueError, match="strength of feature 3 times strength_multiplier, which is a factor"):
        im.generate("x", [Steer(HOOK, 3, "orthogonal", 200)], strength_multiplier=10)
    with pytest.raises(ValueError, match="strength_multiplier is inf"):
        im.generate("x", [Steer(HOOK, 3)], strength_multiplier=float("inf"))
    with pytest.raises(ValueError, match="must be a finite number"):
        Steer(HOOK, 3, "additive", HUGE)
    with pytest.raises(ValueError, match="feature True: features are numbered"):
        Steer(HOOK, True)


def test_factors_together_stay_within_a_product(im):
    # Unchecked, 16 times 1e6 made the numbers infinite and sampling failed without saying why.
    with pytest.raises(ValueError, match=r"product of the factors of orthogonal and scale is 1e\+48"):
        im.generate("x", [Steer(HOOK, 3, "orthogonal", 1000)] * 16)
    assert len(list(im.generate("x", [Steer(HOOK, 3, "orthogonal", -1000)] * 2, max_tokens=3))) == 3
    assert len(list(im.generate("x", [Steer(HOOK, 3, "scale", 0.5)] * 16, max_tokens=3))) == 3


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_logits_that_are_not_finite_are_reported_with_their_position(im, bad, temperature):
    def broken(tokens, **cache):
        return torch.full((*tokens.shape, 4096), bad)

    with pytest.raises(NotFiniteError, match="logits are not finite"):
        next(generate(im.model, [1], max_tokens=2, temperature=temperature, forward=broken))


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"temperature": "1e-320"}, "temperature is 1e-320: it must be 0"),
        ({"temperature": "nan"}, "temperature is nan: it must be 0"),
        ({"seed": 2**63}, "seed is 9223372036854775808"),
        ({"max_tokens": -1}, "max_tokens is -1"),
        ({"top_k": 0}, "top_k is 0"),
        ({"strength": "1e-320"}, "--strength is 1e-320, which float32 rounds to 0"),
        ({"strength": "1e6", "mode": "orthogonal"}, "--strength, which is a factor in the mode orthogonal, is 1000000"),
        ({"strength": "-1e6", "mode": "scale"}, "--strength, which is a factor in the mode scale, is -1000000"),
        ({"strength": "1e10"}, "strength is 10000000000.0"),
        ({"strength_multiplier": "inf"}, "strength_multiplier is inf"),
        ({"strength": "100", "strength_multiplier": "100", "mode": "orthogonal"}, "--strength times --strength_multi"),
        ({"strength": "1000", "mode": "scale", "feature": "1,2,3"}, "product of the factors of orthogonal and scale"),
    ],
)
def test_the_command_refuses_the_same_before_it_loads_a_model(settings, complaint, capsys):
    told = {"run_dir": "nowhere", "prompt": "x", "feature": 1} | settings
    with pytest.raises(SystemExit) as end:
        flags.run(SteerConfig, lambda config: 0, argv=["steer", *(f"--{name}={value}" for name, value in told.items())])
    err = capsys.readouterr().err
    assert end.value.code == 2
    assert complaint in err
    assert len(err.splitlines()) == 2  # the line, and how to see the flags
