"""The directory of a run: whose it is, and what is written down about it."""

import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

from experiments.locations import absolute_fields
from jsae.config import Json, require

# What may differ between a run and its continuation without changing a number.
_FREE = {"resume", "output_dir", "log_every", "wandb_project", "jax_memory_fraction", "heldout_tokens"} | {
    "prepare_neuronpedia",
    "model_id",
    "source_set",
}
_VERSIONS = ("jsae", "jax", "flax", "optax", "orbax-checkpoint", "torch", "numpy")


def claim(run: Path, config: Json) -> None:
    """Makes the directory, or makes sure that the run in it is the one to go on with.

    Raises:
      ConfigError: it holds another run, or anything else, or with `resume` no run at all.
    """
    record = run / "config.json"
    resume: bool = config.resume  # type: ignore[attr-defined]
    if not resume:
        require(
            not run.exists() or (run.is_dir() and not any(run.iterdir())),
            f"{run} already holds {'another run' if record.is_file() else 'something else'}: "
            "choose another --output_dir, or go on with that run by its own flags and --resume",
        )
        run.mkdir(parents=True, exist_ok=True)
        return
    require(record.is_file(), f"{run} holds no run to resume: leave out --resume to start one")
    before, now = read(run)["flags"], json.loads(json.dumps(config.to_json()))
    same = [absolute_fields(type(config), values, resolve=True) for values in (before, now)]
    differing = [name for name in sorted(set(now) | set(before)) if same[0].get(name) != same[1].get(name)]
    told = ", ".join(
        f"--{n}={_written(before.get(n))} (now {_written(now.get(n))})" for n in differing if n not in _FREE
    )
    require(not told, f"the run in {run} was started with {told}: resume it with its own flags")


def record(run: Path, config: Json, facts: dict[str, Any]) -> None:
    """Writes `config.json`: flags, facts (hashes of model and data), versions. Of a resumed run it checks them.

    Raises:
      ConfigError: the run's facts were others, so its numbers would change.
    """
    path = run / "config.json"
    if path.is_file():
        before = read(run)["facts"]
        changed = [
            f"{name} was {before.get(name)}, is {value}" for name, value in facts.items() if before.get(name) != value
        ]
        require(not changed, f"{run} cannot go on to the same numbers: {'; '.join(changed)}")
        return
    versions = {"python": platform.python_version()} | {name: _version(name) for name in _VERSIONS}
    flags = absolute_fields(type(config), config.to_json())  # whoever reads them may be in another directory
    text = json.dumps({"flags": flags, "facts": facts, "versions": versions}, indent=2)
    partial = path.with_suffix(".partial")
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(path)


def read(run: Path) -> dict[str, Any]:
    """What `record` wrote.

    Raises:
      ConfigError: it is not there or broken.
    """
    path = run / "config.json"
    require(path.is_file(), f"{run} is no run: it has no config.json")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        require(False, f"{path} is broken: {error}")
    require(isinstance(found, dict) and {"flags", "facts"} <= set(found), f"{path} is not what a run writes")
    return found


def _written(value: Any) -> str:
    """A flag's value as one writes it."""
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
