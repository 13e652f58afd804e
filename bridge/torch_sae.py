"""Exported SAEs as torch modules, for tracking, steering, evaluation and users. Reads SAELens directories."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import nn

from bridge.topk import largest
from jsae import saelens
from jsae.saelens.settings import RANKED, TRANSCODERS, check_pursuit

__all__ = ["RANKED", "TorchSAE", "load"]

Dense = Float[torch.Tensor, "*tokens f"]


class TorchSAE(nn.Module):
    """A trained SAE. `W_enc` (d_in, d_sae), `W_dec` (d_sae, d_out), `b_dec` (d_out,), biases (d_sae,).

    Rows of `W_dec` have norm 1 in this project's exports; in files of others they have the norms that were trained.

    Inputs and outputs are in the scale of the model's activations. The SAE is frozen; gradients flow through it to its
    input. `d_out` equals `d_in` except for a transcoder, which predicts another activation than its input, and may have
    `W_skip` (d_out, d_in). A crosscoder reads and reconstructs the activations of its `layers`, concatenated in the
    order of `metadata["hook_names"]`.
    """

    def __init__(self, cfg: dict[str, Any], weights: Mapping[str, torch.Tensor], layers: int = 1):
        super().__init__()
        self.cfg = cfg
        self.layers = layers
        self.architecture: str = cfg["architecture"]
        self.d_in: int = cfg["d_in"]
        self.d_sae: int = cfg["d_sae"]
        self.is_transcoder: bool = self.architecture in TRANSCODERS
        self.d_out: int = cfg.get("d_out", self.d_in) if self.is_transcoder else self.d_in
        self._encode = _ENCODE[TRANSCODERS.get(self.architecture, self.architecture)]
        self.metadata: dict[str, Any] = cfg.get("metadata", {})
        self.pursued: int | None = None
        """Steps of matching pursuit by which `encode` works, or None for the SAE's own encoder."""
        for name, weight in weights.items():
            if name == "W_enc":  # contiguous per latent, which is fastest for few tokens
                weight = weight.T.contiguous().T
            setattr(self, name, nn.Parameter(weight, requires_grad=False))

    def encode(self, x: Float[torch.Tensor, "*tokens d"]) -> Dense:
        """Return the latents of activations, (..., d_in) to (..., d_sae)."""
        return self._encode(self, self._centred(x)) if self.pursued is None else self.pursue(x, self.pursued)

    def pursue(self, x: Float[torch.Tensor, "*tokens d"], k: int, residual_threshold: float = 0.0) -> Dense:
        """Return latents by matching pursuit on the decoder instead of the encoder, (..., d_in) to (..., d_sae).

        Mallat and Zhang 1993, "Matching pursuits with time-frequency dictionaries", with positive coefficients: k times
        the decoder row with the largest inner product with the residual of a token, over its norm, is taken, and its
        part of the residual goes into its latent. A token stops at a row that it has taken before, or where nothing is
        positive. As `matching_pursuit` of SAELens.

        Args:
          x: activations.
          k: most latents per token.
          residual_threshold: norm of the residual below which a token stops; 0 is none.

        Raises:
          ValueError: a transcoder, whose decoder rows are not in the space of its input, or k below 1.
        """
        check_pursuit(self.is_transcoder, k)
        residual = self._centred(x).reshape(-1, self.d_in)
        squares = self.W_dec.square().sum(1).clamp(min=torch.finfo(residual.dtype).tiny)
        directions = self.W_dec / squares.sqrt()[:, None]
        latents = residual.new_zeros(len(residual), self.d_sae)
        active = torch.ones(len(residual), dtype=torch.bool, device=residual.device)
        tokens = torch.arange(len(residual), device=residual.device)
        for _ in range(k):
            largest, index = (residual @ directions.T).max(dim=1)
            taken = (latents[tokens, index] != 0) | (largest <= 0)
            value = largest.relu() / squares[index].sqrt() * active
            latents[tokens, index] += value
            residual = residual - value[:, None] * self.W_dec[index]
            active = active & ~taken
            if residual_threshold > 0:
                active = active & (residual.norm(dim=-1) >= residual_threshold)
            if not active.any():
                break
        return latents.reshape(*x.shape[:-1], self.d_sae)

    def with_encoder(self, encoder: str = "own", k: int | None = None) -> "TorchSAE":
        """Return the SAE with another encoder; the weights are shared.

        Args:
          encoder: "own", or "matching_pursuit" (`pursue`).
          k: latents per token; None is the SAE's own k.

        Raises:
          ValueError: k is missing for an SAE without one, out of range, or given for an encoder that selects no k; or
            matching pursuit of a transcoder.
        """
        other = copy.copy(self)
        if encoder == "own" and k is None:
            return other
        own = self.cfg.get("k")
        if encoder == "own" and own is None:
            raise ValueError(f"a {self.architecture} SAE selects no k latents: k is for {', '.join(RANKED)}")
        k = own if k is None else k
        if k is None or not 1 <= k <= self.d_sae:
            raise ValueError(f"k is {k} for a {self.architecture} SAE: give k from 1 to d_sae, which is {self.d_sae}")
        if encoder == "own":
            other.cfg = self.cfg | {"k": k}
        else:
            check_pursuit(self.is_transcoder, k)
            other.pursued = k
        return other

    def encode_sparse(
        self, x: Float[torch.Tensor, "*tokens d"], k: int | None = None, *, in_order: bool = True
    ) -> tuple[Float[torch.Tensor, "*tokens k"], Int[torch.Tensor, "*tokens k"]]:
        """Return values and indices of each token's k latents of largest magnitude, (..., k) each, largest first.

        `k` may be None for TopK and AbsTopK, which have their own. Without `in_order` a TopK SAE leaves them in any
        order, which takes less time.

        Raises:
          ValueError: k is missing for an architecture without one, or not in [1, d_sae].
        """
        k = self.cfg.get("k") if k is None else k
        if k is None or not 1 <= k <= self.d_sae:
            raise ValueError(f"k is {k} for a {self.architecture} SAE: give k from 1 to d_sae, which is {self.d_sae}")
        if self.architecture == "topk" and self.pursued is None and k <= self.cfg["k"]:
            pre = self._centred(x) @ self.W_enc + self.b_enc
            values, indices = pre.topk(k, dim=-1) if in_order else largest(pre, k)
            return values.relu(), indices
        latents = self.encode(x)
        indices = latents.abs().topk(k, dim=-1).indices
        return latents.gather(-1, indices), indices

    def decode(self, latents: Dense) -> Float[torch.Tensor, "*tokens o"]:
        """Return activations from latents, (..., d_sae) to (..., d_out), without a skip path, which reads the input."""
        return latents @ self.W_dec + self.b_dec

    def decode_sparse(
        self, values: Float[torch.Tensor, "*tokens k"], indices: Int[torch.Tensor, "*tokens k"]
    ) -> Float[torch.Tensor, "*tokens o"]:
        """Return activations, (..., d_out), from sparse latents, (..., k); reads only the decoder rows in use."""
        k = indices.shape[-1]
        flat = nn.functional.embedding_bag(
            indices.reshape(-1, k), self.W_dec, per_sample_weights=values.reshape(-1, k), mode="sum"
        )
        return flat.reshape(*indices.shape[:-1], self.d_out) + self.b_dec

    def forward(self, x: Float[torch.Tensor, "*tokens d"]) -> Float[torch.Tensor, "*tokens o"]:
        """Return the reconstruction of activations, (..., d_in) to (..., d_out)."""
        if self.architecture == "topk" and self.pursued is None and not torch.is_grad_enabled():
            return self.decode_sparse(*self.encode_sparse(x, in_order=False))
        return self.reconstruct(self.encode(x), x)

    def reconstruct(self, latents: Dense, x: Float[torch.Tensor, "*tokens d"]) -> Float[torch.Tensor, "*tokens o"]:
        """Return the reconstruction from latents; a transcoder with a skip path also reads its input, `x`."""
        y_hat = self.decode(latents)
        return y_hat + x.to(y_hat.dtype) @ self.W_skip.T if "skip" in self.architecture else y_hat

    def _centred(self, x: torch.Tensor) -> torch.Tensor:
        """Return the input in the dtype of the weights, minus `b_dec` except for a transcoder."""
        x = x.to(self.W_enc.dtype)
        return x if self.is_transcoder else x - self.b_dec


def load(path: str | Path, device: str | torch.device = "cpu") -> TorchSAE:
    """Load a SAELens directory: `cfg.json` and `sae_weights.safetensors`.

    Files of every version of SAELens are read. Weights are rounded to the file's `dtype`, as SAELens does; computations
    are in float32. Settings with an exact rewrite are folded into the weights (`jsae.saelens`), so that the module
    always subtracts `b_dec` from its input and neither normalises nor rescales; `cfg` is changed accordingly.

    Args:
      path: the directory, or `hf://owner/name[@revision]/folder` on the Hugging Face hub (extra [hub]).
      device: the device of the weights.

    Raises:
      FileNotFoundError: the directory or one of its files does not exist.
      ValueError: a file is broken, a setting unknown or not supported, an array missing, unexpected or of another shape
        or type, or numbers are not finite; names file and setting.
      ImportError: the path is on the hub, and huggingface_hub is not installed.
    """
    cfg, weights, layers = saelens.read(path)
    tensors = {name: torch.from_numpy(weight) for name, weight in weights.items()}
    return TorchSAE(cfg, tensors, layers).eval().to(device)


def _standard(sae: TorchSAE, u: torch.Tensor) -> torch.Tensor:
    return (u @ sae.W_enc + sae.b_enc).relu()


def _topk(sae: TorchSAE, u: torch.Tensor) -> torch.Tensor:
    values, indices = largest(u @ sae.W_enc + sae.b_enc, sae.cfg["k"])
    return values.new_zeros(*values.shape[:-1], sae.d_sae).scatter(-1, indices, values.relu())


def _abstopk(sae: TorchSAE, u: torch.Tensor) -> torch.Tensor:
    pre = u @ sae.W_enc + sae.b_enc
    _, indices = largest(pre.abs(), sae.cfg["k"])
    return torch.zeros_like(pre).scatter(-1, indices, pre.gather(-1, indices))


def _jumprelu(sae: TorchSAE, u: torch.Tensor) -> torch.Tensor:
    pre = u @ sae.W_enc + sae.b_enc
    return torch.where(pre > sae.threshold, pre.relu(), 0)


def _gated(sae: TorchSAE, u: torch.Tensor) -> torch.Tensor:
    h = u @ sae.W_enc
    magnitude = (h * sae.r_mag.exp() + sae.b_mag).relu()
    return torch.where(h + sae.b_gate > 0, magnitude, 0)


_ENCODE: Mapping[str, Callable[[TorchSAE, torch.Tensor], torch.Tensor]] = {
    "standard": _standard,
    "topk": _topk,
    "abstopk": _abstopk,
    "jumprelu": _jumprelu,
    "gated": _gated,
}
