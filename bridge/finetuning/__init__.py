"""Fine-tune an exported SAE by the output of its model: `finetune` and its settings `FinetuneConfig`."""

from bridge.finetuning.config import FinetuneConfig
from bridge.finetuning.pipeline import finetune

__all__ = ["FinetuneConfig", "finetune"]
