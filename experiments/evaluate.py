"""Evaluate exported SAEs on held-out text: reconstruction, effect on the model, probing, and labels of latents.

    python -m experiments.evaluate --run_dir=runs/demo
    python -m experiments.evaluate --run_dir=runs/demo --sae=downloads/other_sae
    python -m experiments.evaluate --run_dir=runs/demo --steering
    python -m experiments.evaluate --compare runs/demo runs/wider

Writes eval.json, latents.json, labels.json, plots/ and, with --steering, steering.json into the run directory, or into
that of --sae. --compare evaluates two runs or exports on the same text, prints them side by side and writes nothing.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bridge.accelerators import check_name, require_torch
from bridge.locations import Checkpoint, Data, FilePath
from bridge.run import Run, commands
from bridge.run.subjects import Encoder
from bridge.settings import CONTEXT, STEP, ExcludeTokens, flag, settle
from experiments import flags
from jsae import extras
from jsae.settings import COUNT, TOKENS, at_least, require


@dataclass(frozen=True)
class EvaluateConfig:
    """SAEs, text and metrics of an evaluation."""

    run_dir: FilePath | None = flag(None, "The run: all of its SAEs, on its model and the held-out part of its text.")
    sae: FilePath | None = flag(None, "A SAELens directory for a hook of the run, evaluated instead of its own SAEs.")
    compare: tuple[FilePath, ...] = flag((), "Two runs or SAELens directories, A B, to print side by side.")
    hook: str | None = flag(None, "Only the SAE of this hook; with a --sae that does not name its hook: that hook.")
    checkpoint: Checkpoint | None = flag(None, "The nanochat, as for training; none is the run's.")
    step: int | None = flag(None, "Step of --checkpoint; none is the last.", STEP)
    tokenizer: FilePath | None = flag(None, "Directory of its tokenizer; none looks beside and above the checkpoint.")
    data: Data | None = flag(None, "Text, as for training, or store:LOCATION for that of a store; none is the run's.")
    split: Literal["heldout", "train", "all"] = flag("heldout", "Part of the text; 'all' for separate evaluation text.")
    context_size: int | None = flag(
        None, "Tokens per row of text; none is the run's, or the model's sequence_len.", CONTEXT
    )
    heldout_tokens: int = flag(200_000, "Tokens for the metrics, and as many for labels and token classes.", TOKENS)
    probe_tokens: int = flag(
        400_000, "Tokens of the passages from which probes tell packages of the standard library apart.", TOKENS
    )
    exclude_tokens: ExcludeTokens | None = flag(None, "Special tokens to leave out; none is as the SAE was trained.")
    drop_sinks: bool | None = flag(None, "Do not reconstruct tokens of extreme norm; none is as in the run.")
    encoder: Encoder = flag("own", "Encoder of the SAEs: their own, or matching pursuit on their decoders.")
    encoder_k: int | None = flag(None, "Latents per token of --encoder; none is the k of a TopK SAE.", COUNT)
    probes: bool = flag(True, "Sparse probing and TPP (extra [eval]).")
    labels: bool = flag(True, "Label every latent with the simple predicate that fits it best.")
    steering: bool = flag(False, "Measure effect and side effect of steering with a sample of the latents.")
    latents: tuple[int, ...] = flag((), "Latents to steer; none is a sample of those that fire.", at_least(0))
    steering_latents: int = flag(24, "Latents in that sample.", at_least(1, 2**20))
    steering_tokens: int = flag(1024, "Tokens on which every strength of every direction is measured.", TOKENS)
    core_bundle: FilePath | None = flag(
        None, "nanochat's eval_bundle, to measure what steering costs in CORE; none is that in $NANOCHAT_BASE_DIR."
    )
    core_examples: int = flag(10, "Most examples of each CORE task; 0 leaves CORE out.", at_least(0))
    plots: bool = flag(True, "Plot densities and training curves (extra [eval]).")
    output_dir: FilePath | None = flag(None, "Directory to write to; none is the run's, or that of --sae.")
    device: str = flag("cpu", "Device of the model.")

    def __post_init__(self) -> None:
        settle(self)
        check_name(self.device)
        require(
            bool(self.run_dir or self.sae or self.compare), "nothing to evaluate: give --run_dir, --sae or --compare"
        )
        require(len(self.compare) in (0, 2), f"--compare takes two runs or SAEs, A B, not {len(self.compare)}")
        require(self.steering or not self.latents, "--latents names latents to steer: add --steering")
        require(self.steering or not self.core_bundle, "--core_bundle is for steered models: add --steering")
        require(not (self.compare and self.sae), "--compare names the SAEs itself: leave out --sae")
        another = self.encoder != "own" or self.encoder_k is not None
        require(
            not another or bool(self.compare or self.output_dir),
            "--encoder and --encoder_k measure another encoder than the exported one, whose results stay as they are: "
            "give an --output_dir for these",
        )


def main(config: EvaluateConfig) -> int:
    """Evaluate every SAE, show the results and write them."""
    output = None if config.compare else Path(config.output_dir or config.sae or config.run_dir)
    _check_requirements(config, output)
    require_torch(config.device)
    with contextlib.nullcontext() if output is None else Run(output).writing():
        return _evaluate(config, output)


def _evaluate(config: EvaluateConfig, output: Path | None) -> int:
    from bridge.evaluate.evaluation import Extent, evaluate, stability_of
    from bridge.run.subjects import Choice
    from experiments import evaluate_view

    directories = tuple(Path(directory) for directory in config.compare or (config.sae or config.run_dir,))
    run = Path(config.run_dir) if config.run_dir else None
    choice = Choice(directories, run, own_runs_first=bool(config.compare), **flags.shared(Choice, config))
    extent = Extent(**flags.shared(Extent, config) | {"core_bundle": _bundle(config)})
    results = evaluate(choice, extent, show_progress=True)

    evaluate_view.show([(f"{subject.path}\n{subject.hook}", result["eval"]) for subject, result in results])
    if config.compare:
        evaluate_view.show_stability(stability_of(results))
    for subject, result in results:
        if problem := result["eval"].get("problem"):
            print(f"warning: {subject.path}, {subject.hook}: this SAE is of no use: {problem}", file=sys.stderr)
    if output is not None:
        by_hook = {subject.hook: result for subject, result in results}
        Run(output).write_evaluation(by_hook)
        if config.plots:
            from experiments.plots import draw

            draw(Run(output), {hook: result["eval"] for hook, result in by_hook.items()})
        evaluate_view.show_written(output, by_hook, config.plots)
    return 0


def _bundle(config: EvaluateConfig) -> Path | None:
    """Return the folder of CORE tasks; None, with a line that says why, where steering is measured without them."""
    from bridge.evaluate import eval_bundle

    if not config.steering or not config.core_examples:
        return None
    if config.core_bundle is not None:
        return Path(config.core_bundle)
    folder = eval_bundle.default_location()
    if folder.is_dir():
        return folder
    print(f"CORE tasks are left out: {folder} does not exist; --core_bundle names another eval_bundle", file=sys.stderr)
    return None


def _check_requirements(config: EvaluateConfig, output: Path | None) -> None:
    """Check that the packages and the output directory exist, before anything takes long."""
    if output is not None and not config.output_dir and not output.is_dir():
        nearest = next(p for p in output.absolute().parents if p.is_dir())
        names = ", ".join(sorted(p.name for p in nearest.iterdir() if p.is_dir())[:12]) or "no directories"
        raise FileNotFoundError(f"{output} is not a directory: give a run or an exported SAE; {nearest} has {names}")
    plots = config.plots and output is not None
    for needed, module, flag_without in ((config.probes, "sklearn", "noprobes"), (plots, "matplotlib", "noplots")):
        if needed and importlib.util.find_spec(module) is None:
            raise ImportError(f"{module} is not installed: {extras.advice('eval')}, or skip it with --{flag_without}")
    if output is None:
        return
    if config.output_dir:
        output.mkdir(parents=True, exist_ok=True)
    require(os.access(output, os.W_OK), f"{output} cannot be written to: give another --output_dir")


def next_commands(config: EvaluateConfig) -> list[str]:
    """Return what to do next with the run that was evaluated, or with the first of two."""
    run = Run(config.run_dir or (config.compare or (config.sae,))[0])
    return commands.after_evaluation(run.path) if run.config_file.is_file() else []


if __name__ == "__main__":
    flags.run(EvaluateConfig, main, after=next_commands)
