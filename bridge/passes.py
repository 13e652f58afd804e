"""The forward passes of a model in which hooks are open: run in Python, stopped early, checked afterwards.

A compiled model would run the graph that was made before the hooks were there. While a context is open, everything that
torch.compile made runs eagerly, so that hooks fire; compiled code is kept and used again when the last context closes.
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
    """Ends a forward pass: what comes after the depth it names is not run."""

    def __init__(self, depth: tuple[int, int]):
        super().__init__(depth)
        self.depth = depth


class Context:
    """Hooks that were put on a model together, of which every forward pass must reach all.

    Args:
      depths: the hook names and when each runs in a pass.
      before: called with the arguments of every pass before it runs.
    """

    def __init__(self, depths: dict[str, tuple[int, int]], before: Callable[[tuple, dict], None] | None = None):
        self.open = True
        self.reached: set[str] = set()
        self._depths, self._before = depths, before

    def begin(self, args: tuple, kwargs: dict) -> None:
        """Start a pass."""
        self.reached = set()
        if self._before is not None:
            self._before(args, kwargs)

    def missed(self, last: tuple[int, int] | None) -> list[str]:
        """Return the hooks that the pass should have reached and did not; `last` is where it was stopped."""
        return [n for n, depth in self._depths.items() if n not in self.reached and (last is None or depth <= last)]


def base(model: nn.Module) -> nn.Module:
    """Return the model within what torch.compile, DataParallel and DistributedDataParallel wrap around it.

    Raises:
      ValueError: copies of the model run on several devices, or it was traced or scripted.
    """
    return _chain(model)[-1]


def require_python(module: nn.Module) -> None:
    """Raise ValueError for a module that does not run in Python, so that hooks within it do not fire."""
    if isinstance(module, torch.jit.ScriptModule):
        raise ValueError(
            f"a {type(module).__name__} was traced or scripted and does not run in Python, where hooks fire: give the "
            "module it was made of"
        )


def _chain(model: nn.Module) -> list[nn.Module]:
    """The model and what it wraps, from the outside in."""
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


class opened:  # noqa: N801 - used as a function, and entered for every token of a generation
    """Within the context, every forward pass of the model begins, may be stopped and is checked as `context` says.

    Contexts may be nested and closed in any order. A pass that is stopped returns None.

    Raises:
      ValueError: at the end of a pass, for hooks that it did not reach.
    """

    def __init__(self, model: nn.Module, context: Context):
        *self._wrappers, self._model = _chain(model)
        self._context = context
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> None:
        with _LOCK:
            passes = _OPEN.get(self._model)
            _EAGER.hold()
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


class _Passes:
    """The contexts that are open on a model, whose `forward` this stands for."""

    def __init__(self, model: nn.Module):
        self.contexts: list[Context] = []
        self.count = 0
        self._own = vars(model).get("forward")
        self._model = weakref.ref(model)
        self._standing = types.MethodType(_standing_for(self), model)  # a copy of the model binds its own
        model.forward = self._standing
        self._handles = _watched(model, self)

    def close(self, model: nn.Module) -> None:
        """Leave no trace on the model; a forward that somebody else put in stays."""
        for handle in self._handles:
            handle.remove()
        if vars(model).get("forward") is not self._standing:
            return
        if self._own is None:
            del model.forward
        else:
            model.forward = self._own

    def forward_of(self, model: nn.Module) -> Callable[..., Any]:
        """Return the forward without contexts: what it was before them, or of a copy that of its class."""
        if self._own is not None and model is self._model():
            return self._own
        return types.MethodType(type(model).forward, model)

    def run(self, args: tuple, kwargs: dict) -> Any:
        """Run one pass. A hook may run the model again, so what was reached is kept for the pass around it."""
        contexts = tuple(self.contexts)
        around = [context.reached for context in contexts]
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
            for context, reached in zip(contexts, around, strict=True):
                context.reached = reached


def _unreached(model: str, missed: list[str]) -> str:
    names = ", ".join(dict.fromkeys(missed))
    return (
        f"a forward pass of the {model} did not reach {names}: the hooks there saw and changed nothing. They fire "
        "where a block is called in Python, and is the module that it was when the context was entered: not in a CUDA "
        "graph or a traced copy, not where a block's forward is called past the module, not on one put in later"
    )


_OPEN: "weakref.WeakKeyDictionary[nn.Module, _Passes]" = weakref.WeakKeyDictionary()
_LOCK = threading.RLock()


def _standing_for(passes: _Passes) -> Callable[..., Any]:
    """A method in the place of a model's forward, which does nothing more once its contexts have closed.

    Somebody may have kept it meanwhile: in a compiled forward, or in a copy of the model.
    """

    def forward(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if _OPEN.get(model) is passes:
            return passes.run(args, kwargs)
        return passes.forward_of(model)(*args, **kwargs)

    return forward


def _watched(wrapper: nn.Module, passes: _Passes) -> list[RemovableHandle]:
    """Hooks that notice a call without a pass, as of what was compiled ahead of time or has another forward now."""
    counts: list[int] = []

    def before(module: nn.Module, inputs: tuple) -> None:
        counts.append(passes.count)

    def after(module: nn.Module, inputs: tuple, output: Any) -> None:
        if counts.pop() == passes.count and module is wrapper:  # a copy made within the context has the hooks too
            raise ValueError(
                f"the {type(wrapper).__name__} computed its output without the forward pass in which hooks fire: they "
                "saw and changed nothing. It was compiled ahead of time, or its forward was replaced within the "
                "context: run the model that it was made of, and enter contexts after such changes"
            )

    return [wrapper.register_forward_pre_hook(before), wrapper.register_forward_hook(after)]


class _Eager:
    """Has what torch.compile made run eagerly for as long as anybody holds it."""

    def __init__(self) -> None:
        self._holders = 0
        self._stance: Any = None

    def hold(self) -> None:
        # Importing the compiler takes seconds; nothing is compiled where nobody has.
        if self._stance is None and "torch._dynamo" in sys.modules:
            self._stance = torch.compiler.set_stance("force_eager")
        self._holders += 1

    def release(self) -> None:
        self._holders -= 1
        if not self._holders and self._stance is not None:
            self._stance.__exit__(None, None, None)
            self._stance = None


_EAGER = _Eager()
