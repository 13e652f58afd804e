"""The loop of a training run, and what comes after it: export, evaluation, a word to the user."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from bridge import torch_sae
from bridge.evaluate import Site
from bridge.evaluate.core import finite
from bridge.evaluate.survey import survey
from bridge.hooks import module_name
from experiments.report import Reporter
from experiments.signals import stop_requests
from jsae import export, metrics, optim, saes
from jsae import train as training
from jsae.checkpoint import Checkpoints
from jsae.config import SAEConfig, TrainConfig
from jsae.data import Cursor, Shuffled

if TYPE_CHECKING:
    from bridge.nanochat import Nanochat
    from bridge.nanochat.corpus import Corpus
    from bridge.stream import ActivationStream
    from experiments.train import RunConfig


def train(run: Path, config: "RunConfig", sae: SAEConfig, source: "ActivationStream") -> training.TrainState | None:
    """Trains from the start or the last checkpoint to the end; None if it was asked to stop, after saving."""
    recipe = config.train_config()
    with Checkpoints(run / "checkpoints") as checkpoints:
        batches, state = _begin(config, recipe, sae, source, checkpoints)
        begun, start = state, int(state.step)
        last_fvu, window = float("nan"), None
        save_every = max(config.checkpoint_every // recipe.batch_size, 1)
        add = jax.jit(metrics.add)
        with Reporter(run, start, recipe.num_steps, config.wandb_project) as reporter, stop_requests() as stopped:
            for step, state, sums in training.fit(recipe, begun, batches):
                window = sums if window is None else add(window, sums)
                last = step == recipe.num_steps
                due = last or bool(stopped) or step % save_every == 0
                if due or step % config.log_every == 0:
                    training.check_finite(state, window)
                    values = _values(recipe, sae.d_sae, step, state, window, source)
                    reporter.report(step, values)
                    last_fvu, window = values["fvu"], None
                if due:
                    checkpoints.save(step, state, {"cursor": batches.cursor().to_json()}, last_fvu)
                if stopped and not last:
                    checkpoints.wait()
                    return None
        checkpoints.wait()
    return state


def _begin(
    config: "RunConfig", recipe: TrainConfig, sae: SAEConfig, source: "ActivationStream", checkpoints: Checkpoints
) -> tuple[Shuffled, training.TrainState]:
    """The stream and the state it belongs to: fresh ones, or those of the last checkpoint."""
    shuffle = {
        "batch_size": recipe.batch_size,
        "batches_per_block": config.block_size // recipe.batch_size,
        "seed": recipe.seed,
        "num_batches": recipe.num_steps,
    }
    if config.resume and checkpoints.latest() is not None:
        sample = jax.ShapeDtypeStruct((recipe.batch_size, sae.d_in), np.float32)
        like = jax.eval_shape(lambda x: training.init(sae, recipe, x), sample)
        found = checkpoints.restore(like)
        return Shuffled(source, cursor=Cursor(**found.notes["cursor"]), **shuffle), found.state
    batches = Shuffled(source, **shuffle)
    return batches, training.init(sae, recipe, batches.peek())


def _values(
    recipe: TrainConfig,
    d_sae: int,
    step: int,
    state: training.TrainState,
    window: metrics.Sums,
    source: "ActivationStream",
) -> dict[str, Any]:
    """The metrics of a window of steps."""
    summary = metrics.summarize(jax.device_get(window))
    silent = np.asarray(jax.device_get(state.since_fired)) >= recipe.dead_after
    tokens, source.tokens_seen = source.tokens_seen, 0
    return {
        **{name: summary[name] for name in ("loss", "fvu", "l0", "mse", "cosine")},
        "dead_fraction": float(np.mean(silent)),
        "learning_rate": float(optim.schedule(recipe, d_sae)(step - 1)),
        "activations": summary["tokens"],
        "tokens": tokens,
    }


def finish(
    run: Path,
    config: "RunConfig",
    state: training.TrainState,
    nano: "Nanochat",
    hook: str,
    heldout: "Corpus",
) -> None:
    """Exports the SAE, measures the export on held-out text, and says where everything lies."""
    folder = run / "sae" / hook
    metadata = {
        "sae_lens_training_version": "jsae",
        "model_name": f"nanochat-{config.checkpoint}" if config.checkpoint == "demo" else Path(config.checkpoint).name,
        "model_class_name": "nanochat",
        "model_fingerprint": nano.fingerprint,
        "hook_name": hook,
        "hf_hook_name": module_name(hook),
        "context_size": heldout.row_len,
        "prepend_bos": True,
        "exclude_special_tokens": sorted(nano.tokenizer.special_tokens.values()),
        "dataset_path": config.data,
        "seqpos_slice": [None],
        "model_from_pretrained_kwargs": {},
        "training_architecture": config.activation,
        "training_tokens": config.num_activations,
    }
    export.write(folder, state.sae.config, saes.weights(state.sae), float(state.scale), metadata)
    shipped = torch_sae.load(folder, nano.model.lm_head.weight.device)
    needed = -(-config.heldout_tokens // heldout.row_len)
    site = Site(nano.model, hook, nano.tokenizer.bos_token_id, config.drop_sinks, config.tokens_per_forward)
    sums = survey(site, shipped, site.batches(np.stack(list(heldout.one_pass(needed))))).sums
    export.write_sparsity(folder, metrics.density(sums))
    summary = {name: value for name, value in metrics.summarize(sums).items() if name != "loss"}
    told = json.dumps(finite({hook: summary}), indent=2, allow_nan=False)
    (run / "eval.json").write_text(told + "\n", encoding="utf-8")
    _tell(run, folder, hook, summary)


def _tell(run: Path, folder: Path, hook: str, summary: dict[str, float]) -> None:
    table = Table(title=f"{hook} on {summary['tokens']:,.0f} held-out tokens")
    for column in ("FVU", "explained variance", "L0", "dead latents", "cosine", "relative bias"):
        table.add_column(column, justify="right")
    table.add_row(
        f"{summary['fvu']:.4f}",
        f"{summary['explained_variance']:.4f}",
        f"{summary['l0']:.2f}",
        f"{summary['dead_fraction']:.2%}",
        f"{summary['cosine']:.4f}",
        f"{summary['relative_reconstruction_bias']:.4f}",
    )
    console = Console()
    console.print(table)
    console.print(f"exported SAE    {folder}   (bridge.torch_sae.load, sae_lens.SAE.load_from_disk)", soft_wrap=True)
    console.print(
        f"metrics         {run / 'metrics.jsonl'}, {run / 'eval.json'}; tensorboard --logdir {run / 'tb'}",
        soft_wrap=True,
    )
    console.print(f"checkpoints     {run / 'checkpoints'}", soft_wrap=True)
