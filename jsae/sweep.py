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


class Programs:
    """The compiled steps of some SAEs, made when they are first needed; the states are donated."""

    def __init__(self, members: Sequence[Member]):
        self._members = tuple(members)
        self._compiled: dict[tuple[int | None, ...], Any] = {}

    def of(self, number: int) -> Any:
        """`(states, batch) -> (states, sums)` of a step: it changes where k has come down."""
        rooms = tuple(train.room(member.train, member.sae, number) for member in self._members)
        if rooms not in self._compiled:
            self._compiled[rooms] = self._program(rooms)
        return self._compiled[rooms]

    def _program(self, rooms: tuple[int | None, ...]) -> Any:
        def step(states: States, batch: Batch) -> tuple[States, AllSums]:
            done = [
                train.update(member.train, state, batch[member.site], room)
                for member, state, room in zip(self._members, states, rooms, strict=True)
            ]
            return tuple(state for state, _ in done), tuple(sums for _, sums in done)

        return jax.jit(step, donate_argnums=0)


def fit(
    members: Sequence[Member], states: States, batches: Iterator[Batch], programs: Programs | None = None
) -> Iterator[tuple[int, States, AllSums]]:
    """Trains all from where the states stand to the end of the run, one batch a step.

    Yields `(steps taken, states, sums of the batch)` after every step without waiting for the device. The states are
    the next step's to reuse: whoever keeps them must copy them before asking for the next. `programs` of the same
    members spare the compilation.

    Raises:
      ConfigError: members whose runs differ in their number of steps.
    """
    steps = {member.train.num_steps for member in members}
    require(len(steps) == 1, f"SAEs of one pass take the same number of steps, not {sorted(steps)}")
    programs = programs or Programs(members)
    for number in range(int(states[0].step) + 1, steps.pop() + 1):
        states, sums = programs.of(number)(states, tuple(next(batches)))
        yield number, states, sums
