"""Forward passes with hooks: they run in Python, may be stopped early, and are checked to have reached all hooks.

A compiled model would run the graph that was compiled without the hooks. So while a context is open, everything that
torch.compile has compiled runs eagerly; the compiled code is used again after the last context has closed.
"""

import sys
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

_WRAPPED = ("_orig_mod", "module", "_fsdp_wrapped_module")


class Stop(Exception):  # noqa: N818 - control flow, not an error
    """Ends a forward pass after a depth."""

    def __init__(self, depth: tuple[int, int]):
        super().__init__(depth)
        self.depth = depth


class Context:
    """A group of hooks on a model, all of which every forward pass must reach.

    Args:
      depths: the position of each hook in a pass, by name.
      before: called with the arguments of every pass before it runs.
    """

    def __init__(self, depths: dict[str, tuple[int, int]], before: Callable[[tuple, dict], None] | None = None):
        self.open = True
        self.reached: set[str] = set()
        self._depths, self._before = depths, before

    def begin(self, args: tuple, kwargs: dict) -> None:
        """Start a pass with these arguments."""
        self.reached = set()
        if self._before is not None:
            self._before(args, kwargs)

    def missed(self, last: tuple[int, int] | None) -> list[str]:
        """Return the hooks that the pass should have reached but did not; `last` is the depth at which it stopped."""
        return [n for n, depth in self._depths.items() if n not in self.reached and (last is None or depth <= last)]


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside the wrappers of torch.compile, DataParallel and DistributedDataParallel.

    Raises:
      ValueError: copies of the model run on several devices, or it is traced or scripted.
    """
    return _wrapper_chain(model)[-1]


def require_python(module: nn.Module) -> None:
    """Raise ValueError for a module that does not run in Python, so that hooks within it do not fire."""
    if isinstance(module, torch.jit.ScriptModule):
        raise ValueError(
            f"a {type(module).__name__} is traced or scripted and does not run in Python, so hooks cannot fire: give "
            "the module that it was made from"
        )


def _wrapper_chain(model: nn.Module) -> list[nn.Module]:
    """Return a model and the models that it wraps, from the outermost to the innermost."""
    chain = [model]
    while True:
        outer = chain[-1]
        require_python(outer)
        if isinstance(outer, nn.DataParallel) and len(outer.device_ids) > 1:
            raise ValueError(
                f"a DataParallel runs copies of the model on {len(outer.device_ids)} devices, whose activations would "
                "overwrite each other: give its .module"
            )
        parts = vars(outer)["_modules"]
        inner = next((parts[name] for name in _WRAPPED if name in parts), None)
        if inner is None or "transformer" in parts:
            return chain
        chain.append(inner)


class open_context:  # noqa: N801 - used as a function, and entered for every token of a generation
    """Apply a context to all forward passes of a model. A context manager.

    Contexts may be nested and closed in any order. A pass that is stopped returns None.

    Raises:
      ValueError: at the end of a pass that did not reach all hooks.
    """

    def __init__(self, model: nn.Module, context: Context):
        *self._wrappers, self._model = _wrapper_chain(model)
        self._context = context
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> None:
        with _LOCK:
            passes = _OPEN.get(self._model)
            _EAGER.acquire()
            if passes is None:
                passes = _OPEN[self._model] = _Passes(self._model)
            passes.contexts.append(self._context)
            for wrapper in self._wrappers:
                self._handles += _watched(wrapper, passes)

    def __exit__(self, *exception: object) -> None:
        with _LOCK:
            self._context.open = False
            passes = _OPEN[self._model]
            passes.contexts.remove(self._context)
            if not passes.contexts:
                del _OPEN[self._model]
                passes.close(self._model)
            for handle in self._handles:
                handle.remove()
            _EAGER.release()


def is_open(model: nn.Module) -> bool:
    """Return whether a context is open on a model, which is not wrapped."""
    return model in _OPEN


class _Passes:
    """The open contexts of a model, with a replacement of its `forward`."""

    def __init__(self, model: nn.Module):
        self.contexts: list[Context] = []
        self.count = 0
        self._original = vars(model).get("forward")
        self._model = weakref.ref(model)
        self._replacement = types.MethodType(_replacement_forward(self), model)  # a copy of the model binds its own
        model.forward = self._replacement
        self._handles = _watched(model, self)

    def close(self, model: nn.Module) -> None:
        """Restore the model, except for a forward that other code has set meanwhile."""
        for handle in self._handles:
            handle.remove()
        if vars(model).get("forward") is not self._replacement:
            return
        if self._original is None:
            del model.forward
        else:
            model.forward = self._original

    def forward_of(self, model: nn.Module) -> Callable[..., Any]:
        """Return the forward without contexts: the original one, or, for a copy of the model, that of its class."""
        if self._original is not None and model is self._model():
            return self._original
        return types.MethodType(type(model).forward, model)

    def run(self, args: tuple, kwargs: dict) -> Any:
        """Run one pass. A hook may run the model again, so the hooks reached by the outer pass are restored."""
        contexts = tuple(self.contexts)
        outer = [context.reached for context in contexts]
        try:
            for context in contexts:
                context.begin(args, kwargs)
            self.count += 1
            try:
                output, last = self.forward_of(self._model())(*args, **kwargs), None
            except Stop as stop:
                output, last = None, stop.depth
            missed = [name for context in contexts if context.open for name in context.missed(last)]
            if missed:
                raise ValueError(_unreached(type(self._model()).__name__, missed))
            return output
        finally:
            for context, reached in zip(contexts, outer, strict=True):
                context.reached = reached


def _unreached(model: str, missed: list[str]) -> str:
    names = ", ".join(dict.fromkeys(missed))
    return (
        f"a forward pass of the {model} did not reach {names}, so the hooks there had no effect. Hooks fire only where "
        "a block is called in Python and is the same module as when the context was entered: not in a CUDA graph or a "
        "traced copy, not if the block's forward is called directly, not on a block that was replaced"
    )


_OPEN: "weakref.WeakKeyDictionary[nn.Module, _Passes]" = weakref.WeakKeyDictionary()
_LOCK = threading.RLock()


def _replacement_forward(passes: _Passes) -> Callable[..., Any]:
    """Return a replacement of a model's forward, which calls the original one after its contexts have closed.

    This matters if other code has kept it, in a compiled forward or in a copy of the model.
    """

    def forward(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if _OPEN.get(model) is passes:
            return passes.run(args, kwargs)
        return passes.forward_of(model)(*args, **kwargs)

    return forward


def _watched(wrapper: nn.Module, passes: _Passes) -> list[RemovableHandle]:
    """Add hooks that detect a call without a pass, for example of a model compiled ahead of time."""
    counts: list[int] = []

    def before(module: nn.Module, inputs: tuple) -> None:
        counts.append(passes.count)

    def after(module: nn.Module, inputs: tuple, output: Any) -> None:
        if counts.pop() == passes.count and module is wrapper:  # a copy made within the context has the hooks too
            raise ValueError(
                f"the {type(wrapper).__name__} computed its output without the forward pass in which hooks fire, so "
                "they had no effect. It was compiled ahead of time, or its forward was replaced within the context: "
                "run the original model, and enter contexts after such changes"
            )

    return [wrapper.register_forward_pre_hook(before), wrapper.register_forward_hook(after)]


class _Eager:
    """A counter of open contexts, during which compiled code runs eagerly."""

    def __init__(self) -> None:
        self._count = 0
        self._stance: Any = None

    def acquire(self) -> None:
        # Importing the compiler takes seconds, and without it nothing can have been compiled.
        if self._stance is None and "torch._dynamo" in sys.modules:
            self._stance = torch.compiler.set_stance("force_eager")
        self._count += 1

    def release(self) -> None:
        self._count -= 1
        if not self._count and self._stance is not None:
            self._stance.__exit__(None, None, None)
            self._stance = None


_EAGER = _Eager()
