"""Reading and changing activations in a running nanochat: context managers that leave no trace.

Hook names are TransformerLens's: `blocks.{L}.hook_resid_post` is the output of block L, `blocks.{L}.hook_attn_out` and
`blocks.{L}.hook_mlp_out` what its two halves add to the residual stream, `blocks.{L}.ln2.hook_normalized` what its MLP
reads. They are found on any module with `transformer.h[L].attn` and `.mlp`: this project's model, and upstream's `GPT`.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import nn
from torch.utils.hooks import RemovableHandle

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


class _Stop(Exception):  # noqa: N818 - control flow, not an error
    """Ends a forward pass after the last captured activation."""


def hook_name(layer: int, site: str) -> str:
    """The hook name of a layer and a short site name: `hook_name(3, "mlp")` is `blocks.3.hook_mlp_out`.

    Raises:
      ValueError: a site that does not exist.
    """
    if site not in SITES:
        raise ValueError(f"no hook type {site!r}: choose one of {', '.join(SITES)}")
    return f"blocks.{layer}.{SITES[site]}"


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
      ValueError: no such name, a layer that the model does not have, or no nanochat.
    """
    layer, site = parse(name)
    blocks = _blocks(model)
    if layer >= len(blocks):
        raise ValueError(f"{name}: the model has {len(blocks)} layers, 0 to {len(blocks) - 1}")
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


@contextlib.contextmanager
def capture(model: nn.Module, names: Sequence[str], stop: bool = False) -> Iterator[dict[str, Acts]]:
    """Within the context, every forward pass leaves the activations of `names` in the dict that is yielded.

    Each is the tensor itself, (B, T, C), with its gradient history if there is one. With `stop` the forward pass ends
    after the deepest of them and the model returns None.

    Raises:
      ValueError: a name that the model does not have, or no name at all.
    """
    if not names:
        raise ValueError("capture of no activations: give at least one hook name")
    for name in names:
        find(model, name)
    deepest = max(names, key=depth)
    acts: dict[str, Acts] = {}

    def keep(name: str) -> Callable[[Acts], None]:
        def hook(found: Acts) -> None:
            acts[name] = found
            if stop and name == deepest:
                raise _Stop

        return hook

    with contextlib.ExitStack() as stack:
        for name in dict.fromkeys(names):
            stack.callback(_attach(model, name, keep(name)).remove)
        if stop:
            stack.enter_context(_quiet(model))
        yield acts


@contextlib.contextmanager
def edit(model: nn.Module, edits: Mapping[str, Edit]) -> Iterator[None]:
    """Within the context, the activations of each name are replaced by what its function returns for them.

    Functions get and return (B, T, C); several names act together, and contexts may be nested: the inner one sees
    what the outer one made.

    Raises:
      ValueError: a name that the model does not have; in the forward pass, a function that returns another shape.
    """
    for name in edits:
        find(model, name)

    def change(name: str) -> Callable[[Acts], Acts]:
        def hook(found: Acts) -> Acts:
            new = edits[name](found)
            if new.shape != found.shape:
                raise ValueError(f"the edit of {name} made {tuple(new.shape)} of {tuple(found.shape)}")
            return new.to(found.dtype)

        return hook

    with contextlib.ExitStack() as stack:
        for name in edits:
            stack.callback(_attach(model, name, change(name)).remove)
        yield


def _attach(model: nn.Module, name: str, hook: Callable[[Acts], Acts | None]) -> RemovableHandle:
    """Has every forward pass call the hook with the activations of a name; what it returns takes their place."""
    module = find(model, name)
    if parse(name)[1] == "mlp_in":
        return module.register_forward_pre_hook(lambda module, inputs: hook(inputs[0]))
    return module.register_forward_hook(lambda module, inputs, output: hook(output))


@contextlib.contextmanager
def _quiet(model: nn.Module) -> Iterator[None]:
    """Within the context, a forward pass that was stopped returns None."""
    forward = model.forward

    def stoppable(*args: object, **kwargs: object) -> object:
        try:
            return forward(*args, **kwargs)
        except _Stop:
            return None

    had_own = "forward" in vars(model)
    model.forward = stoppable
    try:
        yield
    finally:
        if had_own:
            model.forward = forward
        else:
            del model.forward


def _blocks(model: nn.Module) -> nn.ModuleList:
    """The blocks of a nanochat, compiled or not."""
    inner = getattr(model, "_orig_mod", model)
    try:
        return inner.transformer.h
    except AttributeError:
        raise ValueError(f"a {type(model).__name__} has no transformer.h[i]: hooks need a nanochat") from None
