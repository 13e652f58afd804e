"""The records that one page shows: those of a run, and of a second run on the same model beside it."""

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Float32, UInt16

from bridge.run import Run
from bridge.run.labels import Names
from jsae.records.store import Store
from jsae.settings import require


@dataclasses.dataclass(frozen=True)
class Part:
    """The records of one SAE, and where their texts begin among those of the page."""

    run: Run
    store: Store
    names: Names
    beside: str | None = None
    """The page's name of the second run; None for the run that the page belongs to."""
    first_row: int = 0
    """The row of the page's texts which is row 0 of the records."""

    @property
    def hook(self) -> str:
        """The hook whose activation the SAE reads."""
        return self.store.header.hook

    @property
    def name(self) -> str:
        """The name of the SAE on the page: its hook, of the second run behind the run's name."""
        return self.hook if self.beside is None else f"{self.beside}/{self.hook}"

    @cached_property
    def written(self) -> tuple[str, int]:
        """The hook at which the SAE writes, and the width; directions are compared only within one."""
        from bridge import torch_sae
        from bridge.explorer.weights import written_hook

        export = self.run.recorded_export(self.hook)
        hook = self.hook if export is None else written_hook(self.hook, torch_sae.load(export))
        return hook, self.store.header.d_in

    def decoder(self) -> Float32[np.ndarray, "f d"] | None:
        """Return the decoder rows, of unit length or 0; None without an export."""
        from bridge import torch_sae

        export = self.run.recorded_export(self.hook)
        if export is None:
            return None
        W_dec = torch_sae.load(export).W_dec.float().cpu().numpy()
        norms = np.linalg.norm(W_dec, axis=1, keepdims=True)
        return (W_dec / np.where(norms > 0, norms, 1)).astype(np.float32)


def of_run(run: Run, hooks: Sequence[str], beside: str | None = None) -> list[Part]:
    """Return the records of a run at these hooks, from the lowest layer up.

    Raises:
      StoreError: records are broken, of another version, or of another SAE than the run's export.
      ValueError: the run's labels or notes are broken.
    """
    stores = sorted(map(run.records, hooks), key=lambda store: (store.header.layer, store.header.hook))
    return [Part(run, store, Names.read(run.path, store.header.hook), beside) for store in stores]


def check_second(run: Run, second: Run, context_length: int | None = None) -> None:
    """Raise ConfigError if a second run is the first, has no records, or has records of other rows of text.

    Reads nothing of the first run, whose records may still have to be gathered; None for a `context_length` is any.
    """
    require(run.path.resolve() != second.path.resolve(), f"--with_run={second.path} is the run itself: give another")
    gathers = f"`python -m experiments.explore --run_dir={second.path}"
    hooks = second.recorded_hooks
    require(bool(hooks), f"--with_run={second.path} has no records: {gathers}` gathers them")
    length = second.records(hooks[0]).header.settings.get("context_length")
    require(
        context_length in (None, length),
        f"--with_run={second.path} was read in rows of {length} tokens: give --context_length={length}, or "
        f"{gathers} --context_length={context_length}` gathers anew",
    )


def join(run: Run, own: Sequence[Part], second: Run) -> list[Part]:
    """Return the parts of a run followed by those of a second one, whose texts follow unless they are the same.

    Raises:
      ConfigError: the second run is the first, has no records, or its records are of another model, other tokens or
        another length of rows; says what there is.
      StoreError, ValueError: as `of_run`, of the second run.
    """
    check_second(run, second)
    others = of_run(second, second.recorded_hooks, _second_name(run.path, second.path))
    first, texts = own[0].store.texts, others[0].store.texts
    require(
        texts.header.fingerprint == first.header.fingerprint,
        f"{second.path} was read with another model, {texts.header.model} {texts.header.fingerprint[:12]}, than "
        f"{run.path}, {first.header.model} {first.header.fingerprint[:12]}: give a run on the same model",
    )
    require(
        (texts.vocabulary, texts.header.special) == (first.vocabulary, first.header.special),
        f"{second.path} was read with another tokenizer than {run.path}: give both the same --tokenizer",
    )
    require(
        texts.header.row_length == first.header.row_length,
        f"the texts of {second.path} have rows of {texts.header.row_length} tokens, those of {run.path} "
        f"{first.header.row_length}: gather one of them again with the --context_length of the other",
    )
    is_same = np.array_equal(texts.tokens, first.tokens)
    return [*own, *(dataclasses.replace(part, first_row=0 if is_same else first.header.rows) for part in others)]


def tokens(parts: Sequence[Part]) -> UInt16[np.ndarray, "rows T"]:
    """Return the rows of text of a page: those of the run, and those of the second run where they differ."""
    first, last = parts[0], parts[-1]
    own = first.store.texts.tokens
    return own if last.first_row == 0 else np.concatenate([own, last.store.texts.tokens])


def _second_name(run: Path, second: Path) -> str:
    """Return a name of the second run that is not the first one's."""
    first, other = run.resolve(), second.resolve()
    return other.name if other.name != first.name else f"{other.parent.name}/{other.name}"
