"""A model and a training loop as nanochat's base_train.py has them, written anew and tiny. Also a script.

    python tests/upstream_loop.py '{"steps": 6, "folder": "…", "watch": {"layer": ["1"], …}}'

The loop accumulates gradients, compiles the model, wraps it for several processes, saves at the top of a step, and
resumes. What concerns the watcher are the three lines that docs/guides/watch.md shows.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

VOCAB, WIDTH, LAYERS, LENGTH = 96, 32, 3, 24


def norm(x: torch.Tensor) -> torch.Tensor:
    return functional.rms_norm(x, (x.size(-1),))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        for name in ("c_q", "c_k", "c_v", "c_proj"):
            setattr(self, name, nn.Linear(width, width, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, C = x.shape

        def split(y: torch.Tensor) -> torch.Tensor:
            return y.view(B, T, self.heads, C // self.heads).transpose(1, 2)

        q, k, v = norm(split(self.c_q(x))), norm(split(self.c_k(x))), split(self.c_v(x))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(functional.relu(self.c_fc(x)).square())


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.attn, self.mlp = Attention(width, 4), MLP(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(norm(x))
        return x + self.mlp(norm(x))


class GPT(nn.Module):
    """A nanochat of the generation G2, as far as its training is concerned: `model(x, y)` is the loss."""

    def __init__(self, width: int = WIDTH, layers: int = LAYERS):
        super().__init__()
        blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(VOCAB, width), "h": blocks})
        self.lm_head = nn.Linear(width, VOCAB, bias=False)
        self.resid_lambdas, self.x0_lambdas = nn.Parameter(torch.ones(layers)), nn.Parameter(torch.full((layers,), 0.1))

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        x = x0 = norm(self.transformer.wte(idx))
        for i, block in enumerate(self.transformer.h):
            x = block(self.resid_lambdas[i] * x + self.x0_lambdas[i] * x0)
        logits = 15 * torch.tanh(self.lm_head(norm(x)).float() / 15)
        return logits if targets is None else functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def batch(step: int, micro_step: int, rank: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows of a text that repeats itself, beginning with BOS; the same for the same arguments."""
    generator = torch.Generator().manual_seed(1_000_003 * step + 1009 * micro_step + rank)
    starts = torch.randint(0, 80, (rows, 1), generator=generator)
    ids = (starts + 7 * torch.arange(LENGTH) + torch.randint(0, 3, (rows, LENGTH), generator=generator)) % 80
    ids = torch.cat([torch.full((rows, 1), VOCAB - 9), ids], dim=1)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def evaluate(model: nn.Module) -> float:
    model.eval()
    with torch.no_grad():
        loss = model(*batch(10**6, 0, 0, 2)).item()
    model.train()
    return loss


def train(
    folder: Path,
    steps: int,
    watch: dict[str, Any] | None = None,
    *,
    resume_from_step: int = -1,
    save_every: int = 4,
    accumulate: int = 2,
    rows: int = 4,
    compiler: str | None = None,
    ddp: bool = False,
    stop_at: int | None = None,
    on_step: Any = None,
) -> dict[str, Any]:
    """Train, save and resume as upstream does; return the losses of all micro-steps, the model and the watcher."""
    rank = int(os.environ.get("RANK", "0")) if ddp else 0
    checkpoint_dir = folder / "base_checkpoints" / "d3"
    torch.manual_seed(0)
    orig_model = GPT()
    optimizer = torch.optim.AdamW(orig_model.parameters(), 3e-3)
    if resume_from_step != -1:
        saved = torch.load(checkpoint_dir / f"model_{resume_from_step:06d}.pt")
        orig_model.load_state_dict(saved["model"], assign=False)
        optimizer.load_state_dict(saved["optimizer"])
    model: nn.Module = orig_model
    if ddp:
        model = nn.parallel.DistributedDataParallel(model)
    if compiler is not None:
        model = torch.compile(model, dynamic=False, backend=compiler)
    watcher = None
    if watch is not None:
        from bridge.live import Watcher

        watcher = Watcher(model, checkpoint=checkpoint_dir, resume_from=resume_from_step, **watch)
    losses, step = [], max(resume_from_step, 0)
    while True:
        last_step = step == steps
        if watcher is not None:
            watcher.step(step)
        if step % 3 == 0:
            evaluate(model if not ddp else orig_model)
        if last_step or (step > 0 and step != resume_from_step and step % save_every == 0):
            weights = orig_model.state_dict()
            if rank == 0:
                checkpoint_dir.mkdir(parents=True, exist_ok=True)
                saved = {"model": weights, "optimizer": optimizer.state_dict()}
                torch.save(saved, checkpoint_dir / f"model_{step:06d}.pt")
        if last_step or step == stop_at:
            break
        for micro_step in range(accumulate):
            loss = model(*batch(step, micro_step, rank, rows))
            losses.append(loss.item())
            (loss / accumulate).backward()
        optimizer.step()
        model.zero_grad(set_to_none=True)
        step += 1
        if on_step is not None:
            on_step(step, orig_model)
    return {"losses": losses, "model": orig_model, "watcher": watcher}


def main() -> None:
    arguments = json.loads(sys.argv[1])
    folder, kill_at = Path(arguments.pop("folder")), arguments.pop("kill_at", None)
    torch.set_num_threads(1)
    if arguments.get("ddp"):
        torch.distributed.init_process_group("gloo")

    def on_step(step: int, model: nn.Module) -> None:
        if step == kill_at:
            os.kill(os.getpid(), 9)

    result = train(folder, on_step=on_step, **arguments)
    if result["watcher"] is not None:
        result["watcher"].close()
    print("result " + json.dumps({"losses": result["losses"]}), flush=True)
    if arguments.get("ddp"):
        torch.distributed.destroy_process_group()
        os._exit(0)  # gloo's threads may still hold tensors, and abort the process when Python takes itself down


if __name__ == "__main__":
    main()
