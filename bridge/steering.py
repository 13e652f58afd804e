"""Steering: requests, the update formula of each mode, and the positions that are steered.

Names and formulas of the first three modes are Neuronpedia's; the others use the SAE's own activation.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int

from bridge import ranges
from bridge.hooks import Acts, Edit
from bridge.torch_sae import RANKED, TorchSAE

POSITIONS = ("all", "prompt", "generated", "not_special")


@dataclasses.dataclass(frozen=True)
class Steer:
    """A request to steer one feature at one hook.

    With h the activation of a token, d the feature's decoder row, d^ = d / |d|, a(h) the feature's activation in the
    SAE, and c the strength:

        additive        h + c d                             SIMPLE_ADDITIVE; 0 changes nothing
        orthogonal      h + (c - 1) (h . d^) d^             ORTHOGONAL_DECOMP; 1 changes nothing, 0 removes d^
        projection_cap  h + (min(h . d^, c) - h . d^) d^    PROJECTION_CAP
        clamp           h + (c - a(h)) d                    the activation becomes c
        scale           h + (c - 1) a(h) d                  the activation is multiplied by c; 1 changes nothing
        ablate          scale with c = 0, independent of the strength

    In the first three modes c is strength_multiplier * strength. All modes add to h, so the SAE's error is kept.
    Strengths are in units of the feature's activation with unit decoder rows: like Neuronpedia, rows of other norms are
    normalised first, except for TopK, and for AbsTopK, whose activations may be negative.

    Args:
      hook: hook name.
      feature: index of the feature in the SAE of the hook.
      mode: one of MODES.
      strength: see above.
      positions: the tokens to steer: "all" (Neuronpedia's default), "prompt", "generated", or "not_special", which
        leaves out BOS and the markers of a chat (Neuronpedia's steer_special_tokens=false).

    Raises:
      ValueError: an unknown mode or position, a negative feature, or a strength that is not finite. The range of c
        (`bridge.ranges`) is checked when the request is applied, because it depends on the multiplier.
    """

    hook: str
    feature: int
    mode: str = "additive"
    strength: float | int = 0.0
    positions: str = "all"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"no steering mode {self.mode!r}: choose one of {', '.join(MODES)}")
        if self.positions not in POSITIONS:
            raise ValueError(f"no positions {self.positions!r}: choose one of {', '.join(POSITIONS)}")
        if isinstance(self.feature, bool) or not isinstance(self.feature, int) or self.feature < 0:
            raise ValueError(f"feature {ranges.shown(self.feature)}: features are numbered from 0")
        if not ranges.is_finite(self.strength):
            strength = ranges.shown(self.strength)
            raise ValueError(f"the strength of feature {self.feature} is {strength}: it must be a finite number")

    def c(self, strength_multiplier: float | int = 1.0) -> float:
        """Return c in the formula of the mode."""
        if self.mode == "ablate":
            return 0.0
        return float(self.strength) * (float(strength_multiplier) if self.mode in ranges.MULTIPLIED else 1.0)


@dataclasses.dataclass(frozen=True)
class Feature:
    """A feature for steering: `direction` is its decoder row d, `activation` maps h, (B, T, C), to a(h), (B, T)."""

    direction: Float[torch.Tensor, " C"]
    activation: Callable[[Acts], Float[torch.Tensor, "B T"]]

    @property
    def unit(self) -> Float[torch.Tensor, " C"]:
        """The direction with norm 1."""
        return self.direction / self.direction.norm()


def feature(sae: TorchSAE, index: int) -> Feature:
    """Return a feature of an SAE, in the units of `Steer`.

    Raises:
      ValueError: the SAE has no such feature, or its decoder row is zero or not finite.
    """
    if not 0 <= index < sae.d_sae:
        raise ValueError(f"no feature {index}: this SAE has features 0 to {sae.d_sae - 1}")
    row = sae.W_dec[index].float()
    norm = row.norm()
    if not 0 < norm < math.inf:
        raise ValueError(f"the decoder row of feature {index} has norm {norm:g}, so it is not a direction to steer in")
    if sae.architecture in RANKED:
        return Feature(row, _ranked_activation(sae, index))
    # Each latent of these has its own threshold, so one column of the encoder is enough.
    column = slice(index, index + 1)
    weights = {n: w[column] for n, w in sae.named_parameters() if n not in ("W_enc", "W_dec", "b_dec")}
    alone = TorchSAE(sae.cfg | {"d_sae": 1}, weights | {"W_enc": sae.W_enc[:, column], "b_dec": sae.b_dec})
    return Feature(row / norm, lambda h: alone.encode(h)[..., 0] * norm)


def _ranked_activation(sae: TorchSAE, index: int) -> Callable[[Acts], Float[torch.Tensor, "B T"]]:
    """Return a(h) of a TopK or AbsTopK SAE, whose latents are active only among the k largest of all."""

    def activation(h: Acts) -> Float[torch.Tensor, "B T"]:
        values, indices = sae.encode_sparse(h)
        return (values * (indices == index)).sum(-1)

    return activation


# ---- formulas: functions of a feature and c that return an edit ---------------------------------------------------


def additive(feature: Feature, c: float, dtype: torch.dtype = torch.float32) -> Edit:
    """Return h + c d. The shift is computed once, in the dtype of the activations."""
    shift = (c * feature.direction).to(dtype)
    return lambda h: h + shift


def orthogonal(feature: Feature, c: float, dtype: torch.dtype = torch.float32) -> Edit:
    """Multiply the component of h along d^ by c: h + (c - 1) (h . d^) d^."""
    unit = feature.unit
    return lambda h: h + _along(unit, (c - 1) * (h.float() @ unit), dtype)


def projection_cap(feature: Feature, c: float, dtype: torch.dtype = torch.float32) -> Edit:
    """Limit the component of h along d^ to c: h + (min(h . d^, c) - h . d^) d^."""
    unit = feature.unit
    return lambda h: h + _along(unit, (c - h.float() @ unit).clamp(max=0), dtype)


def clamp(feature: Feature, c: float, dtype: torch.dtype = torch.float32) -> Edit:
    """Set the activation to c: h + (c - a(h)) d."""
    return lambda h: h + _along(feature.direction, c - feature.activation(h), dtype)


def scale(feature: Feature, c: float, dtype: torch.dtype = torch.float32) -> Edit:
    """Multiply the activation by c: h + (c - 1) a(h) d."""
    return lambda h: h + _along(feature.direction, (c - 1) * feature.activation(h), dtype)


def _along(direction: Float[torch.Tensor, " C"], lengths: Float[torch.Tensor, "B T"], dtype: torch.dtype) -> Acts:
    return (lengths[..., None] * direction).to(dtype)


_FORMULAS: Mapping[str, Callable[..., Edit]] = {
    "additive": additive,
    "orthogonal": orthogonal,
    "projection_cap": projection_cap,
    "clamp": clamp,
    "scale": scale,
    "ablate": scale,
}
MODES = tuple(_FORMULAS)
LENGTHS = ("additive", "projection_cap", "clamp")
"""Modes whose c is a length along d; in the others it is a factor."""


def steering_edit(sae: TorchSAE, steer: Steer, strength_multiplier: float | int, dtype: torch.dtype) -> Edit:
    """Return the edit of a request, a function of activations (B, T, C), at all positions.

    Args:
      sae: the SAE of the hook.
      steer: the request.
      strength_multiplier: see `Steer`.
      dtype: dtype of the activations.

    Raises:
      ValueError: the SAE has no such feature, the multiplier is not finite, or c is out of the range of the mode.
    """
    if not ranges.is_finite(strength_multiplier):
        raise ValueError(f"strength_multiplier is {ranges.shown(strength_multiplier)}: it must be a finite number")
    _check_c(steer, strength_multiplier)
    try:
        target = feature(sae, steer.feature)
    except ValueError as error:
        raise ValueError(f"{steer.hook}: {error}") from error
    return _FORMULAS[steer.mode](target, steer.c(strength_multiplier), dtype)


def _check_c(steer: Steer, strength_multiplier: float | int) -> None:
    """Raise ValueError unless the c of a request is in the range of its mode."""
    ranges.check_strength(steer.mode, steer.strength, f"the strength of feature {steer.feature}")
    if steer.mode in ranges.MULTIPLIED:
        name = f"the strength of feature {steer.feature} times strength_multiplier"
        ranges.check_strength(steer.mode, steer.c(strength_multiplier), name)


# ---- positions -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class PassInput:
    """The input of the current forward pass: `tokens`, (B, T), beginning at position `start` of the text."""

    tokens: Int[torch.Tensor, "B T"] | None = None
    start: int = 0


def mask(
    positions: str, pass_input: PassInput, prompt_length: int | None, special: Int[torch.Tensor, " n"] | None
) -> Bool[torch.Tensor, "B T"] | bool:
    """Return the mask of the tokens to steer in the current forward pass; True for all, False for none.

    Args:
      positions: one of POSITIONS.
      pass_input: the input of the forward pass.
      prompt_length: number of tokens of the prompt; required for "prompt" and "generated".
      special: ids of special tokens; required for "not_special".
    """
    tokens: Any = pass_input.tokens
    if positions == "all":
        return True
    if positions == "not_special":
        return ~(tokens[..., None] == special).any(-1)  # torch.isin may wait for a GPU
    prompt_tokens = min(max(prompt_length - pass_input.start, 0), tokens.shape[1])
    if prompt_tokens in (0, tokens.shape[1]):
        return (prompt_tokens > 0) == (positions == "prompt")
    indices = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    return indices < prompt_tokens if positions == "prompt" else indices >= prompt_tokens


def masked(edit: Edit, current_mask: Callable[[], Bool[torch.Tensor, "B T"] | bool]) -> Edit:
    """Return an edit that applies only at the positions of `current_mask()`; the others are unchanged bit for bit."""

    def masked_edit(h: Acts) -> Acts:
        selected = current_mask()
        if isinstance(selected, bool):
            return edit(h) if selected else h
        return torch.where(selected[..., None], edit(h), h)

    return masked_edit
