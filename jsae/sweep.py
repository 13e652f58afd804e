"""Many SAEs from one stream of activations: stepped together in one compiled step, each as if it were alone."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax

from jsae import metrics, train
from jsae.config import SAEConfig, TrainConfig, require
from jsae.train import Acts, TrainState

Batch = Sequence[Acts]
"""For every site its activations, of the same tokens."""


class Member(NamedTuple):
    """One SAE of a sweep."""

    sae: SAEConfig
    train: TrainConfig
    site: int
    """Which site of a batch it reads."""


States = tuple[TrainState, ...]
AllSums = tuple[metrics.Sums, ...]


def init(members: Sequence[Member], sample: Batch) -> States:
    """The states before the first step, each scaled and centred on its site's sample of activations."""
    return tuple(train.init(member.sae, member.train, sample[member.site]) for member in members)


def fit(members: Sequence[Member], states: States, batches: Iterator[Batch]) -> Iterator[tuple[int, States, AllSums]]:
    """Trains all from where the states stand to the end of the run, one batch a step.

    Yields `(steps taken, states, sums of the batch)` after every step without waiting for the device. The states are
    the next step's to reuse: whoever keeps them must copy them before asking for the next.

    Raises:
      ConfigError: members whose runs differ in their number of steps.
    """
    steps = {member.train.num_steps for member in members}
    require(len(steps) == 1, f"SAEs of one pass take the same number of steps, not {sorted(steps)}")
    programs: dict[tuple[int | None, ...], Any] = {}
    for number in range(int(states[0].step) + 1, steps.pop() + 1):
        rooms = tuple(train.room(member.train, member.sae, number) for member in members)
        if rooms not in programs:
            programs[rooms] = _program(members, rooms)
        states, sums = programs[rooms](states, tuple(next(batches)))
        yield number, states, sums


def _program(members: Sequence[Member], rooms: tuple[int | None, ...]) -> Any:
    """The compiled step of all members; the states are donated."""

    def step(states: States, batch: Batch) -> tuple[States, AllSums]:
        done = [
            train.update(member.train, state, batch[member.site], room)
            for member, state, room in zip(members, states, rooms, strict=True)
        ]
        return tuple(state for state, _ in done), tuple(sums for _, sums in done)

    return jax.jit(step, donate_argnums=0)
