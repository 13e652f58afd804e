"""The exported SAEs of a run, an export or a folder of exports, as torch modules. No jax."""

import functools
from collections.abc import Callable
from pathlib import Path

import torch

from bridge import torch_sae
from bridge.compatibility import check_kind, check_transcoder
from bridge.hooks import parse
from bridge.run.exports import finished, within
from bridge.torch_sae import TorchSAE
from jsae.saelens.settings import CFG


def load_saes(
    path: str | Path, device: str | torch.device = "cpu", *, transcoders: bool = False
) -> dict[str, TorchSAE]:
    """Load exported SAEs; return them by hook name, from `metadata.hook_name` in cfg.json or the name of the folder.

    Args:
      path: an exported SAE, a run directory (for a sweep, that of a variant), or a folder of exports.
      device: the device of the SAEs.
      transcoders: whether transcoders are allowed too, by the hook of their input.

    Raises:
      FileNotFoundError: there is no export at the path; the message lists what exists.
      ValueError: an export is damaged, is a crosscoder, or a transcoder where these are not allowed, or names no hook
        of a nanochat, or two exports have the same hook.
    """
    return _load(path, device, functools.partial(check_kind, transcoders=transcoders))


def load_transcoders(path: str | Path, device: str | torch.device = "cpu") -> dict[str, TorchSAE]:
    """Load exported transcoders by the hook of their input; as `load_saes`, which refuses them.

    Raises:
      FileNotFoundError: as `load_saes`.
      ValueError: as `load_saes`, but an export that is no transcoder is refused.
    """
    return _load(path, device, check_transcoder)


def _load(path: str | Path, device: str | torch.device, check: Callable[[Path, TorchSAE], None]) -> dict[str, TorchSAE]:
    """Return the exports at a path by hook, each checked by a function that raises ValueError."""
    saes: dict[str, TorchSAE] = {}
    for folder in exports_at(Path(path)):
        sae = torch_sae.load(folder, device)
        check(folder, sae)
        metadata = sae.metadata if isinstance(sae.metadata, dict) else {}
        name = str(metadata.get("hook_name") or folder.resolve().name)
        try:
            parse(name)
        except ValueError as error:
            raise ValueError(f"{folder} does not say which activation it reads: {error}") from error
        if name in saes:
            raise ValueError(f"{path} contains two SAEs of {name}: give the directory of one of them")
        saes[name] = sae
    return saes


def is_export(path: Path) -> bool:
    """Return whether a folder is an exported SAE itself."""
    return (path / CFG).is_file()


def exports_at(path: Path) -> list[Path]:
    """Return the directories of the exported SAEs at a path: itself, those of a run, or those in a folder.

    Raises:
      FileNotFoundError: there are none; says what there is.
    """
    if is_export(path):
        return [path]
    if exports := finished(path) or within(path):
        return exports
    if not path.is_dir():
        raise FileNotFoundError(f"no SAE at {path}: it is not a directory")
    names = ", ".join(sorted(p.name for p in path.iterdir())[:12]) or "nothing"
    raise FileNotFoundError(
        f"no SAE at {path}, which contains {names}: give an exported SAE (cfg.json, sae_weights.safetensors), "
        "a folder of them, or the directory of a finished run"
    )
