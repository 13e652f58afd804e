"""Decoding with tensors that never move: every step of a generation runs the same kernels on the same memory.

On a GPU a step is recorded as a CUDA graph once and replayed, so that the processor no longer launches some thousand
kernels per token. What hooks compute within the step is recorded too.
"""

import sys
from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bridge import passes
from bridge.nanochat.cache import Cache, StaticCache
from bridge.nanochat.model import GPT

Replay = Callable[[], object]
Recorder = Callable[[Callable[[], Tensor], Callable[[], None]], tuple[Replay, Tensor]]
"""Takes a step and a function that undoes it; returns a function that replays it on the same memory, and its output."""

_SHORTEST = 256
"""Keys that the first recorded step reads; a step for twice as many is recorded when they are full."""
_WORTHWHILE = 4
"""Tokens that a recorded step must be good for: recording takes as long as a few eager steps."""


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
