"""Sizes, activations and settings of the training steps that are measured, and a step as a case for timing.

A size is written `d_in:d_sae:k:batch`. Activations are normal numbers from a fixed key: all latents fire equally often,
so none dies and a sparse step touches all rows of the weights.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from jsae.config import TrainConfig

if TYPE_CHECKING:
    import jax

    from jsae.architectures import SAEConfig
    from jsae.loop import Member, States
    from jsae.ops import Ops

Dtype = Literal["float32", "bfloat16"]
DTYPE_HELP = "Type of the factors of matrix products; bfloat16 is for GPUs."
SIZE = "768:6144:32:2048"
LARGE = "768:24576:32:2048"
SIZES_HELP = "Sizes to measure, each written d_in:d_sae:k:batch."

_BATCHES = 4
_FAINT = 1e-3
_STEPS = 1_000_000  # length of the run that the measured steps belong to: schedules hardly move during a measurement


class Size(NamedTuple):
    """Widths, active latents and activations of a training step; written as its flag."""

    d_in: int
    d_sae: int
    k: int
    batch: int

    @classmethod
    def parse(cls, text: str) -> Size:
        """Return the size that `d_in:d_sae:k:batch` says.

        Raises:
          ValueError: the text is not four positive numbers, or k is larger than d_sae.
        """
        parts = text.split(":")
        if len(parts) != 4 or not all(p.isascii() and p.isdigit() and int(p) for p in parts):
            raise ValueError(f"sizes are d_in:d_sae:k:batch, four positive numbers such as {SIZE}, got {text!r}")
        size = cls(*map(int, parts))
        if size.k > size.d_sae:
            raise ValueError(f"sizes: k={size.k} is larger than d_sae={size.d_sae} in {text!r}: give a smaller k")
        return size

    def __str__(self) -> str:
        return ":".join(map(str, self))

    @property
    def nested_widths(self) -> tuple[int, ...]:
        """Matryoshka's inner widths: a sixteenth and a quarter of the latents."""
        return tuple(sorted({max(self.d_sae // 16, 1), max(self.d_sae // 4, 2)}))


def known_architectures() -> tuple[str, ...]:
    """Return the names of all architectures."""
    from jsae.architectures import ARCHITECTURES

    return tuple(ARCHITECTURES)


def check(sizes: Sequence[str], architectures: Sequence[str], known: Sequence[str]) -> None:
    """Check the sizes and architectures of a measurement.

    Raises:
      ValueError: an invalid size, an unknown architecture, or none at all.
    """
    if not sizes:
        raise ValueError(f"sizes must name at least one, such as {SIZE}")
    for text in sizes:
        Size.parse(text)
    if not architectures or not set(architectures) <= set(known):
        raise ValueError(f"architectures must be some of {', '.join(known)}, got {', '.join(architectures) or 'none'}")


def sae_config(architecture: str, size: Size) -> SAEConfig:
    """Return the config of an SAE of that size, with the defaults of training."""
    from jsae.architectures import find

    config = find(architecture).Config
    given: dict[str, Any] = {"k": min(size.k, size.d_sae), "nested_widths": size.nested_widths}
    own = {field.name: given[field.name] for field in dataclasses.fields(config) if field.name in given}
    return config(size.d_in, size.d_sae, **own)


def train_config(size: Size, matmul_dtype: Dtype = "float32") -> TrainConfig:
    """Return the config of a run that is far longer than the measurement, and in which no latent dies."""
    return TrainConfig(size.batch * _STEPS, size.batch, dead_after=2**30, matmul_dtype=matmul_dtype)


def activations(size: Size, seed: int = 0) -> jax.Array:
    """Return a batch, (batch, d_in) float32."""
    import jax

    return jax.random.normal(jax.random.key(seed), (size.batch, size.d_in))


def batches(size: Size) -> list[jax.Array]:
    """Return the batches that steps take in turn, (batch, d_in) float32 each."""
    return [activations(size, seed) for seed in range(_BATCHES)]


def member(architecture: str, size: Size, matmul_dtype: Dtype = "float32") -> Member:
    """Return a run's only member."""
    from jsae.loop import Member

    return Member(sae_config(architecture, size), train_config(size, matmul_dtype))


def begin(member: Member, sample: jax.Array, dead: float = 0.0, ops: Ops | None = None) -> States:
    """Return the state before the first step; for sparse architectures with that fraction of latents dead for good."""
    from jsae import loop

    (state,) = loop.init([member], (sample,), ops)
    count = round(dead * member.sae.d_sae)
    if not count or not state.sae.sparse:
        return (state,)
    # Latents with tiny encoder rows are never selected, and AuxK revives them only slowly.
    state.sae.W_enc[...] = state.sae.W_enc.at[:count].multiply(_FAINT)
    return (state._replace(since_fired=state.since_fired.at[:count].set(member.train.dead_window)),)


def program(member: Member, ops: Ops | None = None) -> Callable[..., Any]:
    """Return the compiled step that `experiments.train` runs: (states, batch) -> (states, sums)."""
    from jsae import loop

    return loop.Programs([member], ops).at(member.train.num_steps)


def stepping(
    architecture: str,
    size: Size,
    dead: float = 0.0,
    warmup_steps: int = 0,
    matmul_dtype: Dtype = "float32",
    ops: Ops | None = None,
    queued: int = 1,
) -> Callable[[], None]:
    """Return a case that takes `queued` training steps and then waits for them, after some warm-up."""
    import jax

    only, inputs = member(architecture, size, matmul_dtype), batches(size)
    endless, current, step = itertools.cycle(inputs), [begin(only, inputs[0], dead, ops)], program(only, ops)

    def run() -> None:
        for _ in range(queued):
            current[0], _ = step(current[0], (next(endless),))
        jax.block_until_ready(current[0])

    for _ in range(warmup_steps):
        run()
    return run


def encoder_matmul(size: Size, matmul_dtype: Dtype = "float32") -> Callable[[], None]:
    """Return a case that multiplies a batch with the encoder and waits: every step is compared with it."""
    import jax
    import jax.numpy as jnp

    x = activations(size)
    W_enc = jax.random.normal(jax.random.key(1), (size.d_sae, size.d_in))

    def product(x: jax.Array, W: jax.Array) -> jax.Array:
        return jnp.matmul(x.astype(matmul_dtype), W.T.astype(matmul_dtype), preferred_element_type=jnp.float32)

    program = jax.jit(product)

    def run() -> None:
        jax.block_until_ready(program(x, W_enc))

    return run


def device_name(device: str) -> dict[str, str]:
    """Return jax's name of its GPU under "device", as in `timing.machine`, which asks torch; {} on a CPU."""
    import jax

    return {} if device == "cpu" else {"device": jax.devices()[0].device_kind}
