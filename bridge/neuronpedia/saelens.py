"""The exported SAE once more, with the place in its metadata where SAELens finds its latents on Neuronpedia."""

import shutil
from pathlib import Path

from bridge import torch_sae
from bridge.neuronpedia.ids import Ids
from bridge.neuronpedia.strict import write_json
from jsae import files
from jsae.saelens import config as sae_config


def write(sae_dir: Path, out: Path, *, ids: Ids) -> list[Path]:
    """Writes `out/HOOK`, a SAELens directory with `metadata.neuronpedia_id`; whole or not at all.

    SAELens' dashboards and quick lists go by that id.

    Args:
      sae_dir: the export.
      out: the folder of all hooks.
      ids: where the latents stand.

    Returns:
      The files.

    Raises:
      FileNotFoundError, ValueError: no export, or a broken one.
    """
    torch_sae.load(sae_dir)  # refuses what is none
    settings = sae_config.read(sae_dir)
    where = {"neuronpedia_id": ids.link}
    # Of a file of a version before 6, SAELens reads what describes the SAE between the settings.
    metadata = (settings.written.get("metadata") or {}) | where
    cfg = settings.written | (where if settings.legacy else {"metadata": metadata})
    folder = out / ids.hook
    with files.replacing_folder(folder) as partial:
        for file in sorted((*sae_dir.glob("*.safetensors"), *sae_dir.glob("activation_scaler.json"))):
            shutil.copyfile(file, partial / file.name)
        write_json(partial / "cfg.json", cfg, indent=2)
    return sorted(folder.iterdir())
