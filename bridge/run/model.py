"""The nanochat that a run was trained on, or that a user names instead. No torch before it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jsae.settings import require

if TYPE_CHECKING:
    import torch

    from bridge.nanochat import Nanochat


@dataclass(frozen=True)
class ModelPath:
    """Where a nanochat lies, as flags say it."""

    checkpoint: str
    """A checkpoint, `hf://…` or `demo`."""
    step: int | None = None
    """None is the last one."""
    tokenizer: str | None = None
    """Directory of the tokenizer; None looks beside and above the checkpoint."""

    @classmethod
    def of(cls, given: Mapping[str, Any], recorded: Mapping[str, Any]) -> ModelPath:
        """Return what a user gives, completed by what a run recorded.

        Where a checkpoint is given, the recorded step and tokenizer are those of another one and do not count.

        Args:
          given: "checkpoint", "step" and "tokenizer"; None where the user says nothing.
          recorded: flags of a run.

        Raises:
          ConfigError: neither names a checkpoint.
        """
        if given.get("checkpoint") is not None:
            recorded = {}
        names = ("checkpoint", "step", "tokenizer")
        values = {name: recorded.get(name) if given.get(name) is None else given[name] for name in names}
        require(isinstance(values["checkpoint"], str), "no checkpoint is recorded: say with --checkpoint which it is")
        return cls(**values)

    def load(self, device: str | torch.device = "cpu") -> Nanochat:
        """Load the model with its tokenizer, and warn of weights that are not finite.

        Raises:
          FileNotFoundError: no such checkpoint.
          ConfigError: it has no tokenizer.
          ValueError: it is broken, or no nanochat.
        """
        import bridge.nanochat
        from bridge import finite

        nano = bridge.nanochat.load(self.checkpoint, self.step, device, tokenizer=self.tokenizer)
        finite.warn_of_broken_weights(nano.model)
        require(
            nano.tokenizer is not None,
            f"no tokenizer lies beside {self.checkpoint}: give its directory with --tokenizer",
        )
        return nano

    def layers(self) -> int:
        """Return the number of layers; a missing tokenizer is no matter here."""
        import bridge.nanochat

        return bridge.nanochat.load(self.checkpoint, self.step, tokenizer=self.tokenizer).config.n_layer
