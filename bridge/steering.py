"""What steering does to an activation: the request, the update formula of every mode, and where it applies.

Names and formulas of the first three modes are Neuronpedia's; the others speak of the SAE's own activation.
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
    """One feature pushed at one hook: its index in the SAE there, a mode, a strength, and the tokens it applies to.

    With h the activation of a token, d the feature's decoder row, d^ = d / |d|, a(h) the feature's activation as the
    whole SAE gives it, and c the strength:

        additive        h + c d                             SIMPLE_ADDITIVE; 0 changes nothing
        orthogonal      h + (c - 1) (h . d^) d^             ORTHOGONAL_DECOMP; 1 changes nothing, 0 removes d^
        projection_cap  h + (min(h . d^, c) - h . d^) d^    PROJECTION_CAP
        clamp           h + (c - a(h)) d                    the activation becomes c
        scale           h + (c - 1) a(h) d                  the activation is multiplied: 1 changes nothing, 2 doubles
        ablate          scale with c = 0, whatever the strength

    In the first three, Neuronpedia's, c is strength_multiplier * strength. All are added to h, so what the SAE does
    not explain stays. Strengths are in units of the feature's activation with unit decoder rows: rows that are not
    unit are folded first as Neuronpedia folds them, except those of a TopK SAE, which it takes as they are; and of
    AbsTopK, whose activations may be negative.

    Positions: "all" (Neuronpedia's default), "prompt", "generated", or "not_special", which leaves out BOS and the
    markers of a chat (Neuronpedia's steer_special_tokens=false).

    Raises:
      ValueError: an unknown mode or position, a negative feature, a strength that is not finite. What is too large for
        its mode is refused when it is applied, since the multiplier counts too; see `bridge.ranges`.
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
            given = ranges.shown(self.strength)
            raise ValueError(f"the strength of feature {self.feature} is {given}: it must be a finite number")

    def c(self, strength_multiplier: float | int = 1.0) -> float:
        """The c of the mode's formula."""
        if self.mode == "ablate":
            return 0.0
        return float(self.strength) * (float(strength_multiplier) if self.mode in ranges.MULTIPLIED else 1.0)


@dataclasses.dataclass(frozen=True)
class Feature:
    """A latent as steering needs it: `direction` is its decoder row d, `activation` maps (B, T, C) to a(h), (B, T)."""

    direction: Float[torch.Tensor, " C"]
    activation: Callable[[Acts], Float[torch.Tensor, "B T"]]

    @property
    def unit(self) -> Float[torch.Tensor, " C"]:
        """The direction at length 1."""
        return self.direction / self.direction.norm()


def feature(sae: TorchSAE, index: int) -> Feature:
    """A latent of an SAE, in the units that `Steer` promises.

    Raises:
      ValueError: the SAE has no such latent, or its decoder row is zero or not finite.
    """
    if not 0 <= index < sae.d_sae:
        raise ValueError(f"no feature {index}: this SAE has features 0 to {sae.d_sae - 1}")
    row = sae.W_dec[index].float()
    norm = row.norm()
    if not 0 < norm < math.inf:
        raise ValueError(f"the decoder row of feature {index} has norm {norm:g}: it gives no direction to steer in")
    if sae.architecture in RANKED:
        return Feature(row, _of_ranked(sae, index))
    # Every latent of these has its own inequality: one column of the encoder answers for one latent.
    column = slice(index, index + 1)
    weights = {n: w[column] for n, w in sae.named_parameters() if n not in ("W_enc", "W_dec", "b_dec")}
    alone = TorchSAE(sae.cfg | {"d_sae": 1}, weights | {"W_enc": sae.W_enc[:, column], "b_dec": sae.b_dec})
    return Feature(row / norm, lambda h: alone.encode(h)[..., 0] * norm)


def _of_ranked(sae: TorchSAE, index: int) -> Callable[[Acts], Float[torch.Tensor, "B T"]]:
    """A latent of a TopK or AbsTopK SAE is on only where it is among the k largest, so all of them must be known."""

    def activation(h: Acts) -> Float[torch.Tensor, "B T"]:
        values, indices = sae.encode_sparse(h)
        return (values * (indices == index)).sum(-1)

    return activation


# ---- the formulas: each makes, of a feature and c, what happens to an activation ----------------------------------


def additive(feature: Feature, c: float, dtype: torch.dtype = torch.float32) -> Edit:
    """Adds c d: the shift is computed once, in the dtype of the activations."""
    shift = (c * feature.direction).to(dtype)
    return lambda h: h + shift


def orthogonal(feature: Feature, c: float, dtype: torch.dtype = torch.float32) -> Edit:
    """Multiplies the part of h along d^ by c: h + (c - 1) (h . d^) d^."""
    unit = feature.unit
    return lambda h: h + _along(unit, (c - 1) * (h.float() @ unit), dtype)


def projection_cap(feature: Feature, c: float, dtype: torch.dtype = torch.float32) -> Edit:
    """Caps the part of h along d^ at c: h + (min(h . d^, c) - h . d^) d^."""
    unit = feature.unit
    return lambda h: h + _along(unit, (c - h.float() @ unit).clamp(max=0), dtype)


def clamp(feature: Feature, c: float, dtype: torch.dtype = torch.float32) -> Edit:
    """Makes the activation c: h + (c - a(h)) d."""
    return lambda h: h + _along(feature.direction, c - feature.activation(h), dtype)


def scale(feature: Feature, c: float, dtype: torch.dtype = torch.float32) -> Edit:
    """Multiplies the activation by c: h + (c - 1) a(h) d."""
    return lambda h: h + _along(feature.direction, (c - 1) * feature.activation(h), dtype)


def _along(direction: Float[torch.Tensor, " C"], by: Float[torch.Tensor, "B T"], dtype: torch.dtype) -> Acts:
    return (by[..., None] * direction).to(dtype)


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
"""The modes whose c is a length along d; in the others it is a factor."""


def edit_of(sae: TorchSAE, steer: Steer, strength_multiplier: float | int, dtype: torch.dtype) -> Edit:
    """Return what a request does to the activations (B, T, C) of its hook, at every position.

    Raises:
      ValueError: a feature that the SAE does not have, a multiplier that is not finite, or a c out of its mode's range.
    """
    if not ranges.is_finite(strength_multiplier):
        given = ranges.shown(strength_multiplier)
        raise ValueError(f"strength_multiplier is {given}: it must be a finite number")
    _check_c(steer, strength_multiplier)
    try:
        chosen = feature(sae, steer.feature)
    except ValueError as error:
        raise ValueError(f"{steer.hook}: {error}") from error
    return _FORMULAS[steer.mode](chosen, steer.c(strength_multiplier), dtype)


def _check_c(steer: Steer, strength_multiplier: float | int) -> None:
    """Raise ValueError unless the c of a request is in the range of its mode."""
    ranges.check_strength(steer.mode, steer.strength, f"the strength of feature {steer.feature}")
    if steer.mode in ranges.MULTIPLIED:
        name = f"the strength of feature {steer.feature} times strength_multiplier"
        ranges.check_strength(steer.mode, steer.c(strength_multiplier), name)


# ---- where ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Reading:
    """What the forward pass at hand reads: `tokens` (B, T), the first of them at position `start` of its text."""

    tokens: Int[torch.Tensor, "B T"] | None = None
    start: int = 0


def mask(
    positions: str, reading: Reading, prompt_length: int | None, special: Int[torch.Tensor, " n"] | None
) -> Bool[torch.Tensor, "B T"] | bool:
    """Which of the tokens being read are steered; True or False where that is all or none of them.

    Args:
      positions: one of POSITIONS.
      reading: the forward pass at hand.
      prompt_length: tokens of the prompt; "prompt" and "generated" ask for it.
      special: ids of special tokens; "not_special" asks for them.
    """
    tokens: Any = reading.tokens
    if positions == "all":
        return True
    if positions == "not_special":
        return ~torch.isin(tokens, special)
    of_prompt = min(max(prompt_length - reading.start, 0), tokens.shape[1])
    if of_prompt in (0, tokens.shape[1]):
        return (of_prompt > 0) == (positions == "prompt")
    at = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    return at < of_prompt if positions == "prompt" else at >= of_prompt


def masked(edit: Edit, where: Callable[[], Bool[torch.Tensor, "B T"] | bool]) -> Edit:
    """The edit at the positions that `where` gives for the forward pass at hand; the others stay bit for bit."""

    def change(h: Acts) -> Acts:
        chosen = where()
        if isinstance(chosen, bool):
            return edit(h) if chosen else h
        return torch.where(chosen[..., None], edit(h), h)

    return change
