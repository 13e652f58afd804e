"""The direct path of every layer's output to the end of a nanochat, in which no later block reacts to it.

Between blocks the residual stream is mixed with x0, x <- r_i x + s_i x0, in one generation (G4e) also with bigram
embeddings, and at the end of G7 the output of a middle block is subtracted, y = h_{L-1} - β h_m. So exactly

    y = c_l h_l + d_l x0 + e_l h_m + g_l bigram + (what the attention and MLPs of later blocks write)
"""

from typing import NamedTuple

from bridge.circuits.frozen import check_model
from bridge.nanochat.model import GPT


class DirectPath(NamedTuple):
    """Factors with which the outputs of earlier parts reach the residual stream that the final norm reads."""

    own: float
    """c, of the block's output. Below 0 an addition to it acts in the opposite direction."""
    x0: float
    """d, of the residual stream before the first block, beside its path through the block's output."""
    middle: float
    """e, of the output of block `n_layer // 2`, from the block after it on: minus the backout."""
    bigram: float
    """g, of the bigram embeddings (G4e)."""

    @property
    def sign(self) -> float:
        """The sign of `own`, as 1 or -1. The final norm cancels its magnitude, but not its sign."""
        return -1.0 if self.own < 0 else 1.0


def direct_paths(model: GPT) -> list[DirectPath]:
    """Return the direct path of every block's output, from the first block to the last.

    Raises:
      ValueError: the model is no nanochat of this project.
    """
    gpt = check_model(model, "lenses", coarse=True)
    config = gpt.config
    last, middle = config.n_layer - 1, config.n_layer // 2
    backout = gpt.backout_lambda.float().item() if config.backout else 0.0
    mixing = _mixing(gpt)
    paths = []
    for layer in range(config.n_layer):
        own, x0, bigram = _mixed(mixing, layer, last)
        if layer <= middle:
            at_middle = _mixed(mixing, layer, middle)
            own, x0, bigram = (a - backout * b for a, b in zip((own, x0, bigram), at_middle, strict=True))
        paths.append(DirectPath(own, x0, -backout if layer > middle else 0.0, bigram))
    return paths


Mixing = list[tuple[float, float, float]]
"""By layer: what multiplies the stream, x0 and the bigram embeddings before the block."""


def _mixing(gpt: GPT) -> Mixing:
    depth = gpt.config.n_layer
    resid = gpt.resid_lambdas.float().tolist() if gpt.config.lambdas else [1.0] * depth
    first = gpt.x0_lambdas.float().tolist() if gpt.config.lambdas else [0.0] * depth
    bigram = gpt.bigram_lambdas.float().tolist() if gpt.config.bigram else [0.0] * depth
    return list(zip(resid, first, bigram, strict=True))


def _mixed(mixing: Mixing, layer: int, end: int) -> tuple[float, float, float]:
    """Return the factors of the direct path to the output of block `end`: of the block's output, x0 and the bigram."""
    own, x0, bigram = 1.0, 0.0, 0.0
    for r, s, b in mixing[layer + 1 : end + 1]:
        own, x0, bigram = r * own, r * x0 + s, r * bigram + b
    return own, x0, bigram
