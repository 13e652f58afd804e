"""Listen to the forward passes of a training, compiled or not, without a change to what they compute.

Hooks on the blocks call an operation of torch. Compiled code contains the call, so that the code is the same whether
anybody listens or not: nothing is compiled again, no graph breaks, and what the call does is decided when it runs.
"""

from __future__ import annotations

import functools
import itertools
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from bridge.hooks import find, register
from bridge.passes import unwrapped
from bridge.selection import kept

_TOKENS = -1  # number of the hook on the token ids
_SPARE = 1.125  # rows that are taken, over those that are wanted: some do not count
_EXTRA = 64


class Part:
    """Rows of one forward pass: token ids, and activations by hook with a mask of the tokens that count."""

    def __init__(self, tokens: torch.Tensor, rows: np.ndarray | None):
        self.tokens = tokens
        self.rows = rows
        """Numbers of the tokens that are taken, in order; None takes all."""
        self.acts: dict[int, torch.Tensor] = {}
        self.mask: torch.Tensor | None = None


class Capture:
    """Hooks on a model that is being trained, which take activations of the tokens that count when they are armed.

    A forward pass counts in training mode only. Passes of the main thread are taken in their order, until there are
    enough rows; those of other threads, which are in no order, are all taken and then sorted by their tokens. So what
    is taken depends on the training and the seed alone.

    Args:
      model: a nanochat of any generation, possibly wrapped or compiled, that has not run yet.
      hooks: names of the activations.
      excluded: ids of tokens that do not count.
      drop_sinks: whether tokens of extreme norm do not count.
      seed: of the choice of tokens.

    Raises:
      ValueError: the model does not have a hook, or is no nanochat.
    """

    def __init__(
        self, model: nn.Module, hooks: Sequence[str], *, excluded: tuple[int, ...], drop_sinks: bool, seed: int
    ):
        self._hooks, self._excluded, self._drop_sinks, self._seed = tuple(hooks), excluded, drop_sinks, seed
        self._handles: list[RemovableHandle] = []
        self._key: int | None = None
        self._guard = threading.Lock()
        self._current: dict[int, Part] = {}
        self._parts: list[tuple[bool, Part]] = []
        self._wanted = self._reserved = self._step = 0
        self._seconds = 0.0
        self.error: Exception | None = None
        """The error of a forward pass, which it did not disturb."""
        self.attach(model)

    def attach(self, model: nn.Module) -> None:
        """Move the hooks to a model.

        Raises:
          ValueError: it does not have a hook, or is no nanochat.
        """
        inner = unwrapped(model)
        places = [(find(model, name), name) for name in self._hooks]
        self.detach()
        self._model = weakref.ref(inner)
        self._key = key = next(_KEYS)
        _LISTENERS[key] = self
        embedding = inner.transformer.wte
        device = embedding.weight.device
        forward = _listener(embedding, key, _TOKENS, device)
        self._handles = [embedding.register_forward_pre_hook(lambda called, inputs: forward(called, inputs[0]))]
        self._handles += [
            register(module, name, _listener(module, key, number, device))
            for number, (module, name) in enumerate(places)
        ]

    def detach(self) -> None:
        """Remove the hooks."""
        _LISTENERS.pop(self._key, None)
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def arm(self, wanted: int, step: int) -> None:
        """Listen to the passes from now on, until there are enough rows; 0 listens to none.

        Args:
          wanted: rows to take.
          step: number of the training's step, from which with the seed the choice of tokens follows.
        """
        with self._guard:
            self._current, self._parts = {}, []
            self._wanted, self._reserved, self._step = wanted, 0, step

    def take(self) -> list[np.ndarray] | None:
        """Return the rows that were taken since `arm`, float32 (n, d) per hook; None if no pass was heard."""
        with self._guard:
            heard, self._parts, self._current = self._parts, [], {}
            wanted, self._wanted = self._wanted, 0
        whole = [(ordered, part) for ordered, part in heard if len(part.acts) == len(self._hooks)]
        if not whole:
            return None
        if not all(ordered for ordered, _ in whole):
            whole.sort(key=lambda item: item[1].tokens.cpu().numpy().tobytes())
        columns = [
            np.concatenate([part.acts[i].float().cpu().numpy()[part.mask.cpu().numpy()] for _, part in whole])
            for i in range(len(self._hooks))
        ]
        if len(columns[0]) > wanted:
            order = np.random.default_rng((self._seed, self._step, 1)).permutation(len(columns[0]))[:wanted]
            columns = [column[order] for column in columns]
        return columns

    def seconds(self) -> float:
        """Return the time that listening took since the last call, of all threads together."""
        with self._guard:
            seconds, self._seconds = self._seconds, 0.0
        return seconds

    def hear(self, number: int, value: torch.Tensor) -> None:
        """Take what a hook was called with; never raises."""
        if not self._wanted:
            return
        start = time.perf_counter()
        try:
            model = self._model()
            if model is not None and model.training:
                with torch.no_grad():
                    self._hear(number, value.detach())
        except Exception as error:  # a forward pass of the training must go on
            self.error = error
        finally:
            with self._guard:
                self._seconds += time.perf_counter() - start

    def _hear(self, number: int, value: torch.Tensor) -> None:
        thread = threading.get_ident()
        if number == _TOKENS:
            ordered = thread == threading.main_thread().ident
            with self._guard:
                self._current.pop(thread, None)
                missing = self._wanted - self._reserved
                if not ordered or missing > 0:
                    part = Part(value.clone(), self._rows(value.numel(), missing) if ordered else None)
                    self._reserved += value.numel() if part.rows is None else int(len(part.rows) / _SPARE)
                    self._current[thread] = part
                    self._parts.append((ordered, part))
            return
        part = self._current.get(thread)
        if part is None or part.tokens.shape != value.shape[:2]:
            return
        mask = kept(value, part.tokens, self._excluded, self._drop_sinks).flatten()
        acts = value.reshape(-1, value.shape[-1])
        if part.rows is None:
            acts = acts.clone()
        else:
            rows = torch.from_numpy(part.rows).to(value.device, non_blocking=True)
            acts, mask = acts.index_select(0, rows), mask.index_select(0, rows)
        part.mask = mask if part.mask is None else part.mask & mask
        part.acts[number] = acts

    def _rows(self, count: int, missing: int) -> np.ndarray | None:
        """Return which tokens of a pass to take; None is all of them."""
        several = int(missing * _SPARE) + _EXTRA
        if several >= count:
            return None
        seed = (self._seed, self._step, 0, len(self._parts))
        return np.sort(np.random.default_rng(seed).choice(count, several, replace=False))


_KEYS = itertools.count()
_LISTENERS: weakref.WeakValueDictionary[int, Capture] = weakref.WeakValueDictionary()


def _listener(
    module: nn.Module, key: int, number: int, device: torch.device
) -> Callable[[nn.Module, torch.Tensor], None]:
    """Return a hook that passes values on. A plain function, which copies of the model share and compilers read."""
    observe, marker = _operation(), torch.zeros(1, device=device)

    def call(called: nn.Module, value: torch.Tensor) -> None:
        if called is not module:  # a copy of the model
            return
        if torch.compiler.is_compiling():
            observe(value.detach(), marker, key, number)
        else:
            _hear(key, number, value)

    return call


def _hear(key: int, number: int, value: torch.Tensor) -> None:
    listener = _LISTENERS.get(key)
    if listener is not None:
        listener.hear(number, value)


@functools.cache
def _operation() -> Any:
    """Return the operation. It says that it writes to `marker`, so that compilers keep the call."""
    schema = "(Tensor value, Tensor(a!) marker, int key, int number) -> ()"

    @torch.library.custom_op("jsae::observe", mutates_args={"marker"}, schema=schema)
    def observe(value: torch.Tensor, marker: torch.Tensor, key: int, number: int) -> None:
        _hear(key, number, value)

    @observe.register_fake
    def _(value: torch.Tensor, marker: torch.Tensor, key: int, number: int) -> None:
        return None

    return observe
