"""Effects of changing a node: what the graph predicts, what the frozen network gives, and what the model does."""

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor

from bridge.circuits.frozen import Frozen
from bridge.circuits.graph import Graph, Node
from bridge.circuits.tracing import Traced
from bridge.hooks import Acts, edit, hook_name


@dataclasses.dataclass(frozen=True)
class Effect:
    """Changes of the explained logits when what a node writes is multiplied by a factor; (n,) each.

    Attributes:
      node: a feature or an error.
      factor: 0 removes it, 1 changes nothing.
      direct: by the edges from the node to the logits.
      total: by all paths, while the features on them stay active and change as their rows say.
      frozen: in the frozen network, with all other features held: equal to `direct` but for rounding.
      real: in the model, where attention, norms, gates and MLPs react.
      probabilities: of the tokens in the model, before and after, (2, n).
    """

    node: Node
    factor: float
    direct: Float[Tensor, " n"]
    total: Float[Tensor, " n"]
    frozen: Float[Tensor, " n"]
    real: Float[Tensor, " n"]
    probabilities: Float[Tensor, "2 n"]

    @property
    def frozen_gap(self) -> float:
        """Largest difference between the direct effect and the change in the frozen network."""
        return float((self.direct - self.frozen).abs().max())


def intervene(traced: Traced, column: int, factor: float = 0.0) -> Effect:
    """Multiply what a feature or error writes by a factor, and compare the predicted with the real change.

    Args:
      traced: the graph.
      column: of the node in the graph's matrix (`Replacement.column`).
      factor: 0 is an ablation, 2 doubles.

    Raises:
      ValueError: the node is no feature or error, whose change the model can be given.
    """
    graph, r = traced.graph, traced.replacement
    if not 0 <= column < graph.errors.stop:
        raise ValueError(f"column {column} is no feature or error: these are 0 to {graph.errors.stop - 1}")
    layer, position, vector = r.written(column)
    change = torch.zeros_like(r.frozen.embedding)
    change[position] = (factor - 1) * vector
    with torch.inference_mode(False), torch.no_grad():
        frozen = r.frozen.run(r.frozen.inputs([h + change * (i == layer) for i, h in enumerate(r.base)]))[1]
        with edit(r.frozen.model, {hook_name(layer, "mlp"): lambda h: _added(h, change)}):
            real = Frozen(r.frozen.model, r.frozen.tokens, r.skip)
    before = traced.targets @ r.frozen.final[-1]
    probabilities = torch.stack([x.logits[-1].softmax(-1)[list(graph.logits)] for x in (r.frozen, real)])
    return Effect(
        graph.source(column),
        factor,
        (factor - 1) * graph.matrix[graph.feature_count :, column],
        (factor - 1) * total_effects(graph, column),
        traced.targets @ frozen[-1] - before,
        traced.targets @ real.final[-1] - before,
        probabilities,
    )


def _added(h: Acts, change: Float[Tensor, "T C"]) -> Acts:
    return h + change


def total_effects(graph: Graph, column: int) -> Float[Tensor, " n"]:
    """Return the effects of a source on the logits over all paths through the features, (n,).

    A feature whose pre-activation changes by δ writes δ / a times as much more as it wrote. The features' changes are
    δ = A[:, s] + A diag(1/a) δ, solved layer by layer.
    """
    inner, outer = graph.matrix[: graph.feature_count], graph.matrix[graph.feature_count :]
    features = slice(0, graph.feature_count)
    changes = step = inner[:, column]
    for _ in range(graph.layers):
        step = inner[:, features] @ (step / graph.activations)
        if not step.any():
            break
        changes = changes + step
    return outer[:, column] + outer[:, features] @ (changes / graph.activations)


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Agreement of the predictions of a graph with ablations in the model, for the most likely logit.

    Attributes:
      count: number of ablated features, those of the largest direct effects.
      direct: correlation of the direct effects with the real changes.
      total: correlation of the effects over all paths.
      slope: real change per predicted total effect, by least squares through the origin.
      frozen_gap: the largest of the effects (`Effect.frozen_gap`).
    """

    count: int
    direct: float
    total: float
    slope: float
    frozen_gap: float


def agreement(traced: Traced, count: int) -> Agreement:
    """Ablate the features of the largest direct effects on the most likely logit, one after the other.

    Raises:
      ValueError: there are fewer than two features, of which there is no correlation.
    """
    graph = traced.graph
    direct = graph.matrix[graph.feature_count, : graph.feature_count].abs()
    columns = direct.argsort(descending=True, stable=True)[:count].tolist()
    if len(columns) < 2:
        raise ValueError(f"a correlation needs at least two features: {len(columns)} of {graph.feature_count} chosen")
    effects = [intervene(traced, column) for column in columns]
    direct, total, real = (
        torch.stack([getattr(effect, name)[0] for effect in effects]).double() for name in ("direct", "total", "real")
    )
    return Agreement(
        len(effects),
        float(torch.corrcoef(torch.stack([direct, real]))[0, 1]),
        float(torch.corrcoef(torch.stack([total, real]))[0, 1]),
        float(total @ real / total.square().sum()),
        max(effect.frozen_gap for effect in effects),
    )
