"""What an exploration prints of each SAE."""

from pathlib import Path

from jsae.records.store import Store


def summary(records: Path, hook: str) -> str:
    """What was gathered of one SAE."""
    store = Store(records / hook)
    dead = int((store["count"] == 0).sum())
    again = store.header.duplicate_rows
    dropped = f", {again:,} repeated row{'s' * (again > 1)} dropped" if again else ""
    return f"{hook}: {store.header.d_sae:,} latents ({dead:,} dead) on {store.header.tokens:,} tokens{dropped}"
