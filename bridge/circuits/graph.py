"""An attribution graph as a matrix of direct effects, and the names of its nodes."""

import dataclasses
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

Kind = Literal["feature", "error", "token", "logit"]


@dataclasses.dataclass(frozen=True)
class Node:
    """A node of a graph."""

    kind: Kind
    layer: int | None
    """Of a feature or error."""
    position: int
    index: int | None
    """The latent of a feature, the token id of a token or logit."""

    def node_id(self, layers: int) -> str:
        """Return the id in graph files; `layers` is the number of layers of the model."""
        if self.kind == "token":
            return f"E_{self.index}_{self.position}"
        if self.kind == "logit":
            return f"{layers + 1}_{self.index}_{self.position}"
        return f"{self.layer}_{-1 if self.index is None else self.index}_{self.position}"


@dataclasses.dataclass(frozen=True)
class Graph:
    """The direct effects of sources on targets in a nanochat that is frozen at a prompt.

    Targets (rows) are the F features, then the n logits. Sources (columns) are the features, the errors by layer and
    position, and the tokens, whose effects include their value embeddings and bigrams. With the encoder's bias and the
    effects of the decoder biases, a row sums to its value: exactly, but for rounding (`residuals`).
    """

    tokens: tuple[int, ...]
    """The prompt's token ids."""
    layers: int
    features: Int[Tensor, "F 3"]
    """Layer, position and latent, in this order."""
    activations: Float[Tensor, " F"]
    logits: tuple[int, ...]
    """Token ids of the explained logits, the most likely first."""
    probabilities: Float[Tensor, " n"]
    """Of these tokens, after the softcap."""
    matrix: Float[Tensor, "R S"]
    biases: Float[Tensor, "R 2"]
    """The effects of all decoder biases, and the target's own encoder bias."""
    values: Float[Tensor, " R"]
    """What a row explains: pre-activations of the features, demeaned logits before the softcap."""
    active: int
    """Number of active features, of which those that are no nodes are part of the errors."""

    @property
    def feature_count(self) -> int:
        """Number of features F."""
        return len(self.features)

    @property
    def errors(self) -> slice:
        """The columns of the errors."""
        return slice(self.feature_count, self.feature_count + self.layers * len(self.tokens))

    @property
    def token_columns(self) -> slice:
        """The columns of the tokens."""
        return slice(self.errors.stop, self.errors.stop + len(self.tokens))

    def residuals(self) -> Float[Tensor, " R"]:
        """Return the gap between each row's value and the sum of its parts, relative to the sum of absolute parts."""
        gaps = (self.values - self.matrix.sum(1) - self.biases.sum(1)).abs()
        return gaps / (self.matrix.abs().sum(1) + self.biases.abs().sum(1)).clamp(min=torch.finfo(gaps.dtype).tiny)

    def source(self, column: int) -> Node:
        """Return the node of a column."""
        if column < self.feature_count:
            layer, position, latent = self.features[column].tolist()
            return Node("feature", layer, position, latent)
        if column < self.errors.stop:
            return Node("error", *divmod(column - self.feature_count, len(self.tokens)), None)
        position = column - self.errors.stop
        return Node("token", None, position, self.tokens[position])

    def target(self, row: int) -> Node:
        """Return the node of a row."""
        if row < self.feature_count:
            return self.source(row)
        return Node("logit", None, len(self.tokens) - 1, self.logits[row - self.feature_count])
