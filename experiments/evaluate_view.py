"""Output of an evaluation: a table with a column per SAE, and the list of written files."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

Column = tuple[str, dict[str, Any]]


Format = str | Callable[[Any], str | None]
"""A format specification, or a function from the value to its text; None where there is nothing to show."""

BASELINES = {"llm": "channels", "pca": "components", "random": "random SAE"}


def _accuracy(name: str) -> Format:
    """Return a function that shows an accuracy of sparse probing with its interval."""

    def show(group: dict[str, Any]) -> str | None:
        bounds = group.get("intervals", {}).get(name)
        return f"{group[name]:.1%}{_interval(bounds, 100)}" if group.get(name) is not None else None

    return show


def _baseline(k: int) -> Format:
    """Return a function that shows the best baseline of k features with its interval."""

    def show(group: dict[str, Any]) -> str | None:
        kind = group.get("advantage", {}).get(str(k), {}).get("baseline")
        text = kind and _accuracy(f"{kind}_top_{k}_test_accuracy")(group)  # type: ignore[operator]
        return text and f"{BASELINES.get(kind, kind)} {text}"

    return show


def _advantage(k: int) -> Format:
    """Return a function that shows by how many percentage points k latents surpass the best baseline."""

    def show(group: dict[str, Any]) -> str | None:
        entry = group.get("advantage", {}).get(str(k))
        return entry and f"{100 * entry['difference']:+.1f}{_interval(entry['interval'], 100)}"

    return show


def _interval(bounds: Sequence[float] | None, factor: float = 1, digits: int = 1) -> str:
    return "" if not bounds else f" [{factor * bounds[0]:.{digits}f}, {factor * bounds[1]:.{digits}f}]"


def _probing(kind: str) -> tuple[tuple[str, str, Format], ...]:
    rows: list[tuple[str, str, Format]] = []
    for k, name in ((1, "1 latent"), (5, "5 latents")):
        rows += [
            (f"{kind}, by {name}", f"sparse_probing.{kind}", _accuracy(f"sae_top_{k}_test_accuracy")),
            ("  by the best baseline", f"sparse_probing.{kind}", _baseline(k)),
            ("  difference, in points", f"sparse_probing.{kind}", _advantage(k)),
        ]
    return (*rows, ("  by all channels", f"sparse_probing.{kind}", _accuracy("llm_test_accuracy")))


def _cost(entry: Sequence[float]) -> str:
    """Return a loss of CORE as text, with its interval."""
    return f"{entry[0]:.3f}{_interval(entry[1:], digits=3)}"


def _mean(name: str, spec: str) -> Format:
    """Return a function that shows a mean over concepts with its interval."""

    def show(group: dict[str, Any]) -> str | None:
        if group.get(name) is None:
            return None
        return f"{group[name]:{spec}}{_interval(group['intervals'][name], digits=int(spec[1]))}"

    return show


def _concepts(group: dict[str, Any]) -> str:
    """Return how many concepts count, and how many a probe does not find."""
    missing = len(group["left_out"])
    without = f"; {missing} with a probe below F1 {group['least_probe_f1']}" if missing else ""
    return f"{len(group['concepts'])}{without}"


def _detection(name: str) -> Format:
    """Return a function that shows a score of labels as detectors with its interval."""

    def show(group: dict[str, Any]) -> str | None:
        if group.get(name) is None:
            return None
        return f"{group[name]:.3f}{_interval(group['intervals'][name], digits=3)}"

    return show


def _quartiles(entry: dict[str, Any]) -> str | None:
    """Return median and quartiles of steering's effects as text."""
    if entry.get("median") is None:
        return None
    return f"{entry['median']:+.2f}{_interval(entry['quartiles'], digits=2)} of {entry['latents']}"


def _steering(target: str, name: str) -> tuple[tuple[str, str, Format], ...]:
    return (
        (f"{name}, by latents", f"steering.{target}.latent", _quartiles),
        ("  by differences of means", f"steering.{target}.difference_of_means", _quartiles),
        ("  by random directions", f"steering.{target}.random", _quartiles),
    )


# Section, then its rows: heading, path of the value in eval.json, format.
_ROWS: dict[str, tuple[tuple[str, str, Format], ...]] = {
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
    "accuracy of sparse probes, 95 % intervals": (*_probing("package"), *_probing("syntax")),
    "concepts: first letters, capitals": (
        ("latents per concept", "absorption", _mean("latents", ".1f")),
        ("F1 of a probe of these", "absorption", _mean("main_f1", ".3f")),
        ("absorbed fraction", "absorption", _mean("fraction", ".3f")),
        ("absorption rate", "absorption", _mean("rate", ".3f")),
        ("concepts", "absorption", _concepts),
    ),
    "labels": (
        ("F1 of labels, on other text", "labels.detection", _detection("f1")),
        ("balanced accuracy", "labels.detection", _detection("balanced_accuracy")),
        ("labels with F1 over 0.5", "labels.f1_over_50_percent", ",d"),
        ("  over 0.8", "labels.f1_over_80_percent", ",d"),
    ),
    "steering: nats gained at KL 0.1, quartiles": (
        *_steering("following", "what follows the label"),
        *_steering("label", "tokens that the label names"),
        ("tokens that it promotes, by latents", "steering.promoted.latent", _quartiles),
        ("  by random directions, their own", "steering.own.random", _quartiles),
        ("bits per byte that this costs", "steering.bits_per_byte", "+.4f"),
        ("CORE of the model as it is", "steering.capability.core", ".3f"),
        *(
            (f"  lost at {m:g} x the greatest activation", f"steering.capability.cost_at_{m:g}", _cost)
            for m in (0.5, 1, 2, 4)
        ),
    ),
    "unreliable (arXiv 2605.18229)": tuple(
        (f"TPP of 10 latents, {kind}", f"tpp.{kind}.tpp_threshold_10_total_metric", ".3f")
        for kind in ("package", "syntax")
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
        filled = [(name, [_text(entry, path, spec) for _, entry in columns]) for name, path, spec in rows]
        filled = [row for row in filled if any(text is not None for text in row[1])]
        if filled:
            table.add_section()
            table.add_row(Text(section, style="bold"))
        for name, texts in filled:
            table.add_row(name, *("–" if text is None else text for text in texts))
    console = Console()
    if not console.is_terminal:  # a pipe has no width: the table takes as much as it needs
        console = Console(width=44 + 40 * len(columns))
    console.print(table)


def show_stability(found: dict[str, Any]) -> None:
    """Print how many latents SAEs of the same hook share.

    Args:
      found: of `bridge.evaluate.evaluation.stability_of`.
    """
    for hook, entry in found.items():
        if isinstance(entry, str):
            line = f"{hook}: latents are not matched: {entry}"
        else:
            shares = ", ".join(f"{entry[f'share_over_{bar}']:.1%} above a cosine of {bar}" for bar in (0.7, 0.9))
            alive = " and ".join(f"{count:,}" for count in entry["alive"])
            line = f"{hook}: of {alive} living latents, matched one to one, {shares}; mean {entry['mean_cosine']:.3f}"
        Console().print(Text(line), soft_wrap=True)


def show_recurrence(found: Mapping[str, Any], same: float) -> None:
    """Print how many latents of every SAE recur in those of other seeds.

    Args:
      found: of `bridge.run.recurrence.compare`.
      same: the cosine from which a latent recurs.
    """
    for hook, entry in found.items():
        table = Table(title=f"{hook}: latents that recur in SAEs of other seeds (cosine {same:g} or more)")
        for column in ("run", "alive", "mean share", f"in all {entry['others']}", "in none"):
            table.add_column(column, justify="left" if column == "run" else "right")
        for run, counts in entry["runs"].items():
            alive = max(counts["alive"], 1)
            shares = [f"{counts[name]:,} ({counts[name] / alive:.1%})" for name in ("in_all", "in_none")]
            table.add_row(Path(run).name, f"{counts['alive']:,}", f"{counts['mean']:.1%}", *shares)
        Console().print(table)


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


def _text(entry: dict[str, Any], path: str, spec: Format) -> str | None:
    """Return the value at a path as text; None if there is none."""
    value = _at(entry, path)
    if value is None or callable(spec):
        return None if value is None else spec(value)  # type: ignore[operator]
    return format(value, spec)


def _at(entry: dict[str, Any], path: str) -> Any:
    """Return the value at a path of keys, such as "latents.dead"; None if there is none."""
    value: Any = entry
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value
