"""Capture and edit activations of a nanochat with context managers that restore the model.

Hook names are TransformerLens's: `blocks.{L}.hook_resid_post` is the output of block L, `blocks.{L}.hook_attn_out` and
`blocks.{L}.hook_mlp_out` are the outputs of its two halves, `blocks.{L}.ln2.hook_normalized` is the input of its MLP.
They exist on any module with `transformer.h[L].attn` and `.mlp`: this project's model and upstream's `GPT`.
"""

import contextlib
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from jaxtyping import Float
from torch import nn
from torch.utils.hooks import RemovableHandle

from bridge.passes import Context, Stop, open_context, require_python, unwrapped

Acts = Float[torch.Tensor, "B T C"]
Edit = Callable[[Acts], Acts]

SITES: Mapping[str, str] = {
    "attn": "hook_attn_out",
    "mlp_in": "ln2.hook_normalized",
    "mlp": "hook_mlp_out",
    "resid_post": "hook_resid_post",
}
"""Hook names by short name, in the order of a forward pass."""

_NAME = re.compile(r"blocks\.(\d+)\.((?:ln2\.)?hook_\w+)")
_MODULES = {"attn": "attn", "mlp_in": "mlp", "mlp": "mlp"}


def hook_name(layer: int, site: str) -> str:
    """Return the hook name of a layer and a short name: `hook_name(3, "mlp")` is `blocks.3.hook_mlp_out`.

    Raises:
      ValueError: the site is not in `SITES`.
    """
    if site not in SITES:
        raise ValueError(f"no hook type {site!r}: choose one of {', '.join(SITES)}")
    return f"blocks.{layer}.{SITES[site]}"


@functools.cache
def parse(name: str) -> tuple[int, str]:
    """Return the layer and the short name of a hook name.

    Raises:
      ValueError: there is no such hook name.
    """
    match = _NAME.fullmatch(name)
    site = next((s for s, full in SITES.items() if match and full == match[2]), None)
    if match is None or site is None:
        known = ", ".join(f"blocks.{{L}}.{full}" for full in SITES.values())
        raise ValueError(f"no hook is called {name!r}: names are {known}")
    return int(match[1]), site


def find(model: nn.Module, name: str) -> nn.Module:
    """Return the module to which a hook belongs: its output is the activation, or, for "mlp_in", its input.

    Raises:
      ValueError: the hook name or its layer does not exist, or the model is not a nanochat that runs in Python.
    """
    layer, site = parse(name)
    blocks = _blocks(model)
    if layer >= len(blocks):
        raise ValueError(f"{name}: the model has {len(blocks)} layers, 0 to {len(blocks) - 1}")
    require_python(blocks[layer])
    return blocks[layer] if site == "resid_post" else getattr(blocks[layer], _MODULES[site])


def module_name(name: str) -> str:
    """Return the name of the module of a hook (see `find`): `transformer.h.3.mlp` for `blocks.3.hook_mlp_out`.

    Raises:
      ValueError: there is no such hook name.
    """
    layer, site = parse(name)
    return f"transformer.h.{layer}" if site == "resid_post" else f"transformer.h.{layer}.{_MODULES[site]}"


def depth(name: str) -> tuple[int, int]:
    """Return a sort key of hook names: their order in a forward pass."""
    layer, site = parse(name)
    return layer, list(SITES).index(site)


class NotCapturedError(ValueError, KeyError):
    """The requested activation was not captured."""

    __str__ = Exception.__str__  # KeyError would show its message in quotes


class Captured(dict[str, Acts]):
    """Activations of the last forward pass by hook name. Raises NotCapturedError, with the reason, for missing ones."""

    def __init__(self, names: Sequence[str]):
        super().__init__()
        self._names = tuple(names)

    def __missing__(self, name: str) -> Acts:
        if name not in self._names:
            raise NotCapturedError(f"{name} is not captured; captured are {', '.join(self._names)}")
        raise NotCapturedError(
            f"nothing was captured at {name}: no forward pass of the model ran in Python within the context, or it was "
            "stopped before the hook"
        )


@contextlib.contextmanager
def capture(model: nn.Module, names: Sequence[str], stop: bool = False) -> Iterator[dict[str, Acts]]:
    """Yield a dict into which every forward pass within the context puts the activations of the named hooks.

    The activations are the original tensors, (B, T, C), with their gradient history. Compiled models run eagerly
    within the context.

    Args:
      model: a nanochat, possibly wrapped or compiled.
      names: hook names.
      stop: whether to end forward passes after the last of these hooks; the model then returns None.

    Raises:
      ValueError: the model does not have a hook, or none is named; in a forward pass, if it does not reach a hook; on
        access to an activation that was not captured.
    """
    if not names:
        raise ValueError("no hook to capture: give at least one hook name")
    deepest = max(names, key=depth)
    acts = Captured(names)

    def store(name: str) -> Callable[[Acts], None]:
        def hook(h: Acts) -> None:
            acts[name] = h
            if stop and name == deepest:
                raise Stop(depth(name))

        return hook

    with _HookContext(model, {name: store(name) for name in names}):
        yield acts


@contextlib.contextmanager
def edit(model: nn.Module, edits: Mapping[str, Edit]) -> Iterator[None]:
    """Replace activations in every forward pass within the context.

    Contexts may be nested: the inner one edits the result of the outer one. Compiled models run eagerly within the
    context.

    Args:
      model: a nanochat, possibly wrapped or compiled.
      edits: functions from activations to new activations, (B, T, C), by hook name.

    Raises:
      ValueError: the model does not have a hook; in a forward pass, if a function returns another shape, or the pass
        does not reach a hook.
    """

    def apply(name: str) -> Callable[[Acts], Acts]:
        def hook(h: Acts) -> Acts:
            new = edits[name](h)
            if new.shape != h.shape:
                raise ValueError(f"the edit of {name} returned the shape {tuple(new.shape)}, expected {tuple(h.shape)}")
            return new.to(h.dtype)

        return hook

    with _HookContext(model, {name: apply(name) for name in edits}):
        yield


def blocks_before(name: str) -> tuple[str, ...]:
    """Return the hook names of the outputs of all blocks whose work an edit of this hook does not change.

    They are the blocks before that of the hook; for the output of a block, that block too.
    """
    layer, site = parse(name)
    return tuple(hook_name(i, "resid_post") for i in range(layer + (site == "resid_post")))


@contextlib.contextmanager
def replay(model: nn.Module, outputs: Mapping[str, Acts]) -> Iterator[None]:
    """Have blocks return given outputs instead of running, in every forward pass within the context.

    This saves their work where a pass over the same tokens has been captured, and an edit changes only what comes after
    them (`blocks_before`). Hooks on these blocks see the given outputs, as those of `edit` do; those within them do not
    fire. A cache of keys is not filled by blocks that do not run.

    Args:
      model: a nanochat, possibly wrapped or compiled.
      outputs: outputs of blocks, (B, T, C), by hook name, `blocks.{L}.hook_resid_post`.

    Raises:
      ValueError: the model does not have a hook, or it is not the output of a block.
    """
    if other := [name for name in outputs if parse(name)[1] != "resid_post"]:
        raise ValueError(f"{other[0]} is not the output of a block: only blocks.{{L}}.hook_resid_post are replayed")
    blocks = {name: find(model, name) for name in outputs}
    before = {name: vars(block).get("forward") for name, block in blocks.items()}
    try:
        for name, block in blocks.items():
            block.forward = functools.partial(_given, outputs[name])
        yield
    finally:
        for name, block in blocks.items():
            if before[name] is None:
                vars(block).pop("forward", None)
            else:
                block.forward = before[name]


def _given(output: Acts, *args: object, **kwargs: object) -> Acts:
    """Return the output that a block is given in place of what it would compute from its arguments."""
    return output


def watch(model: nn.Module, before: Callable[[tuple, dict[str, Any]], None]) -> AbstractContextManager[None]:
    """Call `before` with the arguments (args, kwargs) of every forward pass within the context, before it runs."""
    return open_context(model, Context({}, before))


class _HookContext:
    """A context in which every forward pass calls hooks with the activations of their names.

    If a hook returns a tensor, it replaces the activation.
    """

    def __init__(self, model: nn.Module, hooks: Mapping[str, Callable[[Acts], Acts | None]]):
        self._hooks = [(find(model, name), name, hook) for name, hook in hooks.items()]
        self._context = Context({name: depth(name) for name in hooks})
        self._opened = open_context(model, self._context)
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> None:
        self._opened.__enter__()
        self._handles = [_attach(module, name, self._context, hook) for module, name, hook in self._hooks]

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._opened.__exit__(*exception)


def _attach(module: nn.Module, name: str, context: Context, hook: Callable[[Acts], Acts | None]) -> RemovableHandle:
    def call(called: nn.Module, h: Acts) -> Acts | None:
        # Code compiled within the context, and copies of the model made there, keep the hook after it.
        if not context.open or called is not module:
            return None
        context.reached.add(name)
        return hook(h)

    return register(module, name, call)


def register(module: nn.Module, name: str, call: Callable[[nn.Module, Acts], Acts | None]) -> RemovableHandle:
    """Have a function called with the module and the activation whenever the module of a hook (see `find`) runs.

    A tensor that it returns replaces the activation. Compiled code calls it only if it was compiled afterwards.
    """
    if parse(name)[1] == "mlp_in":
        return module.register_forward_pre_hook(lambda called, inputs: call(called, inputs[0]))
    return module.register_forward_hook(lambda called, inputs, output: call(called, output))


def _blocks(model: nn.Module) -> nn.ModuleList | nn.Sequential:
    """Return the blocks of a nanochat, possibly wrapped."""
    inner = unwrapped(model)
    blocks = getattr(getattr(inner, "transformer", None), "h", None)
    if not isinstance(blocks, nn.ModuleList | nn.Sequential):
        raise ValueError(f"a {type(inner).__name__} has no transformer.h[i]: hooks need a nanochat")
    return blocks
