"""Measures of an exported SAE on held-out text, before and after fine-tuning."""

from pathlib import Path

import numpy as np
from jaxtyping import Int
from rich.console import Console
from rich.table import Table

from bridge import torch_sae
from bridge.evaluate.core import preservation
from bridge.evaluate.site import Site
from bridge.evaluate.splice import effects
from bridge.evaluate.survey import survey
from jsae import metrics
from jsae.progress import Progress

PASSES = 5
"""Passes of `measure` over the text."""
_COLUMNS = {"loss_recovered": "loss recovered", "kl": "KL", "ce": "CE", "fvu": "FVU", "l0": "L0", "dead": "dead"}


def measure(site: Site, folder: str | Path, rows: Int[np.ndarray, "R T"], token_bytes: np.ndarray) -> dict[str, float]:
    """Return metrics of an exported SAE or transcoder on held-out text, as `bridge.evaluate` defines them.

    `kl` and `ce` are those of the model with the reconstruction, in nats per token, `ce_without_sae` that of the model
    alone; `loss_recovered` is the share of the increase by zero ablation that the SAE avoids; `dead` is the share of
    latents that do not fire on this text.

    Args:
      site: the activation, in a model that returns logits.
      folder: the export.
      rows: token ids; the model reads them `PASSES` times.
      token_bytes: the length in bytes of every token.

    Raises:
      ValueError: the SAE has another width, or no token counts.
    """
    sae = torch_sae.load(folder, site.device)
    batches = site.batches(rows, max(sae.d_sae, len(token_bytes)))
    with Progress("measuring", PASSES * rows.size, "tokens") as progress, progress.tokens_of(site.model):
        sums = survey(site, sae, batches).sums
        plain = metrics.summarize(sums)
        mean = np.asarray(sums.total / sums.tokens, np.float32)
        groups = preservation(effects(site, sae, batches, mean, token_bytes))
    losses = groups["model_performance_preservation"]
    return {
        "loss_recovered": losses["ce_loss_score"],
        "kl": groups["model_behavior_preservation"]["kl_div_with_sae"],
        "ce": losses["ce_loss_with_sae"],
        "ce_without_sae": losses["ce_loss_without_sae"],
        "fvu": plain["fvu"],
        "l0": plain["l0"],
        "dead": plain["dead_fraction"],
    }


def show(before: dict[str, float], after: dict[str, float], tokens: int) -> None:
    """Print a table of the metrics before and after."""
    table = Table(title=f"on {tokens:,} held-out tokens; CE without SAE {before['ce_without_sae']:.4f}")
    table.add_column("")
    for title in _COLUMNS.values():
        table.add_column(title, justify="right")
    for label, measured in (("before", before), ("after", after)):
        table.add_row(label, *(_cell(name, measured[name]) for name in _COLUMNS))
    Console().print(table)


def _cell(name: str, value: float) -> str:
    return f"{value:.2%}" if name == "dead" else f"{value:.2f}" if name == "l0" else f"{value:.4f}"
