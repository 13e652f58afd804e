"""Train a nanochat of the newest generation from scratch: the training step, and checkpoints to resume from."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import time
import zipfile
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, final, get_args

import numpy as np
import torch
from jaxtyping import Float, Int32
from torch import Tensor, nn

from bridge.nanochat.corpus import Corpus
from bridge.nanochat.loss import assistant_tokens, bits_per_byte, cross_entropy
from bridge.nanochat.model import GPT
from jsae import files, jsons

Learned = Literal["all", "assistant"]
"""The tokens whose loss is minimised: all, or as in nanochat's chat training those that the assistant says."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Hyperparameters of the training.

    The default rates suit a model with 128 channels and batches of a few thousand tokens. All rates rise linearly over
    warmup_steps, stay constant, and fall linearly to zero over the last fraction `warmdown` of the steps.
    """

    steps: int
    batch_rows: int = 16
    micro_rows: int = 2
    matrix_lr: float = 0.02
    embedding_lr: float = 0.1
    head_lr: float = 0.01
    scalar_lr: float = 0.02
    weight_decay: float = 0.05
    warmup_steps: int = 40
    warmdown: float = 0.5
    grad_clip: float = 1.0
    bf16: bool = True
    learned: Learned = "all"

    def __post_init__(self):
        if self.learned not in get_args(Learned):
            raise ValueError(f"learned must be one of {', '.join(get_args(Learned))}, got {self.learned!r}")
        for name in ("steps", "batch_rows", "micro_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.batch_rows % self.micro_rows:
            raise ValueError(f"batch_rows {self.batch_rows} must be a multiple of micro_rows {self.micro_rows}")
        for name in ("matrix_lr", "embedding_lr", "head_lr", "scalar_lr", "grad_clip"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.weight_decay < 0 or self.warmup_steps < 0 or not 0 <= self.warmdown <= 1:
            raise ValueError("weight_decay and warmup_steps must not be negative, warmdown must be in 0..1")

    def rate(self, step: int) -> float:
        """Return the factor on all learning rates at a step, counted from 0."""
        rise = (step + 1) / (self.warmup_steps + 1)
        fall = (self.steps - step) / max(1.0, self.warmdown * self.steps)
        return min(1.0, rise, fall)


@final
class Trainer:
    """The state of a training: the model, its optimisers and the position in the corpus.

    Matrices of the blocks are trained by Muon (orthogonalised momentum), embeddings, head and scalars by AdamW.

    The rows of a step are split into parts of micro_rows, and `workers` parts are computed at the same time, each in
    one thread. On a CPU this is faster than many threads in every small matrix product, and it does not stall when
    another process needs a core. Gradients are added in the order of the rows, so `workers` does not affect results.

    Args:
        model: the model, trained in place.
        corpus: the token rows.
        recipe: the hyperparameters.
        workers: number of threads.
    """

    def __init__(self, model: GPT, corpus: Corpus, recipe: Recipe, workers: int = 1):
        if workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        self.model, self.corpus, self.recipe = model, corpus, recipe
        self.step, self.seconds = 0, 0.0
        self._workers = workers
        self._optimizers = _optimizers(model, recipe)

    def run(self, last: int | None = None) -> Iterator[dict[str, float]]:
        """Train up to step number `last` (default: the recipe's steps); yield the metrics of each step.

        The metrics are `loss` (nats per token), `grad_norm` and `seconds`. The caller may stop iterating at any step.

        Raises FloatingPointError if the loss or the gradient is not finite; the weights are those of the step before.
        """
        while self.step < min(self.recipe.steps, last or self.recipe.steps):
            begin = time.perf_counter()
            rows = self.corpus.next_rows(self.recipe.batch_rows)
            metrics = self._update(rows)
            self.step += 1
            seconds = time.perf_counter() - begin
            self.seconds += seconds
            yield {**metrics, "seconds": seconds}

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next steps depend on, as plain types and tensors."""
        return {
            "step": self.step,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
            "corpus": json.dumps(self.corpus.position()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state, with the same steps as the trainer that saved it.

        Raises ValueError if the state is of a model of other shapes, or of another corpus.
        """
        shapes = {name: tuple(weight.shape) for name, weight in self.model.state_dict().items()}
        saved = {name: tuple(weight.shape) for name, weight in state["model"].items()}
        if differing := sorted(name for name in shapes.keys() | saved if shapes.get(name) != saved.get(name)):
            name = differing[0]
            raise ValueError(f"the save is of another model: {name} is {saved.get(name)}, here {shapes.get(name)}")
        self.corpus.seek(jsons.loads(state["corpus"]))
        self.model.load_state_dict(state["model"])
        for optimizer, moments in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(moments)
        self.step, self.seconds = state["step"], state["seconds"]

    def _update(self, rows: Int32[np.ndarray, "B row_len"]) -> dict[str, float]:
        recipe, weights = self.recipe, list(self.model.parameters())
        device, tokens = weights[0].device, torch.from_numpy(rows[:, :-1].copy())
        targets = torch.from_numpy(learned_targets(rows, recipe.learned, self.corpus.tokenizer.special_tokens))
        count = max(int((targets >= 0).sum()), 1)
        parts = [x.to(device).split(recipe.micro_rows) for x in (tokens, targets)]
        total, gradients = torch.zeros((), device=device), [torch.zeros_like(weight) for weight in weights]
        with ThreadPoolExecutor(self._workers) as pool:
            for loss, part in pool.map(functools.partial(self._gradients, count), *parts):
                total += loss
                torch._foreach_add_(gradients, part)
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient
        norm = nn.utils.clip_grad_norm_(weights, recipe.grad_clip)
        loss, norm = total.item(), norm.item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise FloatingPointError(f"step {self.step}: loss {loss}, gradient norm {norm}: lower the learning rates")
        rate = recipe.rate(self.step)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * rate
            optimizer.step()
        return {"loss": loss, "grad_norm": norm}

    def _gradients(
        self, count: int, tokens: Int32[Tensor, "b T"], targets: Int32[Tensor, "b T"]
    ) -> tuple[Float[Tensor, ""], tuple[Tensor, ...]]:
        """Return the part of some rows in the mean loss of a step, which learns `count` tokens, and its gradients."""
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.recipe.bf16):
            loss = cross_entropy(self.model, tokens, targets).sum() / count
        return loss.detach(), torch.autograd.grad(loss, list(self.model.parameters()))


def _optimizers(model: GPT, recipe: Recipe) -> list[torch.optim.Optimizer]:
    matrices, embeddings, head, scalars = [], [], [], []
    for name, weight in model.named_parameters():
        if weight.ndim == 1 or "gate" in name:
            scalars.append(weight)
        elif name.startswith("lm_head"):
            head.append(weight)
        elif name.startswith("transformer.h."):
            matrices.append(weight)
        else:
            embeddings.append(weight)
    muon = torch.optim.Muon(matrices, lr=recipe.matrix_lr, momentum=0.95, weight_decay=recipe.weight_decay)
    groups = [
        {"params": embeddings, "lr": recipe.embedding_lr},
        {"params": head, "lr": recipe.head_lr},
        {"params": scalars, "lr": recipe.scalar_lr},
    ]
    adam = torch.optim.AdamW(groups, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.0)
    for optimizer in (muon, adam):
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return [muon, adam]


def learned_targets(
    rows: Int32[np.ndarray, "B row_len"], learned: Learned, special_tokens: Mapping[str, int]
) -> Int32[np.ndarray, "B T"]:
    """Return the targets of rows, shifted by one token; -1 for those that are not learned.

    Args:
        rows: token ids.
        learned: which tokens are learned.
        special_tokens: ids by name.
    """
    targets = rows[:, 1:].copy()
    if learned == "assistant":
        targets[~assistant_tokens(rows, special_tokens)[:, 1:]] = -1
    return targets


def heldout_bits_per_byte(model: GPT, corpus: Corpus, rows: int, micro_rows: int, learned: Learned = "all") -> float:
    """Return the float32 loss in bits per byte on the first rows of one pass through a corpus.

    Args:
        model: the model.
        corpus: the held-out split.
        rows: number of rows.
        micro_rows: rows per forward pass.
        learned: which tokens are measured.
    """
    tokenizer = corpus.tokenizer

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        remaining = corpus.one_pass(rows)
        while several := list(itertools.islice(remaining, micro_rows)):
            part = np.stack(several)
            targets = learned_targets(part, learned, tokenizer.special_tokens)
            yield torch.from_numpy(part[:, :-1].copy()).to(model.lm_head.weight.device), torch.from_numpy(targets)

    model.eval()
    result = bits_per_byte(model, batches(), tokenizer.token_bytes)
    model.train()
    return result


# ---- files --------------------------------------------------------------------------------------------------------


def rounded(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights for a small file: matrices in bfloat16, vectors and scalars unchanged."""
    return {name: weight.bfloat16() if weight.ndim > 1 else weight for name, weight in weights.items()}


def save(
    directory: Path,
    weights: dict[str, Tensor],
    meta: dict[str, Any],
    state: dict[str, Any] | None,
    kept_steps: Collection[int] = (),
) -> Path:
    """Write a checkpoint as nanochat does: `model_%06d.pt`, `meta_%06d.json` and, with state, `optim_%06d_rank0.pt`.

    Each file is written atomically, the weights last. Then earlier checkpoints in the directory are deleted, and the
    partial files of killed processes.

    Args:
        directory: created if missing.
        weights: the weights by name.
        meta: the content of the meta file, with the `step`.
        state: the trainer's `state_dict`; None saves none.
        kept_steps: steps whose weights and meta file are not deleted.

    Returns:
        The path of the weights.

    Raises:
        OSError: a file cannot be written, for example because the disk is full; the earlier checkpoint remains.
    """
    directory.mkdir(parents=True, exist_ok=True)
    files.clear(directory, "model_*.pt", "meta_*.json", "optim_*.pt")
    step = meta["step"]
    if state is not None:
        _save(state, directory / f"optim_{step:06d}_rank0.pt")
    files.write(directory / f"meta_{step:06d}.json", json.dumps(meta, indent=2))
    model = directory / f"model_{step:06d}.pt"
    _save(weights, model)
    for pattern, kept in (("model_*.pt", kept_steps), ("meta_*.json", kept_steps), ("optim_*_rank0.pt", ())):
        for old in directory.glob(pattern):
            if not any(f"_{number:06d}" in old.name for number in (step, *kept)):
                old.unlink()
    return model


def last_state(directory: Path) -> dict[str, Any] | None:
    """Return the trainer's state of the last save in a directory, or None. Raises ValueError for a damaged file."""
    saves = sorted(directory.glob("optim_*_rank0.pt"))
    if not saves:
        return None
    try:
        _check_sums(saves[-1])
        return torch.load(saves[-1], map_location="cpu", weights_only=True)
    except Exception as error:
        if files.is_system_error(error):
            raise
        raise ValueError(f"{saves[-1]} cannot be read ({error}); delete it to start from scratch") from error


def _save(value: dict[str, Any], path: Path) -> None:
    """Save a value with torch, atomically."""
    with files.replacing(path) as partial, partial.open("wb") as file:  # given a path, torch.save hides the cause
        torch.save(value, file)


def _check_sums(path: Path) -> None:
    """Verify the checksums that torch.save writes and torch.load ignores. Raises ValueError if one differs."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"its member {damaged} does not match its checksum")
