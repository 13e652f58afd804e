"""A nanochat frozen at one prompt: attention patterns, norms and gates are constants, the rest is linear."""

import copy
import dataclasses
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bridge.hooks import SITES, capture, hook_name
from bridge.nanochat.attention import window_mask
from bridge.nanochat.model import GPT, mix, norm
from bridge.passes import unwrapped

Acts = Float[Tensor, "T C"]


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The vectors in which the frozen network is linear."""

    embedding: Acts
    """Normed embeddings of the tokens."""
    values: dict[int, Float[Tensor, "T kv"]]
    """Value embeddings by layer, before their gates."""
    bigram: Acts | None
    mlp: list[Acts]
    """By layer: what is written in the place of the MLP, beside its skip path."""

    def of_tokens(self, layer: int) -> list[Tensor]:
        """Return the vectors of the tokens themselves that the MLP of a layer may depend on, (T, _) each."""
        values = [value for i, value in self.values.items() if i <= layer]
        return [self.embedding, *values, *([] if self.bigram is None else [self.bigram])]

    def differentiable(self) -> "Inputs":
        """Return copies with respect to which gradients can be taken."""
        values = {i: _leaf(value) for i, value in self.values.items()}
        bigram = None if self.bigram is None else _leaf(self.bigram)
        return Inputs(_leaf(self.embedding), values, bigram, [_leaf(h) for h in self.mlp])


class Frozen:
    """Constants of the frozen network at a prompt of T tokens, and the values that the model computed.

    The frozen network (`run`) gives the model's own activations for the model's own inputs. With ρ the inverse root
    mean squares, P the attention patterns, γ the factors of the smear, g those of value embeddings:

        x = e_t + γ_t e_{t-1};  x0 = x
        x <- r_l x + s_l x0 + b_l bigram;  x <- x + W_o P (W_v ρ x + g ve_l);  x <- x + mlp_l + W_skip ρ' x
        y = ρ_f (x - β x_middle)

    Args:
      model: a nanochat in float32 or float64; it may be compiled or wrapped.
      tokens: the prompt.
      skip: the skip path of every layer, (C, C), or None.

    Raises:
      ValueError: the model is another class than `bridge.nanochat.model.GPT`, or in a lower precision.
    """

    def __init__(self, model: torch.nn.Module, tokens: Int[Tensor, " T"], skip: Sequence[Tensor | None]):
        self.model = check_model(model)
        self.config, self.tokens, self.skip = self.model.config, tokens, list(skip)
        with torch.inference_mode(False), torch.no_grad():
            self._read(model)

    def _read(self, model: torch.nn.Module) -> None:
        """Run the model and derive the constants from its activations."""
        layers, length = range(self.config.n_layer), len(self.tokens)
        with capture(model, [hook_name(i, site) for site in SITES for i in layers]) as acts:
            self.logits: Float[Tensor, "T V"] = model(self.tokens[None])[0]
        acts = {name: h[0] for name, h in acts.items()}
        self.embedding: Acts = norm(self.model.transformer.wte(self.tokens), self.model.eps)
        self.smear = self.model.smear_factor(self.embedding) if self.config.smear else None
        self.bigram = self.model.bigram_embed(self.tokens[None], None)[0] if self.config.bigram else None
        self.values = {int(i): embed(self.tokens) for i, embed in self.model.value_embeds.items()}
        self.mlp_in = [acts[hook_name(i, "mlp_in")] for i in layers]
        self.mlp = [acts[hook_name(i, "mlp")] for i in layers]
        self.attn_scale, self.mlp_scale, self.patterns = [], [], []
        self.gates: dict[int, Tensor] = {}
        rope = self.model.rope(slice(length), self.embedding.dtype)
        x = x0 = middle = self._smeared(self.embedding)
        for i, block in enumerate(self.model.transformer.h):
            x = self._mixed(i, x, x0, self.bigram)
            self.attn_scale.append(inverse_rms(x, self.model.eps))
            normed = (x * self.attn_scale[i])[None]
            q, k = block.attn.queries_and_keys(normed, rope)
            self.patterns.append(_pattern(q, k, block.attn.window))
            if i in self.values:
                self.gates[i] = block.attn.value_gate(normed)
            x = x + acts[hook_name(i, "attn")]
            self.mlp_scale.append(inverse_rms(x, self.model.eps))
            x = acts[hook_name(i, "resid_post")]
            if i == self.config.n_layer // 2:
                middle = x
        x = self._without_backout(x, middle)
        self.final_scale = inverse_rms(x, self.model.eps)
        self.final: Acts = x * self.final_scale
        """The final residual stream, normed: what lm_head reads."""

    def run(self, inputs: Inputs) -> tuple[list[Acts], Acts]:
        """Return what the MLP of every layer reads, and the normed final residual stream."""
        x = x0 = middle = self._smeared(inputs.embedding)
        reads = []
        for i in range(self.config.n_layer):
            x = self._mixed(i, x, x0, inputs.bigram)
            x = x + self._attention(i, x * self.attn_scale[i], inputs.values.get(i))
            reads.append(x * self.mlp_scale[i])
            x = x + inputs.mlp[i]
            if self.skip[i] is not None:
                x = x + reads[i] @ self.skip[i].T
            if i == self.config.n_layer // 2:
                middle = x
        return reads, self._without_backout(x, middle) * self.final_scale

    def inputs(self, mlp: Sequence[Acts]) -> Inputs:
        """Return the inputs at the prompt, with `mlp` in the place of the MLPs."""
        return Inputs(self.embedding, self.values, self.bigram, list(mlp))

    def prefix(self, length: int) -> "Frozen":
        """Return the frozen network at the first tokens; later ones do not change it."""
        other = copy.copy(self)
        for name in ("tokens", "embedding", "smear", "bigram", "final_scale", "final", "logits"):
            whole = getattr(self, name)
            setattr(other, name, None if whole is None else whole[:length])
        for name in ("attn_scale", "mlp_scale", "mlp_in", "mlp"):
            setattr(other, name, [whole[:length] for whole in getattr(self, name)])
        other.values = {i: whole[:length] for i, whole in self.values.items()}
        other.gates = {i: whole[:, :length] for i, whole in self.gates.items()}
        other.patterns = [whole[:, :length, :length] for whole in self.patterns]
        return other

    def _attention(self, layer: int, x: Acts, values: Tensor | None) -> Acts:
        """Return the output of a layer's attention, which is linear in x and the value embeddings."""
        attn = self.model.transformer.h[layer].attn
        v = attn.values(x[None], None if values is None else values[None], self.gates.get(layer))[0]
        v = v.repeat_interleave(self.config.n_head // self.config.n_kv_head, dim=1)
        return attn.c_proj(torch.einsum("hts,shd->thd", self.patterns[layer], v).flatten(1))

    def _mixed(self, layer: int, x: Acts, x0: Acts, bigram: Acts | None) -> Acts:
        if self.config.lambdas:
            x = mix(x, x0, self.model.resid_lambdas[layer], self.model.x0_lambdas[layer])
        return x if bigram is None else x + self.model.bigram_lambdas[layer] * bigram

    def _smeared(self, x: Acts) -> Acts:
        return x if self.smear is None else x + self.smear * torch.cat([torch.zeros_like(x[:1]), x[:-1]])

    def _without_backout(self, x: Acts, middle: Acts) -> Acts:
        return x - self.model.backout_lambda.to(x.dtype) * middle if self.config.backout else x


def check_model(model: torch.nn.Module, purpose: str = "attribution graphs", coarse: bool = False) -> GPT:
    """Return the nanochat inside its wrappers.

    Args:
      model: the model.
      purpose: what it is for, in the plural, for the message of an error.
      coarse: whether it may compute in less than float32.

    Raises:
      ValueError: it is another class, or computes in less than float32.
    """
    inner = unwrapped(model)
    if not isinstance(inner, GPT):
        raise ValueError(f"{purpose} need a bridge.nanochat.model.GPT, got a {type(inner).__name__}")
    if not coarse and (dtype := inner.lm_head.weight.dtype) not in (torch.float32, torch.float64):
        raise ValueError(f"the model is in {dtype}, too coarse for {purpose}: convert it with model.float()")
    return inner


def inverse_rms(x: Float[Tensor, "*n C"], eps: float | None) -> Float[Tensor, "*n 1"]:
    """Return the factor by which `bridge.nanochat.model.norm` multiplies x."""
    return (x.square().mean(-1, keepdim=True) + (torch.finfo(x.dtype).eps if eps is None else eps)).rsqrt()


def _leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def _pattern(q: Float[Tensor, "1 T H D"], k: Float[Tensor, "1 T Hkv D"], window: int | None) -> Float[Tensor, "H T T"]:
    """Return the weights of attention: softmax(q k^T / sqrt(D)) over the keys in the window."""
    k = k.repeat_interleave(q.size(2) // k.size(2), dim=2)
    scores = torch.einsum("thd,shd->hts", q[0], k[0]) / q.size(-1) ** 0.5
    return scores.masked_fill(~window_mask(len(q[0]), len(q[0]), window, q.device), -torch.inf).softmax(-1)
