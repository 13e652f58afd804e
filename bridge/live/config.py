"""Settings of watching a training: which activations, how much of them, and the SAEs that learn from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from bridge import accelerators
from bridge.locations import Checkpoint, Data, FilePath
from bridge.run.layout import Layout
from bridge.settings import WATCH_SHARE, ExcludeTokens, flag, settle
from bridge.training.config import RunConfig
from bridge.training.settings import HookType
from jsae.settings import COUNT, DEAD_AFTER, RATE, SEED, Json, Range, at_least, require

NOMINAL_STEPS = 5000
"""The default learning rate is that of a training of so many batches, and stays constant."""
_SILENT_BATCHES = 256
_SPECIAL = 9  # tokens at the end of every nanochat's vocabulary, the first of them BOS


@dataclass(frozen=True)
class Sizes(Json):
    """Sizes of the model that is watched."""

    n_layer: int
    n_embd: int
    vocab_size: int

    def excluded(self, choice: ExcludeTokens) -> tuple[int, ...]:
        """Return the ids that a choice leaves out: a nanochat's special tokens are the last nine, beginning with BOS.

        Raises:
          ValueError: the vocabulary is too small to have them.
        """
        first = self.vocab_size - _SPECIAL
        require(
            first >= 0 or choice == "nothing",
            f"the model has {self.vocab_size} tokens, and a nanochat's last nine are special: give "
            "exclude_tokens='nothing'",
        )
        return {"bos": (first,), "special": tuple(range(first, self.vocab_size)), "nothing": ()}[choice]


@dataclass(frozen=True)
class WatchConfig(Json):
    """Settings of watching a training. The run directory records them for the commands that read it.

    Raises:
      ConfigError: settings that cannot work; names the field, what was given and what is allowed.
    """

    RESUME: ClassVar[str] = "resume_from=STEP"

    checkpoint: Checkpoint | None = flag(None, "Directory in which the training saves its model.")
    output_dir: FilePath = flag("runs/watch", "Directory of the run that is written.")
    layer: tuple[str, ...] = flag((), "Layers to watch, counted from 0, an SAE each; or 'all'; none is the middle one.")
    hook_type: HookType = flag("resid_post", "Activation of a layer to watch.")
    activation: str = flag("topk", "Architecture of the SAEs.")
    expansion_factor: int = flag(8, "Latents per dimension of the model.", at_least(1, 2**28))
    k: int = flag(32, "Active latents per token, for architectures that have a k.", COUNT)
    every: int = flag(1, "Steps of the training from one that is listened to, to the next.", COUNT)
    tokens: int = flag(2048, "Activations that are taken from such a step.", at_least(1, 2**24))
    share: float = flag(0.05, "Largest part of the training's own time that watching may take.", WATCH_SHARE)
    batch_size: int = flag(2048, "Activations of a batch of the SAEs.", at_least(1, 2**24))
    learning_rate: float | None = flag(None, "Constant rate of the SAEs; none is a rate for these sizes.", RATE)
    dead_after: int | None = flag(
        None, "Activations without firing after which a latent is dead; none is 256 batches.", DEAD_AFTER
    )
    seed: int = flag(0, "Seed of the initial weights, and of which tokens of a step are taken.", SEED)
    exclude_tokens: ExcludeTokens = flag("bos", "Special tokens to leave out: bos, all nine (special), or nothing.")
    drop_sinks: bool = flag(True, "Leave out tokens whose norm exceeds 10 times the 0.9 quantile of their row.")
    place: Literal["process", "sidecar"] = flag(
        "process", "Where SAEs are trained: between the steps of the training, or in a process beside it."
    )
    device: str = flag("cpu", "Device of the SAEs: cpu, cuda or cuda:N.")
    resume_from: int = flag(
        0, "Step from which the training goes on; 0 and -1 begin anew.", Range(-1, 2**31 - 1, "be a step, or -1")
    )
    keep_checkpoints: int | None = flag(None, "Latest checkpoints of the SAEs to keep; none keeps all.", COUNT)
    log_every: int = flag(50, "Batches between lines of metrics.", COUNT)
    data: Data = flag("stdlib", "Text on which later commands read the model: as for training SAEs.")
    tokenizer: FilePath | None = flag(None, "Directory of the tokenizer; none looks beside and above the checkpoint.")

    def __post_init__(self) -> None:
        settle(self)
        accelerators.check_name(self.device)
        require(
            self.checkpoint is not None,
            "checkpoint is not given: name the directory in which the training saves its model, such as checkpoint_dir",
        )
        require(
            self.place == "sidecar" or ":" not in self.device,
            f"device={self.device!r} is another GPU than the training's: give place='sidecar', a process of its own",
        )
        require(
            self._has_k() or self.k == type(self).__dataclass_fields__["k"].default,
            f"k={self.k} means nothing to {self.activation}: leave it out",
        )
        self.run_config()

    @property
    def resume(self) -> bool:
        """True if the run in `output_dir` is continued: the training goes on, and there is one."""
        return self.resume_from > 0 and Layout(self.output_dir).config_file.is_file()

    def run_config(self) -> RunConfig:
        """Return the settings of a training of the same SAEs, as long as the one that gives them their default rate.

        Raises:
          ConfigError: settings of SAEs that cannot work.
        """
        own: dict[str, Any] = {
            name: getattr(self, name)
            for name in (
                *("checkpoint", "tokenizer", "data", "layer", "hook_type", "activation", "expansion_factor"),
                *("batch_size", "exclude_tokens", "drop_sinks", "device", "output_dir", "log_every"),
            )
        }
        own |= {"k": (self.k,)} if self._has_k() else {}
        return RunConfig(
            **own,
            seed=(self.seed,),
            learning_rate=() if self.learning_rate is None else (self.learning_rate,),
            dead_after=min(self.dead_after or _SILENT_BATCHES * self.batch_size, 2**30),
            num_activations=NOMINAL_STEPS * self.batch_size,
            block_size=max(self.batch_size, 65536),
            checkpoint_every=self.batch_size,
        )

    def _has_k(self) -> bool:
        """Return whether the architecture has a k."""
        from jsae.architectures import find

        return "k" in find(self.activation).Config.__dataclass_fields__
