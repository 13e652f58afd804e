"""The exported SAEs of a run, an export or a folder of exports, as torch modules. No jax."""

from pathlib import Path

import torch

from bridge import torch_sae
from bridge.compatibility import check_kind
from bridge.hooks import parse
from bridge.run.exports import finished, within
from bridge.sae_settings import CFG
from bridge.torch_sae import TorchSAE


def load_saes(path: str | Path, device: str | torch.device = "cpu") -> dict[str, TorchSAE]:
    """Return the exported SAEs of a place by hook name: `metadata.hook_name` of their cfg.json, else the folder's name.

    Args:
      path: an exported SAE; a run directory, with its exports in sae/ (of a sweep, that of a variant); or a folder of
        exports.
      device: where they shall be.

    Raises:
      FileNotFoundError: there is no export at that place; says what is there.
      ValueError: an export is broken, a transcoder or crosscoder, belongs to no hook of a nanochat, or two belong to
        one.
    """
    saes: dict[str, TorchSAE] = {}
    for folder in _exports(Path(path)):
        sae = torch_sae.load(folder, device)
        check_kind(folder, sae)
        metadata = sae.metadata if isinstance(sae.metadata, dict) else {}
        name = str(metadata.get("hook_name") or folder.resolve().name)
        try:
            parse(name)
        except ValueError as error:
            raise ValueError(f"{folder} does not say which activation it reads: {error}") from error
        if name in saes:
            raise ValueError(f"{path} holds two SAEs of {name}: give the directory of one of them")
        saes[name] = sae
    return saes


def is_export(path: Path) -> bool:
    """Return whether a folder is an exported SAE itself."""
    return (path / CFG).is_file()


def _exports(path: Path) -> list[Path]:
    """Return the directories of exported SAEs that a path means."""
    if is_export(path):
        return [path]
    if exports := finished(path) or within(path):
        return exports
    if not path.is_dir():
        raise FileNotFoundError(f"no SAE at {path}: it is no directory")
    names = ", ".join(sorted(p.name for p in path.iterdir())[:12]) or "nothing"
    raise FileNotFoundError(
        f"no SAE at {path}, which holds {names}: give an exported SAE (cfg.json, sae_weights.safetensors), "
        "a folder of them, or the directory of a run that is finished"
    )
