"""Decoding with tensors that never move: every step of a generation runs the same kernels on the same memory.

On a GPU a step is recorded as a CUDA graph once and replayed, so that the processor no longer launches some thousand
kernels per token. What hooks compute within the step is recorded too.
"""

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bridge import passes
from bridge.nanochat.model import GPT, Cache

Replay = Callable[[], object]
Recorder = Callable[[Callable[[], Tensor], Callable[[], None]], tuple[Replay, Tensor]]
"""Takes a step and a function that undoes it; returns a function that replays it on the same memory, and its output."""

_SHORTEST = 256
"""Keys that the first recorded step reads; a step for twice as many is recorded when they are full."""
_WORTHWHILE = 4
"""Tokens that a recorded step must be good for: recording takes as long as a few eager steps."""


class StaticCache(Cache):
    """A cache that is written at a position held on the device, and read as a whole under a mask.

    Args:
      cache: a cache whose text continues.
      capacity: tokens per row of the new one.
    """

    def __init__(self, cache: Cache, capacity: int):
        shape = (*cache.k.shape[:3], capacity, cache.k.shape[4])
        super().__init__(cache.k.new_zeros(shape), cache.v.new_zeros(shape))
        for ours, theirs in ((self.k, cache.k), (self.v, cache.v)):
            ours[:, :, :, : cache.position] = theirs[:, :, :, : cache.position]
        self.position = cache.position
        self.last_token = cache.last_token.clone()
        self.last_embedding = None if cache.last_embedding is None else cache.last_embedding.clone()
        self.keys = capacity
        self._at = torch.full((1,), cache.position, device=self.k.device)
        self._masks: dict[int | None, Tensor] = {}

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write one layer's key and value of a token, and return the first `keys` of that layer."""
        self.k[layer].index_copy_(2, self._at, k.detach())
        self.v[layer].index_copy_(2, self._at, v.detach())
        return self.k[layer, :, :, : self.keys], self.v[layer, :, :, : self.keys]

    def rows(self, count: int) -> Any:
        """Return the position of the next token, on the device."""
        if count != 1:
            raise ValueError(f"a static cache takes one token at a time, not {count}")
        return self._at

    def mask(self, window: int | None) -> Float[Tensor, "1 1 1 keys"]:
        """Return 0 for the keys that the next token sees and -inf for the others."""
        if window not in self._masks:
            s = torch.arange(self.keys, device=self.k.device)
            visible = s <= self._at if window is None else (s <= self._at) & (s >= self._at - window)
            bias = torch.zeros(self.keys, dtype=self.k.dtype, device=self.k.device)
            self._masks[window] = bias.masked_fill(~visible, -torch.inf)[None, None, None]
        return self._masks[window]

    def advance(self, tokens: Int[Tensor, "B 1"], embedded: Float[Tensor, "B 1 C"] | None) -> None:
        """End a forward pass over one token per row."""
        self._masks = {}  # a later step, and a recorded one, makes its own
        self.position += 1
        self._at += 1
        self.last_token.copy_(tokens)
        if embedded is not None:
            self.last_embedding.copy_(embedded)

    def state(self) -> tuple[int, Tensor, Tensor, Tensor | None]:
        """Return a copy of what a step changes, except for the key and value that it writes, which it writes again."""
        embedding = None if self.last_embedding is None else self.last_embedding.clone()
        return self.position, self._at.clone(), self.last_token.clone(), embedding

    def restore(self, state: tuple[int, Tensor, Tensor, Tensor | None]) -> None:
        """Return to a `state`."""
        self.position, at, token, embedding = state
        self._at.copy_(at)
        self.last_token.copy_(token)
        if embedding is not None:
            self.last_embedding.copy_(embedding)
        self._masks = {}

    def replayed(self) -> None:
        """Count a token that a recorded step has added."""
        self.position += 1


class Decoder:
    """Steps of a generation on a static cache, recorded on a GPU unless hooks of others are on the model.

    Args:
      model: the model.
      forward: called instead of the model, with the same arguments; it must do the same for every token.
      cache: the text so far, of as many rows as are generated.
      steps: number of tokens that may follow.
      record: records steps; None: as CUDA graphs on a GPU, and not at all elsewhere.
    """

    def __init__(
        self, model: GPT, forward: Callable[..., Tensor], cache: Cache, steps: int, record: Recorder | None = None
    ):
        capacity = -(-(cache.position + steps) // 64) * 64  # kernels want rows of masks that are aligned
        self.cache = StaticCache(cache, capacity)
        self._end = cache.position + steps
        self._model, self._forward = model, forward
        self._modules = list(model.modules())
        self._tokens = torch.zeros_like(self.cache.last_token)
        self._record = cuda_graph if record is None and self._tokens.is_cuda else record
        self._replay: Replay | None = None
        self._logits: Tensor | None = None

    def step(self, tokens: Int[Tensor, "B 1"]) -> Float[Tensor, "B 1 V"]:
        """Return the logits after one more token per row. The next step may overwrite them."""
        self._tokens.copy_(tokens)
        if self._record is None or self._is_hooked():
            self._replay = None  # hooks may change what the recording holds
            self.cache.keys = self.cache.max_len
            return self._run()
        if self._replay is None or self.cache.position >= self.cache.keys:
            self._replay = None
            self.cache.keys = _rounded(self.cache.position + 1, self.cache.max_len)
            if min(self.cache.keys, self._end) - self.cache.position >= _WORTHWHILE:
                self._begin_recording()
            if self._replay is None:
                return self._run()
        self._replay()
        self.cache.replayed()
        return self._logits

    def _run(self) -> Float[Tensor, "B 1 V"]:
        return self._forward(self._tokens, cache=self.cache)

    def _begin_recording(self) -> None:
        """Record a step on the present tokens, without any effect; say so where that is not possible."""
        assert self._record is not None
        state = self.cache.state()
        try:
            self._replay, self._logits = self._record(self._run, lambda: self.cache.restore(state))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self._record = None
            reason = f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"[:300]
            print(f"note: tokens are decoded without a CUDA graph ({reason})", file=sys.stderr, flush=True)
        self.cache.restore(state)

    def _is_hooked(self) -> bool:
        """Return whether somebody else's hooks are on the model, which run in Python."""
        return passes.is_open(self._model) or _have_hooks(self._modules)


def cuda_graph(step: Callable[[], Tensor], undo: Callable[[], None]) -> tuple[Replay, Tensor]:
    """Record a step as a CUDA graph (a `Recorder`)."""
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries allocate when a thread first uses them, which a recording forbids
        step()
    torch.cuda.current_stream().wait_stream(side)
    undo()
    with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
        output = step()
    return graph.replay, output


def _have_hooks(modules: Iterable[nn.Module]) -> bool:
    return any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def _rounded(needed: int, most: int) -> int:
    """Return the number of keys of a step that reads `needed` of them: a power of two, at most `most`."""
    keys = _SHORTEST
    while keys < needed:
        keys *= 2
    return min(keys, most)
