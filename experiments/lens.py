"""Show what a nanochat expects after every layer, by lenses on its residual stream, and fit lenses.

    python -m experiments.lens --run_dir=runs/demo --prompt="def mean(values):"
    python -m experiments.lens --run_dir=runs/demo --latent=7
    python -m experiments.lens --run_dir=runs/demo --fit=jacobian --prompts=100
    python -m experiments.lens --merge=a.pt,b.pt --out=ab.pt
    python -m experiments.lens --run_dir=runs/demo --measure

The logit lens and the direct path need no fit. A Jacobian lens and a tuned lens are fitted on text, by default into
lenses/ of the run, where this command and the explorer find them. --checkpoint stands for a model without a run.
"""

from __future__ import annotations

import dataclasses
import functools
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from bridge.accelerators import check_name, require_torch
from bridge.locations import Checkpoint, Data, FilePath
from bridge.run import Run, commands
from bridge.run.layout import Layout
from bridge.run.model import ModelPath
from bridge.settings import CONTEXT, LONG_SEED, STEP, flag, settle
from experiments import flags, signals
from jsae.settings import COUNT, Range, at_least, require

if TYPE_CHECKING:
    from collections.abc import Callable

    from bridge.lenses import JacobianLens, Lens
    from bridge.lenses.fitting import Text
    from bridge.lenses.lens import FittedLens
    from bridge.nanochat import Nanochat

_RATE = Range(0, 10, "lie in (0, 10]")
_NAMES = ("logit", "direct", "jacobian", "tuned")
_TEXT = {"data", "split", "context_length"}
_OF_ACTION: dict[str, set[str]] = {
    "prompt": {"lens", "show", "layers", "top"},
    "latent": {"lens", "hook", "top"},
    "measure": {"lens", "show", "rows", *_TEXT},
    "merge": {"out"},
    "fit": {"out", "resume", *_TEXT},
}
"""Flags that only some actions have, by action."""
_OF_FIT = {
    "jacobian": {"prompts", "min_prompts", "tolerance", "first_prompt", "batch_size"},
    "tuned": {"steps", "learning_rate", "weight_decay", "rows", "seed"},
}


@dataclass(frozen=True)
class LensConfig:
    """A model, and what to show, fit, merge or measure."""

    run_dir: FilePath | None = flag(None, "A run: its model, its lenses, and the SAEs of --latent.")
    prompt: str = flag("", "Text whose next tokens are shown after every layer; BOS is put before it.")
    latent: int | None = flag(None, "Latent of the run's SAE whose direction is shown.", at_least(0, 2**31 - 1))
    hook: str | None = flag(None, "The SAE of --latent where the run has several.")
    fit: Literal["jacobian", "tuned"] | None = flag(None, "Lens to fit.")
    merge: tuple[FilePath, ...] = flag((), "Files of Jacobian lenses of different prompts to merge, A,B.")
    measure: bool = flag(False, "Print the divergence of lenses from the model on text.")
    lens: tuple[FilePath, ...] = flag((), "Files of fitted lenses; none are those of the run.")
    show: tuple[str, ...] = flag((), f"Lenses to show, any of {','.join(_NAMES)}; none are all there are.")
    layers: tuple[int, ...] = flag((), "Layers to show; none are all.", at_least(0, 1023))
    top: int = flag(1, "Tokens per cell; of --latent at least ten are shown.", at_least(1, 100))
    out: FilePath | None = flag(None, "File of the lens; none is lenses/ of the run.")
    data: Data | None = flag(None, "Text, as for training; none is the run's, else stdlib.")
    split: Literal["train", "heldout", "all"] | None = flag(
        None, "Part of the text; none is train for --fit and heldout for --measure."
    )
    context_length: int = flag(128, "Tokens of a prompt or row of text, BOS first.", CONTEXT)
    prompts: int = flag(1000, "Most prompts of a Jacobian lens.", COUNT)
    min_prompts: int = flag(100, "Prompts before which its fit does not end by itself.", COUNT)
    tolerance: float = flag(2e-3, "It ends when its mean moves by less over ten prompts.", Range(0, 1, "lie in [0, 1]"))
    first_prompt: int = flag(0, "Pieces of text to leave out, for lenses to be merged.", at_least(0, 2**40))
    batch_size: int | None = flag(None, "Channels per backward pass; none is as memory allows.", at_least(1, 2**16))
    resume: bool = flag(False, "Continue an unfinished fit.")
    steps: int = flag(250, "Steps of a tuned lens.", COUNT)
    learning_rate: float = flag(2e-3, "Its learning rate at the start, of Adam; it falls to 0.", _RATE)
    weight_decay: float = flag(0.0, "Pulls its translators to the identity.", Range(0, 1, "lie in [0, 1]"))
    rows: int = flag(4, "Rows of text per step of a tuned lens; --measure reads ten times as many.", at_least(1, 2**16))
    seed: int = flag(0, "Order of the text of a tuned lens.", LONG_SEED)
    checkpoint: Checkpoint | None = flag(None, "The nanochat, as for training; none is the run's.")
    step: int | None = flag(None, "Step of --checkpoint; none is the last.", STEP)
    tokenizer: FilePath | None = flag(None, "Directory of its tokenizer; none looks beside and above the checkpoint.")
    device: str = flag("cpu", "Device of the model.")

    def __post_init__(self) -> None:
        settle(self)
        check_name(self.device)
        require(
            bool(self.merge) or bool(self.run_dir) or self.checkpoint is not None,
            "no model: give --run_dir, or --checkpoint",
        )
        require(len(self._actions) == 1, f"give one of --prompt, --latent, --fit, --merge and --measure{self._given()}")
        require(len(self.merge) != 1, "--merge needs at least two lenses, A,B")
        require(self.latent is None or bool(self.run_dir), "--latent is of a run: give --run_dir")
        require(self.learning_rate > 0, f"learning_rate is {self.learning_rate}: it must be above 0")
        for name in self.show:
            require(name in _NAMES, f"show has {name!r:.60}: choose from {', '.join(_NAMES)}")
        needs_out = bool(self.merge) or (self.fit is not None and not self.run_dir)
        require(not needs_out or self.out is not None, "nowhere to write: give --out, a file")

    @property
    def _actions(self) -> list[str]:
        """The actions that are asked for."""
        asked = {
            "prompt": bool(self.prompt),
            "latent": self.latent is not None,
            "fit": self.fit is not None,
            "merge": bool(self.merge),
            "measure": self.measure,
        }
        return [name for name, value in asked.items() if value]

    def _given(self) -> str:
        return f"; got {' and '.join('--' + name for name in self._actions)}" if self._actions else ""

    def check_given(self, given: set[str]) -> None:
        """Raise ConfigError for flags that the action does not have."""
        (action,) = self._actions
        allowed = _OF_ACTION[action] | (_OF_FIT[self.fit] if self.fit else set())
        limited = set().union(*_OF_ACTION.values(), *_OF_FIT.values())
        for name in sorted((given & limited) - allowed):
            shown = f"--fit={self.fit}" if self.fit else f"--{action}"
            require(False, f"--{name} does nothing with {shown}: leave it out")


def main(config: LensConfig) -> int:
    """Do what is asked for; return the exit code."""
    if config.merge:
        return _merge(config)
    require_torch(config.device)
    nano = _model(config)
    if config.fit is not None:
        return _fit(config, nano)
    if config.latent is not None:
        return _latent(config, nano)
    return _measure(config, nano) if config.measure else _prompt(config, nano)


def _model(config: LensConfig) -> Nanochat:
    """Load the model, in float32."""
    given = {name: getattr(config, name) for name in ("checkpoint", "step", "tokenizer")}
    path = Run(config.run_dir).model_path(**given) if config.run_dir else ModelPath.resolve(given, {})
    nano = path.load(config.device)
    nano.model.float()
    return nano


def _text(config: LensConfig, split: Literal["train", "heldout"]) -> Text:
    from bridge.lenses.fitting import Text

    recorded = Run(config.run_dir).flags if config.run_dir and config.data is None else {}
    data = recorded.get("data", "stdlib") if config.data is None else config.data
    return Text(data, config.split or split, config.context_length)


def _out(config: LensConfig) -> Path:
    if config.out is not None:
        return Path(config.out)
    assert config.run_dir is not None
    assert config.fit is not None
    return Layout(config.run_dir).lens_file(config.fit)


def _fit(config: LensConfig, nano: Nanochat) -> int:
    from bridge.lenses import JacobianLens, fitting, jacobian, tuned

    out, text = _out(config), _text(config, "train")
    fit: Callable[..., FittedLens]
    if config.fit == "tuned":
        of_tuned = tuned.Settings(**flags.shared(tuned.Settings, config))
        fit = functools.partial(fitting.fit_tuned, nano, out, text, of_tuned, rows=config.rows, seed=config.seed)
    else:
        settings = jacobian.Settings(config.prompts, config.min_prompts, config.tolerance, config.batch_size)
        fit = functools.partial(fitting.fit_jacobian, nano, out, text, settings, first_prompt=config.first_prompt)
    try:
        lens = fit(resume=config.resume, stop_requests=signals.stop_requests, show_progress=True)
    except fitting.Stopped:
        command = shlex.join(word for word in sys.argv[1:] if word not in ("--resume", "--resume=true"))
        print(f"stopped; continue with: python -m experiments.lens {command} --resume", flush=True)
        return signals.STOPPED
    if not isinstance(lens, JacobianLens):
        print(f"tuned lens      {out}", flush=True)
        return 0
    first, following = fitting.span(lens)
    print(f"jacobian lens   {out}: {lens.n_prompts} prompts, pieces {first} to {following - 1} of the text", flush=True)
    return 0


def _merge(config: LensConfig) -> int:
    from bridge.lenses import JacobianLens, lens_file

    out = _out(config)
    require(not out.exists(), f"{out} exists: give another --out, or move it")
    lenses = []
    for path in config.merge:
        lens = lens_file.load(path)
        require(isinstance(lens, JacobianLens), f"{path} is a {lens.name} lens: only Jacobian lenses are merged")
        lenses.append(lens)
    merged = lens_file.merge(lenses)  # type: ignore[arg-type]
    lens_file.save(merged, out)
    print(f"jacobian lens   {out}: {merged.n_prompts} prompts", flush=True)
    return 0


def _lenses(config: LensConfig, nano: Nanochat) -> dict[str, Lens]:
    """Return the lenses to show by name: those without a fit, and the fitted ones of the flags or the run."""
    from bridge.lenses import DirectLens, LogitLens, fitting

    found: dict[str, Lens] = {"logit": LogitLens(nano.model), "direct": DirectLens(nano.model)}
    paths = [Path(path) for path in config.lens]
    if config.run_dir and not paths:
        paths = Layout(config.run_dir).lens_files
    for path in paths:
        lens = fitting.load(nano, path)
        require(lens.name not in found, f"{path} is a second {lens.name} lens: give one of each kind")
        found[lens.name] = lens
    for name in config.show:
        require(name in found, f"there is no {name} lens: fit one with --fit={name}, or give its file with --lens")
    return {name: lens for name, lens in found.items() if not config.show or name in config.show}


def _prompt(config: LensConfig, nano: Nanochat) -> int:
    import torch

    from bridge import lenses
    from experiments import lens_view

    ids, context = nano.tokenizer.encode(config.prompt, prepend_bos=True), nano.config.sequence_len
    require(len(ids) <= context, f"the prompt has {len(ids)} tokens, BOS included: the model's context is {context}")
    deepest = nano.config.n_layer - 1
    require(
        max(config.layers, default=0) <= deepest, f"layers has {max(config.layers, default=0)}: the last is {deepest}"
    )
    tokens = torch.tensor(ids, device=config.device)
    chosen, streams = _lenses(config, nano), lenses.read(nano.model, tokens[None])
    for lens in chosen.values():
        found = lenses.table(nano.model, lens, streams, tokens, top=config.top, layers=config.layers)
        lens_view.show_table(found, ids, nano.tokenizer)
    return 0


def _latent(config: LensConfig, nano: Nanochat) -> int:
    from bridge.hooks import parse
    from bridge.lenses import direct_paths, written
    from experiments import lens_view

    assert config.run_dir is not None
    assert config.latent is not None
    sae = Run(config.run_dir).sae(config.hook, config.device)
    hook = sae.metadata.get("hook_name_out") if sae.is_transcoder else sae.metadata.get("hook_name", config.hook)
    require(isinstance(hook, str) and sae.layers == 1, "the SAE does not say what it writes to: no latent can be shown")
    layer, site = parse(hook)
    require(site != "mlp_in", f"an SAE of {hook} writes to what the MLP reads, not to the residual stream")
    require(config.latent < sae.d_sae, f"latent is {config.latent}: the SAE has latents 0 to {sae.d_sae - 1}")
    jacobian: JacobianLens | None = _lenses(dataclasses.replace(config, show=()), nano).get("jacobian")  # type: ignore[assignment]
    found = written(nano.model, sae.W_dec[config.latent], layer, jacobian, max(10, config.top))
    lens_view.show_written(found, hook, direct_paths(nano.model)[layer], jacobian, nano.tokenizer)
    return 0


def _measure(config: LensConfig, nano: Nanochat) -> int:
    from bridge.lenses import fitting
    from experiments import lens_view

    chosen = list(_lenses(config, nano).values())
    found = fitting.measure(nano, chosen, _text(config, "heldout"), rows=10 * config.rows, show_progress=True)
    lens_view.show_quality(found, nano.config.n_layer)
    return 0


def next_commands(config: LensConfig) -> list[str]:
    """Return a command that shows a lens that was fitted."""
    model = {name: getattr(config, name) for name in ("run_dir", "checkpoint", "step", "tokenizer")}
    return commands.after_lens(config.fit, None if config.out is None else Path(config.out), **model)


if __name__ == "__main__":
    flags.run(LensConfig, main, after=next_commands)
