"""Tables of lenses: the most likely tokens after every layer of a text, and the tokens that a direction writes."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bridge.circuits.frozen import check_model
from bridge.lenses.lens import JacobianLens, Lens
from bridge.lenses.paths import DirectPath, direct_paths
from bridge.lenses.streams import Streams, unembed

_NUMBERS_AT_ONCE = 2**25
"""Logits that are held at a time."""


@dataclasses.dataclass(frozen=True)
class Table:
    """The most likely next tokens by a lens, L rows of T positions; the last row is the model's own output.

    Attributes:
      lens: the name of the lens.
      layers: the layer of every row; the last is the model's last.
      tokens: the n most likely tokens, (L, T, n), most likely first.
      probabilities: theirs, (L, T, n), of the whole vocabulary.
      ranks: how many tokens are more likely than the one that follows in the text, (L, T - 1).
      entropy: of the whole distribution in nats, (L, T).
    """

    lens: str
    layers: tuple[int, ...]
    tokens: Int[Tensor, "L T n"]
    probabilities: Float[Tensor, "L T n"]
    ranks: Int[Tensor, "L T-1"]
    entropy: Float[Tensor, "L T"]


def rows(model: nn.Module, lens: Lens, streams: Streams, layer: int) -> Float[Tensor, "B T V"]:
    """Return log-probabilities by a lens after a layer; after the last layer they are the model's own.

    Args:
      model: the model of the streams.
      lens: the lens.
      streams: of a text.
      layer: one of the lens's layers, or the last layer.
    """
    if layer == len(streams.blocks) - 1:
        return streams.logits.log_softmax(-1)
    return unembed(model, lens.stream(streams, layer)).log_softmax(-1)


def rows_of(lens: Lens, depth: int, layers: Sequence[int] = ()) -> list[int]:
    """Return the layers of a table, in order: those that are asked for and that the lens reads, and the last.

    Args:
      lens: the lens.
      depth: number of layers of the model.
      layers: the wanted ones; none are all.
    """
    wanted = set(layers) or set(range(depth))
    return [*(layer for layer in lens.layers if layer in wanted and layer < depth - 1), depth - 1]


class Row(NamedTuple):
    """One row of a table: what `Table` has, for a layer."""

    layer: int
    tokens: Int[Tensor, "T n"]
    probabilities: Float[Tensor, "T n"]
    ranks: Int[Tensor, " T-1"]
    entropy: Float[Tensor, " T"]


def table(
    model: nn.Module,
    lens: Lens,
    streams: Streams,
    tokens: Int[Tensor, " T"],
    *,
    top: int = 5,
    layers: Sequence[int] = (),
) -> Table:
    """Return the table of one text.

    Args:
      model: a nanochat.
      lens: the lens.
      streams: of the text as one row, from `bridge.lenses.read`.
      tokens: the text.
      top: number of tokens per cell.
      layers: rows; none are all that the lens has.
    """
    return assembled(lens.name, list(table_rows(model, lens, streams, tokens, top=top, layers=layers)))


def table_rows(
    model: nn.Module, lens: Lens, streams: Streams, tokens: Int[Tensor, " T"], *, top: int, layers: Sequence[int] = ()
) -> Iterator[Row]:
    """Yield the rows of `table` one by one, as a server needs them that does other work between."""
    vocabulary = check_model(model, "lenses", coarse=True).config.vocab_size
    step = max(1, _NUMBERS_AT_ONCE // vocabulary)
    for layer in rows_of(lens, len(streams.blocks), layers):
        yield _row(model, lens, streams, tokens, layer, min(top, vocabulary), step)


def assembled(name: str, rows: Sequence[Row]) -> Table:
    """Return the table of some rows by a lens."""
    layers, *parts = zip(*rows, strict=True)
    return Table(name, tuple(layers), *(torch.stack(part) for part in parts))


def as_json(table: Table) -> dict[str, Any]:
    """Return a table as the explorer's page takes it, with `rounded` numbers."""
    return {
        "layers": list(table.layers),
        "ids": table.tokens.tolist(),
        "probabilities": rounded(table.probabilities),
        "ranks": table.ranks.tolist(),
        "entropy": rounded(table.entropy),
    }


def rounded(numbers: Tensor) -> Any:
    """Return numbers as nested lists, with four decimals; those that are not finite as 0, which JSON lacks."""
    return torch.nan_to_num(numbers.double(), 0.0, 0.0, 0.0).mul(1e4).round().div(1e4).tolist()


@torch.no_grad()
def _row(
    model: nn.Module, lens: Lens, streams: Streams, tokens: Int[Tensor, " T"], layer: int, top: int, step: int
) -> Row:
    """Return one row, computed some positions at a time."""
    parts = []
    for start in range(0, len(tokens), step):
        logs = rows(model, lens, streams.at(slice(start, start + step)), layer)[0]
        best = logs.topk(top)
        following = tokens[start + 1 : start + 1 + len(logs)]
        own = logs[: len(following)].gather(1, following[:, None])
        ranks = (logs[: len(following)] > own).sum(1)
        parts.append((best.indices, best.values.exp(), ranks, -(logs.exp() * logs).sum(1)))
    return Row(layer, *(torch.cat(part) for part in zip(*parts, strict=True)))


# ---- directions -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Written:
    """The tokens that a direction raises and lowers most, by one lens.

    Attributes:
      lens: the name of the lens.
      top, bottom: ids of the tokens, (n,), the most raised and the most lowered first.
      top_values, bottom_values: changes of their logits before the softcap, minus the mean over the vocabulary, (n,).
    """

    lens: str
    top: Int[Tensor, " n"]
    top_values: Float[Tensor, " n"]
    bottom: Int[Tensor, " n"]
    bottom_values: Float[Tensor, " n"]

    def overlap(self, other: "Written", most: int = 10) -> int:
        """Return how many of the `most` most raised tokens two lenses share."""
        return len(set(self.top[:most].tolist()) & set(other.top[:most].tolist()))


@torch.no_grad()
def written(
    model: nn.Module,
    direction: Float[Tensor, " C"],
    layer: int,
    jacobian: JacobianLens | None = None,
    top: int = 20,
) -> list[Written]:
    """Return what a direction in a layer's output writes: c_l W_U d, and W_U J_l d if a Jacobian lens has the layer.

    A direction has no context, so there is no norm: values are comparable within a lens, not between them. W_U is
    lm_head without the padding of the vocabulary.

    Args:
      model: a nanochat.
      direction: for example a decoder row.
      layer: the layer whose output it is added to.
      jacobian: the lens.
      top: number of tokens.

    Raises:
      ValueError: the model has no such layer, or another width.
    """
    gpt = check_model(model, "lenses", coarse=True)
    paths: list[DirectPath] = direct_paths(model)
    if not 0 <= layer < len(paths) or direction.shape != (gpt.config.n_embd,):
        raise ValueError(
            f"a direction of shape {tuple(direction.shape)} in layer {layer}: the model has width {gpt.config.n_embd} "
            f"and layers 0 to {len(paths) - 1}"
        )
    W_U = gpt.lm_head.weight[: gpt.config.vocab_size].float()
    direction = direction.to(W_U)
    written = [_written("direct", W_U @ (paths[layer].own * direction), top)]
    if jacobian is not None and layer in jacobian.layers:
        written.append(_written(jacobian.name, W_U @ (jacobian.matrices[layer].to(W_U) @ direction), top))
    return written


def _written(name: str, logits: Float[Tensor, " V"], top: int) -> Written:
    logits = logits - logits.mean()
    most = min(top, len(logits))
    high, low = logits.topk(most), logits.topk(most, largest=False)
    return Written(name, high.indices, high.values, low.indices, low.values)
