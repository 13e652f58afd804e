"""Fine-tune an exported SAE so that the model's output changes less where its reconstruction is put in.

    python -m experiments.finetune --sae=runs/demo --out=runs/demo-kl
    python -m experiments.finetune --sae=hf://owner/name/folder --checkpoint=DIR --data=chats.jsonl --out=runs/tuned

Model, text and tokens that are left out are those of the run that the SAE belongs to, where they are not given. The new
directory is a run: `evaluate`, `explore`, `export` and `steer` take it as --run_dir.
"""

from bridge.finetuning import FinetuneConfig, finetune
from bridge.run import Run, commands
from experiments import flags


def main(config: FinetuneConfig) -> int:
    """Fine-tune, export and measure; return the exit code."""
    finetune(config)
    return 0


def next_commands(config: FinetuneConfig) -> list[str]:
    """Return what to do next with the run."""
    return commands.after_training(Run(config.out).path)


if __name__ == "__main__":
    flags.run(FinetuneConfig, main, after=next_commands)
