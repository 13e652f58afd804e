"""The other trainers' side of the `peers` and `memory` measurements. Run by path in an environment that has no jsae.

Reads one JSON job per line from stdin and answers each with one line of JSON. `make` builds a library's own trainer;
`step` takes one training step on a batch of `x.npy`, as the trainer's own loop does; `matmul` multiplies a batch with
an encoder; `peak` takes some steps and reports their memory. Settings are the libraries' defaults.
"""

import contextlib
import gc
import itertools
import queue
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peer_protocol  # beside this file
import resident

STEPS = 1_000_000
"""Length of the run that the measured steps belong to: schedules hardly move during a measurement."""

FIRST = 64
"""Activations of the first step, which allocates the moments and everything else that is kept."""

Step = Callable[[Any], object]
"""Takes a training step on a batch, (n, d)."""


def main(folder: Path) -> None:
    """Answer the jobs on stdin, on the activations in `folder`."""
    import peer_trainers

    answers = peer_protocol.open_answers()
    peer_protocol.answer(answers, {"versions": peer_protocol.versions(*peer_trainers.PACKAGES)})
    side: _Side | None = None
    for job in peer_protocol.jobs():
        if job["do"] == "make":
            side = None
            _free()
            side = _Side(job, folder)
            peer_protocol.answer(answers, {})
        else:
            peer_protocol.answer(answers, getattr(side, job["do"])(job))


def _free() -> None:
    """Free what an earlier trainer of this process held on a GPU."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class _Side:
    """A trainer and the batches that it is given in turn."""

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

    def step(self, job: dict[str, Any]) -> dict[str, float]:
        """Return the seconds of one training step; `queued` of them, or one, are taken before it waits."""
        queued = job.get("queued", 1)

        def work() -> None:
            for _ in range(queued):
                self._step(next(self._batches))

        return {"seconds": self._timed(work)["seconds"] / queued}

    def matmul(self, _: dict[str, Any]) -> dict[str, float]:
        """Return the seconds of the encoder's product alone."""

        def product() -> None:
            with self._cast():
                next(self._batches) @ self._W_enc.T

        return self._timed(product)

    def peak(self, job: dict[str, Any]) -> dict[str, int]:
        """Return the bytes in use before some steps, and the peak during them."""
        import torch

        before = resident.forget_peak() if self._device == "cpu" else torch.cuda.memory_allocated()
        if self._device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        for _ in range(job["steps"]):
            self.step(job)
        peak = resident.peak() if self._device == "cpu" else torch.cuda.max_memory_allocated()
        return {"before": before, "peak": peak}

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


# ---- the trainers -------------------------------------------------------------------------------------------------


def _shape(job: dict[str, Any]) -> Any:
    from peer_trainers import Shape

    sizes = {name: job[name] for name in ("architecture", "d_in", "d_sae", "k", "batch", "device")}
    return Shape(**sizes, widths=(*job["nested_widths"], job["d_sae"]))


def _saelens(job: dict[str, Any]) -> Step:
    """Return what SAETrainer.fit does for every batch."""
    import peer_trainers

    trainer = peer_trainers.saelens(_shape(job), STEPS, iter(()), autocast=job["autocast"])

    def step(batch: Any) -> None:
        trainer.maybe_reset_sparsity()
        trainer.step(batch)
        trainer.n_training_steps += 1

    return step


def _dictionary_learning(job: dict[str, Any]) -> Step:
    """Return what trainSAE does for every batch: the trainer's `update`, under autocast if the job asks for it."""
    import peer_trainers

    make, config = peer_trainers.dictionary_learning(_shape(job), STEPS)
    if "k" in config:
        config["threshold_start_step"] = 0  # as in all but the first steps of a run
    trainer = make(**config)
    numbers, cast = itertools.count(), _autocast(job)

    def step(batch: Any) -> None:
        with cast():
            trainer.update(next(numbers), batch)

    return step


def _sparsify(job: dict[str, Any], optimizer: str) -> Step:
    """Return a step of the Trainer's own loop, which runs in a thread and waits where it asks its model for a batch.

    A step is therefore all that the loop does from one batch to the next. On a GPU it always computes under autocast.
    """
    import peer_trainers
    import torch

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

    trainer = peer_trainers.sparsify(_shape(job), STEPS, Numbers(), activations, optimizer=optimizer)
    return turns.follow(trainer.fit)


class _Turns:
    """Controls a loop, one batch at a time."""

    def __init__(self) -> None:
        self._batches: queue.Queue[Any] = queue.Queue()
        self._requests: queue.Queue[BaseException | None] = queue.Queue()

    def next_batch(self) -> Any:
        """Report that the previous batch is done and wait for the next; called by the loop."""
        self._requests.put(None)
        return self._batches.get()

    def follow(self, loop: Callable[[], object]) -> Step:
        """Start the loop and return its step; the loop waits whenever it asks for a batch."""

        def run() -> None:
            try:
                loop()
            except BaseException as error:
                self._requests.put(error)

        def wait() -> None:
            error = self._requests.get()
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


if __name__ == "__main__":
    main(Path(sys.argv[1]))
