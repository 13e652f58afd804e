"""Memory that jax is predicted to need on a GPU for the SAEs of a run and their steps.

The arrays are counted: what a step reads, writes and holds in between. Factors that stand for several arrays of one
shape were fitted to the peaks of jax's allocator (`tests/gpu/test_gpu_memory.py` holds them to a fifth).
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jsae.loop import Member
    from jsae.ops import MatmulDtype, Ops

SAMPLE = 65_536
"""Activations, about, that SAEs are initialised from."""
_FLOAT = 4
_PAIR = 24
"""Bytes of a code and its gradient: value and latent, each sorted by latent too."""
_BATCHES = 1.5
"""Arrays of the input and target of a part of a batch in float32 that a step holds: errors and rounded copies."""
_SPARSE_WEIGHTS, _DENSE_WEIGHTS = 1.35, 1.0
"""Weights of one SAE that a step holds beside them: gradients, rounded ones. This and `_BATCHES` are fitted to what
steps need on an H200: TopK 1.79 GiB with 20,480 latents and 6.66 with 131,072, ReLU 2.37, Gated 2.83."""
_AUXK = 2
"""Arrays in float32 of the latents that AuxK revives."""
_DENSE = 4
"""Arrays in float32 that a step holds of the latents of a part in a dense architecture without kernels."""
_XLA_DENSE, _XLA_AT_ONCE = 4, 10
"""Arrays of all pre-activations, and of the rows of all codes, that a sparse step without kernels holds."""
_LIBRARIES = 2**26  # workspaces of products


@dataclass(frozen=True)
class Need:
    """Bytes that jax needs for the steps of a run."""

    state: int
    """Weights, moments and averages of all SAEs."""
    saved: int
    """The copy of them that a checkpoint is written from."""
    gradients: int
    """Gradients and other copies of the weights of the largest SAE, while it takes its step."""
    batch: int
    """Batches of all sites, and what a step makes of its own."""
    latents: int
    """Pre-activations and codes of the SAE that has most."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.state + self.saved + self.gradients + self.batch + self.latents + _LIBRARIES


def of_steps(
    members: Sequence[Member], ops: Ops | None = None, *, saving: bool = True, mesh: tuple[int, int] = (1, 1)
) -> Need:
    """Return what the steps of some SAEs need on a GPU.

    Args:
      members: the SAEs.
      ops: the implementation; None is the one for jax's default device.
      saving: whether checkpoints are written.
      mesh: GPUs that divide the batch, and that divide the latents.
    """
    data, shards = mesh
    weights = [_weights(member) // shards for member in members]
    state = sum(w * (3 + (m.train.average_fraction is not None)) for w, m in zip(weights, members, strict=True))
    sites = {member.site: _row(member) for member in members}
    rows = members[0].train.batch_size // data
    return Need(
        state=state,
        saved=state if saving else 0,
        gradients=max(
            round(w * (_SPARSE_WEIGHTS if member.sae.sae.sparse else _DENSE_WEIGHTS))
            for w, member in zip(weights, members, strict=True)
        ),
        batch=rows * sum(sites.values())
        + max(round(_BATCHES * _part(member, ops or member.ops, mesh) * _row(member)) for member in members),
        latents=max(_latents(member, ops or member.ops, mesh) for member in members),
    )


def of_first_block(members: Sequence[Member], block_size: int, shards: int = 1) -> int:
    """Return the bytes of the arrays that the first SAE is initialised from, while all others exist.

    Args:
      members: the SAEs.
      block_size: activations of a block.
      shards: GPUs that divide the latents.
    """
    widths = [member.sae.d_in + (member.sae.d_out or 0) for member in members]
    return sum(3 * _weights(member) // shards for member in members) + _FLOAT * block_size * max(widths)


def kernels_are_likely() -> bool:
    """Return whether jax will run Triton kernels on torch's GPU, as far as can be told before jax starts."""
    import torch

    installed = all(importlib.util.find_spec(name) is not None for name in ("triton", "jax_triton"))
    return installed and torch.cuda.get_device_capability()[0] >= 8


def likely_ops(matmul_dtype: MatmulDtype, kernels: bool) -> Ops:
    """Return the implementation that a GPU will have, without starting jax."""
    from jsae.ops import IMPLEMENTATIONS

    name = "gpu" if kernels else "xla"
    return dataclasses.replace(IMPLEMENTATIONS[name], matmul_dtype=matmul_dtype)


def _weights(member: Member) -> int:
    """Return the bytes of both weight matrices."""
    return _FLOAT * member.sae.d_sae * (member.sae.d_in + member.sae.width_out)


def _row(member: Member) -> int:
    """Return the bytes of one token's input and target."""
    return _FLOAT * (member.sae.d_in + member.sae.width_out)


def _part(member: Member, ops: Ops, mesh: tuple[int, int]) -> int:
    """Return the number of tokens whose step is taken at once; a batch on several GPUs is not taken in parts."""
    sae, n = member.sae, member.train.batch_size // mesh[0]
    if sae.sae.sparse or mesh != (1, 1):
        return n
    chunk = getattr(ops, "sum_chunk", lambda n, d_in, d_sae, gradients: n)
    return chunk(n, sae.d_in, sae.d_sae, True)


def _latents(member: Member, ops: Ops, mesh: tuple[int, int] = (1, 1)) -> int:
    """Return the bytes of what a step holds of latents at once."""
    from jsae import auxk  # imports jax

    sae, n = member.sae, member.train.batch_size // mesh[0]
    d, f = sae.d_in, sae.d_sae // mesh[1]
    number = 2 if ops.name == "gpu" and ops.matmul_dtype == "bfloat16" else _FLOAT
    if not sae.sae.sparse:
        tokens = _part(member, ops, mesh)
        if ops.name == "gpu" and sae.sae.maps:  # pre-activations and maps, and the gradients of both
            return number * (2 + 2 * sae.sae.maps) * tokens * f
        return _DENSE * _FLOAT * tokens * f
    k = max(sae.k or 1, member.train.k_start or 0)
    pairs = _PAIR * n * k + _AUXK * _FLOAT * n * auxk.room(sae.d_sae)
    if ops.name == "gpu":
        chunk = getattr(ops, "encode_chunk", lambda n, d_in, d_sae: n)
        by_token = sae.sae.form in ("topk", "abstopk")
        return pairs + number * f * (chunk(n, d, f) if by_token else n)
    if getattr(ops, "decoding", None) == "at once":
        return pairs + _XLA_AT_ONCE * _FLOAT * n * k * max(d, sae.width_out)
    return pairs + _XLA_DENSE * _FLOAT * n * f
