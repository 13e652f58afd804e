"""The loop of a training run: every step of every SAE, reports and checkpoints between."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from experiments.report import Reporter
from experiments.signals import stop_requests
from jsae import metrics, optim
from jsae import train as training
from jsae.checkpoint import Checkpoints
from jsae.data import Cursor, Shuffled
from jsae.train import AllSums, Member, States

if TYPE_CHECKING:
    from bridge.stream import ActivationStream
    from experiments.plan import Trainee
    from experiments.run_config import RunConfig


def train(run: Path, config: "RunConfig", trainees: Sequence["Trainee"], source: "ActivationStream") -> States | None:
    """Trains from the start or the last checkpoint to the end; None if it was asked to stop, after saving."""
    members = [trainee.member for trainee in trainees]
    num_steps = members[0].train.num_steps
    save_every = max(config.checkpoint_every // config.batch_size, 1)
    add = jax.jit(lambda totals, sums: tuple(map(metrics.add, totals, sums)))
    with Checkpoints(run / "checkpoints") as checkpoints:
        batches, states = _begin(config, members, source, checkpoints)
        begun, start = states, int(states[0].step)
        last_fvu, window = float("nan"), None
        with Reporter(run, trainees, start, num_steps, config.wandb_project) as reporter, stop_requests() as stopped:
            for step, states, sums in training.fit(members, begun, batches):
                window = sums if window is None else add(window, sums)
                last = step == num_steps
                due = last or bool(stopped) or step % save_every == 0
                if due or step % config.log_every == 0:
                    for trainee, state, total in zip(trainees, states, window, strict=True):
                        training.check_finite(state, total, trainee.label if len(trainees) > 1 else None)
                    values = _values(members, step, states, window)
                    tokens, source.tokens_seen = source.tokens_seen, 0
                    reporter.report(step, values, tokens)
                    last_fvu, window = float(np.mean([v["fvu"] for v in values])), None
                if due:
                    checkpoints.save(step, states, {"cursor": batches.cursor().to_json()}, last_fvu)
                if stopped and not last:
                    checkpoints.wait()
                    return None
        checkpoints.wait()
    return states


def _begin(
    config: "RunConfig", members: Sequence[Member], source: "ActivationStream", checkpoints: Checkpoints
) -> tuple[Shuffled, States]:
    """The stream and the states it belongs to: fresh ones, or those of the last checkpoint."""
    shuffle = {
        "batch_size": config.batch_size,
        "batches_per_block": config.block_size // config.batch_size,
        "seed": config.data_seed,
        "num_batches": members[0].train.num_steps,
    }
    if config.resume and checkpoints.latest() is not None:
        sample = tuple({member.site: _abstract(member, source.d_in) for member in members}.values())
        like = jax.eval_shape(lambda x: training.init(members, x), sample)
        found = checkpoints.restore(like)
        return Shuffled(source, cursor=Cursor(**found.notes["cursor"]), **shuffle), found.states
    batches = Shuffled(source, **shuffle)
    return batches, training.init(members, batches.peek())


def _abstract(member: Member, width: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The shapes of what a member's site gives."""
    parts = 2 if member.sae.is_transcoder else member.sae.layers
    return (jax.ShapeDtypeStruct((member.train.batch_size, width), np.float32),) * parts


def _values(members: Sequence[Member], step: int, states: States, window: AllSums) -> list[dict[str, Any]]:
    """The metrics of a window of steps, of every SAE."""
    found = []
    since_fired = jax.device_get([state.since_fired for state in states])
    for member, sums, silent in zip(members, jax.device_get(window), since_fired, strict=True):
        summary = metrics.summarize(sums)
        rate = float(optim.schedule(member.train, member.sae.d_sae)(step - 1))
        found.append(
            {
                **{name: summary[name] for name in ("loss", "fvu", "l0", "mse", "cosine")},
                "dead_fraction": float(np.mean(silent >= member.train.dead_after)),
                "learning_rate": rate,
                "activations": summary["tokens"],
            }
        )
    return found
