"""Writes data/generations.json: logits of the tiny nanochats, to be run when the goldens agree and never else."""

import json
from pathlib import Path

import torch
from tiny_nanochat import tiny, tokens

from bridge.nanochat.config import GENERATIONS

TABLE = Path(__file__).parent / "data" / "generations.json"
LENGTH = 300  # beyond every short window of 400 tokens
POSITIONS = (0, 1, 130, 299)
TOKENS = (0, 17, 49)


def sample_logits(generation: str) -> torch.Tensor:
    """Logits of a generation (position, token), of the second row."""
    with torch.no_grad():
        return tiny(generation)(tokens(LENGTH))[1][list(POSITIONS)][:, list(TOKENS)]


def main() -> None:
    """Writes the table."""
    table = {name: [[round(x, 5) for x in row] for row in sample_logits(name).tolist()] for name in GENERATIONS}
    rows = [f'  "{name}": {json.dumps(values)}' for name, values in table.items()]
    TABLE.write_text("{\n" + ",\n".join(rows) + "\n}\n")


if __name__ == "__main__":
    main()
