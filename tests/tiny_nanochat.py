"""Tiny nanochats of every generation, with weights that never change, and their files as upstream writes them."""

import json
import zlib
from pathlib import Path

import numpy as np
import torch

from bridge.nanochat.model import GPT, GPTConfig

SIZES = {"sequence_len": 400, "vocab_size": 50, "n_layer": 4, "n_head": 4, "n_kv_head": 2, "n_embd": 32}
# Files of width 32 need the settings of the training script of their generation to be distinguishable.
USER_CONFIG = {
    "G4": {"depth": 4, "eval_tokens": 10485760},
    "G5": {"depth": 4, "eval_tokens": 41943040, "fp8": False},
}


def tiny(generation: str, **fields) -> GPT:
    """A model whose every weight is far from zero, the same on every machine."""
    model = GPT(GPTConfig.of_generation(generation, **(SIZES | fields)))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(tuple(weight.shape))
            scale = 0.3 if weight.ndim == 1 else weight.size(1) ** -0.5
            scale *= 4 if "lm_head" in name else 1  # so that the softcap shows
            weight.copy_(torch.from_numpy(values * scale) + (weight.ndim == 1))
    return model.eval().requires_grad_(False)


def tokens(length: int, rows: int = 2) -> torch.Tensor:
    """Token ids (rows, length), the same on every machine."""
    return torch.from_numpy(np.random.default_rng(7).integers(0, SIZES["vocab_size"], (rows, length)))


def model_config(model: GPT) -> dict:
    """Return the model settings that upstream stores: sizes, and the pattern of windows where its version has one."""
    names = ["sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd"]
    names += ["window_pattern"] if model.config.window != "none" else []
    return {name: getattr(model.config, name) for name in names}


def write(directory: Path, model: GPT, generation: str, step: int = 0, **meta) -> Path:
    """A base checkpoint of the model, the way the scripts of its time wrote it; meta replaces keys of the meta file."""
    directory.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), directory / f"model_{step:06d}.pt")
    told = {
        "step": step,
        "val_bpb": 3.0,
        "model_config": model_config(model),
        "user_config": USER_CONFIG.get(generation, {"depth": 4}),
        "device_batch_size": 2,
        "max_seq_len": model.config.sequence_len,
    }
    (directory / f"meta_{step:06d}.json").write_text(json.dumps(told | meta, indent=2))
    return directory
