"""SAEs that learn from the activations of a training as they come, with a checkpoint for every one of the training."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from bridge.live.config import Sizes, WatchConfig
from bridge.live.pool import Pool, Rows
from bridge.live.results import Results
from bridge.run import Run, directory
from bridge.training import plan
from jsae import drift, loop, metrics, step
from jsae.checkpoint import Checkpoints
from jsae.config import RECIPE, TrainConfig
from jsae.settings import require

if TYPE_CHECKING:
    from jsae.drift import Drift
    from jsae.loop import AllSums, Member, States
    from jsae.ops import Ops

_ENDLESS, _MOST = 2**31 - 1, 2**50  # batches and activations of a training without an end
_WARMUP = 100  # batches
_SPARSITY_WARMUP = 250

Say = Callable[[str], None]


class Learner:
    """The SAEs of a watched training and their run directory, which is locked. A context manager.

    Args:
      config: the settings.
      sizes: of the model.
      say: called with messages for the user.

    Raises:
      ConfigError: settings that cannot work, or a directory that holds something else.
      LockedError: another process writes to the directory.
      DamagedError: the checkpoint to continue from is damaged.
    """

    def __init__(self, config: WatchConfig, sizes: Sizes, say: Say = print):
        self._config, self._say = config, say
        run, settings = Run(config.output_dir), config.run_config()
        self._trainees = plan.trainees_of_sizes(run.path, settings, sizes.n_layer, sizes.n_embd)
        self._nominal = [trainee.member for trainee in self._trainees]
        self._members = [_endless(member) for member in self._nominal]
        self._ops = loop.choose_ops(self._members).ops
        self._advance = _program(tuple(self._members), self._ops)
        self._pool = Pool(config.batch_size, [sizes.n_embd] * len(self._members))
        self._states: States | None = None
        self._drifts: tuple[Drift, ...] = ()
        self._window: AllSums | None = None
        self._since_save: AllSums | None = None
        self._step_of_training = max(config.resume_from, 0)
        self._watch: dict[str, float] = {}
        self.batches = 0
        """Number of batches that were trained on."""
        self.prepared = False
        """True if a batch was trained on in this process, so that everything is compiled."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(directory.claimed(run.path, config))
            facts = {"model": None, "data": None, "sizes": sizes.to_json(), "recipe": RECIPE}
            facts["hook_names"] = [list(trainee.hooks) for trainee in self._trainees]
            directory.record(run.path, config, facts)
            self._checkpoints = stack.enter_context(Checkpoints(run.checkpoints_folder, config.keep_checkpoints))
            if config.resume:
                self._restore()
            excluded = list(sizes.excluded(config.exclude_tokens))
            self._results = stack.enter_context(
                Results(config, settings, self._trainees, excluded, self._step_of_training)
            )
            self._stack = stack.pop_all()

    def __enter__(self) -> Learner:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    @property
    def hooks(self) -> tuple[str, ...]:
        """The hooks that are read, one per SAE."""
        return tuple(trainee.hooks[0] for trainee in self._trainees)

    @property
    def folder(self) -> Path:
        """The run directory."""
        return Run(self._config.output_dir).path

    def push(self, parts: Sequence[Rows], step_of_training: int, watch: dict[str, float] | None = None) -> None:
        """Train on activations, in whole batches; what is left over waits for more.

        Args:
          parts: rows of every hook, of the same tokens.
          step_of_training: steps that the training has taken with them.
          watch: figures of the watching, for the metrics.

        Raises:
          NotFiniteError: an SAE has a loss that is not finite.
          DegenerateError: the first batch is one from which nothing can be learned.
        """
        self._step_of_training, self._watch = step_of_training, watch or {}
        for batch in self._pool.batches(parts):
            self._train(batch)

    def save(self, step_of_training: int, watch: dict[str, float] | None = None) -> bool:
        """Save everything as the checkpoint of a step of the training, and export the SAEs; return when it is on disk.

        Args:
          step_of_training: steps that the training has taken.
          watch: figures of the watching, for the metrics.

        Returns:
          False where no batch has been trained on yet, so that there is nothing to save.

        Raises:
          OSError: the files cannot be written; earlier ones are complete.
          NotFiniteError: an SAE has a loss that is not finite; nothing is saved.
        """
        self._step_of_training, self._watch = step_of_training, watch or {}
        if self._states is None:
            return False
        self._report()
        notes = {"batches": self.batches, "filled": self._pool.filled}
        self._checkpoints.save(step_of_training, self._tree(), notes, float("nan"))
        self._checkpoints.wait()
        if self._since_save is not None:
            self._results.export(self._states, jax.device_get(self._since_save), step_of_training, self.batches)
            self._since_save = None
        return True

    def close(self) -> None:
        """Unlock the directory. What was learned after the last checkpoint is dropped, as it is in the training."""
        self._stack.close()

    def _tree(self) -> Any:
        return self._states, self._drifts, tuple(jnp.asarray(array) for array in self._pool.arrays)

    def _train(self, batch: tuple[Rows, ...]) -> None:
        acts = tuple(jax.device_put(part) for part in batch)
        if self._states is None:
            self._states = loop.init(self._nominal, acts, self._ops)
            self._drifts = tuple(map(drift.init, acts))
        self._states, self._drifts, sums = self._advance(self._states, self._drifts, acts)
        self._window = sums if self._window is None else _add(self._window, sums)
        self._since_save = sums if self._since_save is None else _add(self._since_save, sums)
        jax.block_until_ready(self._states)
        self.batches, self.prepared = self.batches + 1, True
        if self.batches % self._config.log_every == 0:
            self._report()

    def _report(self) -> None:
        if self._window is None:
            return
        for trainee, state, sums in zip(self._trainees, self._states, self._window, strict=True):
            loop.check_finite(state, sums, trainee.name if len(self._trainees) > 1 else None)
        window = jax.device_get(self._window)
        values: list[dict[str, Any]] = [
            summary | {"density_histogram": metrics.density_histogram(sums)}
            for summary, sums in zip(
                loop.summaries(self._members, self.batches, self._states, window), window, strict=True
            )
        ]
        scales = [float(state.scale) for state in self._states]
        self._results.report(self._step_of_training, self.batches, values, scales, self._watch)
        self._window = None

    def _restore(self) -> None:
        """Continue from the checkpoint of the step from which the training goes on, or the last one before it."""
        begin, steps = self._config.resume_from, self._checkpoints.steps()
        before = [number for number in steps if number <= begin]
        if not before:
            known = f"its checkpoints are of the steps {_shortened(steps)}" if steps else "it has no checkpoint"
            self._say(f"the SAEs begin anew at step {begin} of the training: in {self.folder} {known}")
            return
        like = loop.abstract_states(self._members, self._ops)
        batch = [jax.ShapeDtypeStruct((m.train.batch_size, m.sae.d_in), np.float32) for m in self._members]
        means = tuple(jax.eval_shape(drift.init, acts) for acts in batch)
        restored = self._checkpoints.restore((like, means, tuple(batch)), before[-1])
        self._states, self._drifts, waiting = restored.states
        self.batches, filled = int(restored.notes["batches"]), int(restored.notes["filled"])
        require(0 <= filled < self._config.batch_size, f"{self.folder}: the notes of step {before[-1]} are damaged")
        self._pool.restore([np.asarray(array) for array in waiting], filled)
        if before[-1] < begin:
            self._say(
                f"the SAEs have no checkpoint of step {begin}: they go on from that of step {before[-1]}, and have not "
                "seen the training between the two"
            )
        self._step_of_training = before[-1]


@functools.lru_cache(maxsize=4)
def _program(members: tuple[Member, ...], ops: Ops) -> Any:
    """Return a compiled step of some SAEs; the last few are kept for watching with the same SAEs again.

    It takes states, running means and a batch, of which each SAE has a part, and returns states, means and metric sums.
    """

    def advance(
        states: States, drifts: tuple[Drift, ...], batch: tuple[Any, ...]
    ) -> tuple[States, tuple[Drift, ...], AllSums]:
        taken = []
        for member, state, means, acts in zip(members, states, drifts, batch, strict=True):
            state, means = drift.follow(state, means, acts)
            state, sums = step.update(member.train, ops, state, acts)
            taken.append((state, means, sums))
        return tuple(zip(*taken, strict=True))

    return jax.jit(advance, donate_argnums=(0, 1))


@jax.jit
def _add(totals: AllSums, sums: AllSums) -> AllSums:
    return tuple(map(metrics.add, totals, sums))


def _endless(member: Member) -> Member:
    """Return an SAE whose training never ends: its rate warms up and stays."""
    train = member.train
    steps = min(_ENDLESS, _MOST // train.batch_size)
    endless = TrainConfig(
        **{f.name: getattr(train, f.name) for f in dataclasses.fields(train)}
        | {
            "num_activations": steps * train.batch_size,
            "warmup_fraction": _WARMUP / steps,
            "sparsity_warmup_fraction": _SPARSITY_WARMUP / steps,
            "decay_fraction": 0.0,
        }
    )
    return member._replace(train=endless)


def _shortened(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps if len(steps) < 9 else [*steps[:4], "…", *steps[-4:]]))
