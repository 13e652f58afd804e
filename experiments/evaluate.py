"""Measures exported SAEs on held-out text: what of the model they keep, what their latents know, what to call them.

    python -m experiments.evaluate --run_dir=runs/demo
    python -m experiments.evaluate --run_dir=runs/demo --sae=downloads/other_sae
    python -m experiments.evaluate --compare runs/demo runs/wider

Writes eval.json, latents.json, labels.json and plots/ into the run directory, or into that of --sae. --compare measures
two runs or exports on the same text, prints them side by side and writes nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from experiments import flags, rundir
from experiments.accelerators import check_name, require_torch
from experiments.flags import CONTEXT, STEP, flag, settle
from experiments.locations import Checkpoint, Data, FilePath
from experiments.run_config import ExcludeTokens
from jsae import files, jsons
from jsae.config import TOKENS, require
from jsae.health import unusable

if TYPE_CHECKING:
    from bridge.evaluate.text import Text
    from experiments.subjects import Subject

_LARGEST_TABLE = 2**30


@dataclass(frozen=True)
class EvaluateConfig:
    """What is measured, on what, and how much of it."""

    run_dir: FilePath | None = flag(None, "A run: all of its SAEs, on its model and the held-out part of its text.")
    sae: FilePath | None = flag(None, "Any SAELens directory for a hook of the run, measured instead of the run's own.")
    compare: tuple[FilePath, ...] = flag((), "Two runs or SAELens directories, A B: prints both side by side.")
    hook: str | None = flag(None, "Only the SAE of this hook; of a --sae that does not say it: which hook it is for.")
    checkpoint: Checkpoint | None = flag(None, "The nanochat, as of training; none is the one the run was trained on.")
    step: int | None = flag(None, "Step of --checkpoint; none is the last.", STEP)
    tokenizer: FilePath | None = flag(None, "Directory of its tokenizer; none looks beside and above the checkpoint.")
    data: Data | None = flag(None, "Text, as for training; none is the run's.")
    split: Literal["heldout", "train", "all"] = flag("heldout", "Which part of it; 'all' for text of its own.")
    context_size: int | None = flag(
        None, "Tokens per row of text; none is the run's, or the model's sequence_len.", CONTEXT
    )
    heldout_tokens: int = flag(200_000, "Tokens for the metrics, and as many for labels and token classes.", TOKENS)
    probe_tokens: int = flag(
        400_000, "Tokens of the passages by which packages of the standard library are told.", TOKENS
    )
    exclude_tokens: ExcludeTokens | None = flag(None, "Special tokens to leave out; none is as the SAE was trained.")
    drop_sinks: bool | None = flag(None, "Leave tokens of extreme norm as they are; none is as in the run.")
    probes: bool = flag(True, "Sparse probing and TPP (extra [eval]).")
    labels: bool = flag(True, "Name every latent by the simple predicate that fits it best.")
    plots: bool = flag(True, "Plot densities and training curves (extra [eval]).")
    output_dir: FilePath | None = flag(None, "Where to write; none is the run's directory, or that of --sae.")
    device: str = flag("cpu", "Where the model runs.")

    def __post_init__(self) -> None:
        settle(self)
        check_name(self.device)
        require(
            bool(self.run_dir or self.sae or self.compare), "nothing to measure: give --run_dir, --sae or --compare"
        )
        require(len(self.compare) in (0, 2), f"--compare takes two runs or SAEs, A B, not {len(self.compare)}")
        require(not (self.compare and self.sae), "--compare names the SAEs itself: leave out --sae")


def main(config: EvaluateConfig) -> int:
    """Measure every SAE, write what was found, show it."""
    output = None if config.compare else Path(config.output_dir or config.sae or config.run_dir)
    _need(config, output)
    require_torch(config.device)
    with contextlib.nullcontext() if output is None else rundir.writing(output):
        return _evaluate(config, output)


def _evaluate(config: EvaluateConfig, output: Path | None) -> int:
    from bridge.evaluate.core import finite
    from experiments import evaluate_view, subjects

    # What is measured, and on which text.
    found = subjects.find(config)
    texts = {id(s.nano): subjects.text_for(config, s.nano) for s in found}
    data = subjects.told(config, found[0].place)["data"]

    # The measuring.
    results: list[dict[str, Any]] = []
    for subject in found:
        with evaluate_view.busy(f"measuring {subject.place}, {subject.hook}"):
            results.append(finite(_measure(config, subject, texts[id(subject.nano)], data)))

    # What became of it.
    evaluate_view.show([(f"{s.place}\n{s.hook}", r["eval"]) for s, r in zip(found, results, strict=True)])
    for subject, result in zip(found, results, strict=True):
        if problem := result["eval"].get("problem"):
            print(f"warning: {subject.place}, {subject.hook}: this SAE is of no use: {problem}", file=sys.stderr)
    if output is not None:
        by_hook = {subject.hook: result for subject, result in zip(found, results, strict=True)}
        _write(output, by_hook)
        if config.plots:
            from experiments.plots import draw

            draw(output, {hook: result["eval"] for hook, result in by_hook.items()})
        evaluate_view.told(output, by_hook, config.plots)
    return 0


def _need(config: EvaluateConfig, output: Path | None) -> None:
    """Complains of what is missing before anything heavy is done."""
    plots = config.plots and output is not None
    for wanted, module, instead in ((config.probes, "sklearn", "noprobes"), (plots, "matplotlib", "noplots")):
        if wanted and importlib.util.find_spec(module) is None:
            raise ImportError(f"{module} is not installed: pip install 'jsae[eval]', or do without by --{instead}")
    if output is None:
        return
    if config.output_dir:
        output.mkdir(parents=True, exist_ok=True)
    if not output.is_dir():
        nearest = next(p for p in output.absolute().parents if p.is_dir())
        there = ", ".join(sorted(p.name for p in nearest.iterdir() if p.is_dir())[:12]) or "no directories"
        raise FileNotFoundError(f"{output} is no directory: give a run or an exported SAE; {nearest} holds {there}")
    require(os.access(output, os.W_OK), f"{output} cannot be written to: give another --output_dir")


def _measure(config: EvaluateConfig, subject: Subject, text: Text, data: str) -> dict[str, Any]:
    """What the files say of one SAE: metrics, what is known of every latent, labels."""
    from bridge.evaluate import Site, classes, labels, measure, probing

    nano, sae = subject.nano, subject.sae
    site = Site(nano.model, subject.hook, subject.excluded, subject.drop_sinks)
    summary, columns = measure(site, sae, text.tokens, nano.tokenizer.token_bytes)
    if problem := unusable(summary):
        summary["problem"] = problem
    summary["setting"] = {
        "sae": str(subject.place),
        "model": nano.fingerprint,
        "checkpoint": str(nano.path),
        "split": config.split,
        "data": data,
        "text": hashlib.sha256(text.tokens.tobytes()).hexdigest()[:16],
        "context_size": text.tokens.shape[1],
        "excluded": list(subject.excluded),
        "drop_sinks": subject.drop_sinks,
    }
    found: dict[str, Any] = {"eval": summary, "latents": columns}
    if config.probes:
        passages = classes.packages(data, nano.tokenizer, config.probe_tokens)
        examples = {
            "package": None if passages is None else classes.of_passages(site, sae, passages),
            "syntax": classes.of_tokens(site, sae, text),
        }
        W_dec = sae.W_dec.cpu().numpy()
        summary["sparse_probing"] = {name: x and probing.sparse_probing(x) for name, x in examples.items()}
        summary["tpp"] = {name: x and probing.tpp(x, W_dec) for name, x in examples.items()}
    if config.labels:
        named = labels.label(labels.firings(site, sae, text), text, nano.tokenizer)
        summary["labels"] = labels.summary(named)
        found["labels"] = labels.table(named)
    return found


def _write(output: Path, results: dict[str, dict[str, Any]]) -> None:
    """Put what was found into the JSON tables of the directory, beside other hooks; each whole or not at all."""
    for name in next(iter(results.values())):
        path = output / f"{name}.json"
        table = _kept(path) | {hook: found[name] for hook, found in results.items()}
        indent = 2 if name == "eval" else None  # the others are long columns
        files.write(path, json.dumps(table, indent=indent, allow_nan=False) + "\n")


def _kept(path: Path) -> dict[str, Any]:
    """Return the table that is there, of other hooks too; of a broken one says that it is replaced."""
    if not path.is_file():
        return {}
    try:
        table = jsons.read(path, _LARGEST_TABLE)
    except ValueError:
        table = None
    if not isinstance(table, dict):
        print(f"{path} was broken and is replaced: what it said of other hooks is lost", file=sys.stderr)
        return {}
    return table


if __name__ == "__main__":
    flags.run(EvaluateConfig, main)
