"""Continue a prompt with and without pushing features of a trained SAE, side by side.

    python -m experiments.steer --run_dir=runs/demo --prompt="def " --feature=123 --strength=8 --mode=clamp

Without --feature it shows what fires on the prompt. --interactive reads prompts and commands; try /help.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from bridge import ranges
from bridge.accelerators import check_name, require_torch
from bridge.locations import Checkpoint, FilePath
from bridge.run import Run, commands
from bridge.settings import LONG_SEED, STEP, flag, settle
from experiments import flags
from jsae.settings import COUNT, Range, at_least, require

if TYPE_CHECKING:
    from bridge.runtime import InterpretableModel, Steer


STRENGTH = Range(-ranges.LONGEST, ranges.LONGEST, f"be finite, between -{ranges.LONGEST:g} and {ranges.LONGEST:g}")
TEMPERATURE = Range(1e-6, 1e6, "be 0, or from 1e-6 to 1e6", also=(0,))


@dataclass(frozen=True)
class SteerConfig:
    """The prompt, its continuation, and the features that are steered."""

    run_dir: FilePath = dataclasses.field(metadata={"help": "A run directory, or with --checkpoint any exported SAE."})
    prompt: str = flag("", "Text to continue; with --chat the user's message.")
    feature: tuple[int, ...] = flag((), "Features to push, in this order.")
    strength: tuple[float, ...] = flag((8.0,), "Strength of each feature, or one for all.", STRENGTH)
    mode: Literal["additive", "orthogonal", "projection_cap", "clamp", "scale", "ablate"] = flag(
        "additive", "Kind of steering; bridge.steering.Steer has the formulas."
    )
    positions: Literal["all", "prompt", "generated", "not_special"] = flag("all", "Tokens at which to steer.")
    strength_multiplier: float = flag(1.0, "Factor on strengths of additive, orthogonal and projection_cap.", STRENGTH)
    hook: str | None = flag(None, "Hook of the SAE, for a run with several SAEs.")
    max_tokens: int = flag(64, "Most tokens to generate.", at_least(1, 2**24))
    temperature: float = flag(0.5, "Temperature of the sampling; 0 takes the likeliest token.", TEMPERATURE)
    top_k: int | None = flag(None, "Sample among this many likeliest tokens; none is all.", COUNT)
    seed: int = flag(16, "Seed of the sampling, the same for both continuations.", LONG_SEED)
    chat: bool = flag(False, "The prompt is a user's message to a chat checkpoint.")
    interactive: bool = flag(False, "Read prompts, and commands such as /steer, /top, /why.")
    checkpoint: Checkpoint | None = flag(None, "The nanochat, as for training; none is the run's.")
    step: int | None = flag(None, "Step of --checkpoint; none is the last.", STEP)
    tokenizer: FilePath | None = flag(None, "Directory of its tokenizer; none looks beside and above the checkpoint.")
    device: str = flag("cpu", "Device of the model.")

    def __post_init__(self) -> None:
        require(all(map(math.isfinite, self.strength)), f"--strength is {self.strength}: give finite numbers")
        settle(self)
        check_name(self.device)
        strengths, features = len(self.strength), len(self.feature)
        require(
            strengths == 1 or strengths == features,
            f"--strength has {strengths} values for {features} features: give one for each, or one for all",
        )
        require(self.interactive or bool(self.prompt), "the prompt is empty: give --prompt=TEXT, or --interactive")
        self._check_ranges()

    def _check_ranges(self) -> None:
        """Raise ValueError for numbers that the runtime would refuse when the model is loaded."""
        ranges.check_temperature(self.temperature, "--temperature")
        ranges.check_seed(self.seed, "--seed")
        ranges.check_number("--strength_multiplier", self.strength_multiplier, -ranges.LONGEST, ranges.LONGEST)
        for name in ("max_tokens", "top_k"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"--{name} is {value}: it must be at least 1")
        factor = self.strength_multiplier if self.mode in ranges.MULTIPLIED else 1.0
        for strength in self.strength:
            ranges.check_strength(self.mode, strength, "--strength")
            ranges.check_strength(self.mode, factor * strength, "--strength times --strength_multiplier")
        ranges.check_product([(self.mode, factor * strength) for strength in self.strengths], "--strength")

    @property
    def strengths(self) -> tuple[float, ...]:
        """The strength of each feature."""
        return self.strength * len(self.feature) if len(self.strength) == 1 else self.strength


def main(config: SteerConfig) -> int:
    """Load the model and its SAEs, then continue the prompt, or read prompts."""
    require_torch(config.device)
    im = _load(config)
    hook = _hook(config, im)
    from experiments.prompt_loop import Session, Settings, ask

    session = Session(im, hook, Settings(**flags.shared(Settings, config)), _requests(config, hook))
    if config.prompt:
        session.prompt(config.prompt)
    if config.interactive:
        ask(session)
    return 0


def _load(config: SteerConfig) -> InterpretableModel:
    """Return the run's model, or the one of the flags, with the run's SAEs."""
    from bridge.run.exports import warn_of_marked
    from bridge.runtime import InterpretableModel

    run = Run(config.run_dir)
    model = run.model_path(checkpoint=config.checkpoint, step=config.step, tokenizer=config.tokenizer)
    saes = run.saes(config.device)
    warn_of_marked([run.path])  # an exported SAE by itself
    run.warn_of_marked(saes)
    nano = model.load(config.device)
    if config.chat:
        flags.warn_of_base(nano)
    return InterpretableModel.from_nanochat(nano, saes)


def _hook(config: SteerConfig, im: InterpretableModel) -> str:
    if config.hook is None:
        require(len(im.hooks) == 1, f"{config.run_dir} has several SAEs: choose one with --hook={'|'.join(im.hooks)}")
        return im.hooks[0]
    im.sae(config.hook)
    return config.hook


def _requests(config: SteerConfig, hook: str) -> list[Steer]:
    from bridge.runtime import Steer

    pairs = zip(config.feature, config.strengths, strict=True)
    return [Steer(hook, index, config.mode, strength, config.positions) for index, strength in pairs]


def next_commands(config: SteerConfig) -> list[str]:
    """Return commands to steer further and to explore."""
    model = {name: getattr(config, name) for name in ("checkpoint", "step", "tokenizer")}
    return commands.after_steering(Path(config.run_dir), config.hook, bool(config.feature), **model)


if __name__ == "__main__":
    flags.run(SteerConfig, main, after=next_commands)
