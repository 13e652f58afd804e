"""Evaluate chosen SAEs: metrics, statistics per latent, labels. The results go into a run's tables."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from bridge import steering
from bridge.evaluate import absorption, capability, classes, eval_bundle, labels, probing, steering_score, text
from bridge.evaluate.core import PASSES, finite, measure
from bridge.evaluate.eval_bundle import Task
from bridge.evaluate.site import Site, remembering
from bridge.evaluate.text import Text
from bridge.nanochat import Nanochat
from bridge.nanochat.units import Split
from bridge.run import subjects
from bridge.run.subjects import Choice, Subject
from jsae import stability
from jsae.health import unusable
from jsae.progress import Progress

CORE_LATENTS = 3
"""Latents of the sample with which the model is steered in CORE tasks."""


@dataclass(frozen=True)
class Extent:
    """The amount of text to read, and what to measure besides the metrics."""

    split: Split = "heldout"
    heldout_tokens: int = 200_000
    """Tokens for the metrics, and as many for labels and token classes."""
    probe_tokens: int = 400_000
    """Tokens of the passages on which probes learn to distinguish packages of the standard library."""
    probes: bool = True
    """Sparse probing and TPP; needs the extra [eval]."""
    labels: bool = True
    steering: bool = False
    """Effect and side effect of steering with a sample of the latents (`bridge.evaluate.steering_score`)."""
    latents: tuple[int, ...] = ()
    """The latents to steer; () is a sample of those that fire."""
    steering_latents: int = 24
    """Size of that sample."""
    steering_tokens: int = 1024
    """Tokens of text on which every strength of every direction is measured."""
    core_bundle: Path | None = None
    """nanochat's eval bundle: CORE tasks on the steered model; None leaves them out."""
    core_examples: int = 10
    """Most examples of each CORE task."""


def evaluate(choice: Choice, extent: Extent, *, show_progress: bool = False) -> list[tuple[Subject, dict[str, Any]]]:
    """Measure every chosen SAE on the same text.

    Args:
      choice: the SAEs and their model; the text is that of the first place.
      extent: how much to read and measure.
      show_progress: show progress on stderr.

    Returns:
      Every SAE with its results as `Run.write_evaluation` takes them: "eval" (metrics), "latents" (columns) and, if
      requested, "labels" and "steering". Numbers that are not finite are None.

    Raises:
      ConfigError, ValueError: an SAE does not fit the model, rows are longer than the model accepts, or there is too
        little text.
      FileNotFoundError: no such run, export, checkpoint or text.
    """
    tasks = eval_bundle.read(extent.core_bundle) if extent.steering and extent.core_bundle else []
    chosen = subjects.find(choice)
    data = subjects.reading(choice, choice.paths[0]).data
    texts = {id(subject.nano): _text(choice, extent, subject.nano) for subject in chosen}
    results, console = [], Console(stderr=True, quiet=not show_progress)
    for subject in chosen:
        progress = Progress(f"measuring {subject.hook}", None, console=console)
        with progress, progress.tokens_of(subject.nano.model):
            results.append(finite(_measure(extent, subject, texts[id(subject.nano)], data, progress, tasks)))
    return list(zip(chosen, results, strict=True))


def _text(choice: Choice, extent: Extent, nano: Nanochat) -> Text:
    """Return the text of the first place as tokens of a model, so that all SAEs are compared on the same text.

    Raises:
      ConfigError: rows are longer than the model accepts.
      ValueError: there is not enough text for one row.
    """
    reading = subjects.reading(choice, choice.paths[0])
    row_len = nano.row_length(reading.context_size)
    documents = text.documents(reading.data, extent.split, nano.tokenizer)
    return text.read(documents, nano.tokenizer, row_len, extent.heldout_tokens)


def _measure(
    extent: Extent, subject: Subject, rows: Text, data: str, progress: Progress, tasks: Sequence[Task]
) -> dict[str, Any]:
    """Return the results of one SAE; they contain numpy numbers and arrays."""
    nano, sae = subject.nano, subject.sae
    site = remembering(Site(nano.model, subject.hook, subject.excluded, subject.drop_sinks), rows.tokens)
    progress.phase(f"measuring {subject.hook}", PASSES * rows.tokens.size, "tokens")
    summary, columns = measure(site, sae, rows.tokens, nano.tokenizer.token_bytes)
    if problem := unusable(summary):
        summary["problem"] = problem
    summary["setting"] = {
        "sae": str(subject.path),
        "model": nano.fingerprint,
        "checkpoint": str(nano.path),
        "split": extent.split,
        "data": data,
        "text": hashlib.sha256(rows.tokens.tobytes()).hexdigest()[:16],
        "context_size": rows.tokens.shape[1],
        "excluded": list(subject.excluded),
        "drop_sinks": subject.drop_sinks,
    }
    if sae.pursued is not None:
        summary["setting"]["encoder"] = f"matching pursuit of {sae.pursued} latents"
    results: dict[str, Any] = {"eval": summary, "latents": columns}
    if extent.probes:
        summary |= _probes(extent, subject, site, rows, data, progress)
    labelled = None
    if extent.labels:
        progress.phase("labelling latents", site.unread(rows.tokens) or None, "tokens")
        labelled, combined = labels.describe(
            labels.firings(site, sae, rows), labels.Material.of_text(rows, nano.tokenizer)
        )
        summary["labels"] = labels.summary(combined, labelled)
        results["labels"] = labels.table(combined, labelled)
    if extent.steering:
        results["steering"] = _steering(extent, subject, site, rows, labelled, progress, tasks)
        summary["steering"] = results["steering"]["summary"]
    return results


def _steering(
    extent: Extent,
    subject: Subject,
    site: Site,
    rows: Text,
    labelled: list[labels.Label] | None,
    progress: Progress,
    tasks: Sequence[Task],
) -> dict[str, Any]:
    """Return the scores of steering and, where there are tasks, what steering costs in capability."""
    sae, tokenizer = subject.sae, subject.nano.tokenizer
    progress.phase("steering", None, "tokens")
    wanted = steering_score.Extent(extent.latents, extent.steering_latents, extent.steering_tokens)
    results = steering_score.score(site, sae, rows, tokenizer, labelled, wanted)
    if tasks:
        progress.phase("CORE tasks", None, "tokens")
        steered = list(results["latents"].items())
        middle = [steered[(2 * i + 1) * len(steered) // (2 * CORE_LATENTS)] for i in range(CORE_LATENTS)]
        features = {
            int(latent): (steering.feature(sae, int(latent)), entry["greatest_activation"]) for latent, entry in middle
        }
        found = capability.cost(site, tokenizer, tasks, extent.core_examples, features, steering_score.MULTIPLES)
        results["capability"] = found
        results["summary"]["capability"] = {
            "core": found[capability.PLAIN]["core"],
            **{f"cost_at_{arm['multiple']:g}": [arm["cost"], *arm["interval"]] for arm in found["strengths"]},
        }
    return results


def _probes(extent: Extent, subject: Subject, site: Site, rows: Text, data: str, progress: Progress) -> dict[str, Any]:
    """Return the metrics of sparse probing and TPP, by kind of class; None for a kind that the text lacks."""
    progress.phase("reading text for probes", None)
    passages = classes.packages(data, subject.nano.tokenizer, extent.probe_tokens)
    tokens = site.unread(rows.tokens) + (0 if passages is None else passages.tokens.size)
    progress.phase("reading activations for probes", tokens or None, "tokens")
    examples = {
        "package": None if passages is None else classes.passage_examples(site, subject.sae, passages),
        "syntax": classes.token_examples(site, subject.sae, rows),
    }
    progress.phase("fitting probes", None)
    W_dec = subject.sae.W_dec.cpu().numpy()
    letters = classes.letter_examples(site, subject.sae, rows, subject.nano.tokenizer)
    return {
        "sparse_probing": {kind: x and probing.sparse_probing(x) for kind, x in examples.items()},
        "tpp": {kind: x and probing.tpp(x, W_dec) for kind, x in examples.items()},
        "absorption": letters and absorption.absorption(letters, W_dec, subject.sae.b_dec.cpu().numpy()),
    }


def stability_of(results: Sequence[tuple[Subject, Mapping[str, Any]]]) -> dict[str, Any]:
    """Return how many living latents the SAEs of each hook share, by hook.

    Args:
      results: of `evaluate`.

    Returns:
      For every hook of at least two SAEs, the numbers of `jsae.stability.stability`, or the reason why the SAEs cannot
      be matched.
    """
    hooks: dict[str, list[tuple[Subject, Mapping[str, Any]]]] = {}
    for subject, result in results:
        hooks.setdefault(subject.hook, []).append((subject, result))
    found: dict[str, Any] = {}
    for hook, members in hooks.items():
        if len(members) < 2:
            continue
        decoders = [subject.sae.W_dec.float().cpu().numpy() for subject, _ in members]
        alive = [np.asarray(result["latents"]["feature_density"], np.float64) > 0 for _, result in members]
        try:
            found[hook] = stability.stability(decoders, alive)
        except ValueError as error:
            found[hook] = str(error)
    return found
