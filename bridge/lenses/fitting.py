"""Fit lenses on text into files: the whole call, with progress, and a fit that can be continued."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from rich.console import Console
from torch import Tensor

from bridge.lenses import jacobian, lens_file, quality, tuned
from bridge.lenses.lens import JacobianLens, Lens, TunedLens, check_fits
from bridge.lenses.prompts import prompts
from bridge.nanochat import Nanochat
from bridge.nanochat.corpus import Corpus
from bridge.nanochat.units import Split
from jsae.progress import Progress
from jsae.settings import require

_SECONDS_BETWEEN_SAVES = 60.0


class Stopped(Exception):  # noqa: N818 - control flow, not an error
    """The fit was asked to stop and has saved what it has."""


@dataclasses.dataclass(frozen=True)
class Text:
    """The text that lenses are fitted or measured on, as for training."""

    data: str = "stdlib"
    split: Split = "train"
    context_length: int = 128
    """Tokens of a prompt or row, BOS first."""

    def corpus(self, nano: Nanochat) -> Corpus:
        """Return the text as rows of the model's tokens."""
        return Corpus(self.data, nano.tokenizer, split=self.split, row_len=nano.row_length(self.context_length))


StopRequests = Callable[[], AbstractContextManager[list[int]]]


def unfinished(out: Path) -> Path:
    """Return the file in which an unfinished fit is kept: the lens so far, in float32, and what continues it."""
    return out.with_name(f"{out.name}.fit")


def fit_jacobian(
    nano: Nanochat,
    out: Path,
    text: Text,
    settings: jacobian.Settings | None = None,
    *,
    first_prompt: int = 0,
    resume: bool = False,
    stop_requests: StopRequests = lambda: nullcontext([]),
    show_progress: bool = False,
) -> JacobianLens:
    """Fit a Jacobian lens and write it to a file.

    What was computed is saved once a minute beside the file (`unfinished`), and when the fit is stopped.

    Args:
      nano: the model in float32, with its tokenizer.
      out: the file; it must not exist.
      text: the text of the prompts.
      settings: when to end.
      first_prompt: number of pieces of the text to leave out, for lenses to be merged.
      resume: continue an unfinished fit.
      stop_requests: a context in which requests to stop are appended to a list.
      show_progress: whether to show a bar.

    Raises:
      Stopped: on request; `resume` continues.
      ValueError: the file exists, there is an unfinished fit and `resume` is not given, or none and it is; or it was of
        another model, text or place; or the text has no prompt.
      OSError: the file cannot be written.
    """
    settings = settings or jacobian.Settings()
    corpus = text.corpus(nano)
    about = {
        "model_fingerprint": nano.fingerprint,
        "target": "final_stream",
        "text": f"{corpus.fingerprint} {text.context_length}",
    }
    mean, start = _start(out, about, first_prompt, resume, nano)
    fit = _Fit(mean, out, about, first_prompt, start)
    ids = prompts(
        corpus.documents(),
        nano.tokenizer,
        first=start,
        length=text.context_length,
        device=nano.model.lm_head.weight.device,
    )
    bar = Progress("fitting", settings.max_prompts, "prompts", mean.count, console=_console(show_progress))
    with bar as progress, stop_requests() as stops:
        jacobian.fit(
            nano.model, fit.counted(ids), settings, mean=mean, report=lambda _: fit.after_prompt(progress, stops)
        )
    lens = fit.lens()
    _finish(lens, out)
    return lens


class _Fit:
    """A fit of a Jacobian lens that knows how far it is in the text, and saves itself."""

    def __init__(self, mean: jacobian.Mean, out: Path, about: dict[str, Any], first: int, following: int):
        self._mean, self._out, self._about = mean, out, about
        self._first, self._next = first, following
        self._saved = time.monotonic()

    def counted(self, ids: Iterator[Int[Tensor, " _"]]) -> Iterator[Tensor]:
        """Yield prompts, and count them."""
        for prompt in ids:
            self._next += 1
            yield prompt

    def lens(self) -> JacobianLens:
        """Return the lens of the prompts so far."""
        return self._mean.lens(self._about | {"prompts": [self._first, self._next]})

    def after_prompt(self, progress: Progress, stops: list[int]) -> None:
        """Report how far the fit is; save it from time to time and when it is to stop, and then raise `Stopped`."""
        note = f"moves by {self._mean.movement:.1e}" if self._mean.movement < math.inf else ""
        progress.update(self._mean.count, note)
        if stops or time.monotonic() - self._saved > _SECONDS_BETWEEN_SAVES:
            lens = self.lens()
            kept = dataclasses.replace(lens, provenance={**lens.provenance, "moves": list(self._mean.moves)})
            lens_file.save(kept, unfinished(self._out), torch.float32)
            self._saved = time.monotonic()
        if stops:
            raise Stopped


def _start(
    out: Path, about: dict[str, Any], first_prompt: int, resume: bool, nano: Nanochat
) -> tuple[jacobian.Mean, int]:
    """Return the mean so far, and the number of the next piece of text."""
    state = unfinished(out)
    _check_state(out, resume)
    if not resume:
        return jacobian.Mean(), first_prompt
    lens = lens_file.load(state, nano.model.lm_head.weight.device)
    recorded = dict(lens.provenance) | {"first_prompt": span(lens)[0]}
    _check_recorded(state, recorded, about | {"first_prompt": first_prompt}, "model, text and --first_prompt")
    moves = lens.provenance.get("moves")
    assert isinstance(lens, JacobianLens)
    return jacobian.Mean(lens, moves if isinstance(moves, list) else ()), span(lens)[1]


def _finish(lens: JacobianLens | TunedLens, out: Path) -> None:
    """Write a lens, and remove the unfinished fit that it comes from."""
    lens_file.save(lens, out)
    unfinished(out).unlink(missing_ok=True)


def _check_state(out: Path, resume: bool) -> None:
    """Raise ConfigError if the lens exists, or an unfinished fit does where none is continued, or the reverse."""
    state = unfinished(out)
    require(not out.exists(), f"{out} exists: give another --out, or move it")
    require(
        resume or not state.exists(),
        f"{state} is an unfinished fit: continue it with --resume, or move it to start anew",
    )
    require(state.exists() or not resume, f"there is no unfinished fit at {state}: leave --resume out")


def _check_recorded(state: Path, recorded: Mapping[str, object], expected: Mapping[str, object], what: str) -> None:
    """Raise ConfigError if an unfinished fit is of something else."""
    for name, value in expected.items():
        require(
            recorded.get(name) == value,
            f"the unfinished fit {state} has {name} {recorded.get(name)!r}, this one {value!r}: give the same {what}, "
            "or another --out",
        )


def span(lens: JacobianLens | TunedLens) -> tuple[int, int]:
    """Return the pieces of text that a fit of a Jacobian lens has read, [first, next).

    Raises:
      ValueError: the lens does not say so.
    """
    pieces = lens.provenance.get("prompts")
    if not (isinstance(lens, JacobianLens) and isinstance(pieces, list) and [type(i) for i in pieces] == [int, int]):
        raise ValueError(f"the {lens.name} lens does not say which prompts it has: fit it anew")
    return pieces[0], pieces[1]


def fit_tuned(
    nano: Nanochat,
    out: Path,
    text: Text,
    settings: tuned.Settings | None = None,
    *,
    rows: int = 4,
    seed: int = 0,
    resume: bool = False,
    stop_requests: StopRequests = lambda: nullcontext([]),
    show_progress: bool = False,
) -> TunedLens:
    """Fit a tuned lens and write it to a file.

    Translators, Adam's moments and the place in the text are saved once a minute beside the file (`unfinished`), and
    when the fit is stopped; they are three times as large as the lens.

    Args:
      nano: the model in float32, with its tokenizer.
      out: the file; it must not exist.
      text: the text.
      settings: the optimisation.
      rows: rows of text in a batch.
      seed: of the order of the text.
      resume: continue an unfinished fit, to the same lens.
      stop_requests: a context in which requests to stop are appended to a list.
      show_progress: whether to show a bar.

    Raises:
      Stopped: on request; `resume` continues.
      ValueError: the file exists, a loss is not finite, there is an unfinished fit and `resume` is not given, or none
        and it is; or it was of another model, text or settings.
      OSError: the file cannot be written.
    """
    settings = settings or tuned.Settings()
    _check_state(out, resume)
    read = {"split": text.split, "row_len": nano.row_length(text.context_length), "seed": seed}
    corpus = Corpus(text.data, nano.tokenizer, **read)
    about = {"model_fingerprint": nano.fingerprint, "text": corpus.fingerprint}
    plan = about | dataclasses.asdict(settings) | {"rows": rows}
    fit = _continued(nano, out, settings, plan, corpus) if resume else tuned.Fit(nano.model, settings)
    device = nano.model.lm_head.weight.device
    batches = (torch.from_numpy(corpus.next_rows(rows)).long().to(device) for _ in range(settings.steps))
    bar = Progress("fitting", settings.steps, "steps", fit.step, console=_console(show_progress))
    with bar as progress, stop_requests() as stops:
        saved = time.monotonic()

        def after_step(step: int, kl: torch.Tensor) -> None:
            nonlocal saved
            progress.update(step, f"KL {float(kl.mean()):.3f}")
            if stops or time.monotonic() - saved > _SECONDS_BETWEEN_SAVES:
                place = plan | {"steps_taken": step, "position": corpus.position()}
                lens_file.save(
                    dataclasses.replace(fit.lens, provenance=place), unfinished(out), torch.float32, fit.moments()
                )
                saved = time.monotonic()
            if stops:
                raise Stopped

        lens = tuned.fit(nano.model, batches, begun=fit, report=after_step)
    found = dataclasses.replace(lens, provenance=about | {"tokens": settings.steps * rows * corpus.row_len})
    _finish(found, out)
    return found


def _continued(nano: Nanochat, out: Path, settings: tuned.Settings, plan: dict[str, Any], corpus: Corpus) -> tuned.Fit:
    """Return an unfinished fit, and put the corpus where it was."""
    state = unfinished(out)
    lens, moments = lens_file.load_unfinished(state, nano.model.lm_head.weight.device)
    _check_recorded(state, lens.provenance, plan, "model, text and settings")
    check_fits(lens, nano.model, nano.fingerprint)
    step = lens.provenance.get("steps_taken")
    try:
        require(type(step) is int and 0 < step <= settings.steps, f"steps_taken is {step!r}")
        corpus.seek(lens.provenance["position"])  # type: ignore[arg-type]  # anything that is no position is refused
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise ValueError(f"the unfinished fit {state} cannot be continued, move it to start anew: {error}") from error
    return tuned.Fit(nano.model, settings, lens, moments, step)  # type: ignore[arg-type]


def measure(
    nano: Nanochat, lenses: list[Lens], text: Text, *, rows: int = 40, show_progress: bool = False
) -> dict[str, dict[int, quality.Quality]]:
    """Return the quality of lenses on rows of text; see `bridge.lenses.quality.measure`.

    Args:
      nano: the model, with its tokenizer.
      lenses: the lenses.
      text: the text, held out from what they were fitted on.
      rows: number of rows.
      show_progress: whether to show a bar.
    """
    device = nano.model.lm_head.weight.device
    chosen = [torch.from_numpy(row)[None].long().to(device) for row in text.corpus(nano).one_pass(rows)]
    with Progress("measuring", len(chosen), "rows", console=_console(show_progress)) as progress:
        return quality.measure(nano.model, lenses, progress.each(chosen))


def load(nano: Nanochat, path: Path) -> JacobianLens | TunedLens:
    """Read a fitted lens onto the device of a model, and check that it is of this model.

    Raises:
      FileNotFoundError, ValueError: as `lens_file.load` and `check_fits`; names the file.
    """
    lens = lens_file.load(path, nano.model.lm_head.weight.device)
    try:
        check_fits(lens, nano.model, nano.fingerprint if "model_fingerprint" in lens.provenance else None)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return lens


def _console(show: bool) -> Console:
    return Console(stderr=True, quiet=not show)
