"""Inputs and results of a forward pass of an SAE."""

from typing import Any, NamedTuple

from jaxtyping import Array, Bool, Float, Int

from jsae.ops import Latents, Ops, Reference


class Context(NamedTuple):
    """Arguments of a forward pass other than its input. The defaults are those of inference."""

    ops: Ops = Reference()
    training: bool = False
    """Whether batch-wide selection is used, where training and inference differ."""
    strength: Float[Array, ""] | float = 1.0
    """Factor on sparsity penalties: their warm-up, and the controller's where L0 has a target."""
    dead: Bool[Array, " f"] | None = None
    """Which latents are dead; None where it is known that none is."""
    step: Int[Array, ""] | int = 0
    """Number of the training step."""
    room: int | None = None
    """Codes per token that are selected, while k comes down from a larger one; None is k."""
    limit: Int[Array, ""] | None = None
    """How many of the `room` codes count."""
    scale: Float[Array, "*d"] | None = None
    """Factor on the activations as they are read; None where they are scaled already."""


class Forward(NamedTuple):
    """One forward pass in training, as a penalty sees it."""

    x: Float[Array, "n d"]
    y: Float[Array, "n o"]
    """The target: x, or a transcoder's target."""
    error: Float[Array, "n o"]
    """y_hat - y."""
    latents: Latents
    extra: Any
    """The second value of `activate`."""
    context: Context
