"""Small checkpoints of one nanochat over its training and its tuning, as upstream lays them out."""

import shutil
from pathlib import Path

import torch
from tiny_nanochat import SIZES, tiny, write

from bridge.nanochat import locate
from bridge.nanochat.model import GPT

TOKENIZER = locate.find("demo").tokenizer
VOCABULARY = 4096
STEPS = (100, 200)


def model(change: float, seed: int, **sizes: int) -> GPT:
    """A tiny nanochat with the demo's vocabulary; `change` moves its weights away from those of all others."""
    made = tiny("G7", **({"vocab_size": VOCABULARY} | sizes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in made.parameters():
            if weight.ndim > 1:
                weight += change * weight.std() * torch.randn(weight.shape, generator=generator)
    return made


def write_series(root: Path) -> Path:
    """Write base_checkpoints/d4 with two steps, chatsft_checkpoints/d4 with one, and the tokenizer; return the root."""
    for step in STEPS:
        write(root / "base_checkpoints" / "d4", model(20 / step, step), "G7", step)
    write(root / "chatsft_checkpoints" / "d4", model(0.05, 1), "G7", 50)
    shutil.copytree(TOKENIZER, root / "tokenizer")
    return root


def flag(root: Path) -> tuple[str, ...]:
    """Return `--checkpoints` with all of them."""
    return (f"{root}/base_checkpoints/d4@100", "200", f"sft={root}/chatsft_checkpoints/d4")


WIDTH = SIZES["n_embd"]
