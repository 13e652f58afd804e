"""Write data/upstream.safetensors: outputs of upstream's own code on the tiny nanochats.

`python tests/upstream_table.py CLONE` runs every commit in `COMMITS` of a clone of karpathy/nanochat, on the processor
and in float32, with the weights and tokens of `tiny_nanochat`. Only the outputs are kept, so that a clone of this
repository alone can hold every generation to upstream.
"""

import importlib
import io
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import torch
from golden_table import capture
from safetensors.torch import save_file
from tiny_nanochat import model_config, tiny, tokens
from torch import Tensor

FILE = Path(__file__).parent / "data" / "upstream.safetensors"
COMMITS = {
    "G0": "3a5e0bc",
    "G1": "2c4473d",
    "G2": "201d705",
    "G3": "d58fcd9",
    "G4": "348fbb3",
    "G4e": "d5418ea",
    "G5": "324e69c",
    "G6": "6ed7d1d",
    "G7": "92d63d4",
}
LENGTH = 300  # beyond every short window of the tiny nanochats, which have a sequence_len of 400
POSITIONS = (0, 1, 130, 299)
PROMPT, CONTINUATION = 24, 16


def outputs(model: torch.nn.Module) -> dict[str, Tensor]:
    """Return logits (p, v), layer outputs (l, p, d) and final norm (p, d) at `POSITIONS` of the second row."""
    with torch.no_grad():
        logits, acts = capture(model, lambda: model(tokens(LENGTH)))
    positions = list(POSITIONS)
    acts["final_norm"] = acts["final_norm"][0, 1, positions]
    layers = {name: acts[name][:, 1, positions] for name in ("resid_post", "attn_out", "mlp_out")}
    return {"logits": logits[1, positions], **layers, "final_norm": acts["final_norm"]}


def losses(model: torch.nn.Module) -> Tensor:
    """Return upstream's loss (t,) per token of the second row."""
    ids = tokens(LENGTH + 1)
    with torch.no_grad():
        loss = model(ids[:, :-1], ids[:, 1:].contiguous(), loss_reduction="none")
    return loss.reshape(2, LENGTH)[1]


def _upstream(folder: Path, generation: str) -> torch.nn.Module:
    """Return upstream's model with the weights of the tiny nanochat."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "nanochat"]:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    try:
        gpt = importlib.import_module("nanochat.gpt")
    finally:
        sys.path.remove(str(folder))
    ours = tiny(generation)
    model = gpt.GPT(gpt.GPTConfig(**model_config(ours)))
    for weight in model.parameters():  # some are bfloat16 there; the rope tables stay as they are
        weight.data = weight.data.float()
    model.load_state_dict(ours.state_dict())
    return model.eval()


def main() -> None:
    """Write the table."""
    torch.set_num_threads(1)
    table = {}
    for generation, commit in COMMITS.items():
        archive = subprocess.run(
            ["git", "-C", sys.argv[1], "archive", commit, "nanochat"], check=True, capture_output=True
        ).stdout
        with tempfile.TemporaryDirectory() as folder:
            with tarfile.open(fileobj=io.BytesIO(archive)) as files:
                files.extractall(folder, filter="data")
            model = _upstream(Path(folder), generation)
            prompt = tokens(PROMPT)[0].tolist()
            greedy = torch.tensor(list(model.generate(prompt, max_tokens=CONTINUATION, temperature=0)))
            found = outputs(model) | {"loss": losses(model), "greedy": greedy.int()}
        table |= {f"{generation}.{name}": value.contiguous() for name, value in found.items()}
    save_file(table, FILE, metadata=COMMITS)


if __name__ == "__main__":
    main()
