"""SAEs of every exported form with random weights, the same on every machine; unit decoder rows."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from bridge.torch_sae import TorchSAE

FORMS = ("topk", "standard", "jumprelu", "gated", "abstopk")


def toy_sae(architecture: str, d_in: int, d_sae: int, seed: int = 0, k: int = 4, **metadata) -> TorchSAE:
    """Return an SAE with encoder directions equal to its decoder rows, so that latents fire on what they write."""
    random = np.random.default_rng(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.from_numpy(random.standard_normal(shape)).float()

    W_dec = torch.nn.functional.normalize(normal(d_sae, d_in), dim=1)
    weights = {"W_dec": W_dec, "W_enc": W_dec.T.contiguous() * 0.8, "b_dec": 0.1 * normal(d_in)}
    bias = 0.1 * normal(d_sae) - 0.2
    if architecture == "gated":
        weights |= {"b_gate": bias, "b_mag": bias + 0.1, "r_mag": 0.1 * normal(d_sae)}
    else:
        weights["b_enc"] = bias
    if architecture == "jumprelu":
        weights["threshold"] = 0.2 + 0.1 * normal(d_sae).abs()
    cfg = {"architecture": architecture, "d_in": d_in, "d_sae": d_sae, "metadata": metadata}
    return TorchSAE(cfg | ({"k": k} if architecture in ("topk", "abstopk") else {}), weights).eval()


def toy_transcoder(
    layer: int, d: int, d_sae: int, *, skip: bool = True, dtype: torch.dtype = torch.float32, **metadata
) -> TorchSAE:
    """Return a JumpReLU transcoder of an MLP with random weights; about a tenth of its latents fire on a token."""
    random = np.random.default_rng(layer)

    def normal(*shape: int) -> torch.Tensor:
        return torch.from_numpy(random.standard_normal(shape)).to(dtype)

    weights = {"W_enc": normal(d, d_sae) / d**0.5, "b_enc": 0.1 * normal(d_sae), "b_dec": 0.3 * normal(d)}
    weights |= {"W_dec": torch.nn.functional.normalize(normal(d_sae, d), dim=1)}
    weights |= {"threshold": torch.full((d_sae,), 1.3, dtype=dtype)}
    if skip:
        weights["W_skip"] = 0.3 * normal(d, d) / d**0.5
    hooks = {"hook_name": f"blocks.{layer}.ln2.hook_normalized", "hook_name_out": f"blocks.{layer}.hook_mlp_out"}
    architecture = "jumprelu_skip_transcoder" if skip else "jumprelu_transcoder"
    cfg = {"architecture": architecture, "d_in": d, "d_out": d, "d_sae": d_sae, "metadata": hooks | metadata}
    return TorchSAE(cfg, weights).eval()


def export(sae: TorchSAE, folder: Path) -> Path:
    """Write the SAE as a SAELens directory; return the folder."""
    folder.mkdir(parents=True)
    cfg = sae.cfg | {"apply_b_dec_to_input": not sae.is_transcoder, "normalize_activations": "none"}
    (folder / "cfg.json").write_text(json.dumps(cfg))
    save_file(
        {name: weight.detach().contiguous() for name, weight in sae.named_parameters()},
        folder / "sae_weights.safetensors",
    )
    return folder
