"""The residual streams that lenses read."""

import dataclasses

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bridge.circuits.frozen import check_model
from bridge.hooks import capture, hook_name
from bridge.lenses.paths import DirectPath, direct_paths

Stream = Float[Tensor, "B T C"]


@dataclasses.dataclass(frozen=True)
class Streams:
    """The residual stream of a text after every block, and what reaches its end beside the blocks.

    Attributes:
      blocks: outputs of all blocks, `blocks.L.hook_resid_post`, (B, T, C) each.
      x0: the stream before the first block; None where only outputs of blocks were read.
      bigram: bigram embeddings (G4e); None without.
      logits: the model's own, (B, T, V); None if the pass ended after the last block.
    """

    blocks: list[Stream]
    x0: Stream | None
    bigram: Stream | None
    logits: Float[Tensor, "B T V"] | None

    def at(self, positions: slice) -> "Streams":
        """Return the streams of some positions."""
        x0, bigram, logits = (None if x is None else x[:, positions] for x in (self.x0, self.bigram, self.logits))
        return Streams([h[:, positions] for h in self.blocks], x0, bigram, logits)

    def direct(self, path: DirectPath, layer: int) -> Stream:
        """Return the final stream without the writes of the blocks after a layer; it needs `x0`."""
        assert self.x0 is not None
        stream = path.own * self.blocks[layer] + path.x0 * self.x0
        if path.middle:
            stream = stream + path.middle * self.blocks[len(self.blocks) // 2]
        if self.bigram is not None:
            stream = stream + path.bigram * self.bigram
        return stream


def read(model: nn.Module, tokens: Int[Tensor, "B T"]) -> Streams:
    """Run a model on token ids and return its streams, in its own precision, without gradients.

    Args:
      model: a nanochat of this project; it may be compiled or wrapped, and open contexts take effect.
      tokens: token ids, on its device.

    Raises:
      ValueError: the model is another one, or does not take the tokens.
    """
    gpt = check_model(model, "lenses", coarse=True)
    names = [hook_name(layer, "resid_post") for layer in range(gpt.config.n_layer)]
    with torch.no_grad():
        with capture(model, names) as acts:
            logits = model(tokens)
        x0 = gpt.embed(tokens)[1]
        bigram = gpt.bigram_embed(tokens, None) if gpt.config.bigram else None
    return Streams([acts[name] for name in names], x0, bigram, logits)


def final(model: nn.Module, streams: Streams) -> Stream:
    """Return the residual stream that the final norm reads."""
    return streams.direct(direct_paths(model)[-1], len(streams.blocks) - 1)


def unembed(model: nn.Module, stream: Float[Tensor, "*n C"]) -> Float[Tensor, "*n V"]:
    """Return the logits that the end of the model gives for a residual stream: norm, lm_head and softcap."""
    gpt = check_model(model, "lenses", coarse=True)
    return gpt.unembed(stream.to(gpt.lm_head.weight.dtype))
