"""Terminal output of attribution graphs: scores, strongest paths, effects of interventions."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bridge.circuits import Graph, Pruned, Traced, intervene, scores
from bridge.circuits.graph import Node
from bridge.circuits.graph_file import Naming
from bridge.circuits.interventions import agreement
from bridge.circuits.paths import Path, strongest
from bridge.graph_names import token_text
from bridge.graphs import Written
from experiments import browsing
from experiments.steer_view import shown


def show_graph(graph: Graph, pruned: Pruned, naming: Naming, paths: int) -> None:
    """Print the explained tokens, the sizes and scores of the graph, and its strongest paths."""
    console = Console()
    columns = pruned.sources[: graph.errors.stop]
    kept = f"{int(columns.sum()):,} features and errors and {int(pruned.edges.sum()):,} edges are kept"
    nodes = f"{graph.active:,} active features, {graph.feature_count:,} of them nodes"
    console.print(f"{len(graph.tokens)} tokens, {nodes}; {kept}", highlight=False, soft_wrap=True)
    likely = zip(graph.logits, graph.probabilities.tolist(), strict=True)
    tokens = ", ".join(f"{_token(naming, token)} {probability:.3f}" for token, probability in likely)
    console.print(f"next token      {tokens}", markup=False, highlight=False, soft_wrap=True)
    result = scores(graph)
    console.print(f"scores          replacement {result.replacement:.3f}, completeness {result.completeness:.3f}")
    console.print(
        f"{_token(naming, graph.logits[0])}: {result.logit:.3f} = {result.from_tokens:.3f} from tokens directly, "
        f"{result.from_features:.3f} from features, {result.from_errors:.3f} from errors, {result.from_biases:.3f} "
        "from biases",
        markup=False,
        soft_wrap=True,
    )
    console.print(f"row residual    {float(graph.residuals().max()):.1e} of the sum of absolute parts, at most")
    for title, least in (("strongest paths", 0), ("strongest paths through features", 1)):
        if found := strongest(graph, pruned, paths, least_features=least):
            console.print(_paths(title, found, graph, naming))


def _paths(title: str, paths: list[Path], graph: Graph, naming: Naming) -> Table:
    table = Table("share", "path, with direct effects", title=title, title_justify="left")
    for path in paths:
        steps = [_name(path.nodes[0], graph, naming)]
        for node, weight in zip(path.nodes[1:], path.weights, strict=True):
            steps += [f"{weight:+.3g}", _name(node, graph, naming)]
        table.add_row(f"{path.share:.4f}", escape(" → ".join(steps)))
    return table


def show_effect(traced: Traced, naming: Naming, column: int, factor: float) -> None:
    """Change a node in the model; print predicted and real changes of the explained logits."""
    effect = intervene(traced, column, factor)
    node = _name(effect.node, traced.graph, naming)
    table = Table(
        "token", "direct", "all paths", "real", "p before", "p after", title=f"{escape(node)} times {factor:g}"
    )
    for place, token in enumerate(traced.graph.logits):
        changes = (f"{float(part[place]):+.4f}" for part in (effect.direct, effect.total, effect.real))
        table.add_row(
            escape(_token(naming, token)), *changes, *(f"{float(p[place]):.4f}" for p in effect.probabilities)
        )
    console = Console()
    console.print(table)
    console.print(f"frozen network  differs from the direct effects by {effect.frozen_gap:.1e} at most")


def show_agreement(traced: Traced, count: int) -> None:
    """Ablate features in the model; print how their effects correlate with the predictions."""
    result = agreement(traced, count)
    Console().print(
        f"ablations       {result.count} features: correlation with the real change {result.direct:.3f} direct, "
        f"{result.total:.3f} over all paths, slope {result.slope:.2f}; in the frozen network the largest gap is "
        f"{result.frozen_gap:.1e}",
        soft_wrap=True,
    )


def show_files(written: Written, opened: bool) -> None:
    """Print the paths of the graph, and open it in a browser if that is asked for."""
    for path in written.files:
        print(f"graph           {path}", flush=True)
    if written.address is not None:
        print(f"explorer        {written.address}", flush=True)
        if opened:
            browsing.open_page(written.address)


def _name(node: Node, graph: Graph, naming: Naming) -> str:
    """Return a node as text: its id, and what it is about."""
    if node.kind == "logit":
        return _token(naming, node.index)
    text = _token(naming, graph.tokens[node.position])
    if node.kind == "token":
        return f"{text}@{node.position}"
    label = naming.label(node.layer, node.index) if node.kind == "feature" else "error"
    return f"{node.node_id(graph.layers)} {shown(label)}{' ' * bool(label)}on {text}"


def _token(naming: Naming, token: int) -> str:
    return repr(shown(token_text(naming.pieces(token))))
