"""Text that every machine has: modules of the standard library."""

import json
import shutil
from pathlib import Path


def copied(folder: Path, among: int) -> str:
    """Copy every second one of the first modules to a folder, of so many; return the pattern of the copies."""
    for path in sorted(Path(json.__file__).parents[1].glob("*.py"))[:among:2]:
        shutil.copy(path, folder)
    return f"{folder}/*.py"
