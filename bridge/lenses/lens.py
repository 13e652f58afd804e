"""Lenses: what the residual stream after a layer says about the next token.

A lens maps the output of a block to an estimate of the final residual stream, which the model's own end (norm, lm_head,
softcap) turns into logits. At the last layer the output of G7 is the logits only after the backout; see `tables`.
"""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bridge.lenses.paths import DirectPath, direct_paths
from bridge.lenses.streams import Stream, Streams

LogitTensor = Float[Tensor, "*n V"]


@runtime_checkable
class Lens(Protocol):
    """A lens on a model."""

    @property
    def name(self) -> str:
        """A word for tables."""

    @property
    def layers(self) -> Sequence[int]:
        """The layers that it reads, in order."""

    def stream(self, streams: Streams, layer: int) -> Stream:
        """Return the estimate of the final residual stream from the output of a layer, (B, T, C)."""


class LogitLens:
    """Reads a layer's output as if it were the final stream: sign(c_l) h_l (nostalgebraist 2020, "interpreting GPT").

    c_l is the factor of the direct path (`paths`). If it is below 0, the final layer sees the layer's output with the
    opposite sign, so its sign is applied; its magnitude cancels in the norm.
    """

    name = "logit"

    def __init__(self, model: nn.Module):
        self._signs = [path.sign for path in direct_paths(model)]
        self.layers = range(len(self._signs))

    def stream(self, streams: Streams, layer: int) -> Stream:
        """Return sign(c_l) h_l, (B, T, C)."""
        h = streams.blocks[layer]
        return h if self._signs[layer] > 0 else -h


class DirectLens:
    """Reads the exact direct path: the final stream that the model would have if no later block wrote anything.

    c_l h_l + d_l x0 + e_l h_m + g_l bigram (see `paths`); at the last layer these are the model's own logits. In
    nanochats that mix x0 into every layer, early outputs lack most of what is in the final stream, and this lens adds
    it.
    """

    name = "direct"

    def __init__(self, model: nn.Module):
        self.paths: list[DirectPath] = direct_paths(model)
        self.layers = range(len(self.paths))

    def stream(self, streams: Streams, layer: int) -> Stream:
        """Return the final stream without later writes, (B, T, C)."""
        return streams.direct(self.paths[layer], layer)


class _Fitted(abc.ABC):
    """A lens with a matrix for each of some layers. Abstract."""

    matrices: Mapping[int, Float[Tensor, "C C"]]

    @property
    def layers(self) -> Sequence[int]:
        """The layers that it has a matrix of, in order."""
        return sorted(self.matrices)

    @property
    def width(self) -> int:
        """The width of the model."""
        return len(next(iter(self.matrices.values())))


@dataclasses.dataclass(frozen=True)
class JacobianLens(_Fitted):
    """Reads J_l h_l, where J_l is the mean derivative of the final stream with respect to a layer's output.

    J_l = E_prompts E_{valid p} sum over valid p' >= p of dy[p'] / dh_l[p]; see `bridge.lenses.jacobian`. x0 does not
    depend on h_l, so the lens lacks what x0 adds on the way.

    Attributes:
      matrices: by layer, J_l, (C, C), from the layer's output to the final stream.
      n_prompts: number of prompts of the mean.
      provenance: where the lens comes from, as its file says (`bridge.lenses.lens_file`).
    """

    matrices: Mapping[int, Float[Tensor, "C C"]]
    n_prompts: int
    provenance: Mapping[str, object] = dataclasses.field(default_factory=dict)

    name = "jacobian"

    def stream(self, streams: Streams, layer: int) -> Stream:
        """Return J_l h_l, (B, T, C), in the precision of the lens."""
        matrix = self.matrices[layer]
        return streams.blocks[layer].to(matrix.dtype) @ matrix.T

    def to(self, device: torch.device | str) -> "JacobianLens":
        """Return the lens on a device."""
        return dataclasses.replace(self, matrices={i: matrix.to(device) for i, matrix in self.matrices.items()})


@dataclasses.dataclass(frozen=True)
class TunedLens(_Fitted):
    """Reads s h_l + A_l h_l + b_l, a translation that is fitted to the model's output (Belrose et al. 2023).

    s is the sign of the logit lens, so a lens of zeros is the logit lens.

    Attributes:
      signs: by layer, s.
      matrices: by layer, A_l, (C, C).
      biases: by layer, b_l, (C,).
      provenance: where the lens comes from, as its file says.
    """

    signs: Mapping[int, float]
    matrices: Mapping[int, Float[Tensor, "C C"]]
    biases: Mapping[int, Float[Tensor, " C"]]
    provenance: Mapping[str, object] = dataclasses.field(default_factory=dict)

    name = "tuned"

    def stream(self, streams: Streams, layer: int) -> Stream:
        """Return s h_l + A_l h_l + b_l, (B, T, C), in the precision of the lens."""
        matrix = self.matrices[layer]
        h = streams.blocks[layer].to(matrix.dtype)
        return self.signs[layer] * h + (h @ matrix.T + self.biases[layer])

    def to(self, device: torch.device | str) -> "TunedLens":
        """Return the lens on a device."""
        matrices, biases = ({i: x.to(device) for i, x in part.items()} for part in (self.matrices, self.biases))
        return dataclasses.replace(self, matrices=matrices, biases=biases)


FittedLens = JacobianLens | TunedLens


def check_fits(lens: FittedLens, model: nn.Module, fingerprint: str | None = None) -> None:
    """Check that a fitted lens belongs to a model.

    Args:
      lens: the lens.
      model: a nanochat.
      fingerprint: that of the model's weights; None: do not compare.

    Raises:
      ValueError: it has another width, layers that the model lacks, or was fitted on other weights.
    """
    depth, width = len(direct_paths(model)), model.lm_head.in_features
    if lens.width != width or max(lens.layers) >= depth:
        raise ValueError(
            f"the {lens.name} lens has width {lens.width} and layers {lens.layers[0]} to {lens.layers[-1]}; the model "
            f"has width {width} and layers 0 to {depth - 1}: give a lens that was fitted on this model"
        )
    fitted_on = lens.provenance.get("model_fingerprint")
    if fingerprint is not None and isinstance(fitted_on, str) and fitted_on != fingerprint:
        raise ValueError(
            f"the {lens.name} lens was fitted on a model with the weights {fitted_on[:12]!r}, not on this one, "
            f"{fingerprint[:12]!r}: fit it on this model"
        )
