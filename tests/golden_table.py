"""Differences between bridge.nanochat and upstream's own outputs: `python -m tests.golden_table` prints the table."""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from bridge import nanochat
from bridge.nanochat.engine import generate
from bridge.nanochat.loss import bits_per_byte, cross_entropy

PREFILL = 192  # tokens that the goldens' caches were filled with before single steps
CHUNKS = (1, 2, 61, 128, 1, 7)  # another way through the same 200 tokens
TOLERANCES = {
    "logits": 2e-4,
    "resid_post": 1e-4,
    "attn_out": 1e-4,
    "mlp_out": 1e-4,
    "final_norm": 1e-4,
    "loss": 2e-4,
    "bpb": 1e-5,
    "prefill": 2e-4,
    "decode": 2e-4,
    "decode_acts": 1e-4,
    "chunks": 2e-4,
    "greedy": 0,
}


def cases(goldens: Path) -> list[Path]:
    """Return the cases of nanochat's master, by date."""
    return sorted(p.parent for p in goldens.glob("20*/case.json"))


def capture(model: nn.Module, run) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the result of run(), and the outputs of every layer, captured by ordinary forward hooks."""
    seen: dict[str, list[Tensor]] = {"resid_post": [], "attn_out": [], "mlp_out": [], "final_norm": []}
    handles = [model.lm_head.register_forward_pre_hook(lambda _, args: seen["final_norm"].append(args[0]))]
    for block in model.transformer.h:
        for name, module in (("resid_post", block), ("attn_out", block.attn), ("mlp_out", block.mlp)):
            handles.append(module.register_forward_hook(lambda _, __, out, name=name: seen[name].append(out)))
    try:
        out = run()
    finally:
        for handle in handles:
            handle.remove()
    return out, {name: torch.stack(acts) for name, acts in seen.items()}


def differences(case: Path) -> dict[str, float]:
    """Return the largest absolute difference per golden; for greedy, the number of tokens that differ."""
    settings = json.loads((case / "case.json").read_text())
    golden = load_file(case / "golden.safetensors")
    model = nanochat.load(case).model
    tokens = golden["tokens"]
    logits, acts = capture(model, lambda: model(tokens))
    batch = (tokens, golden["targets"])
    gaps = {"logits": gap(logits, golden["logits"])}
    gaps |= {name: gap(acts[name], golden[name]) for name in ("resid_post", "attn_out", "mlp_out")}
    gaps["final_norm"] = gap(acts["final_norm"][0], golden["final_norm"])
    gaps["loss"] = gap(cross_entropy(model, *batch), golden["loss"])
    gaps["bpb"] = abs(bits_per_byte(model, [batch], golden["token_bytes"]) - settings["bpb"])
    gaps |= _decode_differences(model, golden, settings["decode_quirks"])
    if "bigram_reserved" not in settings["decode_quirks"]:
        columns = list(generate(model, golden["engine_prompt"].tolist(), max_tokens=16, temperature=0, num_samples=2))
        gaps["greedy"] = (golden["engine_greedy"] != torch.tensor(columns).T).sum().item()
    return gaps


def _decode_differences(model: nn.Module, golden: dict[str, Tensor], quirks: list[str]) -> dict[str, float]:
    """Compare decoding through a cache with upstream's steps, or with its full forward where the two disagree."""
    tokens = golden["tokens"]
    cache = model.new_cache(len(tokens), tokens.size(1))
    prefill = model(tokens[:, :PREFILL], cache=cache)[:, -1]
    steps = [capture(model, lambda t=t: model(tokens[:, t : t + 1], cache=cache)) for t in range(PREFILL, 200)]
    gaps = {"prefill": gap(prefill, golden["prefill_last_logits"])}
    expected = golden["logits"][:, PREFILL:] if quirks else golden["decode_logits"]
    gaps["decode"] = gap(torch.cat([logits for logits, _ in steps], dim=1), expected)
    gaps["decode_acts"] = max(
        gap(
            torch.cat([acts[name] for _, acts in steps], dim=2),
            golden[name][:, :, PREFILL:] if quirks else golden[f"decode_{name}"],
        )
        for name in ("resid_post", "attn_out", "mlp_out")
    )
    cache = model.new_cache(len(tokens), tokens.size(1))
    gaps["chunks"] = gap(torch.cat([model(t, cache=cache) for t in tokens.split(CHUNKS, dim=1)], 1), golden["logits"])
    return gaps


def gap(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest absolute difference. Raises ValueError for unequal shapes."""
    if ours.shape != theirs.shape:
        raise ValueError(f"shapes {tuple(ours.shape)} and {tuple(theirs.shape)} differ")
    return (ours - theirs).abs().max().item()


def main() -> None:
    """Print a line per case."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "../shared/nanochat/goldens")
    print("| case | generation | " + " | ".join(TOLERANCES) + " |")
    print("|---|---|" + "---|" * len(TOLERANCES))
    for case in cases(folder):
        gaps = differences(case)
        cells = [f"{gaps[name]:.2g}" if name in gaps else "-" for name in TOLERANCES]
        generation = json.loads((case / "case.json").read_text())["generation"]
        print(f"| {case.name} | {generation} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
