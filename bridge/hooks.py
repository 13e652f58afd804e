"""Reading and changing activations in a running nanochat: context managers that leave no trace.

Hook names are TransformerLens's: `blocks.{L}.hook_resid_post` is the output of block L, `blocks.{L}.hook_attn_out` and
`blocks.{L}.hook_mlp_out` what its two halves add to the residual stream, `blocks.{L}.ln2.hook_normalized` what its MLP
reads. They are found on any module with `transformer.h[L].attn` and `.mlp`: this project's model, and upstream's `GPT`.
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

from bridge.passes import Context, Stop, base, opened, require_python

Acts = Float[torch.Tensor, "B T C"]
Edit = Callable[[Acts], Acts]

SITES: Mapping[str, str] = {
    "attn": "hook_attn_out",
    "mlp_in": "ln2.hook_normalized",
    "mlp": "hook_mlp_out",
    "resid_post": "hook_resid_post",
}
"""Short names to hook names, in the order in which a block runs them."""

_NAME = re.compile(r"blocks\.(\d+)\.((?:ln2\.)?hook_\w+)")


_MODULES = {"attn": "attn", "mlp_in": "mlp", "mlp": "mlp"}


def hook_name(layer: int, site: str) -> str:
    """The hook name of a layer and a short site name: `hook_name(3, "mlp")` is `blocks.3.hook_mlp_out`.

    Raises:
      ValueError: a site that does not exist.
    """
    if site not in SITES:
        raise ValueError(f"no hook type {site!r}: choose one of {', '.join(SITES)}")
    return f"blocks.{layer}.{SITES[site]}"


@functools.cache
def parse(name: str) -> tuple[int, str]:
    """The layer and short site name of a hook name.

    Raises:
      ValueError: not a hook name of this project.
    """
    match = _NAME.fullmatch(name)
    site = next((s for s, full in SITES.items() if match and full == match[2]), None)
    if match is None or site is None:
        known = ", ".join(f"blocks.{{L}}.{full}" for full in SITES.values())
        raise ValueError(f"no hook is called {name!r}: names are {known}")
    return int(match[1]), site


def find(model: nn.Module, name: str) -> nn.Module:
    """The module whose output the hook name means; of what an MLP reads, the MLP.

    Raises:
      ValueError: no such name, a layer that the model does not have, no nanochat, or one that does not run in Python.
    """
    layer, site = parse(name)
    blocks = _blocks(model)
    if layer >= len(blocks):
        raise ValueError(f"{name}: the model has {len(blocks)} layers, 0 to {len(blocks) - 1}")
    require_python(blocks[layer])
    return blocks[layer] if site == "resid_post" else getattr(blocks[layer], _MODULES[site])


def module_name(name: str) -> str:
    """Where the module is that `find` gives: `blocks.3.hook_mlp_out` is `transformer.h.3.mlp`.

    Raises:
      ValueError: not a hook name of this project.
    """
    layer, site = parse(name)
    return f"transformer.h.{layer}" if site == "resid_post" else f"transformer.h.{layer}.{_MODULES[site]}"


def depth(name: str) -> tuple[int, int]:
    """Sorts hook names by when they run in a forward pass."""
    layer, site = parse(name)
    return layer, list(SITES).index(site)


class NotCapturedError(ValueError, KeyError):
    """An activation that was looked up was not captured."""

    __str__ = Exception.__str__  # a KeyError would show its message in quotes


class Captured(dict[str, Acts]):
    """The activations of the last forward pass by hook name. Looking up one that did not come by says why."""

    def __init__(self, names: Sequence[str]):
        super().__init__()
        self._names = tuple(names)

    def __missing__(self, name: str) -> Acts:
        if name not in self._names:
            raise NotCapturedError(f"{name} was not captured: {', '.join(self._names)} are")
        raise NotCapturedError(
            f"nothing was captured at {name}: no forward pass of the model ran in Python within the context, or it was "
            "stopped before"
        )


@contextlib.contextmanager
def capture(model: nn.Module, names: Sequence[str], stop: bool = False) -> Iterator[dict[str, Acts]]:
    """Within the context, every forward pass leaves the activations of `names` in the dict that is yielded.

    Each is the tensor itself, (B, T, C), with its gradient history if there is one. With `stop` the forward pass ends
    after the deepest of them and the model returns None. A compiled model runs eagerly within the context.

    Raises:
      ValueError: a name that the model does not have, or no name at all; in the forward pass, a hook that it did not
        reach; when an activation is looked up, one that did not come by.
    """
    if not names:
        raise ValueError("capture of no activations: give at least one hook name")
    deepest = max(names, key=depth)
    acts = Captured(names)

    def keep(name: str) -> Callable[[Acts], None]:
        def hook(found: Acts) -> None:
            acts[name] = found
            if stop and name == deepest:
                raise Stop(depth(name))

        return hook

    with _Hooked(model, {name: keep(name) for name in names}):
        yield acts


@contextlib.contextmanager
def edit(model: nn.Module, edits: Mapping[str, Edit]) -> Iterator[None]:
    """Within the context, the activations of each name are replaced by what its function returns for them.

    Functions get and return (B, T, C); several names act together, and contexts may be nested: the inner one sees
    what the outer one made. A compiled model runs eagerly within the context.

    Raises:
      ValueError: a name that the model does not have; in the forward pass, a function that returns another shape, or a
        hook that the pass did not reach.
    """

    def change(name: str) -> Callable[[Acts], Acts]:
        def hook(found: Acts) -> Acts:
            new = edits[name](found)
            if new.shape != found.shape:
                raise ValueError(f"the edit of {name} made {tuple(new.shape)} of {tuple(found.shape)}")
            return new.to(found.dtype)

        return hook

    with _Hooked(model, {name: change(name) for name in edits}):
        yield


def watch(model: nn.Module, before: Callable[[tuple, dict[str, Any]], None]) -> AbstractContextManager[None]:
    """Within the context, `before` is called with the arguments of every forward pass before it runs."""
    return opened(model, Context({}, before))


class _Hooked:
    """Within the context, every forward pass calls the hooks with the activations of their names.

    What a hook returns takes the activation's place.
    """

    def __init__(self, model: nn.Module, hooks: Mapping[str, Callable[[Acts], Acts | None]]):
        self._hooks = [(find(model, name), name, hook) for name, hook in hooks.items()]
        self._context = Context({name: depth(name) for name in hooks})
        self._opened = opened(model, self._context)
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> None:
        self._opened.__enter__()
        self._handles = [_attach(module, name, self._context, hook) for module, name, hook in self._hooks]

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._opened.__exit__(*exception)


def _attach(module: nn.Module, name: str, context: Context, hook: Callable[[Acts], Acts | None]) -> RemovableHandle:
    def call(called: nn.Module, found: Acts) -> Acts | None:
        # Code that was compiled within the context, and copies of the model that were made there, keep the hook.
        if not context.open or called is not module:
            return None
        context.reached.add(name)
        return hook(found)

    if parse(name)[1] == "mlp_in":
        return module.register_forward_pre_hook(lambda called, inputs: call(called, inputs[0]))
    return module.register_forward_hook(lambda called, inputs, output: call(called, output))


def _blocks(model: nn.Module) -> nn.ModuleList | nn.Sequential:
    """The blocks of a nanochat, whatever is wrapped around it."""
    inner = base(model)
    blocks = getattr(getattr(inner, "transformer", None), "h", None)
    if not isinstance(blocks, nn.ModuleList | nn.Sequential):
        raise ValueError(f"a {type(inner).__name__} has no transformer.h[i]: hooks need a nanochat")
    return blocks
