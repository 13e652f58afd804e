"""Write every checkpoint's own SAE, that belongs to a crosscoder over checkpoints, as a SAELens directory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bridge.run import Run
from bridge.stages import loading
from jsae import export, saelens
from jsae.saelens import Plain

_OF_CROSSCODER = ("hook_names", "checkpoints", "training_architecture_details", "exclusive_latents")
"""Entries of a crosscoder's metadata that its checkpoints' SAEs do not have."""


def write(run: Run, name: str, own: Sequence[Plain]) -> list[Path]:
    """Write the SAE of every checkpoint beside an exported crosscoder; return their folders.

    Each has the crosscoder's latents in its order, and its hook; `model_fingerprint` is that of the checkpoint.

    Args:
      run: with the crosscoder.
      name: of its export.
      own: the SAEs of its checkpoints (`bridge.stages.own_encoders.fit`).

    Raises:
      ConfigError: the crosscoder does not read checkpoints.
      OSError: a folder cannot be written.
    """
    metadata: dict[str, Any] = saelens.read(run.sae_folder(name)).cfg["metadata"]
    folders = []
    for layer, stage in enumerate(loading.of_record(metadata.get("checkpoints"))):
        folder = run.stage_folder(stage.name, name)
        export.write_plain(
            folder, Plain({**own[layer].cfg, "metadata": {}}, own[layer].weights, 1), _metadata(metadata, layer)
        )
        folders.append(folder)
    return folders


def _metadata(metadata: Mapping[str, Any], layer: int) -> dict[str, Any]:
    """Return the metadata of one checkpoint's SAE."""
    stage = metadata["checkpoints"][layer]
    own = {name: value for name, value in metadata.items() if name not in _OF_CROSSCODER}
    return own | {"model_fingerprint": stage["fingerprint"], "checkpoint": stage, "cut_from_crosscoder": True}
