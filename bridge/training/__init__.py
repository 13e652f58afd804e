"""Train SAEs on the activations of a nanochat: `train`, its settings `RunConfig`, and the parts of a run."""

from bridge.training.config import RunConfig
from bridge.training.pipeline import Stopped, train

__all__ = ["RunConfig", "Stopped", "train"]
