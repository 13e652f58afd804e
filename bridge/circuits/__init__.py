"""Attribution graphs of a nanochat: why it predicts a token, from transcoders of all its layers.

The method is that of circuit-tracer: Ameisen et al. 2025, "Circuit Tracing: Revealing Computational Graphs in Language
Models", with one transcoder per layer. `trace` computes a graph, `prune` selects what matters, `graph_file` writes it.
"""

from bridge.circuits.graph import Graph
from bridge.circuits.interventions import Effect, intervene
from bridge.circuits.scores import Pruned, Scores, prune, scores
from bridge.circuits.tracing import Traced, trace

__all__ = ["Effect", "Graph", "Pruned", "Scores", "Traced", "intervene", "prune", "scores", "trace"]
