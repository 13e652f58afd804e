"""The training loop: any number of SAEs on one stream of activations, stepped in one compiled program.

A single SAE is the case of one member. Every member equals the SAE that is trained alone with the same seeds.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from jsae import axes, metrics, optim, processes, state, step
from jsae.architectures import SAEConfig
from jsae.config import TrainConfig
from jsae.health import ActivationsError, NotFiniteError
from jsae.ops import Ops, Sharded, Xla, choose, choose_with_reason
from jsae.pretrained import Pretrained
from jsae.settings import require
from jsae.state import Acts, TrainState

Batch = Sequence[Acts]
"""For every site its activations, of the same tokens."""


class Member(NamedTuple):
    """One SAE of a run."""

    sae: SAEConfig
    train: TrainConfig
    site: int = 0
    """Which site of a batch it reads."""
    inner: optax.GradientTransformation | None = None
    """An optimiser in the place of Adam, with its own learning rate; decoder rows keep norm 1 in any case."""

    @property
    def ops(self) -> Ops:
        """The implementation for jax's default device and the run's matmul dtype."""
        return choose(self.train.matmul_dtype)


class Choice(NamedTuple):
    """The implementation of operations for a run, and why it was chosen."""

    ops: Ops
    reason: str


States = tuple[TrainState, ...]
AllSums = tuple[metrics.Sums, ...]


def init(
    members: Sequence[Member],
    sample: Batch,
    ops: Ops | None = None,
    mesh: Mesh | None = None,
    starts: Sequence[Pretrained | None] | None = None,
) -> States:
    """Return the states before the first step, each scaled and centred on its site's sample of activations.

    Args:
      members: the SAEs.
      sample: activations of every site; on a mesh the same on all devices.
      ops: the implementation on one device; None chooses it for the device.
      mesh: devices over which the states are sharded; None: one device.
      starts: for every member the exported SAE that it continues, or None; None: all start anew.

    Raises:
      ConfigError: activations of other widths than the SAE's, or a start that is not of the member's kind.
      ActivationsError, DegenerateError: a sample that nothing can be learned from; an abstract one is not checked.
    """
    if mesh is not None:
        ops = Xla(members[0].train.matmul_dtype)  # partitioned by the compiler

    def one(member: Member, start: Pretrained | None) -> TrainState:
        if start is not None:
            start.check(member.sae)
        return state.init(
            member.sae,
            member.train,
            ops or member.ops,
            sample[member.site],
            _optimizer(member, ops),
            mesh,
            None if start is None else start.plain.weights,
        )

    return tuple(map(one, members, starts or [None] * len(members)))


def abstract_states(members: Sequence[Member], ops: Ops | None = None, mesh: Mesh | None = None) -> States:
    """Return shapes, dtypes and on a mesh shardings of the states, which restoring a checkpoint needs."""

    def one(member: Member) -> TrainState:
        whole = jax.eval_shape(
            lambda sample: init([member._replace(site=0)], (sample,), ops)[0], _abstract_acts(member)
        )
        if mesh is None:
            return whole
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            whole,
            state.shardings(whole, mesh),
        )

    return tuple(map(one, members))


def choose_ops(members: Sequence[Member], mesh: Mesh | None = None) -> Choice:
    """Return the implementation for jax's default device: without kernels where a step with them does not compile.

    On a GPU with kernels the first step is traced and its kernels are compiled to PTX, for the sizes of the members.

    Args:
      members: the SAEs.
      mesh: devices that share every step; None: one device.
    """
    choice = Choice(*choose_with_reason(members[0].train.matmul_dtype))
    obstacle = _obstacle(members, choice.ops, mesh) if choice.ops.name == "gpu" else None
    if obstacle is None:
        return choice
    return Choice(Xla(members[0].train.matmul_dtype), obstacle)


def _obstacle(members: Sequence[Member], ops: Ops, mesh: Mesh | None) -> str | None:
    """Return why kernels of the first step cannot be compiled; None if they can."""
    batch = {member.site: _abstract_acts(member, mesh) for member in members}
    try:
        states = abstract_states(members, ops, mesh)
        Programs(members, ops, mesh).at(1).lower(states, tuple(batch[site] for site in sorted(batch)))
    except Exception as error:  # compilers raise errors of their own kinds
        lines = str(error).strip().splitlines() or [""]
        return f"a step with Triton kernels does not compile for this GPU ({type(error).__name__}: {lines[0]:.200})"
    return None


def _abstract_acts(member: Member, mesh: Mesh | None = None) -> tuple[jax.ShapeDtypeStruct, ...]:
    rows, sharding = member.train.batch_size, None if mesh is None else NamedSharding(mesh, axes.BATCH)
    return tuple(
        jax.ShapeDtypeStruct((rows, width), np.float32, sharding=sharding) for width in state.widths(member.sae)
    )


class Programs:
    """The compiled steps of some SAEs, compiled when they are first needed. The states are donated.

    Args:
      members: the SAEs.
      ops: the implementation on one device; None chooses it for the device.
      mesh: devices that share every step; batches are divided over all of them in order. None: one device.
    """

    def __init__(self, members: Sequence[Member], ops: Ops | None = None, mesh: Mesh | None = None):
        self._members, self._own_ops, self._mesh = tuple(members), ops, mesh
        self._compiled: dict[tuple[int | None, ...], Any] = {}

    def at(self, number: int) -> Any:
        """Return `(states, batch) -> (states, sums)` of a step; the program changes where k has come down."""
        rooms = tuple(room(member, number) for member in self._members)
        if rooms not in self._compiled:
            self._compiled[rooms] = jax.jit(self._step(rooms), donate_argnums=0)
        return self._compiled[rooms]

    def _step(self, rooms: tuple[int | None, ...]) -> Any:
        def all_steps(states: States, batch: Batch) -> tuple[States, AllSums]:
            if self._mesh is not None:
                batch = jax.lax.with_sharding_constraint(batch, NamedSharding(self._mesh, axes.spec(("n", "d"))))
            done = [
                step.update(
                    member.train,
                    self._ops(member),
                    before,
                    batch[member.site],
                    room,
                    _optimizer(member, self._ops(member)),
                )
                for member, before, room in zip(self._members, states, rooms, strict=True)
            ]
            states = tuple(self._placed(after) for after, _ in done)
            return states, tuple(sums for _, sums in done)

        return all_steps

    def _ops(self, member: Member) -> Ops:
        """Return the implementation for all devices."""
        ops = self._own_ops or member.ops
        return ops if self._mesh is None else Sharded(inner=ops, mesh=self._mesh)  # type: ignore[arg-type]

    def _placed(self, new: TrainState) -> TrainState:
        """Return a state in its place on the devices."""
        if self._mesh is None:
            return new
        return jax.lax.with_sharding_constraint(new, state.shardings(new, self._mesh))


def fit(
    members: Sequence[Member], states: States, batches: Iterator[Batch], programs: Programs | None = None
) -> Iterator[tuple[int, States, AllSums]]:
    """Train all members from where the states stand to the end of the run, one batch a step.

    Yields `(steps taken, states, sums of the batch)` after every step without waiting for the device. The states are
    donated to the next step: whoever keeps them must copy them before asking for the next. `programs` of the same
    members save the compilation.

    Raises:
      ConfigError: no members, members whose runs differ in their number of steps, or batches that end before the run.
    """
    steps = {member.train.num_steps for member in members}
    require(len(steps) == 1, f"SAEs of one pass take the same number of steps, not {sorted(steps)}")
    programs, last = programs or Programs(members), steps.pop()
    for number in range(int(states[0].step) + 1, last + 1):
        batch = next(batches, None)
        require(batch is not None, f"the activations ended after {number - 1} of {last} steps: give more of them")
        states, sums = programs.at(number)(states, tuple(batch))
        yield number, states, sums


def room(member: Member, number: int) -> int | None:
    """Return how many codes a token may have in a step in which k is still above the SAE's; None afterwards."""
    config = member.train
    return config.k_start if config.anneals(member.sae) and number <= config.anneal_steps else None


def check_finite(state: TrainState, sums: metrics.Sums, name: str | None = None) -> None:
    """Wait for the device and stop a run whose loss is not finite; `name` says which SAE of several.

    Raises:
      NotFiniteError: some step so far had a loss that is NaN or infinite; an ActivationsError where they are the cause.
    """
    number = int(state.bad_step)
    if number >= 0:
        bad = int(sums.nonfinite)
        cause = (
            f"{bad} numbers in the activations since the last report are not finite: look at the model's output there"
            if bad
            else "the activations were finite: lower the learning rate or raise the warm-up"
        )
        whose = "" if name is None else f" of {name}"
        raise (ActivationsError if bad else NotFiniteError)(f"the loss{whose} is not finite at step {number}; {cause}")


def summaries(members: Sequence[Member], number: int, states: States, sums: AllSums) -> list[dict[str, float]]:
    """Wait for the device and return the metrics of every member over some steps, the last of which is `number`.

    They are those of `jsae.metrics.summarize`. But `dead_fraction` is the share of latents without a value for
    `dead_after` activations, and `learning_rate` is that of the last step, unless the member has its own optimiser.
    """
    metrics_of_all = []
    fetched = processes.fetch([(last.since_fired, last.rate) for last in states])
    for member, own_sums, (silent, rate) in zip(members, processes.fetch(sums), fetched, strict=True):
        summary = metrics.summarize(own_sums)
        summary["dead_fraction"] = float(np.mean(silent >= member.train.dead_window))
        if member.inner is None:
            summary["learning_rate"] = float(rate * optim.schedule(member.train)(number - 1))
        metrics_of_all.append(summary)
    return metrics_of_all


def _optimizer(member: Member, ops: Ops | None) -> optim.Optimizer:
    return optim.make(member.train, member.sae, ops or member.ops, member.inner)
