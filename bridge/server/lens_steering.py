"""Interventions of Neuronpedia's lens page: add, remove or swap what a token is read from, at chosen layers."""

import dataclasses
import functools
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from bridge.hooks import Acts, Edit, hook_name
from bridge.lenses.lens import JacobianLens
from bridge.server.bodies import Fields, Refusal
from bridge.server.session import Session

_MOST_TOKENS = 16
_STRONGEST = 1e3
_TYPES = ("LOGIT_LENS", "JACOBIAN_LENS")
Direction = Float[Tensor, " C"]


@dataclasses.dataclass(frozen=True)
class Intervention:
    """A change of the outputs of some blocks.

    Attributes:
      source: by layer, the direction: the sum of the unit directions of the tokens.
      target: by layer, that of the token to swap it for; {} without.
      strength: what is added, as a share of the activation's norm; ignored where it is removed or swapped.
      ablates: whether the direction is removed.
      generated: whether new tokens are changed too.
    """

    source: dict[int, Direction]
    target: dict[int, Direction]
    strength: float
    ablates: bool
    generated: bool

    def edits(self, tokens: torch.Tensor, bos: int) -> dict[str, Edit]:
        """Return the edits for a forward pass over token ids, (1, T); BOS is left as it is."""
        spared = (tokens == bos)[..., None]
        return {
            hook_name(layer, "resid_post"): functools.partial(self._changed, layer=layer, spared=spared)
            for layer in self.source
        }

    def _changed(self, h: Acts, layer: int, spared: torch.Tensor) -> Acts:
        x = h.float()
        if self.target:
            changed = swapped(x, self.source[layer], self.target[layer])
        elif self.ablates:
            changed = ablated(x, self.source[layer])
        else:
            changed = steered(x, self.source[layer], self.strength)
        return torch.where(spared, h, changed.to(h.dtype))


def steered(h: Acts, d: Direction, strength: float) -> Acts:
    """Return h + s |h| d; what is added is at most as long as h."""
    norm = h.norm(dim=-1, keepdim=True)
    added = strength * norm * d
    return h + added * (norm / added.norm(dim=-1, keepdim=True).clamp(min=1e-12)).clamp(max=1)


def ablated(h: Acts, d: Direction) -> Acts:
    """Return h without its part along d."""
    unit = _unit(d)
    return h - (h @ unit)[..., None] * unit


def swapped(h: Acts, source: Direction, target: Direction) -> Acts:
    """Return h with its part along one direction turned into another."""
    a, b = _unit(source), _unit(target)
    return h + (h @ a)[..., None] * (b - a)


def intervention(session: Session, fields: Fields) -> Intervention | None:
    """Return what a request changes; None if nothing.

    Raises:
      Refusal: a field is invalid, a token is not of the vocabulary, or there is no Jacobian lens.
    """
    layers = fields.indices("steerLayers", session.nano.config.n_layer)
    tokens = fields.objects("steerTokens", _MOST_TOKENS)
    strength = fields.number("steerStrength", -_STRONGEST, _STRONGEST, 0.0)
    ablates, generated = fields.flag("steerAblate", False), fields.flag("steerGeneratedTokens", False)
    swap = [fields.object("swapToken")] if fields.has("swapToken") else []
    if not tokens or not layers or not (swap or ablates or strength):
        return None
    source = _directions(session, tokens[:1] if swap else tokens, layers)
    return Intervention(source, _directions(session, swap, layers) if swap else {}, strength, ablates, generated)


def _directions(session: Session, tokens: Sequence[Fields], layers: Sequence[int]) -> dict[int, Direction]:
    """Return the sum of the tokens' unit directions by layer: W_U[t], or J_l^T W_U[t]."""
    W_U = session.im.model.lm_head.weight
    chosen = [(_token_id(session, item), item.choice("type", _TYPES)) for item in tokens]
    jacobian = session.lenses.get("jacobian")
    if jacobian is None and any(kind == "JACOBIAN_LENS" for _, kind in chosen):
        raise Refusal(400, "the run has no Jacobian lens to steer with: use the type LOGIT_LENS, or fit one")
    sums = {}
    for layer in layers:
        parts = []
        for token, kind in chosen:
            direction = W_U[token].detach().float()
            if kind == "JACOBIAN_LENS":
                assert isinstance(jacobian, JacobianLens)
                direction = jacobian.matrices[layer].T @ direction if layer in jacobian.layers else direction
            parts.append(_unit(direction))
        sums[layer] = torch.stack(parts).sum(0)
    return sums


def _token_id(session: Session, item: Fields) -> int:
    """Return the first token of a text as a read-out shows it; white space around it may be missing."""
    wanted, tokenizer = item.text("token"), session.im.tokenizer
    texts = _texts(tokenizer)
    token = texts.get(wanted, _texts(tokenizer, stripped=True).get(wanted.strip()))
    if token is None:
        raise item.refusal("token", f"is {wanted[:60]!r}: no token of the model")
    return token


@functools.lru_cache(maxsize=4)
def _texts(tokenizer: object, stripped: bool = False) -> dict[str, int]:
    """Return the first token of every text."""
    texts: dict[str, int] = {}
    for token in range(tokenizer.vocab_size):  # type: ignore[attr-defined]
        text = tokenizer.token_text(token)  # type: ignore[attr-defined]
        texts.setdefault(text.strip() if stripped else text, token)
    return texts


def _unit(d: Direction) -> Direction:
    return d / d.norm().clamp(min=1e-12)
