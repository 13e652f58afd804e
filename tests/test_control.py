"""The controller of L0, driven against a plant whose answer to a penalty is known."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jsae import control
from jsae.architectures import Gated, JumpReLU, ReLU, sae_config
from jsae.settings import ConfigError

RELU = ReLU.control_law
GATED = Gated.control_law
JUMPRELU = JumpReLU.control_law


def plant(strength: float, share: float, gain: float) -> float:
    """L0 of an SAE that learns: it falls by itself, ever more slowly, and with the penalty as a power of it."""
    return 400 * math.exp(-2 * (1 - math.exp(-5 * share))) * (strength / 0.1) ** -gain


def led(
    target: float, law: control.Law, gain: float, num_steps: int = 1000, lag: float = 0.9
) -> tuple[np.ndarray, np.ndarray]:
    """L0 and strength of every step; L0 follows the penalty slowly, `lag` being what is left of the last step's."""
    state, l0, found = control.initial(target), plant(control.FIRST_STRENGTH, 0, gain), []
    strength_of = jax.jit(control.strength, static_argnums=(1, 2, 4))
    after = jax.jit(control.update, static_argnums=(1, 2, 5))
    for number in range(1, num_steps + 1):
        strength = float(strength_of(state, target, law, jnp.int32(number), num_steps))
        l0 = math.exp(lag * math.log(l0) + (1 - lag) * math.log(plant(strength, number / num_steps, gain)))
        state = after(state, target, law, jnp.float32(l0), jnp.int32(number), num_steps)
        found.append((l0, strength))
    l0s, strengths = np.array(found).T
    return l0s, strengths


@pytest.mark.parametrize(("law", "last"), [(RELU, 100), (GATED, 200), (JUMPRELU, 200)])
@pytest.mark.parametrize("gain", [0.5, 1.0])
@pytest.mark.parametrize("target", [16.0, 64.0])
def test_l0_arrives_at_its_target_and_stays(target, gain, law, last):
    l0, _ = led(target, law, gain)
    np.testing.assert_allclose(l0[-last:], target, rtol=0.05)


def test_the_penalty_hardly_exceeds_the_strength_that_it_needs_in_the_end():
    """Were the target asked for at once, it would rise to what kills latents before they have learned."""
    l0, strength = led(32.0, RELU, 1.0)
    assert strength.max() < 2 * strength[-1]
    assert l0.min() > 0.9 * 32
    assert l0[100] > 2 * 32


@pytest.mark.parametrize("fraction", [0.0, 0.7])
def test_l0_is_at_its_target_after_the_given_fraction_of_the_run(fraction):
    l0, _ = led(16.0, JUMPRELU._replace(fraction=fraction), 1.0)
    np.testing.assert_allclose(l0[-200:], 16, rtol=0.05)
    reached = int(np.argmax(l0 < 1.2 * 16))
    assert 0.75 * fraction * 1000 <= reached <= max(fraction * 1000, 300)


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_the_ends_of_the_range_of_the_fraction_give_finite_values(fraction):
    l0, strength = led(16.0, RELU._replace(fraction=fraction), 1.0, num_steps=100)
    assert np.isfinite(l0).all()
    assert np.isfinite(strength).all()


def test_without_a_target_the_penalty_is_left_alone():
    state = control.initial(None)
    for number in range(1, 50):
        assert float(control.strength(state, None, RELU, jnp.int32(number), 100)) == 1
        state = control.update(state, None, RELU, jnp.float32(1000.0 / number), jnp.int32(number), 100)
    assert float(state.strength) == 1


def test_the_first_steps_are_what_the_formulas_say():
    """Target 10 of 100 steps, first L0 40, exponent 1: the wanted L0 is 10 * 60 / step, but 40 at most."""
    state = control.initial(10.0)
    assert float(control.strength(state, 10.0, JUMPRELU, jnp.int32(1), 100)) == pytest.approx(0.1)
    state = control.update(state, 10.0, JUMPRELU, jnp.float32(40.0), jnp.int32(1), 100)
    assert [float(x) for x in state] == pytest.approx([0.1, 40, 40])
    later = math.log(40 / (10 * 60 / 30))
    strength = float(control.strength(state, 10.0, JUMPRELU, jnp.int32(30), 100))
    assert strength == pytest.approx(0.1 * math.exp(2 * later))
    state = control.update(state, 10.0, JUMPRELU, jnp.float32(20.5), jnp.int32(30), 100)
    error = math.log(20.5 / (10 * 60 / 30))
    assert [float(x) for x in state] == pytest.approx(
        [0.1 * math.exp(30 * 0.3**0.5 / 100 * error), 40, 0.8 * 40 + 0.2 * 20.5]
    )


def test_an_l0_of_zero_or_beyond_all_bounds_moves_the_strength_by_a_bounded_factor():
    for l0 in (0.0, 1e9):
        state = control.update(control.initial(10.0), 10.0, RELU, jnp.float32(20.0), jnp.int32(1), 100)
        moved = control.update(state, 10.0, RELU, jnp.float32(l0), jnp.int32(100), 100)
        assert abs(math.log(moved.strength / state.strength)) <= 0.3 + 1e-6
        assert all(np.isfinite(x) for x in moved)


def test_an_l0_that_starts_below_its_target_is_led_up():
    state = control.update(control.initial(50.0), 50.0, RELU, jnp.float32(5.0), jnp.int32(1), 100)
    assert float(state.strength) < control.FIRST_STRENGTH


def test_a_time_to_reach_a_target_without_a_target_is_refused():
    with pytest.raises(ConfigError, match=r"target_l0_fraction=0\.7 means nothing without a target_l0"):
        sae_config("gated", 8, 16, target_l0_fraction=0.7)
    assert sae_config("gated", 8, 16, target_l0=2.0, target_l0_fraction=0.7).target_l0_fraction == 0.7
