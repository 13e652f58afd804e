"""The update formulas of steering, by hand: units, identities, order, positions."""

import dataclasses

import pytest
import torch
from toy_saes import FORMS, toy_sae

from bridge.steering import MODES, POSITIONS, PassInput, Steer, feature, mask, masked, steering_edit
from bridge.torch_sae import TorchSAE

HOOK = "blocks.0.hook_resid_post"

# Two latents that read the first channel and the second, less 1; d is the channel itself.
BY_HAND = TorchSAE(
    {"architecture": "standard", "d_in": 3, "d_sae": 2},
    {
        "W_enc": torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]),
        "b_enc": torch.tensor([-1.0, -1.0]),
        "W_dec": torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]),
        "b_dec": torch.zeros(3),
    },
)
H = torch.tensor([[[3.0, 4.0, 5.0], [-2.0, 1.0, 0.0], [0.5, -1.0, 2.0]]])  # latent 0 is 2, 0, 0


def pushed(sae, h, *requests, strength_multiplier=1.0):
    for index, mode, strength in requests:
        h = steering_edit(sae, Steer(HOOK, index, mode, strength), strength_multiplier, h.dtype)(h)
    return h


@pytest.mark.parametrize(
    ("mode", "strength", "first_channel"),
    [
        ("additive", 2.0, [5.0, 0.0, 2.5]),
        ("additive", -1.0, [2.0, -3.0, -0.5]),
        ("orthogonal", 0.0, [0.0, 0.0, 0.0]),
        ("orthogonal", -1.0, [-3.0, 2.0, -0.5]),
        ("orthogonal", 3.0, [9.0, -6.0, 1.5]),
        ("projection_cap", 1.0, [1.0, -2.0, 0.5]),
        ("projection_cap", -1.0, [-1.0, -2.0, -1.0]),
        ("clamp", 7.0, [8.0, 5.0, 7.5]),
        ("clamp", 0.0, [1.0, -2.0, 0.5]),
        ("scale", 2.0, [5.0, -2.0, 0.5]),
        ("scale", 0.0, [1.0, -2.0, 0.5]),
        ("ablate", 0.0, [1.0, -2.0, 0.5]),
        ("ablate", 9.0, [1.0, -2.0, 0.5]),
    ],
)
def test_every_mode_is_its_formula(mode, strength, first_channel):
    expected = H.clone()
    expected[0, :, 0] = torch.tensor(first_channel)
    torch.testing.assert_close(pushed(BY_HAND, H, (0, mode, strength)), expected, atol=0, rtol=0)


def test_every_mode_is_tested_by_hand():
    assert set(MODES) == {"additive", "orthogonal", "projection_cap", "clamp", "scale", "ablate"}


@pytest.mark.parametrize(
    ("mode", "strength"), [("additive", 0), ("orthogonal", 1), ("scale", 1), ("projection_cap", 1e9)]
)
@pytest.mark.parametrize("form", FORMS)
def test_the_neutral_strength_changes_no_bit(form, mode, strength):
    h = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    assert torch.equal(pushed(toy_sae(form, 32, 64), h, (3, mode, strength)), h)


def test_the_multiplier_is_for_neuronpedias_modes_alone():
    for mode in ("additive", "orthogonal", "projection_cap"):
        twice = pushed(BY_HAND, H, (0, mode, 0.5), strength_multiplier=4.0)
        assert torch.equal(twice, pushed(BY_HAND, H, (0, mode, 2.0))), mode
    for mode in ("clamp", "scale", "ablate"):
        assert torch.equal(
            pushed(BY_HAND, H, (0, mode, 0.5), strength_multiplier=4.0), pushed(BY_HAND, H, (0, mode, 0.5))
        )


def test_each_request_reads_what_the_last_one_made():
    added_first = pushed(BY_HAND, H, (0, "additive", 1.0), (0, "ablate", 0.0))
    assert added_first[0, :, 0].tolist() == [1.0, -1.0, 1.0]
    ablated_first = pushed(BY_HAND, H, (0, "ablate", 0.0), (0, "additive", 1.0))
    assert ablated_first[0, :, 0].tolist() == [2.0, -1.0, 1.5]
    assert pushed(BY_HAND, H, (0, "clamp", 7.0), (1, "clamp", 3.0))[0, 0].tolist() == [8.0, 4.0, 5.0]


@pytest.mark.parametrize("form", FORMS)
def test_the_activation_is_the_whole_saes(form):
    sae = toy_sae(form, 32, 64)
    h = torch.randn(2, 50, 32, generator=torch.Generator().manual_seed(1))
    latents = sae.encode(h)
    firing = latents.flatten(0, 1).ne(0).any(0).nonzero()[:, 0].tolist()
    assert len(firing) > 8
    for index in firing[:8]:
        torch.testing.assert_close(feature(sae, index).activation(h), latents[..., index], atol=1e-5, rtol=1e-5)


def test_a_latent_that_topk_left_out_counts_as_off():
    sae = toy_sae("topk", 8, 16, k=1)
    h = torch.randn(1, 40, 8, generator=torch.Generator().manual_seed(1))
    index = int(sae.encode(h).sum((0, 1)).argmax())
    on = sae.encode(h)[..., index] > 0
    assert on.any()
    assert not on.all()
    doubled, clamped = pushed(sae, h, (index, "scale", 2.0)), pushed(sae, h, (index, "clamp", 5.0))
    assert torch.equal(doubled[~on], h[~on])
    torch.testing.assert_close(clamped[~on], h[~on] + 5.0 * sae.W_dec[index])
    # Where it was on, the part of h along d grows by the difference to the activation it had.
    torch.testing.assert_close(clamped[on] - h[on], (5.0 - sae.encode(h)[on][:, index, None]) * sae.W_dec[index])


def test_a_latent_that_is_negative_is_scaled_and_clamped_from_where_it_is():
    sae = toy_sae("abstopk", 8, 16, k=2)
    h = torch.randn(1, 40, 8, generator=torch.Generator().manual_seed(1))
    index = int(sae.encode(h).sum((0, 1)).argmin())
    activation = sae.encode(h)[0, :, index]
    assert (activation < 0).any()
    row = sae.W_dec[index]
    for mode, strength, step in (("scale", 3.0, 2 * activation), ("clamp", -5.0, -5 - activation)):
        torch.testing.assert_close(pushed(sae, h, (index, mode, strength))[0], h[0] + step[:, None] * row)


def test_rows_that_are_not_unit_are_folded_but_for_those_that_rank_their_latents():
    for form, factor in (("standard", 3.0), ("topk", 1.0), ("abstopk", 1.0)):
        sae = toy_sae(form, 32, 64)
        stretched = TorchSAE(sae.cfg, dict(sae.named_parameters()) | {"W_dec": sae.W_dec * 3})
        h = torch.randn(1, 20, 32, generator=torch.Generator().manual_seed(1))
        index = int(sae.encode(h).sum((0, 1)).argmax())
        chosen = feature(stretched, index)
        torch.testing.assert_close(chosen.direction, sae.W_dec[index] * 3 / factor)
        torch.testing.assert_close(chosen.activation(h), sae.encode(h)[..., index] * factor)
        # What is ablated is what the SAE itself would take away.
        latents = stretched.encode(h)
        ablated = pushed(stretched, h, (index, "ablate", 0.0))
        torch.testing.assert_close(
            h - ablated, latents[..., index, None] * stretched.W_dec[index], atol=1e-5, rtol=1e-5
        )


def test_half_precision_stays_half_precision():
    h = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    for mode in MODES:
        changed = pushed(toy_sae("topk", 32, 64), h, (5, mode, 2.0))
        assert changed.dtype == torch.bfloat16, mode


def test_gradients_flow_through_every_mode():
    sae = toy_sae("standard", 32, 64)
    h = torch.randn(1, 20, 32, generator=torch.Generator().manual_seed(1), requires_grad=True)
    index = int(sae.encode(h).sum((0, 1)).argmax())
    for mode in MODES:
        (gradient,) = torch.autograd.grad(pushed(sae, h, (index, mode, 0.5)).square().sum(), h)
        assert gradient.isfinite().all(), mode
        assert gradient.abs().sum() > 0, mode


# ---- where ---------------------------------------------------------------------------------------------------------

TOKENS = torch.tensor([[9, 1, 2, 3, 8], [9, 4, 8, 5, 6]])
SPECIAL = torch.tensor([8, 9])


@pytest.mark.parametrize(
    ("positions", "start", "expected"),
    [
        ("all", 0, True),
        ("prompt", 0, [[1, 1, 1, 0, 0]] * 2),
        ("prompt", 2, [[1, 0, 0, 0, 0]] * 2),
        ("prompt", 3, False),
        ("generated", 0, [[0, 0, 0, 1, 1]] * 2),
        ("generated", 7, True),
        ("not_special", 0, [[0, 1, 1, 1, 0], [0, 1, 0, 1, 1]]),
    ],
)
def test_a_mask_says_which_tokens_of_a_chunk_are_meant(positions, start, expected):
    found = mask(positions, PassInput(TOKENS, start), 3, SPECIAL)
    if isinstance(expected, bool):
        assert found is expected
    else:
        assert found.tolist() == torch.tensor(expected).bool().tolist()


def test_prompt_and_generated_share_the_text_between_them():
    for start in range(6):
        for length in range(8):
            both = [mask(p, PassInput(TOKENS, start), length, None) for p in ("prompt", "generated")]
            prompt, generated = (torch.as_tensor(m).expand(2, 5) for m in both)
            assert torch.equal(prompt, ~generated)
            assert prompt[0].tolist() == [start + i < length for i in range(5)]


def test_masked_positions_are_unchanged_bit_for_bit():
    h = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(1))
    chosen = torch.tensor([[1, 0, 1, 0, 0], [0, 0, 0, 1, 1]]).bool()
    changed = masked(lambda x: x * 2, lambda: chosen)(h)
    assert torch.equal(changed[~chosen], h[~chosen])
    assert torch.equal(changed[chosen], 2 * h[chosen])
    assert torch.equal(masked(lambda x: x * 2, lambda: True)(h), h * 2)
    assert masked(lambda x: x * 2, lambda: False)(h) is h


# ---- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"mode": "push"}, "no steering mode 'push': choose one of additive, orthogonal"),
        ({"positions": "first"}, f"no positions 'first': choose one of {', '.join(POSITIONS)}"),
        ({"strength": float("nan")}, "strength of feature 0 is nan"),
        ({"strength": float("inf")}, "must be a finite number"),
        ({"feature": -1}, "feature -1: features are numbered from 0"),
    ],
)
def test_a_request_that_means_nothing_is_refused(fields, complaint):
    with pytest.raises(ValueError, match=complaint):
        Steer(**({"hook": HOOK, "feature": 0} | fields))


def test_a_feature_that_is_not_there_or_points_nowhere_is_refused():
    with pytest.raises(ValueError, match=f"{HOOK}: no feature 2: this SAE has features 0 to 1"):
        steering_edit(BY_HAND, Steer(HOOK, 2), 1.0, torch.float32)
    with pytest.raises(ValueError, match="strength_multiplier is inf"):
        steering_edit(BY_HAND, Steer(HOOK, 0), float("inf"), torch.float32)
    silent = TorchSAE(BY_HAND.cfg, dict(BY_HAND.named_parameters()) | {"W_dec": torch.zeros(2, 3)})
    with pytest.raises(ValueError, match="not a direction to steer in"):
        steering_edit(silent, Steer(HOOK, 0), 1.0, torch.float32)


def test_a_request_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Steer(HOOK, 0).strength = 3.0
