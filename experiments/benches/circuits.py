"""Cost of an attribution graph: operations counted and time, for a nanochat and transcoders with random weights.

The shapes are those of nanochat's d20 with transcoders of 8 times the width. Thresholds are chosen so that the wanted
number of features is active on a random prompt. With `--rows_per_layer` only so many rows of each layer are computed,
from which the operations of all rows follow; without it the whole graph is computed, pruned and timed.
"""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bridge.accelerators import check_name, require_torch
from bridge.locations import FilePath
from bridge.settings import flag, settle
from experiments.benches import models, timing
from jsae.settings import COUNT, at_least

if TYPE_CHECKING:
    import torch

    from bridge.circuits.replacement import Replacement
    from bridge.nanochat.model import GPT
    from bridge.torch_sae import TorchSAE


LARGEST_BATCH = 512
"""Rows of a backward pass that `trace` computes together where memory allows."""


@dataclass(frozen=True)
class Config:
    """Model, prompt and features of the measurement."""

    depth: int = flag(20, "Layers; the width is 64 times that.", at_least(2, 128))
    vocab_size: int = flag(32768, "Tokens of the vocabulary.", at_least(64, 2**20))
    tokens: int = flag(17, "Tokens of the prompt, the first of which stands for BOS.", at_least(3, 2**14))
    features: int = flag(10_000, "Active features on all tokens but the first, together.", COUNT)
    expansion_factor: int = flag(8, "Latents per channel.", COUNT)
    rows_per_layer: int | None = flag(None, "Compute so many rows of each layer only; none is all.", COUNT)
    batch_size: int | None = flag(None, "Rows per backward pass; none is as `trace` chooses.", COUNT)
    device: str = flag("auto", "Device; auto is cuda if there is one, else cpu.")
    out: FilePath = flag("experiments/results/circuits_{device}.json", "File for the results.")

    def __post_init__(self) -> None:
        settle(self)
        if self.device != "auto":
            check_name(self.device)


def main(config: Config) -> int:
    """Build model and transcoders, count or time rows, print and write the results."""
    import torch

    device = config.device if config.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    require_torch(device)
    torch.manual_seed(0)
    model = models.random_nanochat(config.depth, config.vocab_size, device).float()
    tokens = torch.randint(1, config.vocab_size, (config.tokens,), device=device)
    tokens[0] = 0
    transcoders = _transcoders(config, model, tokens)
    result = _sampled(config, model, transcoders, tokens) if config.rows_per_layer else None
    result = result or _whole(config, model, transcoders, tokens)
    for name, value in result.items():
        print(f"{name:22} {value:,.4g}", flush=True)
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in ("device", "out")}
    out = config.out.format(device=device.partition(":")[0])
    timing.write(out, {"machine": timing.machine(device), "settings": settings, "results": result})
    print(f"figures: {out}")
    return 0


def _transcoders(config: Config, model: GPT, tokens: torch.Tensor) -> dict[str, TorchSAE]:
    """Return random skip transcoders of all layers, with thresholds that leave the wanted number of features."""
    import torch

    from bridge.hooks import capture, hook_name
    from bridge.torch_sae import TorchSAE

    width = model.config.n_embd
    size, each = width * config.expansion_factor, config.features // config.depth
    names = [hook_name(layer, "mlp_in") for layer in range(config.depth)]
    with torch.no_grad(), capture(model, names) as acts:
        model(tokens[None])
    transcoders = {}
    for layer, name in enumerate(names):
        rows = torch.randn(size, width, device=tokens.device) / width**0.5
        pre = acts[name][0, 1:].float() @ rows.T
        threshold = pre.flatten().topk(each + 1).values[-2:].mean().clamp(min=0)
        weights = {"W_enc": rows.T, "W_dec": torch.nn.functional.normalize(rows, dim=1)}
        weights |= {"b_enc": rows.new_zeros(size), "b_dec": rows.new_zeros(width)}
        weights |= {"threshold": threshold.expand(size).clone(), "W_skip": rows[:width] / 2}
        hooks = {"hook_name": name, "hook_name_out": hook_name(layer, "mlp")}
        cfg = {"architecture": "jumprelu_skip_transcoder", "d_in": width, "d_out": width, "d_sae": size}
        transcoders[name] = TorchSAE(cfg | {"metadata": hooks}, weights).eval()
    return transcoders


def _sampled(config: Config, model: GPT, transcoders: dict[str, TorchSAE], tokens: torch.Tensor) -> dict[str, float]:
    """Count the operations of some rows of every layer; return those of all rows.

    A batch of rows costs its forward pass and as much for each row: twice as many rows tell the two apart.
    """
    from bridge.circuits.replacement import Replacement

    r = Replacement(model, transcoders, tokens, (0,))
    count, batch = config.rows_per_layer or 1, config.batch_size or LARGEST_BATCH
    total = 0.0
    for layer in range(r.depth):
        few, many = (_operations(r, layer, size) for size in (count, 2 * count))
        each = (many - few) / count
        of_layer = r.of_layer(layer)
        rows = of_layer.stop - of_layer.start
        total += rows * each + math.ceil(rows / batch) * (few - count * each)
    return _sizes(r) | {"TFLOP of all rows": total / 1e12}


def _operations(r: Replacement, layer: int, count: int) -> int:
    """Return the floating-point operations of a batch of rows, evenly spread over the features of a layer."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from bridge.circuits.rows import direct_effects

    of_layer = r.of_layer(layer)
    part = torch.linspace(of_layer.start, of_layer.stop - 1, count, device=r.features.device).long()
    positions = r.features[part, 1]
    positions[-1] = r.length - 1  # as in a large batch, the pass runs over the whole prompt
    with FlopCounterMode(display=False) as counter:
        direct_effects(r, layer, r.encoders(layer, r.features[part, 2]), positions)
    return counter.get_total_flops()


def _whole(config: Config, model: GPT, transcoders: dict[str, TorchSAE], tokens: torch.Tensor) -> dict[str, float]:
    """Compute and prune the whole graph, the second time with a clock."""
    from bridge.circuits import prune, trace
    from bridge.circuits.tracing import Limits

    limits = Limits(max_features=config.features, batch_size=config.batch_size)
    trace(model, transcoders, tokens, untrained=(0,), limits=limits)
    start = time.perf_counter()
    traced = trace(model, transcoders, tokens, untrained=(0,), limits=limits)
    _wait(tokens)
    middle = time.perf_counter()
    prune(traced.graph)
    _wait(tokens)
    times = {"seconds to trace": middle - start, "seconds to prune": time.perf_counter() - middle}
    residual = float(traced.graph.residuals().max())
    return _sizes(traced.replacement) | times | {"largest residual": residual}


def _sizes(r: Replacement) -> dict[str, float]:
    rows = len(r.features)
    return {"features": rows, "sources": r.sources, "GiB of the matrix": 4 * rows * r.sources / 2**30}


def _wait(tokens: torch.Tensor) -> Any:
    """Wait until a GPU has finished."""
    import torch

    return torch.cuda.synchronize() if tokens.is_cuda else None
