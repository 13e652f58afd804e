"""Checks that SAEs fit a model: its hooks, width, device and checkpoint. No jax."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from bridge.hooks import depth, find, hook_name
from bridge.passes import unwrapped
from bridge.torch_sae import TorchSAE

if TYPE_CHECKING:
    from bridge.nanochat import Nanochat


def check(
    model: nn.Module, saes: Mapping[str, TorchSAE], fingerprint: str | None = None, *, transcoders: bool = False
) -> None:
    """Check that SAEs read and reconstruct activations of a model.

    Args:
      model: a module with transformer.wte and transformer.h[i].attn and .mlp.
      saes: SAEs by hook name.
      fingerprint: fingerprint of the model, to compare with the checkpoint that the SAEs were trained on; None: do not
        compare.
      transcoders: whether transcoders are allowed, for what only reads their latents.

    Raises:
      ValueError: there is no SAE, or one does not fit the model's layers, width, device or fingerprint, or is a
        crosscoder, or a transcoder where these are not allowed.
    """
    if not saes:
        raise ValueError("no SAE was given: load those of a run with load_saes")
    for name in sorted(saes, key=depth):
        find(model, name)
        check_kind(f"the SAE of {name}", saes[name], transcoders=transcoders)
        _check_fit(model, name, saes[name], fingerprint)


def check_transcoders(model: nn.Module, transcoders: Mapping[str, TorchSAE], fingerprint: str | None = None) -> None:
    """Check that transcoders replace every MLP of a model.

    Args:
      model: a module with transformer.wte and transformer.h[i].attn and .mlp.
      transcoders: by hook of their input, `blocks.L.ln2.hook_normalized`.
      fingerprint: see `check`.

    Raises:
      ValueError: a layer has none or one that is no transcoder from its MLP's input to its output; or one does not fit
        the model's width, device or fingerprint. Names the layers.
    """
    layers = range(len(unwrapped(model).transformer.h))
    names = [hook_name(layer, "mlp_in") for layer in layers]
    missing = [layer for layer, name in zip(layers, names, strict=True) if name not in transcoders]
    if missing or len(transcoders) > len(names):
        raise ValueError(
            f"there are transcoders at {', '.join(sorted(transcoders, key=depth)) or 'no hook'}; this model needs one "
            f"for each of its layers 0 to {layers[-1]}{_lacking(missing)}: train them with --layer=all "
            "--hook_type=mlp_in --target_hook=mlp --skip"
        )
    for layer, name in zip(layers, names, strict=True):
        check_transcoder(name, transcoders[name])
        target = transcoders[name].metadata.get("hook_name_out", hook_name(layer, "mlp"))
        if target != hook_name(layer, "mlp"):
            raise ValueError(f"the transcoder of {name} predicts {target}, not the output of its MLP")
        _check_fit(model, name, transcoders[name], fingerprint)


def _lacking(layers: list[int]) -> str:
    return f" and lacks those of {', '.join(map(str, layers))}" if layers else ""


def check_transcoder(name: str | Path, sae: TorchSAE) -> None:
    """Raise ValueError for an SAE or crosscoder, which does not predict another activation than it reads."""
    if not sae.is_transcoder or sae.layers > 1:
        kind = "a crosscoder" if sae.layers > 1 else f"a {sae.architecture} SAE, which reconstructs its input"
        raise ValueError(
            f"{name} is {kind}. Attribution graphs need transcoders of all layers: train them with --layer=all "
            "--hook_type=mlp_in --target_hook=mlp --skip"
        )


def known_fingerprint(nano: "Nanochat", saes: Mapping[str, TorchSAE]) -> str | None:
    """Return the model's fingerprint, or None if no SAE has one to compare; it takes a pass over the weights file."""
    return nano.fingerprint if any(trained_on(sae) for sae in saes.values()) else None


def check_kind(name: str | Path, sae: TorchSAE, *, transcoders: bool = False) -> None:
    """Raise ValueError for a crosscoder, and for a transcoder, which predicts another activation, unless allowed."""
    metadata = sae.metadata if isinstance(sae.metadata, dict) else {}
    if sae.layers > 1:
        kind = f"a crosscoder, which reconstructs {sae.layers} layers from one code"
    elif sae.is_transcoder and not transcoders:
        kind = f"a transcoder, which predicts {metadata.get('hook_name_out', 'another activation')} from its input"
    else:
        return
    raise ValueError(
        f"{name} is {kind}. Tracking, steering and evaluation need SAEs, which reconstruct their input; the explorer "
        "and attribution graphs also take transcoders. Use bridge.torch_sae.load to get it as a module, and eval.json "
        "of its run for its quality"
    )


def trained_on(sae: TorchSAE) -> str | None:
    """Return the fingerprint of the checkpoint that an SAE was trained on, or None if its export lacks it."""
    return sae.metadata.get("model_fingerprint") if isinstance(sae.metadata, dict) else None


def _check_fit(model: nn.Module, name: str, sae: TorchSAE, fingerprint: str | None) -> None:
    """Raise ValueError for an SAE or transcoder of another width, device or model."""
    embedding = unwrapped(model).transformer.wte.weight
    width, device = embedding.size(1), embedding.device
    named = f"the {'transcoder' if sae.is_transcoder else 'SAE'} of {name}"
    if {sae.d_in, sae.d_out} != {width}:
        channels = f"{sae.d_in}" if sae.d_in == sae.d_out else f"{sae.d_in} and writes {sae.d_out}"
        raise ValueError(
            f"{named} reads {channels} channels, but this model has {width}: give the model that it was trained on"
        )
    if sae.W_dec.device != device:
        raise ValueError(f"{named} is on {sae.W_dec.device}, the model on {device}: move one of them")
    if fingerprint is not None and trained_on(sae) not in (None, fingerprint):
        raise ValueError(
            f"{named} was trained on the checkpoint with sha256 {trained_on(sae)!s:.64}, "
            f"but this one has {fingerprint}: give the checkpoint that it was trained on"
        )
