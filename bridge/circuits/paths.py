"""The strongest paths through an attribution graph."""

import dataclasses
import heapq
from typing import NamedTuple

import torch

from bridge.circuits.graph import Graph, Node
from bridge.circuits.scores import Pruned, normalised

_MOST_STEPS = 200_000
"""Partial paths that are looked at; a search that meets more returns what it has found."""


@dataclasses.dataclass(frozen=True)
class Path:
    """A path from a token or an error through features to a logit.

    Attributes:
      nodes: from the source to the logit.
      weights: direct effects between neighbours, one fewer than nodes.
      share: product of the shares that each node has in the absolute inputs of the next, times the probability of the
        logit: the path's part of the influence.
    """

    nodes: tuple[Node, ...]
    weights: tuple[float, ...]
    share: float


class _Partial(NamedTuple):
    """A path that still grows downwards; columns from its lower end to the last feature, then the row of the logit."""

    negative_share: float
    columns: tuple[int, ...]
    row: int


def strongest(graph: Graph, pruned: Pruned, count: int, *, least_features: int = 0) -> list[Path]:
    """Return the paths of the largest shares within the pruned graph, the largest first.

    Shares only fall along a path, so the best partial path is continued first, and complete ones are found in order.

    Args:
      graph: the graph.
      pruned: which of its edges paths may use.
      count: number of paths; fewer are returned where there are fewer.
      least_features: features that a path must pass.
    """
    shares = normalised(graph.matrix * pruned.edges)
    inner = graph.feature_count
    heap = [_Partial(-float(p), (), inner + i) for i, p in enumerate(graph.probabilities)]
    heapq.heapify(heap)
    paths: list[Path] = []
    for _ in range(_MOST_STEPS):
        if not heap or len(paths) >= count:
            break
        best = heapq.heappop(heap)
        if best.columns and best.columns[0] >= inner:
            if len(best.columns) > least_features:
                paths.append(_path(graph, best))
            continue
        row = best.columns[0] if best.columns else best.row
        (sources,) = shares[row].nonzero(as_tuple=True)
        for column, share in zip(sources.tolist(), shares[row, sources].tolist(), strict=True):
            heapq.heappush(heap, _Partial(best.negative_share * share, (column, *best.columns), best.row))
    return paths


def _path(graph: Graph, partial: _Partial) -> Path:
    rows = [*partial.columns[1:], partial.row]
    nodes = (*(graph.source(column) for column in partial.columns), graph.target(partial.row))
    weights = graph.matrix[torch.tensor(rows), torch.tensor(partial.columns)].tolist()
    return Path(nodes, tuple(weights), -partial.negative_share)
