"""Train the series of checkpoints in `tests/data/series`: a tiny nanochat at log-spaced steps, and its chat training.

    python -m tests.series tests/data/series

writes base_checkpoints/d4 and chatsft_checkpoints/d4, the latter with one step, and the tokenizer. The text is the
standard library of the interpreter, so another version of Python gives slightly other models.
"""

import json
import sys
from pathlib import Path
from typing import Any

from experiments.pretrain import PretrainConfig, main

STEPS = tuple(2**n for n in range(4, 13))
"""Steps of the base model that are kept."""

SHARED: dict[str, Any] = {
    "vocab_size": 1024,
    "n_layer": 4,
    "n_embd": 64,
    "n_head": 2,
    "n_kv_head": 2,
    "sequence_len": 256,
    "window_pattern": "SSSL",
    "batch_rows": 16,
    "micro_rows": 8,
    "save_bf16": True,
    "eval_every": 512,
    "eval_rows": 32,
    "log_every": 128,
}


def train(out: Path, steps: tuple[int, ...] = STEPS, sft_steps: int = 400) -> None:
    """Train the series into a directory."""
    base, sft = out / "base_checkpoints" / "d4", out / "chatsft_checkpoints" / "d4"
    rates = {"matrix_lr": 0.03, "embedding_lr": 0.3, "head_lr": 0.02, "warmdown": 0.6}
    main(PretrainConfig(out=str(base), data="stdlib", steps=steps[-1], keep_steps=steps, **rates, **SHARED))
    rates = {"matrix_lr": 0.006, "embedding_lr": 0.06, "head_lr": 0.004, "scalar_lr": 0.004, "warmdown": 0.9}
    learned: dict[str, Any] = {"init_from": str(base), "learned": "assistant", "data": "stdlib_chats"}
    main(PretrainConfig(out=str(sft), steps=sft_steps, **learned, **rates, **SHARED))
    for state in out.rglob("optim_*"):
        state.unlink()
    for meta in out.rglob("meta_*.json"):
        forget_paths(meta, out)
    (base / "tokenizer").rename(out / "tokenizer")
    for file in (sft / "tokenizer").iterdir():
        file.unlink()
    (sft / "tokenizer").rmdir()


def forget_paths(meta: Path, out: Path) -> None:
    """Name the folders in a meta file as they lie in the series, so that it does not depend on the machine."""
    told = json.loads(meta.read_text())
    for name in ("out", "init_from"):
        if told["user_config"][name] is not None:
            told["user_config"][name] = Path(told["user_config"][name]).resolve().relative_to(out.resolve()).as_posix()
    meta.write_text(json.dumps(told, indent=2))


if __name__ == "__main__":
    train(Path(sys.argv[1]))
