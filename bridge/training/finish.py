"""The end of a training run: export, evaluation of the exports, and a table of results for the user."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float
from rich.console import Console
from rich.table import Table

from bridge.evaluate.core import finite
from bridge.run import Run, commands, recurrence
from bridge.training import singles
from bridge.training.origins import hook_metadata
from jsae import export, files, metrics, pretrained, processes
from jsae.architectures import SAE
from jsae.health import unusable
from jsae.loop import States

if TYPE_CHECKING:
    from bridge.training.config import RunConfig
    from bridge.training.origins import Origin
    from bridge.training.plan import Trainee


class UnusableError(ValueError):
    """Exported SAEs that predict no better than the mean activation, or whose metrics are not finite."""


class Finished(NamedTuple):
    """A trained SAE as it is exported, on the host."""

    sae: SAE
    scale: Float[np.ndarray, "*d"]
    scale_out: Float[np.ndarray, "*d"]


def finished(states: States) -> list[Finished]:
    """Return the SAEs of some states; whole in the first process only, where several divide them."""
    return [
        Finished(processes.fetch_to_first(state.exported), np.asarray(state.scale), np.asarray(state.scale_out))
        for state in states
    ]


def finish(
    config: "RunConfig",
    trainees: Sequence["Trainee"],
    saes: Sequence[Finished],
    origin: "Origin",
) -> None:
    """Export every SAE, measure the exports on held-out tokens, and print metrics and paths.

    Args:
      config: the settings of the run.
      trainees: its SAEs.
      saes: what they have become.
      origin: what they were trained on.

    Raises:
      UnusableError: some SAEs are of no use; names them. They are exported and measured nevertheless, with `problem` in
        `eval.json` and in the metadata of `cfg.json`.
    """
    results: dict[Path, dict[str, dict[str, Any]]] = {}
    problems: list[str] = []
    for trainee, sae in zip(trainees, saes, strict=True):
        metadata = metadata_of(config, trainee, origin)
        summary = write(trainee, sae, origin, metadata)
        if config.stages:
            folder = Run(trainee.folder).sae_folder(trainee.name)
            singles.write(Run(trainee.folder), trainee.name, origin.own_saes(trainee, folder))
        if "problem" in summary:
            problems.append(f"{trainee.label} ({summary['problem']})")
        results.setdefault(trainee.folder, {})[trainee.name] = summary
    for folder, summaries in results.items():
        text = json.dumps(finite(summaries), indent=2, allow_nan=False)
        files.write(Run(folder).table_file("eval"), text + "\n")
    _print_results(config, trainees, results)
    if len(config.seed) > 1 and not problems:
        _compare_seeds(config, max(trainee.member.sae.d_sae for trainee in trainees))
    if problems:
        raise UnusableError(
            f"{len(problems)} of {len(trainees)} exported SAEs are of no use: {'; '.join(problems)}. They are kept for "
            "inspection, and marked. Lower --learning_rate, or the penalty if L0 is 0, or train longer"
        )


def _compare_seeds(config: "RunConfig", latents: int) -> None:
    """Write how often latents recur in SAEs of other seeds, or say which command does it where that takes minutes."""
    if latents > recurrence.AT_ONCE:
        print(
            f"SAEs of several seeds are compared by: {commands.line('stability', run_dir=config.output_dir)}",
            flush=True,
        )
        return
    for group in recurrence.seeds_of(Run(config.output_dir).path):
        for hook, entry in recurrence.compare(group).items():
            means = ", ".join(f"{Path(run).name} {counts['mean']:.0%}" for run, counts in entry["runs"].items())
            print(f"{hook}: latents that recur in another seed, on average: {means} (stability.json)", flush=True)


def write(trainee: "Trainee", finished: Finished, origin: "Origin", metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Export an SAE and measure the export on held-out tokens; return its metrics.

    An SAE of no use has a `problem` among the metrics and in the metadata.
    """
    folder = Run(trainee.folder).sae_folder(trainee.name)
    sae, scale, scale_out = finished
    export.write(folder, sae.config, sae.arrays(), scale, scale_out, metadata)
    summary = _measure(trainee, folder, origin)
    if "problem" in summary:
        export.mark(folder, summary["problem"])
    return summary


def _measure(trainee: "Trainee", folder: Path, origin: "Origin") -> dict[str, Any]:
    """Measure an exported SAE, write its `sparsity.safetensors`, and return its metrics, with a `problem` if any."""
    sums = origin.measure(trainee, folder)
    export.write_sparsity(folder, metrics.density(sums))
    summary: dict[str, Any] = {name: value for name, value in metrics.summarize(sums).items() if name != "loss"}
    summary["density_histogram"] = metrics.density_histogram(sums)
    problem = unusable(summary)
    return summary if problem is None else summary | {"problem": problem}


def metadata_of(config: "RunConfig", trainee: "Trainee", origin: "Origin") -> dict[str, Any]:
    """Return the metadata that SAELens keeps of an SAE, and all that is needed to read the same activations again."""
    train = trainee.member.train
    metadata = {
        "sae_lens_training_version": "jsae",
        **origin.metadata(),
        **hook_metadata(trainee.hooks[0]),
        "prepend_bos": True,
        "sequence_separator_token": "bos",
        "disable_concat_sequences": False,
        "seqpos_slice": [None],
        "model_from_pretrained_kwargs": {},
        "training_architecture": config.activation,
        "training_tokens": train.num_steps * train.batch_size,
    }
    if details := pretrained.details(trainee.member.sae):
        metadata |= {"training_architecture_details": details}
    if exclusive := trainee.member.sae.exclusive:
        metadata |= {"exclusive_latents": exclusive}
    if trainee.start is not None:
        metadata |= {"init_from": {"path": trainee.start.path, "digest": trainee.start.digest}}
    if trainee.member.sae.is_transcoder:
        metadata |= hook_metadata(trainee.hooks[1], "_out")
    if (layers := trainee.member.sae.layers) > 1:
        metadata |= {"hook_names": list(trainee.hooks) if len(trainee.hooks) > 1 else [trainee.name] * layers}
    return metadata


def _cell(value: int | float) -> str:
    """Return a number, however large, in the width of a column."""
    return f"{value:.4f}" if abs(value) < 1e4 else f"{value:.3g}"


def _print_results(
    config: "RunConfig", trainees: Sequence["Trainee"], results: dict[Path, dict[str, dict[str, Any]]]
) -> None:
    """Print a table of metrics, and the paths of all results."""
    tokens = next(iter(next(iter(results.values())).values()))["tokens"]
    table = Table(title=f"on {tokens:,.0f} held-out tokens")
    table.add_column("SAE", no_wrap=True)
    for column in ("FVU", "L0", "dead", "cosine", "rel. bias"):
        table.add_column(column, justify="right")
    for trainee in trainees:
        summary = results[trainee.folder][trainee.name]
        table.add_row(
            trainee.label,
            _cell(summary["fvu"]),
            f"{summary['l0']:.2f}",
            f"{summary['dead_fraction']:.2%}",
            f"{summary['cosine']:.4f}",
            _cell(summary["relative_reconstruction_bias"]),
        )
    console = Console()
    console.print(table)
    run = Run(config.output_dir)
    for trainee in trainees:
        console.print(f"exported SAE    {Run(trainee.folder).sae_folder(trainee.name)}", soft_wrap=True)
    is_crosscoder = config.crosscoder or bool(config.stages)
    readers = ["bridge.torch_sae.load"] + ["sae_lens.SAE.load_from_disk"] * (not is_crosscoder)
    for stage in config.stages:
        folders = [str(Run(trainee.folder).stage_folder(stage.name, trainee.name)) for trainee in trainees]
        console.print(f"SAEs of {stage.name:7} {', '.join(folders)} (sae_lens)", soft_wrap=True)
    console.print(f"read it with    {', '.join(readers)}", soft_wrap=True)
    folders = ", ".join(map(str, results))
    console.print(f"metrics         metrics.jsonl and eval.json in {folders}", soft_wrap=True)
    console.print(f"curves          tensorboard --logdir {run.events_folder}", soft_wrap=True)
    console.print(f"checkpoints     {run.checkpoints_folder}", soft_wrap=True)
