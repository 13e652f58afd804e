"""The packaged run: the SAE of the packaged nanochat that the tutorial trains, with labels of its latents."""

import importlib.resources
import shutil
from pathlib import Path

from bridge.run.layout import Layout
from jsae import files
from jsae.settings import require

FOLDER = "runs/demo-sae"
"""Where a command puts the run if no other folder is given."""


def install(folder: str | Path) -> bool:
    """Copy the packaged run into a folder, unless it is there already; return whether it was copied.

    The folder appears whole, or not at all.

    Raises:
      ConfigError: the folder holds something else, or another run.
      FileNotFoundError: the run is not part of this installation.
      OSError: the folder cannot be written.
    """
    source, run = Layout(_packaged()), Layout(folder)
    if not source.config_file.is_file():
        raise FileNotFoundError(f"the demo run is not part of this installation: {source.path} does not exist")
    if run.config_file.is_file():
        same = run.config_file.read_bytes() == source.config_file.read_bytes()
        require(same, f"{run.path} holds another run: give --run_dir=FOLDER for the packaged one")
        return False
    empty = not run.path.exists() or (run.path.is_dir() and not any(run.path.iterdir()))
    require(empty, f"{run.path} holds something else: give --run_dir=FOLDER for the packaged run")
    with files.replacing_folder(run.path) as partial:
        shutil.copytree(source.path, partial, dirs_exist_ok=True)
    return True


def _packaged() -> Path:
    return Path(str(importlib.resources.files("bridge.run") / "demo"))
