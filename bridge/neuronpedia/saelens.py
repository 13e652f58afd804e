"""Copies of exported SAEs whose metadata has the id with which SAELens finds their latents on Neuronpedia."""

import shutil
from pathlib import Path

from bridge import torch_sae
from bridge.neuronpedia.ids import Ids
from bridge.neuronpedia.strict import write_json
from jsae import files
from jsae.saelens import config as sae_config
from jsae.saelens.settings import CFG, SCALER


def write(sae_dir: Path, out: Path, *, ids: Ids) -> list[Path]:
    """Write `out/HOOK`, a SAELens directory with `metadata.neuronpedia_id`, atomically.

    SAELens's dashboards and quick lists use this id.

    Args:
      sae_dir: the export.
      out: the folder of all hooks.
      ids: Neuronpedia's ids of the SAE.

    Returns:
      The paths of the files.

    Raises:
      FileNotFoundError, ValueError: there is no export, or it is damaged.
    """
    torch_sae.load(sae_dir)  # raises for a damaged export
    settings = sae_config.read(sae_dir)
    link = {"neuronpedia_id": ids.link}
    # In files of versions before 6, SAELens expects metadata among the settings.
    metadata = (settings.written.get("metadata") or {}) | link
    cfg = settings.written | (link if settings.legacy else {"metadata": metadata})
    folder = out / ids.hook
    with files.replacing_folder(folder) as partial:
        for file in sorted((*sae_dir.glob("*.safetensors"), *sae_dir.glob(SCALER))):
            shutil.copyfile(file, partial / file.name)
        write_json(partial / CFG, cfg, indent=2)
    return sorted(folder.iterdir())
