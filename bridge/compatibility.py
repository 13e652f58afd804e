"""Checks that SAEs fit a model: its hooks, width, device and checkpoint. No jax."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from bridge.hooks import depth, find
from bridge.passes import unwrapped
from bridge.torch_sae import TorchSAE

if TYPE_CHECKING:
    from bridge.nanochat import Nanochat


def check(model: nn.Module, saes: Mapping[str, TorchSAE], fingerprint: str | None = None) -> None:
    """Check that SAEs read and reconstruct activations of a model.

    Args:
      model: a module with transformer.wte and transformer.h[i].attn and .mlp.
      saes: SAEs by hook name.
      fingerprint: fingerprint of the model, to compare with the checkpoint that the SAEs were trained on; None: do not
        compare.

    Raises:
      ValueError: there is no SAE, or one does not fit the model's layers, width, device or fingerprint, or is a
        transcoder or crosscoder.
    """
    if not saes:
        raise ValueError("no SAE was given: load those of a run with load_saes")
    for name in sorted(saes, key=depth):
        find(model, name)
        _check(model, name, saes[name], fingerprint)


def known_fingerprint(nano: "Nanochat", saes: Mapping[str, TorchSAE]) -> str | None:
    """Return the model's fingerprint, or None if no SAE has one to compare; it takes a pass over the weights file."""
    return nano.fingerprint if any(trained_on(sae) for sae in saes.values()) else None


def check_kind(name: str | Path, sae: TorchSAE) -> None:
    """Raise ValueError for a transcoder or crosscoder, which does not reconstruct the activation that it reads."""
    metadata = sae.metadata if isinstance(sae.metadata, dict) else {}
    if sae.layers > 1:
        kind = f"a crosscoder, which reconstructs {sae.layers} layers from one code"
    elif sae.is_transcoder:
        kind = f"a transcoder, which predicts {metadata.get('hook_name_out', 'another activation')} from its input"
    else:
        return
    raise ValueError(
        f"{name} is {kind}. Tracking, steering, evaluation and the explorer need SAEs, which reconstruct their input; "
        "use bridge.torch_sae.load to get it as a module, and eval.json of its run for its quality"
    )


def trained_on(sae: TorchSAE) -> str | None:
    """Return the fingerprint of the checkpoint that an SAE was trained on, or None if its export lacks it."""
    return sae.metadata.get("model_fingerprint") if isinstance(sae.metadata, dict) else None


def _check(model: nn.Module, name: str, sae: TorchSAE, fingerprint: str | None) -> None:
    """Raise ValueError for an SAE that does not fit this model."""
    check_kind(f"the SAE of {name}", sae)
    embedding = unwrapped(model).transformer.wte.weight
    width, device = embedding.size(1), embedding.device
    if sae.d_in != width:
        raise ValueError(
            f"the SAE of {name} reads {sae.d_in} channels, but this model has {width}: "
            "give the model that it was trained on"
        )
    if sae.W_dec.device != device:
        raise ValueError(f"the SAE of {name} is on {sae.W_dec.device}, the model on {device}: move one of them")
    if fingerprint is not None and trained_on(sae) not in (None, fingerprint):
        raise ValueError(
            f"the SAE of {name} was trained on the checkpoint with sha256 {trained_on(sae)}, "
            f"but this one has {fingerprint}: give the checkpoint that it was trained on"
        )
