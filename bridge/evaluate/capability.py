"""The cost of steering in capability: nanochat's CORE tasks on the plain and on the steered model."""

import dataclasses
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float

from bridge import steering
from bridge.evaluate import bootstrap
from bridge.evaluate.eval_bundle import Example, Task
from bridge.evaluate.site import Site
from bridge.hooks import edit
from bridge.nanochat.tokenizer import Tokenizer
from bridge.steering import Feature

PLAIN = "plain"
_SHOTS_SEED = 1234  # upstream's: question i is preceded by the examples that random.Random(1234 + i) draws


@dataclasses.dataclass(frozen=True)
class Prompt:
    """The token sequences of one question, and the part of each that is scored."""

    rows: list[list[int]]
    """One sequence per option; a single one for language modelling."""
    starts: list[int]
    """Where the scored part of each begins, at least 1; it reaches to the end."""
    gold: int | None
    """The right option; None for language modelling, which must predict every scored token."""


def render(task: Task, index: int, tokenizer: Tokenizer, longest: int) -> Prompt:
    """Return the prompt of an example as nanochat renders it, with its few-shot examples.

    Multiple choice scores what follows the common beginning of all options, a schema the common end, and language
    modelling the continuation. Sequences are cut on the left to `longest` tokens.
    """
    others = [i for i in range(len(task.examples)) if i != index]
    shots = [task.examples[i] for i in random.Random(_SHOTS_SEED + index).sample(others, task.shots)]
    before = "".join(_solved(task, shot) + "\n\n" for shot in shots)
    texts = [before + text for text in _questions(task, task.examples[index])]
    if task.kind == "language_modeling":
        texts[0] = texts[0].strip()
    rows = [tokenizer.encode(text, prepend_bos=True) for text in texts]
    if task.kind == "schema":
        same = _common(*([row[::-1] for row in rows]))
        starts = [max(len(row) - max(same, 1), 1) for row in rows]
    else:
        starts = [max(min(_common(*rows), len(row) - 1), 1) for row in rows]
    if task.kind == "language_modeling":
        rows, starts = rows[1:], starts[1:]
    cuts = [max(len(row) - longest, 0) for row in rows]
    kept = [row[cut:] for row, cut in zip(rows, cuts, strict=True)]
    starts = [max(start - cut, 1) for start, cut in zip(starts, cuts, strict=True)]
    return Prompt(kept, starts, task.examples[index].get("gold") if task.kind != "language_modeling" else None)


@torch.no_grad()
def is_right(site: Site, prompt: Prompt, padding: int, vocab_size: int) -> bool:
    """Return whether the model, under the open contexts, answers a question.

    The option of the lowest mean loss must be the right one; in language modelling every scored token must be the
    likeliest one.
    """
    losses: list[float] = []
    size = site.rows_per_pass(max(map(len, prompt.rows)), vocab_size)
    for first in range(0, len(prompt.rows), size):
        rows, starts = prompt.rows[first : first + size], prompt.starts[first : first + size]
        width = max(map(len, rows))
        tokens = torch.tensor([row + [padding] * (width - len(row)) for row in rows], device=site.device)
        log_probs = site.model(tokens).log_softmax(-1)
        for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
            predicted, actual = log_probs[i, start - 1 : len(row) - 1], tokens[i, start : len(row)]
            if prompt.gold is None:
                return bool((predicted.argmax(-1) == actual).all())
            losses.append(-predicted.gather(-1, actual[:, None]).mean().item())
    return int(np.argmin(losses)) == prompt.gold


def cost(
    site: Site,
    tokenizer: Tokenizer,
    tasks: Sequence[Task],
    examples: int,
    features: Mapping[int, tuple[Feature, float]],
    multiples: Sequence[float],
) -> dict[str, Any]:
    """Return the centred accuracy of the plain and the steered model, and the difference, for every strength.

    Accuracy is centred as in CORE: (accuracy - guessing) / (1 - guessing), 0 for guessing and 1 for no error. `core` is
    its mean over tasks, `cost` that of the plain model minus the mean over the steered latents, with the 95 % interval
    of a paired bootstrap over tasks and examples.

    Args:
      site: the activation that is steered, at all positions.
      tokenizer: the model's.
      tasks: of the bundle.
      examples: at most this many of each task.
      features: the directions, with the strength of which `multiples` are multiples, by latent.
      multiples: the strengths.
    """
    longest, vocab_size = site.model.config.max_positions, tokenizer.vocab_size
    arms = [(latent, multiple) for multiple in multiples for latent in features]
    right: dict[str, Bool[np.ndarray, "arms n"]] = {}
    for task in tasks:
        table = np.zeros((1 + len(arms), min(examples, len(task.examples))), bool)
        for i in range(table.shape[1]):
            prompt = render(task, i, tokenizer, longest)
            table[0, i] = is_right(site, prompt, tokenizer.bos_token_id, vocab_size)
            for row, (latent, multiple) in enumerate(arms, 1):
                feature, unit = features[latent]
                with edit(site.model, {site.hook_name: steering.additive(feature, multiple * unit)}):
                    table[row, i] = is_right(site, prompt, tokenizer.bos_token_id, vocab_size)
        right[task.name] = table
    return _summary(tasks, right, list(features), multiples)


def _summary(
    tasks: Sequence[Task], right: Mapping[str, np.ndarray], latents: Sequence[int], multiples: Sequence[float]
) -> dict[str, Any]:
    """Return centred accuracies: the plain model's, and for every strength the mean over latents."""
    centred: list[Float[np.ndarray, "s n"]] = []
    for task in tasks:
        table = right[task.name].astype(np.float64)
        steered = table[1:].reshape(len(multiples), len(latents), -1).mean(1)
        centred.append((np.concatenate([table[:1], steered]) - task.baseline) / (1 - task.baseline))
    samples = bootstrap.two_level(centred, [np.arange(table.shape[1]) for table in centred])
    means = np.array([table.mean(1) for table in centred])  # (tasks, 1 + strengths)
    core = means.mean(0)
    return {
        "latents": list(latents),
        "examples": {task.name: table.shape[1] for task, table in zip(tasks, centred, strict=True)},
        PLAIN: {
            "core": float(core[0]),
            "interval": bootstrap.interval(samples[0]),
            "tasks": _by_task(tasks, means[:, 0]),
        },
        "strengths": [
            {
                "multiple": multiple,
                "core": float(core[i]),
                "cost": float(core[0] - core[i]),
                "interval": bootstrap.interval(samples[0] - samples[i]),
                "tasks": _by_task(tasks, means[:, i]),
            }
            for i, multiple in enumerate(multiples, 1)
        ],
    }


def _by_task(tasks: Sequence[Task], values: Float[np.ndarray, " t"]) -> dict[str, float]:
    return {task.name: float(value) for task, value in zip(tasks, values, strict=True)}


def _solved(task: Task, example: Example) -> str:
    """Return an example with its answer."""
    if task.kind == "multiple_choice":
        return f"{example['query']}{task.delimiter}{example['choices'][example['gold']]}"
    if task.kind == "schema":
        return f"{example['context_options'][example['gold']]}{task.delimiter}{example['continuation']}"
    return f"{example['context'].strip()}{task.delimiter}{example['continuation']}"


def _questions(task: Task, example: Example) -> list[str]:
    """Return the texts of an example's options; for language modelling those without and with the continuation."""
    if task.kind == "multiple_choice":
        return [f"{example['query']}{task.delimiter}{choice}" for choice in example["choices"]]
    if task.kind == "schema":
        return [f"{context}{task.delimiter}{example['continuation']}" for context in example["context_options"]]
    question = f"{example['context'].strip()}{task.delimiter}"
    return [question, question + example["continuation"]]


def _common(*rows: list[int]) -> int:
    """Return the length of the common beginning of sequences."""
    for i, ids in enumerate(zip(*rows, strict=False)):
        if len(set(ids)) > 1:
            return i
    return min(map(len, rows))
