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
    """The location of a nanochat, as flags give it."""

    checkpoint: str
    """A checkpoint, `hf://…` or `demo`."""
    step: int | None = None
    """None is the last one."""
    tokenizer: str | None = None
    """Directory of the tokenizer; None looks beside and above the checkpoint."""

    @classmethod
    def resolve(cls, given: Mapping[str, Any], recorded: Mapping[str, Any]) -> ModelPath:
        """Return the location that a user gives, completed by the flags of a run.

        If a checkpoint is given, the recorded step and tokenizer are ignored: they belong to another one.

        Args:
          given: "checkpoint", "step" and "tokenizer"; None for what the user does not give.
          recorded: flags of a run.

        Raises:
          ConfigError: neither names a checkpoint.
        """
        if given.get("checkpoint") is not None:
            recorded = {}
        names = ("checkpoint", "step", "tokenizer")
        values = {name: recorded.get(name) if given.get(name) is None else given[name] for name in names}
        require(isinstance(values["checkpoint"], str), "no checkpoint is recorded: give it with --checkpoint")
        return cls(**values)

    def load(self, device: str | torch.device = "cpu") -> Nanochat:
        """Load the model with its tokenizer, and warn of weights that are not finite.

        Raises:
          FileNotFoundError: no such checkpoint.
          ConfigError: it has no tokenizer.
          ValueError: it is broken, or not a nanochat.
        """
        import bridge.nanochat
        from bridge import finite

        nano = bridge.nanochat.load(self.checkpoint, self.step, device, tokenizer=self.tokenizer)
        finite.warn_of_broken_weights(nano.model)
        require(
            nano.tokenizer is not None,
            f"there is no tokenizer beside {self.checkpoint}: give its directory with --tokenizer",
        )
        return nano

    def layers(self) -> int:
        """Return the number of layers; the tokenizer may be missing."""
        import bridge.nanochat

        return bridge.nanochat.load(self.checkpoint, self.step, tokenizer=self.tokenizer).config.n_layer
