"""Labels of latents: automatic ones of the evaluation, and those that people wrote, which take precedence."""

import contextlib
import dataclasses
import itertools
import json
import unicodedata
import warnings
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bridge.run import recurrence
from bridge.run.layout import Layout
from bridge.run.recurrence import Recurrence
from jsae import files, jsons

LONGEST_LABEL = 512
"""Most characters of a label: Neuronpedia takes no longer explanation."""
LONGEST_NOTE = 10_000
_LARGEST_FILE = 2**26
_LONGEST_LINE = 2**18
_MOST_LINES = 2**18
_MOST_LABELS = 2**20
_MOST_WARNINGS = 20
_LARGEST_LATENT = 2**31
_FIELDS = ("hook", "latent", "label", "note", "time")


@dataclasses.dataclass(frozen=True)
class Name:
    """The label of a latent. The numbers belong to an automatic label, see `bridge.evaluate.labels.Label`."""

    label: str
    note: str = ""
    by_person: bool = False
    f1: float | None = None
    precision: float | None = None
    recall: float | None = None


class Names:
    """The names of the latents of one SAE; latents without one are not in it.

    A label that a person gave hides the automatic one, its F1 included; a note alone leaves it as it is.
    """

    def __init__(
        self,
        automatic: Mapping[int, Name],
        notes: Mapping[int, Mapping[str, Any]],
        recurrence: Recurrence | None = None,
    ):
        self.recurrence = recurrence
        """The recurrence of latents in SAEs of other seeds; None is unknown."""
        self._automatic, self._names = dict(automatic), dict(automatic)
        for latent, line in notes.items():
            known = self._names.get(latent, Name(""))
            if line["label"]:
                known = Name(line["label"], by_person=True)
            if known.label or line["note"]:
                self._names[latent] = dataclasses.replace(known, note=line["note"])

    @classmethod
    def read(cls, run: str | Path, hook: str) -> "Names":
        """Return the names of a run's latents at a hook: from labels.json, overridden by those from notes.jsonl.

        Both files may be absent, and stability.json, which says how often latents recur.

        Raises:
          ValueError: labels.json or stability.json is broken, or notes.jsonl cannot be read as notes (too large, not
            UTF-8).
        """
        automatic = _automatic(Layout(run).table_file("labels"), hook)
        return cls(automatic, _last(notes(run), hook), recurrence.read(run, hook))

    def __getitem__(self, latent: int) -> Name:
        """Return the name of a latent; one without a label if it has none."""
        return self._names.get(latent, Name(""))

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self._names))

    def __len__(self) -> int:
        return len(self._names)

    def automatic(self, latent: int) -> Name:
        """Return the automatic name of a latent, even if people gave another."""
        return self._automatic.get(latent, Name(""))

    def label(self, latent: int) -> str:
        """Return the label of a latent, "" if it has none."""
        return self[latent].label

    def description(self, latent: int) -> str:
        """Return the label of a latent with how often it recurs, if that is known; "" if it has no label."""
        label, recurs = self.label(latent), "" if self.recurrence is None else self.recurrence.text(latent)
        return f"{label} ({recurs})" if label and recurs else label


def automatic_hooks(run: str | Path) -> dict[str, int]:
    """Return the hooks with automatic labels in `labels.json`, and the number of labelled latents of each.

    Raises:
      ValueError: the file is broken.
    """
    file = Path(run) / "labels.json"
    if not file.is_file():
        return {}
    hooks = _table(file)
    counts = {hook: len(_automatic(file, hook)) for hook in hooks}
    return {hook: count for hook, count in counts.items() if count}


def notes_file(run: str | Path) -> Path:
    """Return the file of people's labels and notes: one JSON object per line; the last one of a latent counts."""
    return Layout(run).notes_file


def notes(run: str | Path) -> list[dict[str, Any]]:
    """Return all lines that people wrote, in their order. Invalid lines are left out with a warning.

    Raises:
      ValueError: the file has more than 64 MiB or 262,144 lines, or is not UTF-8.
    """
    file = notes_file(run)
    if not file.is_file():
        return []
    if file.stat().st_size > _LARGEST_FILE:
        raise ValueError(f"{file} has {file.stat().st_size:,} bytes: too many for notes, move it away")
    lines, invalid = [], 0
    for number, text in enumerate(_lines(file), 1):
        if not text.strip():
            continue
        try:
            lines.append(_note(text))
        except ValueError as error:
            invalid += 1
            if invalid <= _MOST_WARNINGS:
                warnings.warn(f"{file}, line {number} is left out: {error}", stacklevel=2)
    if invalid > _MOST_WARNINGS:
        warnings.warn(f"{file}: {invalid - _MOST_WARNINGS:,} more lines are left out", stacklevel=2)
    return lines


def _lines(file: Path) -> Iterator[str]:
    """Yield the lines of a file of notes; lines that are too long come in parts, which are invalid notes."""
    with file.open(encoding="utf-8", newline="\n") as lines:
        try:
            for number in itertools.count(1):
                line = lines.readline(_LONGEST_LINE)
                if not line:
                    return
                if number > _MOST_LINES:
                    raise ValueError(f"{file} has more than {_MOST_LINES:,} lines: too many for notes, move it away")
                yield line
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 ({error}): repair it, or move it away") from error


def _note(text: str) -> dict[str, Any]:
    """Return the note in a line. Raises ValueError if the line is invalid."""
    if len(text) >= _LONGEST_LINE:
        raise ValueError(f"it has {_LONGEST_LINE:,} characters or more")
    line = jsons.loads(text)
    if not isinstance(line, dict):
        raise ValueError(f"expected an object, got {type(line).__name__}")
    return _checked(**{name: line.get(name, "") for name in _FIELDS})


def append(run: str | Path, hook: str, latent: int, label: str, note: str = "") -> dict[str, Any]:
    """Append a person's label and note of a latent; the line is on disk when this returns, whole or not at all.

    Args:
      run: the run's directory.
      hook: of the SAE.
      latent: its number.
      label: its name; "" removes the one that a person gave.
      note: any text.

    Returns:
      The line as it was written: hook, latent, label, note, time (ISO 8601, UTC).

    Raises:
      ValueError: a text that is too long, has control characters or lone surrogates; a latent that is not a number.
      OSError: the line cannot be written, for example because the disk is full. The file is unchanged.
    """
    line = _checked(hook, latent, label, note, datetime.now(UTC).isoformat(timespec="seconds"))
    file = notes_file(run)
    file.parent.mkdir(parents=True, exist_ok=True)
    with files.Lines(file, torn="keep") as lines:  # keep an unfinished line: people also edit this file
        lines.append(json.dumps(line, ensure_ascii=False, allow_nan=False))
    return line


def _checked(hook: Any, latent: Any, label: Any, note: Any, time: Any) -> dict[str, Any]:
    """Return a valid line of the file; raise ValueError for values that are not allowed."""
    if isinstance(latent, bool) or not isinstance(latent, int) or not 0 <= latent < _LARGEST_LATENT:
        raise ValueError(f"latent is {_short(latent)}: expected a number from 0")
    texts = {"hook": (hook, 200), "label": (label, LONGEST_LABEL), "note": (note, LONGEST_NOTE), "time": (time, 64)}
    for name, (text, longest) in texts.items():
        if not isinstance(text, str):
            raise ValueError(f"{name} is {_short(text)}: expected a text")
        if len(text) > longest:
            raise ValueError(f"{name} has {len(text):,} characters: at most {longest:,} are kept")
        refused = next(
            (c for c in text if unicodedata.category(c) in ("Cc", "Cs") and (c not in "\n\t" or name != "note")), ""
        )
        if refused:
            raise ValueError(
                f"{name} has the character U+{ord(refused):04X}: control characters and surrogates are refused"
            )
    if not hook:
        raise ValueError("hook is empty: expected a name such as blocks.2.hook_resid_post")
    return {"hook": hook, "latent": latent, "label": label.strip(), "note": note.strip(), "time": time}


def _last(lines: list[dict[str, Any]], hook: str) -> dict[int, dict[str, Any]]:
    return {line["latent"]: line for line in lines if line["hook"] == hook}


def _automatic(file: Path, hook: str) -> dict[int, Name]:
    """Return the labels of a hook from a file of {hook: {latent: {label, f1, …}}}."""
    if not file.is_file():
        return {}
    with _broken(file):
        table = _table(file).get(hook, {})
        return {int(latent): _name(line) for latent, line in table.items() if line["label"]}


def _table(file: Path) -> dict[str, Any]:
    """Return the labels of all hooks.

    Raises:
      ValueError: the file is broken or too large.
    """
    jsons.check_size(file, _LARGEST_FILE)
    data = file.read_bytes()
    if data.count(b"{") + data.count(b"[") > _MOST_LABELS:
        raise ValueError(f"{file} has more than {_MOST_LABELS:,} labels: move it away")
    with _broken(file):
        table = jsons.loads(data.decode("utf-8"))
        if not isinstance(table, dict):
            raise TypeError(f"expected an object, got {type(table).__name__}")
        return table


@contextlib.contextmanager
def _broken(file: Path) -> Iterator[None]:
    """Turn errors about a file's content into a ValueError that names the file."""
    try:
        yield
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        if str(file) in str(error):
            raise
        problem = f"{type(error).__name__}: {error}"
        raise ValueError(f"{file} is broken ({problem}): `python -m experiments.evaluate` writes it anew") from error


def _name(line: Mapping[str, Any]) -> Name:
    label = line["label"]
    if not isinstance(label, str):
        raise TypeError(f"a label is {_short(label)}")
    numbers = {name: line.get(name) for name in ("f1", "precision", "recall")}
    for name, value in numbers.items():
        if value is not None and not (isinstance(value, int | float) and 0 <= value <= 1):
            raise ValueError(f"{name} is {_short(value)}, expected 0 to 1")
    return Name(label.encode("utf-8", "replace").decode(), **numbers)


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "…"
