"""Exported SAEs as torch modules: what tracking, steering, evaluation and users run. Reads SAELens directories."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

_PER_LATENT: Mapping[str, tuple[str, ...]] = {
    "standard": ("b_enc",),
    "topk": ("b_enc",),
    "abstopk": ("b_enc",),
    "jumprelu": ("b_enc", "threshold"),
    "gated": ("b_gate", "r_mag", "b_mag"),
}
_TRANSCODERS: Mapping[str, str] = {
    "transcoder": "standard",
    "skip_transcoder": "standard",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}
RANKED = ("topk", "abstopk")
"""What chooses among its latents by their size, and knows how many: `cfg["k"]`."""
_MEANT_OTHERWISE = {"normalize_activations": "none", "reshape_activations": "none"}

Dense = Float[torch.Tensor, "*tokens f"]


class TorchSAE(nn.Module):
    """A trained SAE. `W_enc` (d_in, d_sae), `W_dec` (d_sae, d_out) with unit rows, `b_dec` (d_out,), biases (d_sae,).

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
        self.is_transcoder: bool = self.architecture in _TRANSCODERS
        self.d_out: int = cfg.get("d_out", self.d_in) if self.is_transcoder else self.d_in
        self._encode = _ENCODE[_TRANSCODERS.get(self.architecture, self.architecture)]
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
        return self.made(self.encode(x), x)

    def made(self, latents: Dense, x: Float[torch.Tensor, "*tokens d"]) -> Float[torch.Tensor, "*tokens o"]:
        """The reconstruction from latents, and of a transcoder with a skip path from its input too."""
        y_hat = self.decode(latents)
        return y_hat + x.to(y_hat.dtype) @ self.W_skip.T if "skip" in self.architecture else y_hat

    def _centred(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.W_enc.dtype)
        return x if self.is_transcoder else x - self.b_dec


def load(path: str | Path, device: str | torch.device = "cpu") -> TorchSAE:
    """Reads a SAELens directory: `cfg.json` and `sae_weights.safetensors`.

    Raises:
      FileNotFoundError: no such directory, or a file of it is missing.
      ValueError: an architecture, normalisation, shape or number that this reader does not take; names it.
    """
    folder = Path(path)
    for name in ("cfg.json", "sae_weights.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is no exported SAE: it has no {name}")
    try:
        cfg = json.loads((folder / "cfg.json").read_text())
        (folder / "sae_weights.safetensors").open("rb").close()  # load_file calls what it cannot open missing
        weights = load_file(folder / "sae_weights.safetensors", device=str(device))
    except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError, RecursionError) as error:
        raise ValueError(f"{folder} holds a broken export: {error}") from error
    layers = 1
    if isinstance(cfg, dict) and cfg.get("architecture") == "crosscoder":
        cfg, weights, layers = _side_by_side(folder, cfg, weights)
    _check(folder, cfg, weights)
    return TorchSAE(cfg, {name: w.float() for name, w in weights.items()}, layers).eval()


def _side_by_side(
    folder: Path, cfg: dict[str, Any], weights: dict[str, torch.Tensor]
) -> tuple[dict[str, Any], dict[str, torch.Tensor], int]:
    """A crosscoder as the SAE that it is of its layers side by side, `d_in` their widths together; and their number.

    Raises:
      ValueError: settings or arrays that are not what `jsae.export.write` says of a crosscoder.
    """
    sizes = {name: cfg.get(name) for name in ("layers", "d_in", "d_sae")}
    if not all(type(size) is int and size > 0 for size in sizes.values()):
        raise ValueError(f"{folder}: layers, d_in and d_sae of a crosscoder must be positive integers, not {sizes}")
    if cfg.get("activation") not in tuple(_PER_LATENT):
        known = ", ".join(_PER_LATENT)
        raise ValueError(f"{folder}: a crosscoder's activation {cfg.get('activation')!r} is not known: {known} are")
    layers, d, f = sizes.values()
    expected = {"W_enc": (layers, d, f), "W_dec": (f, layers, d), "b_dec": (layers, d)}
    found = {name: tuple(weights[name].shape) if name in weights else None for name in expected}
    if found != expected:
        raise ValueError(f"{folder}: a crosscoder of {layers} layers of width {d} has {expected}, but the file {found}")
    flat = {"W_enc": (layers * d, f), "W_dec": (f, layers * d), "b_dec": (layers * d,)}
    weights = weights | {name: weights[name].reshape(shape) for name, shape in flat.items()}
    return cfg | {"architecture": cfg["activation"], "d_in": layers * d}, weights, layers


def _check(folder: Path, cfg: Any, weights: Mapping[str, torch.Tensor]) -> None:
    """Raises ValueError unless cfg and weights are what `TorchSAE` computes with."""
    known = (*_PER_LATENT, *_TRANSCODERS)
    if not isinstance(cfg, dict) or cfg.get("architecture") not in known:
        found = cfg.get("architecture") if isinstance(cfg, dict) else cfg
        raise ValueError(f"{folder}: architecture {found!r} is not known: {', '.join(known)} are")
    transcoder = cfg["architecture"] in _TRANSCODERS
    if cfg.get("apply_b_dec_to_input", True) == transcoder:
        raise ValueError(f"{folder}: apply_b_dec_to_input must be {str(not transcoder).lower()} here")
    for key, only in _MEANT_OTHERWISE.items():
        if cfg.get(key, only) != only:
            raise ValueError(f"{folder}: {key} is {cfg[key]!r}: this reader takes {only!r} only; fold it at export")
    if cfg.get("rescale_acts_by_decoder_norm"):
        norms = weights["W_dec"].float().norm(dim=-1) if "W_dec" in weights else torch.zeros(1)
        if not torch.allclose(norms, torch.ones_like(norms), atol=1e-4):
            raise ValueError(f"{folder}: activations rescaled by decoder norms that are not 1 are not supported")
    widths = {key: cfg.get(key) for key in ("d_in", "d_sae")}
    widths["d_out"] = cfg.get("d_out", widths["d_in"]) if transcoder else widths["d_in"]
    if not all(isinstance(w, int) and w > 0 for w in widths.values()):
        raise ValueError(f"{folder}: d_in, d_sae and d_out must be positive integers, not {widths}")
    if cfg["architecture"] in RANKED and not (isinstance(cfg.get("k"), int) and 1 <= cfg["k"] <= cfg["d_sae"]):
        raise ValueError(f"{folder}: k is {cfg.get('k')!r}: it must be an integer between 1 and d_sae={cfg['d_sae']}")
    expected = {"W_enc": ("d_in", "d_sae"), "W_dec": ("d_sae", "d_out"), "b_dec": ("d_out",)}
    if "skip" in cfg["architecture"]:
        expected["W_skip"] = ("d_out", "d_in")
    expected |= dict.fromkeys(_PER_LATENT[_TRANSCODERS.get(cfg["architecture"], cfg["architecture"])], ("d_sae",))
    shapes = {name: tuple(widths[axis] for axis in axes) for name, axes in expected.items()}
    found = {name: tuple(w.shape) for name, w in weights.items()}
    if found != shapes:
        raise ValueError(f"{folder}: a {cfg['architecture']} SAE of {widths} has {shapes}, but the file has {found}")
    for name, weight in weights.items():
        if not torch.isfinite(weight).all():
            raise ValueError(f"{folder}: {name} holds numbers that are not finite")


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
