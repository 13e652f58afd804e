"""Whether SAEs belong to a model: its hooks, width, device and checkpoint. No jax."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from bridge.hooks import depth, find
from bridge.passes import base
from bridge.torch_sae import TorchSAE

if TYPE_CHECKING:
    from bridge.nanochat import Nanochat


def check(model: nn.Module, saes: Mapping[str, TorchSAE], fingerprint: str | None = None) -> None:
    """Check that SAEs, by hook name, read and replace activations of a model.

    Args:
      model: any module with transformer.wte and transformer.h[i].attn and .mlp.
      saes: hook names to SAEs.
      fingerprint: of the model; None skips the comparison with the checkpoint that the SAEs were trained on.

    Raises:
      ValueError: no SAE, one for a layer, width, device or model that is not this one's, a transcoder or a crosscoder.
    """
    if not saes:
        raise ValueError("no SAE was given: load_saes reads those of a run")
    for name in sorted(saes, key=depth):
        find(model, name)
        _check(model, name, saes[name], fingerprint)


def known_fingerprint(nano: "Nanochat", saes: Mapping[str, TorchSAE]) -> str | None:
    """Return the model's fingerprint if an SAE names one to compare it with; reading it takes a pass over the file."""
    return nano.fingerprint if any(trained_on(sae) for sae in saes.values()) else None


def check_kind(where: str | Path, sae: TorchSAE) -> None:
    """Raise ValueError for a transcoder or crosscoder, which cannot replace the activation that it reads."""
    metadata = sae.metadata if isinstance(sae.metadata, dict) else {}
    if sae.layers > 1:
        kind = f"a crosscoder of {sae.layers} layers: it makes all of them of one code"
    elif sae.is_transcoder:
        kind = f"a transcoder: it makes {metadata.get('hook_name_out', 'another activation')} of what it reads"
    else:
        return
    raise ValueError(
        f"{where} is {kind}. Tracking, steering, evaluation and the explorer are for SAEs, which make what they read; "
        "bridge.torch_sae.load gives it as a module, and eval.json of its run says how well it does"
    )


def trained_on(sae: TorchSAE) -> str | None:
    """Return the fingerprint of the checkpoint that an SAE was trained on, if its export says so."""
    return sae.metadata.get("model_fingerprint") if isinstance(sae.metadata, dict) else None


def _check(model: nn.Module, name: str, sae: TorchSAE, fingerprint: str | None) -> None:
    """Raise ValueError for an SAE that does not belong to this model."""
    check_kind(f"the SAE of {name}", sae)
    embedding = base(model).transformer.wte.weight
    width, device = embedding.size(1), embedding.device
    if sae.d_in != width:
        raise ValueError(
            f"the SAE of {name} reads {sae.d_in} channels, but this model has {width}: it was trained on another model"
        )
    if sae.W_dec.device != device:
        raise ValueError(f"the SAE of {name} is on {sae.W_dec.device}, but the model on {device}: move one of them")
    if fingerprint is not None and trained_on(sae) not in (None, fingerprint):
        raise ValueError(
            f"the SAE of {name} was trained on the checkpoint with sha256 {trained_on(sae)}, "
            f"this one has {fingerprint}: give the checkpoint it was trained on"
        )
