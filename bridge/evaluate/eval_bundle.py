"""Read nanochat's CORE bundle: in-context tasks from files of others, of which every size and type is checked.

The bundle is a folder with `core.yaml` (the tasks: `label`, `dataset_uri`, `num_fewshot`, `icl_task_type`,
`continuation_delimiter`), `eval_data/*.jsonl` (their examples) and `eval_meta_data.csv` (`Eval Task` and
`Random baseline`, in percent). The CORE metric is from DCLM (arXiv 2406.11794).
"""

import csv
import dataclasses
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jsae import extras, jsons

KINDS = ("multiple_choice", "schema", "language_modeling")
_LARGEST_LIST = 2**18
_LARGEST_DATA = 2**28
_MOST_TASKS = 256
_MOST_EXAMPLES = 2**18
_MOST_OPTIONS = 64
_MOST_SHOTS = 64
_SHUFFLE_SEED = 1337  # upstream's, so that the first examples are the ones it evaluates first

Example = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Task:
    """One in-context task."""

    name: str
    kind: str
    """One of `KINDS`."""
    shots: int
    """Solved examples before each question."""
    delimiter: str
    """Text between a question and its answer."""
    baseline: float
    """Accuracy of guessing, in [0, 1)."""
    examples: list[Example]
    """All examples, shuffled as upstream does."""


def default_location() -> Path:
    """Return the folder into which nanochat downloads the bundle."""
    base = os.environ.get("NANOCHAT_BASE_DIR") or Path.home() / ".cache" / "nanochat"
    return Path(base) / "eval_bundle"


def read(folder: Path) -> list[Task]:
    """Return the tasks of a bundle.

    Raises:
      FileNotFoundError: the folder or one of its files does not exist.
      ValueError: a file is too large, broken, or does not have the bundle's form; names the file.
      ImportError: PyYAML is not installed.
    """
    listing = folder / "core.yaml"
    if not listing.is_file():
        raise FileNotFoundError(f"{folder} is not nanochat's eval bundle: it has no core.yaml; give another folder")
    baselines = _baselines(folder / "eval_meta_data.csv")
    entries = _yaml(listing)
    entries = entries.get("icl_tasks") if isinstance(entries, dict) else None
    if not isinstance(entries, list) or not 0 < len(entries) <= _MOST_TASKS:
        raise ValueError(f"{listing}: icl_tasks must be a list of 1 to {_MOST_TASKS} tasks")
    return [_task(folder, listing, entry, baselines) for entry in entries]


def _task(folder: Path, listing: Path, entry: Any, baselines: dict[str, float]) -> Task:
    """Return one task of `core.yaml` with its examples."""
    if not isinstance(entry, dict):
        raise ValueError(f"{listing}: a task is {_kind_of(entry)}, expected a mapping")
    name, uri, kind = (_text(listing, entry, key) for key in ("label", "dataset_uri", "icl_task_type"))
    if kind not in KINDS:
        raise ValueError(f"{listing}: {name} has the type {kind[:40]!r}, expected one of {', '.join(KINDS)}")
    shots = entry.get("num_fewshot")
    shots = shots[0] if isinstance(shots, list) and shots else shots
    if type(shots) is not int or not 0 <= shots <= _MOST_SHOTS:
        raise ValueError(f"{listing}: num_fewshot of {name} must be a number from 0 to {_MOST_SHOTS}, or a list of one")
    delimiter = entry.get("continuation_delimiter", " ")
    if not isinstance(delimiter, str):
        raise ValueError(f"{listing}: continuation_delimiter of {name} is {_kind_of(delimiter)}, expected text")
    if name not in baselines:
        raise ValueError(f"{folder / 'eval_meta_data.csv'} has no random baseline for {name}")
    examples = _examples(_inside(folder / "eval_data", uri, listing), kind)
    if len(examples) <= shots:
        raise ValueError(f"{folder / 'eval_data' / uri} has {len(examples)} examples, but {name} needs {shots + 1}")
    random.Random(_SHUFFLE_SEED).shuffle(examples)
    return Task(name, kind, shots, delimiter, baselines[name], examples)


def _inside(folder: Path, uri: str, listing: Path) -> Path:
    """Return a path within a folder; one that leads out of it is refused."""
    path = (folder / uri).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ValueError(f"{listing}: dataset_uri {uri[:80]!r} leads out of {folder}")
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist, but {listing} names it")
    return path


def _examples(path: Path, kind: str) -> list[Example]:
    """Return the examples of a file of JSON lines, each checked."""
    jsons.check_size(path, _LARGEST_DATA)
    examples: list[Example] = []
    for number, (line, value) in enumerate(jsons.objects(path), 1):
        if not line.strip():
            continue
        if value is None or not _CHECKS[kind](value):
            raise ValueError(f"{path}, line {number}, is no example of {kind}: remove or mend it")
        if len(examples) == _MOST_EXAMPLES:
            raise ValueError(f"{path} has more than {_MOST_EXAMPLES:,} examples: give fewer")
        examples.append(value)
    return examples


def _is_choice(options: str) -> Callable[[Example], bool]:
    """Return a check of an example with options, one of which is right."""

    def check(example: Example) -> bool:
        values, gold = example.get(options), example.get("gold")
        return (
            isinstance(values, list)
            and 2 <= len(values) <= _MOST_OPTIONS
            and all(isinstance(value, str) for value in values)
            and type(gold) is int
            and 0 <= gold < len(values)
        )

    return check


_CHECKS: dict[str, Callable[[Example], bool]] = {
    "multiple_choice": lambda e: isinstance(e.get("query"), str) and _is_choice("choices")(e),
    "schema": lambda e: isinstance(e.get("continuation"), str) and _is_choice("context_options")(e),
    "language_modeling": lambda e: (
        isinstance(e.get("context"), str) and isinstance(e.get("continuation"), str) and bool(e["continuation"].strip())
    ),
}


def _baselines(path: Path) -> dict[str, float]:
    """Return the accuracy of guessing of every task, in [0, 1)."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: the bundle is not complete")
    jsons.check_size(path, _LARGEST_LIST)
    baselines = {}
    with path.open(encoding="utf-8", newline="") as file:
        try:
            for row in csv.DictReader(file):
                value = float(row["Random baseline"])
                if not 0 <= value < 100:
                    raise ValueError(f"a random baseline is {value:g}, expected 0 to below 100 percent")
                baselines[str(row["Eval Task"])] = value / 100
        except (csv.Error, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is broken: {str(error)[:200]}") from error
    return baselines


def _yaml(path: Path) -> Any:
    """Return the value of a small YAML file."""
    try:
        import yaml
    except ImportError as error:
        raise ImportError(f"the list of CORE tasks needs PyYAML: {extras.advice('eval')}") from error
    jsons.check_size(path, _LARGEST_LIST)
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        line = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is broken: {line or 'it is nested too deeply'}") from error


def _text(path: Path, entry: dict[Any, Any], key: str) -> str:
    value = entry.get(key)
    if not isinstance(value, str) or not value:
        raise ValueError(f"{path}: {key} of a task is {_kind_of(value)}, expected text")
    return value


def _kind_of(value: Any) -> str:
    return "missing" if value is None else f"a {type(value).__name__}"
