"""SAEs in a process beside the training: rows go there through shared memory, and nobody waits for anybody."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import bridge
from bridge.live.config import Sizes, WatchConfig
from bridge.live.ring import Ring, Shape
from jsae import jsons
from jsae.settings import ConfigError

_SLOTS = 4
_START_TIMEOUT = 300.0  # seconds
_CLOSE_TIMEOUT = 30.0
_LAUNCH = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "JAX_PLATFORMS")
"""Variables that say of the training what is not so of the process beside it."""


class Remote:
    """A `Learner` in another process (`bridge.live.sidecar`), with its methods. Rows are dropped when it is behind.

    It belongs to no group of the training's process, so that a signal to that does not end it. When the training ends,
    for whatever reason, it does what it was told before and ends too.

    Args:
      config: the settings.
      sizes: of the model.
      say: called with messages for the user.

    Raises:
      ConfigError: settings that cannot work, a directory that holds something else, or a process that does not start.
    """

    def __init__(self, config: WatchConfig, sizes: Sizes, say: Callable[[str], None]):
        self._say = say
        hooks = len(config.run_config().layers(sizes.n_layer))
        shape = Shape(_SLOTS, config.tokens, hooks, sizes.n_embd)
        self._ring, self._free = Ring(shape), list(range(_SLOTS))
        self._guard = threading.Lock()
        self._started: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._problem: str | None = None
        self.prepared = True
        """The compiling is done elsewhere."""
        self.batches = 0
        """Batches that were trained on, as last reported."""
        self.dropped = 0
        """Steps whose activations were dropped, because no slot was free."""
        ring = {"descriptor": self._ring.descriptor, "shape": shape.to_json()}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bridge.live.sidecar"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=(self._ring.descriptor,),
            start_new_session=True,
            env=_environment(),
        )
        os.close(self._ring.descriptor)  # the memory stays
        self._reader = threading.Thread(target=self._listen, daemon=True)
        self._reader.start()
        self._send({"config": config.to_json(), "sizes": sizes.to_json(), "ring": ring})
        try:
            problem = self._started.get(timeout=_START_TIMEOUT)
        except queue.Empty:
            problem = f"it has not started within {_START_TIMEOUT:.0f} s"
        if problem is not None:
            self.close()
            raise ConfigError(f"the process beside the training cannot watch: {problem}")

    def push(self, parts: Sequence[np.ndarray], step_of_training: int, watch: dict[str, float] | None = None) -> None:
        """Hand rows over, or drop them where no slot is free.

        Raises:
          ConnectionError: the process has ended.
        """
        self._check()
        with self._guard:
            slot = self._free.pop() if self._free else None
        if slot is None:
            self.dropped += 1
            if self.dropped == 10:
                self._say("the process beside the training is slower than the training: steps are dropped")
            return
        self._ring.write(slot, parts)
        self._send(
            {"do": "push", "slot": slot, "rows": len(parts[0]), "step": step_of_training, "watch": watch}
            | {"dropped": self.dropped}
        )

    def save(self, step_of_training: int, watch: dict[str, float] | None = None) -> bool:
        """Have everything saved that was handed over before; does not wait.

        Raises:
          ConnectionError: the process has ended.
        """
        self._check()
        self._send({"do": "save", "step": step_of_training, "watch": watch})
        return True

    def close(self) -> None:
        """Let the process end, after it has done what it was told; wait for that, but not long: it needs nobody."""
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(_CLOSE_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._say(f"process {self._process.pid} still trains on what it was given, saves, and then ends by itself")
            return
        self._reader.join()
        self._process.stdout.close()

    def _check(self) -> None:
        if self._problem is not None:
            raise ConnectionError(self._problem)

    def _send(self, message: dict[str, Any]) -> None:
        try:
            self._process.stdin.write((json.dumps(message) + "\n").encode())
            self._process.stdin.flush()
        except (OSError, ValueError) as error:
            self._check()
            raise ConnectionError(f"the process beside the training has ended ({error})") from error

    def _listen(self) -> None:
        """Read what the process says, until it ends."""
        for line in self._process.stdout:
            message = jsons.loads(line)
            if "ready" in message:
                self._started.put(None)
            elif "free" in message:
                with self._guard:
                    self._free.append(message["free"])
                self.batches = message["batches"]
            elif "say" in message:
                self._say(message["say"])
            elif "error" in message:
                self._problem = message["error"]
        code = self._process.wait()
        self._problem = self._problem or f"the process beside the training has ended with code {code}"
        self._started.put(self._problem)


def _environment() -> dict[str, str]:
    """Return the variables of the process: none that concern the training, and this project on the path."""
    env = {name: value for name, value in os.environ.items() if name not in _LAUNCH}
    env.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # a GPU may be the training's too
    root = str(Path(bridge.__file__).resolve().parents[1])
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [root, env.get("PYTHONPATH", "")]))
    return env
