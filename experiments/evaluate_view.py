"""Output of an evaluation: a table with a column per SAE, and the list of written files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

Column = tuple[str, dict[str, Any]]


def _knowledge(kind: str) -> tuple[tuple[str, str, str], ...]:
    return (
        (f"{kind}, by 1 latent", f"sparse_probing.{kind}.sae_top_1_test_accuracy", ".1%"),
        ("  by 2", f"sparse_probing.{kind}.sae_top_2_test_accuracy", ".1%"),
        ("  by 5", f"sparse_probing.{kind}.sae_top_5_test_accuracy", ".1%"),
        ("  by the activations", f"sparse_probing.{kind}.llm_test_accuracy", ".1%"),
        ("  TPP of 10 latents", f"tpp.{kind}.tpp_threshold_10_total_metric", ".3f"),
    )


# Section, then its rows: heading, path of the value in eval.json, format.
_ROWS: dict[str, tuple[tuple[str, str, str], ...]] = {
    "the model with the SAE in it": (
        ("CE loss score", "model_performance_preservation.ce_loss_score", ".4f"),
        ("KL score", "model_behavior_preservation.kl_div_score", ".4f"),
        ("cross-entropy, as it is", "model_performance_preservation.ce_loss_without_sae", ".4f"),
        ("  with the SAE", "model_performance_preservation.ce_loss_with_sae", ".4f"),
        ("  zeros instead", "model_performance_preservation.ce_loss_with_ablation", ".4f"),
        ("  the mean instead", "model_performance_preservation.ce_loss_with_mean_ablation", ".4f"),
        ("bits per byte, as it is", "bits_per_byte.without_sae", ".4f"),
        ("  with the SAE", "bits_per_byte.with_sae", ".4f"),
        ("  zeros instead", "bits_per_byte.with_ablation", ".4f"),
        ("  the mean instead", "bits_per_byte.with_mean_ablation", ".4f"),
        ("KL, with the SAE", "model_behavior_preservation.kl_div_with_sae", ".4f"),
        ("  zeros instead", "model_behavior_preservation.kl_div_with_ablation", ".4f"),
    ),
    "the reconstruction": (
        ("explained variance", "reconstruction_quality.explained_variance", ".4f"),
        ("  as counted of old", "reconstruction_quality.explained_variance_legacy", ".4f"),
        ("MSE", "reconstruction_quality.mse", ".4g"),
        ("cosine", "reconstruction_quality.cossim", ".4f"),
        ("length, out / in", "shrinkage.l2_ratio", ".4f"),
        ("relative bias", "shrinkage.relative_reconstruction_bias", ".4f"),
    ),
    "the latents": (
        ("latents", "latents.d_sae", ",d"),
        ("L0", "sparsity.l0", ".2f"),
        ("L1", "sparsity.l1", ".4g"),
        ("dead", "latents.dead", ",d"),
        ("dense: over 1 % of tokens", "latents.dense_over_1_percent", ",d"),
        ("  over 10 %", "latents.dense_over_10_percent", ",d"),
        ("duplicated", "latents.duplicated", ",d"),
        ("encoder-decoder cosine", "latents.mean_encoder_decoder_cosine_sim", ".4f"),
    ),
    "what they know": (
        *_knowledge("package"),
        *_knowledge("syntax"),
        ("labels with F1 over 0.5", "labels.f1_over_50_percent", ",d"),
        ("  over 0.8", "labels.f1_over_80_percent", ",d"),
    ),
}


def show(columns: Sequence[Column]) -> None:
    """Print the metrics of SAEs; rows without any value are left out.

    Args:
      columns: heading and entry of eval.json of every SAE.
    """
    tokens = {entry["tokens"] for _, entry in columns}
    table = Table(title=" and ".join(f"{n:,.0f}" for n in sorted(tokens)) + " held-out tokens")
    table.add_column("")
    for heading, _ in columns:
        table.add_column(Text(heading), justify="right", overflow="fold")
    for section, rows in _ROWS.items():
        filled = [(name, [_at(entry, path) for _, entry in columns], spec) for name, path, spec in rows]
        filled = [row for row in filled if any(value is not None for value in row[1])]
        if filled:
            table.add_section()
            table.add_row(Text(section, style="bold"))
        for name, values, spec in filled:
            table.add_row(name, *("–" if value is None else format(value, spec) for value in values))
    console = Console()
    if not console.is_terminal:  # a pipe has no width: the table takes as much as it needs
        console = Console(width=36 + 30 * len(columns))
    console.print(table)


def show_written(output: Path, results: dict[str, dict[str, Any]], plots: bool, max_labels: int = 5) -> None:
    """Print the best labels of every hook, and the files that were written.

    Args:
      output: directory of the files.
      results: the tables of every hook: "eval", "latents", "labels".
      plots: whether plots were written too.
      max_labels: labels to print per hook.
    """
    console = Console()
    for hook, result in results.items():
        best = sorted(result.get("labels", {}).items(), key=lambda item: -(item[1]["f1"] or 0))[:max_labels]
        for latent, label in best:
            line = f"{hook} {latent:>6}  F1 {label['f1'] or 0:.2f}  {label['label']}"
            console.print(Text(line), soft_wrap=True)
    written = [f"{name}.json" for name in next(iter(results.values()))] + ["plots"] * plots
    console.print(Text(f"written to {output}: {', '.join(written)}"), soft_wrap=True)


def _at(entry: dict[str, Any], path: str) -> Any:
    """Return the value at a path of keys, such as "latents.dead"; None if there is none."""
    value: Any = entry
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value
