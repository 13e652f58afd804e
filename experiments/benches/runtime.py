"""Cost of tracking features while a nanochat decodes, and of steering: compared with bare decoding and SAELens.

Random weights in the shapes of nanochat's d12 and d20, a TopK SAE of 8 times the width at the middle layer, cached
decoding. Every case decodes the same tokens from the same position; `tracked` reads the features of all tokens at the
end, `tracked, read every token` after every token, `SAELens` encodes in a forward hook that its user writes.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridge.accelerators import check_name, require_torch
from bridge.locations import FilePath
from bridge.settings import flag
from experiments.benches import models, timing

if TYPE_CHECKING:
    from bridge.nanochat.model import GPT
    from bridge.runtime import InterpretableModel

BARE, TRACKED, EVERY, STEERED, SAELENS = "bare", "tracked", "tracked, read every token", "additive", "SAELens"


@dataclass(frozen=True)
class Config:
    """Models, batches and rounds of the measurement."""

    depths: tuple[int, ...] = flag((12, 20), "Layers; the width is 64 times that.")
    batches: tuple[int, ...] = flag((1, 8), "Rows decoded together.")
    expansion_factor: int = flag(8, "Latents per channel.")
    k: int = flag(32, "Active latents per token.")
    vocab_size: int = flag(32768, "Tokens of the vocabulary.")
    prompt: int = flag(64, "Tokens in the cache before decoding.")
    tokens: int = flag(16, "Tokens decoded per round.")
    rounds: int = flag(15, "Timed rounds, at least 2.")
    threads: int | None = flag(None, "Threads of torch on a CPU; none is torch's default.")
    device: str = flag("auto", "Device; auto is cuda if there is one, else cpu.")
    saelens: bool = flag(True, "Also measure SAELens (extra [test]).")
    out: FilePath = flag("experiments/results/runtime_{device}.json", "File for the results.")

    def __post_init__(self) -> None:
        if self.device != "auto":
            check_name(self.device)
        for name in ("tokens", "prompt", "expansion_factor", "k", "threads"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.rounds < 2:
            raise ValueError(f"rounds must be at least 2, got {self.rounds}")


def main(config: Config) -> int:
    """Measure every shape, print a table, write the results."""
    import torch
    from rich.console import Console

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = config.device if config.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    require_torch(device)
    results = []
    for depth in config.depths:
        with tempfile.TemporaryDirectory() as folder:
            model = models.random_nanochat(depth, config.vocab_size, device)
            im = _interpretable(config, model, Path(folder), device)
            theirs = _saelens(Path(folder), device) if config.saelens else None
            for batch in config.batches:
                results.append({"depth": depth, "batch": batch, **_measure(config, im, theirs, batch)})
                Console().print(_table(results[-1]))
    settings = {
        name: value for name, value in dataclasses.asdict(config).items() if name not in ("device", "out", "threads")
    }
    out = config.out.format(device=device.partition(":")[0])
    timing.write(out, {"machine": timing.machine(device), "settings": settings, "results": results})
    Console().print(f"figures: {out}", soft_wrap=True)
    return 0


def _interpretable(config: Config, model: GPT, folder: Path, device: str) -> InterpretableModel:
    """Return the model with a random SAE, written to files and read back as a trained one is."""
    import numpy as np

    from bridge.hooks import hook_name
    from bridge.runtime import InterpretableModel, load_saes
    from jsae import export
    from jsae.architectures import sae_config

    width = model.config.n_embd
    sae = sae_config("topk", width, width * config.expansion_factor, k=config.k)
    rows = np.random.default_rng(0).standard_normal((sae.d_sae, width), np.float32)
    weights = {
        "W_enc": rows,
        "W_dec": rows,
        "b_enc": np.zeros(sae.d_sae, np.float32),
        "b_dec": np.zeros(width, np.float32),
    }
    name = hook_name(model.config.n_layer // 2, "resid_post")
    export.write(folder / name, sae, weights, 1.0, 1.0, {"hook_name": name})
    return InterpretableModel(model, load_saes(folder, device))


def _saelens(folder: Path, device: str) -> Any:
    """Return the SAE in the same files, read by SAELens."""
    from sae_lens import SAE

    return SAE.load_from_disk(next(folder.iterdir()), device=device)


def _measure(config: Config, im: InterpretableModel, theirs: Any, batch: int) -> dict[str, Any]:
    """Return milliseconds per decoding step of every case, and their ratios to bare decoding."""
    seconds = timing.by_turns(_cases(config, im, theirs, batch), config.rounds)
    steps = {name: [1e3 * s / config.tokens for s in times] for name, times in seconds.items()}
    return {
        "ms_per_step": {name: timing.spread(times) for name, times in steps.items()},
        "ratio_to_bare": timing.ratios(seconds, BARE),
    }


def _cases(config: Config, im: InterpretableModel, theirs: Any, batch: int) -> dict[str, Callable[[], None]]:
    """Return the cases to time: each decodes all tokens once."""
    import torch

    from bridge.hooks import find
    from bridge.runtime import Steer

    (hook,) = im.hooks
    rewind, tokens = _text(config, im.model, batch)

    def decode(after: Callable[[], object] = lambda: None) -> None:
        cache = rewind()
        for i in range(config.tokens):
            im(tokens[:, i : i + 1], cache=cache)
            after()

    def tracked() -> None:
        with im.interpretation_enabled():
            decode()
            im.get_active_features(whole_text=True)

    def read_every_token() -> None:
        with im.interpretation_enabled():
            decode(im.get_active_features)

    def steered() -> None:
        with im.steering_enabled([Steer(hook, 7, "additive", 2.0)]):
            decode()

    def saelens() -> None:
        codes = []
        handle = find(im.model, hook).register_forward_hook(lambda m, i, output: codes.append(theirs.encode(output)))
        try:
            decode()
        finally:
            handle.remove()

    cases = {BARE: decode, TRACKED: tracked, EVERY: read_every_token, STEERED: steered, SAELENS: saelens}
    if theirs is None:
        del cases[SAELENS]

    def synchronized(case: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad():
                case()
            if im.sae().W_enc.is_cuda:
                torch.cuda.synchronize()

        return run

    return {name: synchronized(case) for name, case in cases.items()}


def _text(config: Config, model: GPT, batch: int) -> tuple[Callable[[], Any], Any]:
    """Return a function that resets the cache to the end of the prompt, and the tokens that follow."""
    import torch

    device = model.lm_head.weight.device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (batch, config.prompt + config.tokens), generator=generator).to(device)
    cache = model.new_cache(batch, ids.size(1))
    with torch.no_grad():
        model(ids[:, : config.prompt], cache=cache)
    last = cache.last_token, cache.last_embedding

    def rewind() -> Any:
        cache.position = config.prompt
        cache.last_token, cache.last_embedding = last
        return cache

    return rewind, ids[:, config.prompt :]


def _table(result: dict[str, Any]) -> Any:
    from rich.table import Table

    title = f"d{result['depth']}, batch {result['batch']}"
    table = Table("", "ms per step", "over bare decoding", "quartiles", title=title, title_justify="left")
    for name, step in result["ms_per_step"].items():
        ratio = result["ratio_to_bare"][name]
        over, low, high = (f"{100 * (ratio[key] - 1):+.2f} %" for key in ("median", "q1", "q3"))
        table.add_row(name, f"{step['median']:.3f}", over, f"{low} to {high}")
    return table
