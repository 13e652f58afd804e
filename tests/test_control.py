"""The controller of L0, driven against a plant whose answer to a penalty is known."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jsae import control
from jsae.architectures import sae_config
from jsae.settings import ConfigError

LEAD = 0.3


def plant(strength: float, share: float, gain: float) -> float:
    """L0 of an SAE that learns: it falls by itself, ever more slowly, and with the penalty as a power of it."""
    return 400 * math.exp(-2 * (1 - math.exp(-5 * share))) * (strength / 0.1) ** -gain


def led(
    target: float, proportional: float, gain: float, num_steps: int, lag: float = 0.9, lead: float = LEAD
) -> np.ndarray:
    """L0 of every step of a run; it follows the penalty slowly, `lag` being what is left of the last step's."""
    state, l0, found = control.initial(target), plant(control.FIRST_STRENGTH, 0, gain), []
    strength_of = jax.jit(control.strength, static_argnums=(1, 2, 4, 5))
    after = jax.jit(control.update, static_argnums=(1, 4, 5))
    for number in range(1, num_steps + 1):
        strength = float(strength_of(state, target, proportional, jnp.int32(number), num_steps, lead))
        l0 = math.exp(lag * math.log(l0) + (1 - lag) * math.log(plant(strength, number / num_steps, gain)))
        state = after(state, target, jnp.float32(l0), jnp.int32(number), num_steps, lead)
        found.append(l0)
    return np.array(found)


@pytest.mark.parametrize("proportional", [0.0, 2.0])
@pytest.mark.parametrize("gain", [0.5, 1.0])
@pytest.mark.parametrize("target", [16.0, 64.0])
def test_l0_arrives_at_its_target_and_stays(target, gain, proportional):
    l0 = led(target, proportional, gain, num_steps=1000)
    np.testing.assert_allclose(l0[-200:], target, rtol=0.05)


def test_l0_is_led_down_and_not_thrown():
    """Were the end asked for at once, the penalty would rise to what kills latents before they have learned."""
    l0 = led(32.0, 0.0, 1.0, num_steps=1000)
    assert l0.min() > 0.6 * 32
    assert l0[100] > 2 * 32


@pytest.mark.parametrize("lead", [0.0, 0.7])
def test_l0_falls_to_its_target_over_the_given_fraction_of_the_run(lead):
    l0 = led(16.0, 2.0, 1.0, num_steps=1000, lead=lead)
    np.testing.assert_allclose(l0[-200:], 16, rtol=0.05)
    reached = int(np.argmax(l0 < 1.2 * 16))
    assert 0.75 * lead * 1000 <= reached <= max(lead * 1000, 150)


def test_without_a_target_the_penalty_is_left_alone():
    state = control.initial(None)
    for number in range(1, 50):
        assert float(control.strength(state, None, 2.0, jnp.int32(number), 100, LEAD)) == 1
        state = control.update(state, None, jnp.float32(1000.0 / number), jnp.int32(number), 100, LEAD)
    assert float(state.strength) == 1


def test_the_first_steps_are_what_the_formulas_say():
    """Target 10 of 100 steps, first L0 40: after step 1 the wanted L0 is 10 * 4 ** (1 - 1/30)."""
    state = control.initial(10.0)
    assert float(control.strength(state, 10.0, 2.0, jnp.int32(1), 100, LEAD)) == pytest.approx(0.1)
    state = control.update(state, 10.0, jnp.float32(40.0), jnp.int32(1), 100, LEAD)
    error = math.log(40) - math.log(10) - (1 - 1 / 30) * math.log(4)
    strength = 0.1 * math.exp(30 / 100 * error)
    assert [float(x) for x in state] == pytest.approx([strength, 40, 40])
    later = math.log(40) - math.log(10) - (1 - 2 / 30) * math.log(4)
    assert float(control.strength(state, 10.0, 2.0, jnp.int32(2), 100, LEAD)) == pytest.approx(
        strength * math.exp(2 * later)
    )
    state = control.update(state, 10.0, jnp.float32(20.0), jnp.int32(2), 100, LEAD)
    error = math.log(20) - math.log(10) - (1 - 2 / 30) * math.log(4)
    assert [float(x) for x in state] == pytest.approx([strength * math.exp(0.3 * error), 40, 0.8 * 40 + 0.2 * 20])


def test_an_l0_of_zero_or_beyond_all_bounds_moves_the_strength_by_a_bounded_factor():
    for l0 in (0.0, 1e9):
        state = control.update(control.initial(10.0), 10.0, jnp.float32(20.0), jnp.int32(1), 100, LEAD)
        moved = control.update(state, 10.0, jnp.float32(l0), jnp.int32(2), 100, LEAD)
        assert abs(math.log(moved.strength / state.strength)) <= 0.3 + 1e-6
        assert all(np.isfinite(x) for x in moved)


def test_an_l0_that_starts_below_its_target_is_led_up():
    state = control.update(control.initial(50.0), 50.0, jnp.float32(5.0), jnp.int32(1), 100, LEAD)
    assert float(state.strength) < control.FIRST_STRENGTH


def test_a_time_to_reach_a_target_without_a_target_is_refused():
    with pytest.raises(ConfigError, match=r"target_l0_fraction=0\.7 means nothing without a target_l0"):
        sae_config("gated", 8, 16, target_l0_fraction=0.7)
    assert sae_config("gated", 8, 16, target_l0=2.0, target_l0_fraction=0.7).target_l0_fraction == 0.7
