"""The other trainers' side of the `peers` and `memory` measurements. Run by path in an environment that has no jsae.

Reads a job a line from stdin and answers each with a line of JSON. `make` builds a library's own trainer; `step` has it
take one training step on a batch of `x.npy`, just as its own loop does; `matmul` multiplies a batch with an encoder;
`peak` takes some steps and tells what memory they needed. Settings are the libraries' defaults.
"""

import contextlib
import itertools
import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO

import resident  # beside this file

STEPS = 1_000_000
"""Of the run that the measured steps belong to: no schedule moves much meanwhile."""

FIRST = 64
"""Activations of the first step, after which moments and everything else that is kept is there."""

Step = Callable[[Any], object]
"""Takes a training step on a batch, (n, d)."""


def main(folder: Path) -> None:
    """Serves the jobs on stdin, on the activations in `folder`."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the libraries print goes where errors go
    _tell(answers, {"versions": _versions()})
    side: _Side | None = None
    for line in sys.stdin:
        job = json.loads(line)
        if job["do"] == "make":
            side = _Side(job, folder)
            _tell(answers, {})
        else:
            _tell(answers, getattr(side, job["do"])(job))


def _tell(answers: TextIO, told: dict[str, Any]) -> None:
    print(json.dumps(told), file=answers, flush=True)


class _Side:
    """A trainer and the batches it is fed in turn."""

    def __init__(self, job: dict[str, Any], folder: Path):
        import numpy as np
        import torch

        if job["threads"] is not None:
            torch.set_num_threads(job["threads"])
        torch.manual_seed(0)
        self._device = job["device"]
        x = torch.from_numpy(np.load(folder / "x.npy")).to(self._device)
        self._batches = itertools.cycle(list(x))
        self._cast = _autocast(job)
        self._W_enc = torch.randn(job["d_sae"], job["d_in"], device=self._device) if job["matmul"] else None
        self._step = LIBRARIES[job["trainer"]](job)
        self._step(x[0, :FIRST])
        for _ in range(job["warmup_steps"]):
            self.step(job)

    def step(self, _: dict[str, Any]) -> dict[str, float]:
        """Seconds of one training step."""
        return self._timed(lambda: self._step(next(self._batches)))

    def matmul(self, _: dict[str, Any]) -> dict[str, float]:
        """Seconds of the encoder's product alone."""

        def product() -> None:
            with self._cast():
                next(self._batches) @ self._W_enc.T

        return self._timed(product)

    def peak(self, job: dict[str, Any]) -> dict[str, int]:
        """Bytes before some steps, and the most during them."""
        import torch

        before = resident.forget_peak() if self._device == "cpu" else torch.cuda.memory_allocated()
        if self._device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        for _ in range(job["steps"]):
            self.step(job)
        most = resident.peak() if self._device == "cpu" else torch.cuda.max_memory_allocated()
        return {"before": before, "peak": most}

    def _timed(self, work: Callable[[], object]) -> dict[str, float]:
        import torch

        wait = torch.cuda.synchronize if self._device != "cpu" else lambda: None
        wait()
        start = time.perf_counter()
        work()
        wait()
        return {"seconds": time.perf_counter() - start}


def _autocast(job: dict[str, Any]) -> Callable[[], contextlib.AbstractContextManager]:
    import torch

    if not job["autocast"]:
        return contextlib.nullcontext
    return lambda: torch.autocast(torch.device(job["device"]).type, dtype=torch.bfloat16)


# ---- SAELens ------------------------------------------------------------------------------------------------------


def _saelens(job: dict[str, Any]) -> Step:
    """What SAETrainer.fit does for every batch."""
    import sae_lens
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    kind, own = {
        "topk": ("TopK", {"k": job["k"]}),
        "batchtopk": ("BatchTopK", {"k": float(job["k"])}),
        "matryoshka": (
            "MatryoshkaBatchTopK",
            {"k": float(job["k"]), "matryoshka_widths": [*job["nested_widths"], job["d_sae"]]},
        ),
        "relu": ("Standard", {}),
        "gated": ("Gated", {}),
        "jumprelu": ("JumpReLU", {}),
    }[job["architecture"]]
    widths = {"d_in": job["d_in"], "d_sae": job["d_sae"], "device": job["device"]}
    config = getattr(sae_lens, f"{kind}TrainingSAEConfig")(**widths, **own)
    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=STEPS * job["batch"],
            train_batch_size_samples=job["batch"],
            lr_end=1e-5,  # must be there; a constant rate does not use it
            device=job["device"],
            autocast=job["autocast"],
        ),
        getattr(sae_lens, f"{kind}TrainingSAE")(config).to(job["device"]),
        iter(()),
    )

    def step(batch: Any) -> None:
        trainer.maybe_reset_sparsity()
        trainer.step(batch)
        trainer.n_training_steps += 1

    return step


# ---- dictionary_learning ------------------------------------------------------------------------------------------


def _dictionary_learning(job: dict[str, Any]) -> Step:
    """What trainSAE does for every batch: the trainer's `update`, under autocast where it is asked for."""
    from dictionary_learning.trainers import batch_top_k, gdm, jumprelu, matryoshka_batch_top_k, standard, top_k

    ends = [*job["nested_widths"], job["d_sae"]]
    fractions = [(b - a) / job["d_sae"] for a, b in itertools.pairwise([0, *ends])]
    picked = {"k": job["k"], "threshold_start_step": 0}  # as in all but the first of a run's steps
    trainer, own = {
        "topk": (top_k.TopKTrainer, picked),
        "batchtopk": (batch_top_k.BatchTopKTrainer, picked),
        "matryoshka": (
            matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer,
            {**picked, "group_fractions": fractions},
        ),
        "relu": (standard.StandardTrainer, {}),
        "gated": (gdm.GatedSAETrainer, {}),
        "jumprelu": (jumprelu.JumpReluTrainer, {}),
    }[job["architecture"]]
    made = trainer(
        steps=STEPS,
        activation_dim=job["d_in"],
        dict_size=job["d_sae"],
        layer=0,
        lm_name="none",
        device=job["device"],
        **own,
    )
    numbers, cast = itertools.count(), _autocast(job)

    def step(batch: Any) -> None:
        with cast():
            made.update(next(numbers), batch)

    return step


# ---- sparsify -----------------------------------------------------------------------------------------------------


def _sparsify(job: dict[str, Any], optimizer: str) -> Step:
    """Its Trainer's own loop, in a thread: it is held where it asks its model for the activations of a batch.

    So a step is all that the loop does from one batch to the next. On a GPU it computes under autocast, asked or not.
    """
    import torch
    from replay import Replay  # beside this file
    from sparsify import SparseCoderConfig, TrainConfig, Trainer

    turns = _Turns()

    def activations(input_ids: Any) -> Any:
        if input_ids.numel() == 1:  # the Trainer asks for the width
            return torch.zeros(1, 1, job["d_in"], device=job["device"])
        return turns.next_batch()[None]

    class Numbers(torch.utils.data.Dataset):
        """As many token ids as a batch has activations."""

        def __len__(self) -> int:
            return STEPS

        def __getitem__(self, number: int) -> dict[str, Any]:
            return {
                "input_ids": torch.zeros(min(FIRST, job["batch"]) if number == 0 else job["batch"], dtype=torch.long)
            }

    config = TrainConfig(
        SparseCoderConfig(num_latents=job["d_sae"], k=job["k"]),
        batch_size=1,
        optimizer=optimizer,
        hookpoints=["site"],
        init_seeds=[0],
        log_to_wandb=False,
        save_every=STEPS + 2,
    )
    return turns.follow(Trainer(config, Numbers(), Replay(activations, job["device"])).fit)


class _Turns:
    """Lets a loop go on one batch at a time."""

    def __init__(self) -> None:
        self._batches: queue.Queue[Any] = queue.Queue()
        self._asked: queue.Queue[BaseException | None] = queue.Queue()

    def next_batch(self) -> Any:
        """Called in the loop: says that the batch before is done with, and waits for one."""
        self._asked.put(None)
        return self._batches.get()

    def follow(self, loop: Callable[[], object]) -> Step:
        """Starts the loop, up to where it asks for its first batch; a step takes it to where it asks again."""

        def run() -> None:
            try:
                loop()
            except BaseException as error:
                self._asked.put(error)

        def wait() -> None:
            error = self._asked.get()
            if error is not None:
                raise error

        def step(batch: Any) -> None:
            self._batches.put(batch)
            wait()

        threading.Thread(target=run, daemon=True).start()
        wait()
        return step


LIBRARIES: dict[str, Callable[[dict[str, Any]], Step]] = {
    "SAELens": _saelens,
    "dictionary_learning": _dictionary_learning,
    "sparsify": lambda job: _sparsify(job, "adam"),
    "sparsify signum": lambda job: _sparsify(job, "signum"),
}


def _versions() -> dict[str, str]:
    return dict(_installed("sae-lens", "dictionary-learning", "eai-sparsify", "torch", "numpy"))


def _installed(*names: str) -> Iterator[tuple[str, str]]:
    for name in names:
        with contextlib.suppress(PackageNotFoundError):
            yield name, version(name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
