"""Influence of the nodes of an attribution graph, its pruning and its scores, as circuit-tracer defines them."""

import dataclasses

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bridge.circuits.graph import Graph

_SMALLEST_SUM = 1e-10


@dataclasses.dataclass(frozen=True)
class Scores:
    """Scores of an unpruned graph.

    `replacement` is the share of the influence on the logits that begins at tokens and not at errors. `completeness` is
    the share of the inputs of all nodes, weighted by influence, that do not come from errors. The shares are sums of
    the parts of the most likely logit: they show how much reaches it from tokens without any feature.
    """

    replacement: float
    completeness: float
    from_tokens: float
    from_features: float
    from_errors: float
    from_biases: float

    @property
    def logit(self) -> float:
        """The sum of the four parts."""
        return self.from_tokens + self.from_features + self.from_errors + self.from_biases


@dataclasses.dataclass(frozen=True)
class Pruned:
    """The nodes and edges of a graph that are kept.

    Attributes:
      sources: which columns are kept; all tokens are.
      edges: which entries of the matrix are kept; both ends of each are.
      influence: share of all influence that the more influential sources have with this one: small is important.
    """

    sources: Bool[Tensor, " S"]
    edges: Bool[Tensor, "R S"]
    influence: Float[Tensor, " S"]
    node_threshold: float
    edge_threshold: float


def normalised(matrix: Float[Tensor, "R S"]) -> Float[Tensor, "R S"]:
    """Return absolute values, divided by the sum of their row."""
    absolute = matrix.abs()
    return absolute.div_(absolute.sum(1, keepdim=True).clamp(min=_SMALLEST_SUM))


def influence(
    shares: Float[Tensor, "R S"], targets: Int[Tensor, " r"], weights: Float[Tensor, " n"], depth: int
) -> Float[Tensor, " S"]:
    """Return w (N + N^2 + ...), the influence of every source on the logits over paths of all lengths.

    Args:
      shares: N, normalised rows; the last n belong to the logits.
      targets: the columns of the features that the other rows belong to.
      weights: w, probabilities of the logits.
      depth: number of layers: no path passes more features.
    """
    inner, outer = shares[: len(targets)], shares[len(targets) :]
    step = weights.to(shares.dtype) @ outer
    total = step.clone()
    for _ in range(depth):
        step = step[targets] @ inner
        if not step.any():
            break
        total += step
    return total


def of_graph(graph: Graph, shares: Float[Tensor, "R S"]) -> Float[Tensor, " S"]:
    """Return the influence of every source of a graph with these normalised rows."""
    targets = torch.arange(graph.feature_count, device=shares.device)
    return influence(shares, targets, graph.probabilities, graph.layers)


def scores(graph: Graph) -> Scores:
    """Return the scores of a graph."""
    shares = normalised(graph.matrix)
    total = of_graph(graph, shares)
    tokens, errors = total[graph.token_columns].sum(), total[graph.errors].sum()
    outputs = torch.cat([total[: graph.feature_count], graph.probabilities.to(total.dtype)])
    lost = (outputs * shares[:, graph.errors].sum(1)).sum()
    everything = total.sum() + graph.probabilities.sum()
    row, biases = graph.matrix[graph.feature_count], graph.biases[graph.feature_count].sum()
    parts = (row[graph.token_columns], row[: graph.feature_count], row[graph.errors], biases)
    sums = [float(part.sum()) for part in parts]
    return Scores(float(tokens / (tokens + errors)), float(1 - lost / everything), *sums)


def prune(graph: Graph, node_threshold: float = 0.8, edge_threshold: float = 0.98) -> Pruned:
    """Select the most influential nodes and edges.

    Nodes are kept up to a share of all influence, tokens and logits always. The others are removed, rows normalised
    again, and edges kept up to a share of their scores N[t, s] (I_t + w_t). Then features and errors without an edge
    upwards, and features without one from below, are removed until none is left.

    Args:
      graph: the graph.
      node_threshold: share of the influence, 0 to 1.
      edge_threshold: share of the edges' scores, 0 to 1.
    """
    total, count = of_graph(graph, normalised(graph.matrix)), graph.feature_count
    kept = total >= _cut(total, node_threshold)
    kept[graph.token_columns] = True
    rows = torch.cat([kept[:count], kept.new_ones(len(graph.logits))])
    edges_score = normalised(graph.matrix * rows[:, None] * kept)
    again = of_graph(graph, edges_score)
    edges_score *= torch.cat([again[:count], graph.probabilities.to(again.dtype)])[:, None]
    edges = (edges_score >= _cut(edges_score.flatten(), edge_threshold)) & (edges_score > 0)
    _drop_loose_ends(kept, edges, count, graph.errors.stop)
    return Pruned(kept, edges, _cumulative(total), node_threshold, edge_threshold)


def _drop_loose_ends(kept: Bool[Tensor, " S"], edges: Bool[Tensor, "R S"], features: int, inner: int) -> None:
    """Drop features and errors without targets and features without sources, in place, until there are none."""
    while True:
        before = kept.clone()
        kept[:inner] &= edges[:, :inner].any(0)
        kept[:features] &= edges[:features].any(1)
        edges &= kept
        edges[:features] &= kept[:features, None]
        if torch.equal(kept, before):
            return


def _cut(values: Float[Tensor, " n"], share: float) -> Float[Tensor, ""]:
    """Return the smallest of the largest values that together reach a share of the sum; values are not negative."""
    ordered = values[values > 0].sort(descending=True).values
    if not len(ordered):
        return values.new_zeros(())
    cumulative = ordered.cumsum(0, dtype=torch.float64)
    place = int(torch.searchsorted(cumulative / cumulative[-1], share))
    return ordered[min(place, len(ordered) - 1)]


def _cumulative(total: Float[Tensor, " S"]) -> Float[Tensor, " S"]:
    """Return the share of the sum that each value has with all larger ones; of equal values the first is larger."""
    order = total.argsort(descending=True, stable=True)
    shares = torch.empty_like(total)
    shares[order] = total[order].cumsum(0) / total.sum()
    return shares.clamp(max=1)
