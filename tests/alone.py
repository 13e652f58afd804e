"""Training of a single SAE: the training loop with one member, without tuples."""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import optax

from jsae import loop, metrics
from jsae.architectures import SAEConfig
from jsae.config import TrainConfig
from jsae.state import Acts, TrainState


def begin(
    config: SAEConfig, how: TrainConfig, sample: Acts, inner: optax.GradientTransformation | None = None
) -> TrainState:
    """Return the state before the first step."""
    return loop.init([loop.Member(config, how, inner=inner)], (sample,))[0]


@functools.cache
def programs(member: loop.Member) -> loop.Programs:
    """Return the compiled steps of a member, which all tests share."""
    return loop.Programs([member])


def fit(
    config: SAEConfig,
    how: TrainConfig,
    state: TrainState,
    batches: Iterable[Acts],
    inner: optax.GradientTransformation | None = None,
) -> Iterator[tuple[int, TrainState, metrics.Sums]]:
    """Train to the end of the run; yield number, state and sums of every step."""
    member = loop.Member(config, how, inner=inner)
    for number, states, sums in loop.fit([member], (state,), ((batch,) for batch in batches), programs(member)):
        yield number, states[0], sums[0]


def stepping(config: SAEConfig, how: TrainConfig) -> Callable[[TrainState, Any], tuple[TrainState, metrics.Sums]]:
    """Return the compiled step after k has been lowered: (state, acts) -> (state, sums); it donates the state."""
    program = programs(loop.Member(config, how)).at(how.num_steps)

    def step(state: TrainState, acts: Acts) -> tuple[TrainState, metrics.Sums]:
        (state,), (sums,) = program((state,), (acts,))
        return state, sums

    return step
