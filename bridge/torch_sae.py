"""Exported SAEs as torch modules: what tracking, steering, evaluation and users run. Reads SAELens directories."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import nn

from jsae import saelens
from jsae.saelens.settings import RANKED, TRANSCODERS

__all__ = ["RANKED", "TorchSAE", "load"]

Dense = Float[torch.Tensor, "*tokens f"]


class TorchSAE(nn.Module):
    """A trained SAE. `W_enc` (d_in, d_sae), `W_dec` (d_sae, d_out), `b_dec` (d_out,), biases (d_sae,).

    Rows of `W_dec` have norm 1 in this project's exports; in files of others they have the norms that were trained.

    Takes and gives activations as the model has them. It is frozen; gradients flow through it to its input. `d_out` is
    `d_in` but of a transcoder, which gives another activation than it takes, and may have `W_skip` (d_out, d_in). A
    crosscoder takes and gives the activations of its `layers` side by side, in the order of `metadata["hook_names"]`.
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
        for name, weight in weights.items():
            if name == "W_enc":  # laid out latent by latent, in which few tokens are encoded fastest
                weight = weight.T.contiguous().T
            setattr(self, name, nn.Parameter(weight, requires_grad=False))

    def encode(self, x: Float[torch.Tensor, "*tokens d"]) -> Dense:
        """The latents of activations, (..., d_in) to (..., d_sae)."""
        return self._encode(self, self._centred(x))

    def encode_sparse(
        self, x: Float[torch.Tensor, "*tokens d"], k: int | None = None
    ) -> tuple[Float[torch.Tensor, "*tokens k"], Int[torch.Tensor, "*tokens k"]]:
        """The k latents of every token with the largest magnitude, largest first: values and indices.

        TopK and AbsTopK know their own k.

        Raises:
          ValueError: no k for an architecture that has none, or one above d_sae.
        """
        k = self.cfg.get("k") if k is None else k
        if k is None or not 1 <= k <= self.d_sae:
            raise ValueError(f"k={k} latents of a {self.architecture} SAE with {self.d_sae}: give k between 1 and that")
        if self.architecture == "topk" and k <= self.cfg["k"]:
            values, indices = (self._centred(x) @ self.W_enc + self.b_enc).topk(k, dim=-1)
            return values.relu(), indices
        latents = self.encode(x)
        indices = latents.abs().topk(k, dim=-1).indices
        return latents.gather(-1, indices), indices

    def decode(self, latents: Dense) -> Float[torch.Tensor, "*tokens o"]:
        """Activations from latents, (..., d_sae) to (..., d_out); without the skip path, which reads the input."""
        return latents @ self.W_dec + self.b_dec

    def decode_sparse(
        self, values: Float[torch.Tensor, "*tokens k"], indices: Int[torch.Tensor, "*tokens k"]
    ) -> Float[torch.Tensor, "*tokens o"]:
        """Activations from sparse latents: only the rows that are used are read."""
        k = indices.shape[-1]
        flat = nn.functional.embedding_bag(
            indices.reshape(-1, k), self.W_dec, per_sample_weights=values.reshape(-1, k), mode="sum"
        )
        return flat.reshape(*indices.shape[:-1], self.d_out) + self.b_dec

    def forward(self, x: Float[torch.Tensor, "*tokens d"]) -> Float[torch.Tensor, "*tokens o"]:
        """The reconstruction of activations, (..., d_out)."""
        if self.architecture == "topk" and not torch.is_grad_enabled():
            return self.decode_sparse(*self.encode_sparse(x))
        return self.reconstruct(self.encode(x), x)

    def reconstruct(self, latents: Dense, x: Float[torch.Tensor, "*tokens d"]) -> Float[torch.Tensor, "*tokens o"]:
        """Return the reconstruction from latents; a transcoder with a skip path also reads its input, `x`."""
        y_hat = self.decode(latents)
        return y_hat + x.to(y_hat.dtype) @ self.W_skip.T if "skip" in self.architecture else y_hat

    def _centred(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.W_enc.dtype)
        return x if self.is_transcoder else x - self.b_dec


def load(path: str | Path, device: str | torch.device = "cpu") -> TorchSAE:
    """Load a SAELens directory: `cfg.json` and `sae_weights.safetensors`.

    Files of every version of SAELens are read. Weights are rounded to the file's `dtype`, as SAELens does, and computed
    with in float32. Settings with an exact rewrite are folded into the weights (`jsae.saelens`), so that the module
    always subtracts `b_dec` from its input, neither normalises nor rescales, and its `cfg` says so.

    Args:
      path: the directory, or `hf://owner/name[@revision]/folder` on the Hugging Face hub (extra [hub]).
      device: where the weights go.

    Raises:
      FileNotFoundError: no such directory, or a file of it is missing.
      ValueError: a broken file, a setting that is unknown or not supported, an array that is missing, too many or of
        another shape or type, or numbers that are not finite; names file and setting.
      ImportError: an address on the hub, and huggingface_hub is not installed.
    """
    cfg, weights, layers = saelens.read(path)
    tensors = {name: torch.from_numpy(weight) for name, weight in weights.items()}
    return TorchSAE(cfg, tensors, layers).eval().to(device)


def _standard(sae: TorchSAE, u: torch.Tensor) -> torch.Tensor:
    return (u @ sae.W_enc + sae.b_enc).relu()


def _topk(sae: TorchSAE, u: torch.Tensor) -> torch.Tensor:
    values, indices = (u @ sae.W_enc + sae.b_enc).topk(sae.cfg["k"], dim=-1)
    return values.new_zeros(*values.shape[:-1], sae.d_sae).scatter(-1, indices, values.relu())


def _abstopk(sae: TorchSAE, u: torch.Tensor) -> torch.Tensor:
    pre = u @ sae.W_enc + sae.b_enc
    indices = pre.abs().topk(sae.cfg["k"], dim=-1).indices
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
