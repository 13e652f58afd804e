"""The process beside a training: reads messages and shared memory, and trains the SAEs.

    python -m bridge.live.sidecar        started by `bridge.live.remote`, never by hand

It ends when its input does, after everything that it was told before: a training that dies loses nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from bridge.live.config import Sizes, WatchConfig
from bridge.live.ring import Ring, Shape
from bridge.training import device
from jsae import jsons
from jsae.locks import LockedError

_PATIENCE = 60.0  # seconds for the process of a training that died to end
_OF_ALL = 0.9  # of a GPU's memory, where it has one of its own
_NICE = 5  # on a CPU the training comes first

Tell = Callable[[dict[str, Any]], None]


def main() -> int:
    """Train on what arrives until the input ends."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is not a reply

    def tell(message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # the training has ended
            replies.write((json.dumps(message) + "\n").encode())
            replies.flush()

    try:
        return _serve(sys.stdin.buffer, tell)
    except Exception as error:
        tell({"error": f"{type(error).__name__}: {error}"})
        return 1


def _serve(messages: BinaryIO, tell: Tell) -> int:
    first = jsons.loads(messages.readline() or "{}")
    if not first:
        return 0
    config, sizes = WatchConfig.from_json(first["config"]), Sizes.from_json(first["sizes"])
    ring = Ring(Shape.from_json(first["ring"]["shape"]), first["ring"]["descriptor"])
    kind = device.open_torch(config.device)
    device.open_jax(kind, _OF_ALL)
    if kind == "cpu":
        os.nice(_NICE)
    from bridge.live.learner import Learner

    with _opened(lambda: Learner(config, sizes, lambda text: tell({"say": text}))) as learner:
        tell({"ready": True})
        for line in messages:
            message = jsons.loads(line)
            if message["do"] == "push":
                rows = ring.read(message["slot"], message["rows"])
                watch = (message["watch"] or {}) | {"dropped": message["dropped"]}
                learner.push(rows, message["step"], watch)
                tell({"free": message["slot"], "batches": learner.batches})
            elif not learner.save(message["step"], message["watch"]):
                tell({"say": f"nothing to save at step {message['step']}: no batch has been trained on yet"})
    return 0


@contextlib.contextmanager
def _opened(make: Callable[[], Any]) -> Iterator[Any]:
    """Open the run, once the process of a training that died has let go of it."""
    until = time.monotonic() + _PATIENCE
    while True:
        try:
            opened = make()
            break
        except LockedError:
            if time.monotonic() > until:
                raise
            time.sleep(0.5)
    with opened:
        yield opened


if __name__ == "__main__":
    sys.exit(main())
