"""Forward passes of a nanochat on a GPU whose parts are compiled: blocks, or the halves of blocks with hooks inside.

What lies between the parts runs in Python, so hooks take effect as in an eager pass. Windowed attention runs in
flex_attention, which skips what no query sees.
"""

import sys
from collections.abc import Callable
from typing import Any, Literal

import torch

from bridge.nanochat.config import GPTConfig
from bridge.nanochat.model import is_causal, window_mask

Choice = Literal["auto", "on", "off"]

FIRST_CALL_SECONDS = 25.0
"""The time that compilation must save before it is chosen: about twice what it takes for a d20 on an H100."""
_SAVED = 0.25  # of the time of an eager pass
_FLOPS = 2.4e14  # matrix products of an eager pass on an H100; slower cards gain more
_LAUNCHES = 7e-4  # seconds that an eager block takes however few the tokens
_VARIANTS = 64  # torch compiles a function at most 8 times by default
_NARROWEST_HEAD = 16  # that flex_attention compiles for


class Programs:
    """Calls functions as compiled programs, one per function, shape and kind of layer (`model.Runner`).

    Where a program cannot be compiled, one line on stderr says so, and the functions are called as they are.

    Args:
      head_dim: channels of an attention head.
      backend: the compiler of `torch.compile`.
      use_flex: whether windowed attention runs in flex_attention; None: on CUDA.
    """

    def __init__(self, head_dim: int, backend: str | Callable = "inductor", use_flex: bool | None = None):
        import torch._dynamo
        import torch.nn.attention.flex_attention

        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _VARIANTS)
        self.failure: str | None = None
        self._backend, self._use_flex = backend, use_flex
        self._wide = head_dim >= _NARROWEST_HEAD
        self._compiled: dict[Callable, Callable] = {}
        self._masks: dict[tuple[int, int, torch.device], Any] = {}

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return `function(*arguments)`."""
        while self.failure is None:
            try:
                # An open context of hooks makes compiled code run eagerly; these programs contain no hook.
                with torch.compiler.set_stance("default"):
                    return self._program(function)(*arguments)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                self._fail(error)
                arguments = tuple(self._plain(argument) for argument in arguments)
        return function(*arguments)

    def mask(self, length: int, window: int | None, device: torch.device) -> Any:
        """Return the mask of the attention within a text of this length; None if it is plainly causal."""
        if is_causal(length, window):
            return None
        assert window is not None
        key = (length, window, device)
        if key not in self._masks:
            uses_flex = device.type == "cuda" and self._wide if self._use_flex is None else self._use_flex
            make = _block_mask if uses_flex else _square_mask
            self._masks[key] = make(*key)
        return self._masks[key]

    def _program(self, function: Callable) -> Callable:
        if function not in self._compiled:
            self._compiled[function] = torch.compile(function, backend=self._backend, dynamic=False)
        return self._compiled[function]

    def _fail(self, error: Exception) -> None:
        """Do without flex_attention from now on, or, if it is not in use, without compiled programs."""
        lines = str(error).strip().splitlines()[:2]  # the first one names the backend, the second one its error
        reason = f"{type(error).__name__}: {' '.join(lines)}"[:300]
        with_flex = any(not isinstance(mask, torch.Tensor) for mask in self._masks.values())
        if with_flex:
            self._use_flex = False
            self._compiled.clear()
            note = "windowed attention is computed with masks"
        else:
            self.failure = reason
            note = "the model runs eagerly"
        print(f"note: a part of the model cannot be compiled here ({reason}): {note}", file=sys.stderr, flush=True)
        self._replaced = {id(mask): _square_mask(*key) for key, mask in self._masks.items()}
        self._masks = {key: self._replaced[id(mask)] for key, mask in self._masks.items()}

    def _plain(self, argument: Any) -> Any:
        """Return an argument, or, for a BlockMask that is not in use any more, its mask as a tensor."""
        return self._replaced.get(id(argument), argument)


def _square_mask(length: int, window: int, device: torch.device) -> torch.Tensor:
    return window_mask(length, length, window, device)


def _block_mask(length: int, window: int, device: torch.device) -> Any:
    """Return the BlockMask of `window_mask`, for flex_attention."""
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(lambda b, h, t, s: (s <= t) & (s >= t - window), None, None, length, length, device=device)


def is_worthwhile(config: GPTConfig, deepest: int, tokens: int, tokens_per_forward: int) -> bool:
    """Return whether the compiled passes of a run save more time than their compilation takes; an estimate.

    Args:
      config: the model's.
      deepest: the last block that is run.
      tokens: tokens of the whole run.
      tokens_per_forward: tokens of a pass.
    """
    block = max(24 * config.n_embd**2 * tokens_per_forward / _FLOPS, _LAUNCHES)
    passes = tokens / tokens_per_forward
    return _SAVED * passes * (deepest + 1) * block >= FIRST_CALL_SECONDS


def unavailable(device: torch.device) -> str | None:
    """Return why passes cannot be compiled on a device; None if they can."""
    if device.type != "cuda":
        return "programs are compiled for GPUs"
    from torch.utils._triton import has_triton

    return None if has_triton() else "torch finds no working Triton for this GPU"


def choose(
    choice: Choice, config: GPTConfig, device: torch.device, deepest: int, tokens: int, tokens_per_forward: int
) -> tuple[Programs | None, str]:
    """Return the programs for the passes of a run, None for eager passes, and the reason.

    Args:
      choice: "auto" compiles where it saves time.
      config: the model's.
      device: its device.
      deepest: the last block that is run.
      tokens: tokens of the whole run.
      tokens_per_forward: tokens of a pass.
    """
    if choice == "off":
        return None, "--compile_model=off"
    reason = unavailable(device)
    if reason is not None:
        return None, reason
    if choice == "auto" and not is_worthwhile(config, deepest, tokens, tokens_per_forward):
        return None, "the run is too short to gain from compilation"
    return Programs(config.head_dim), "--compile_model=on" if choice == "on" else "the run is long enough"
