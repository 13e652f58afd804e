"""Find weights and activations that are NaN, infinite or degenerate, before a long run."""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import nn

from bridge import activations
from bridge.hooks import capture
from jsae.health import LARGEST, ActivationsError, DegenerateError, Extent, degenerate

Decode = Callable[[list[int]], str]
_SHOWN = 12  # preceding tokens of text in an error message


def broken_weights(model: nn.Module) -> list[str]:
    """Return a description of every parameter and buffer of a model that holds NaN or infinite numbers."""
    descriptions = []
    for name, weight in (*model.named_parameters(), *model.named_buffers()):
        if not weight.is_floating_point() or bool(weight.detach().isfinite().all()):
            continue
        not_finite = ~weight.detach().isfinite()
        rows = not_finite.flatten(1).any(1).nonzero().flatten().tolist() if not_finite.ndim > 1 else []
        where = f" in rows {', '.join(map(str, rows[:5]))}{' …' * (len(rows) > 5)} of {len(not_finite)}" if rows else ""
        descriptions.append(f"{int(not_finite.sum())} numbers of {name}{where}")
    return descriptions


def warn_of_broken_weights(model: nn.Module) -> None:
    """Print a warning to stderr for every weight of a model that holds NaN or infinite numbers."""
    for description in broken_weights(model):
        print(
            f"warning: {description} are not finite: text that needs them has no activations",
            file=sys.stderr,
            flush=True,
        )


def is_sound(parts: Iterable[Float[torch.Tensor, "n _"]]) -> bool:
    """Return whether all numbers are finite and small enough for sums of squares in float32."""
    return bool(soundness(parts))


def soundness(parts: Iterable[Float[torch.Tensor, "n _"]]) -> Bool[torch.Tensor, ""]:
    """Return the answer of `is_sound` on the device of the numbers, without waiting for it."""
    bounds = [torch.stack(torch.aminmax(part)).float().abs().amax() for part in parts if part.numel()]
    return (torch.stack(bounds) <= LARGEST).all() if bounds else torch.tensor(True)  # False for NaN


def first_unsound(
    model: nn.Module,
    acts: Mapping[str, Float[torch.Tensor, "n d"]],
    keep: Bool[torch.Tensor, " n"],
    tokens: Int[np.ndarray, " n"],
    row_len: int,
    decode: Decode | None = None,
) -> str:
    """Return a description of activations that are not sound: the hook, the number of tokens, and the first bad token.

    Through attention one NaN spreads over its whole row. The token that caused it is the last of the shortest unsound
    prefix of the row, which is found by bisection, running the model on prefixes.

    Args:
      model: the model of the activations.
      acts: activations by hook name, (n, d) each, in the order of the text.
      keep: which tokens count.
      tokens: the ids, row after row.
      row_len: tokens of a row of text.
      decode: returns the text of ids.

    Raises:
      ValueError: all activations are sound.
    """
    for name, activation in acts.items():
        largest = activation.float().abs().amax(-1)
        unsound = (~(largest <= LARGEST) & keep).nonzero().flatten().tolist()
        if unsound:
            start, position = unsound[0] // row_len * row_len, unsound[0] % row_len
            row = tokens[start : start + row_len]
            return (
                f"{len(unsound)} of {int(keep.sum())} tokens have activations at {name} that are "
                f"{_described(float(largest[unsound[0]]), activation.dtype)}; it begins with "
                f"{_token(row, _shortest(model, name, row, position) - 1, decode)}"
            )
    raise ValueError(f"the activations at {', '.join(acts)} are finite and within range")


@torch.no_grad()
def _shortest(model: nn.Module, name: str, row: Int[np.ndarray, " n"], sound: int) -> int:
    """Return the length of the shortest prefix of a row with unsound activations; that of `sound` tokens is sound."""
    device = next(model.parameters()).device
    unsound = len(row)
    while unsound - sound > 1:
        middle = (sound + unsound) // 2
        with capture(model, [name], stop=True) as acts:
            model(torch.from_numpy(row[None, :middle].astype(np.int64)).to(device))
        if is_sound([acts[name][0, 1:]]):  # the first token is BOS, whose norm may be extreme
            sound = middle
        else:
            unsound = middle
    return unsound


def _described(largest: float, dtype: torch.dtype) -> str:
    """Return a description of the largest magnitude among the channels of a token."""
    if np.isfinite(largest):
        return f"as large as {largest:.3g}"
    bound = f": the largest {dtype} is {torch.finfo(dtype).max:.3g}" if np.isinf(largest) else ""
    return f"{'infinite' if np.isinf(largest) else 'NaN'}{bound}"


def _token(row: Int[np.ndarray, " n"], position: int, decode: Decode | None) -> str:
    """Return a description of a token: its position in its row and the preceding text."""
    token = int(row[position])
    if decode is None:
        return f"token {token} at position {position} of its row"
    before = row[max(position - _SHOWN, 0) : position + 1].tolist()
    return f"token {token}, {decode([token])!r}, at position {position} of its row, after {decode(before)!r}"


@torch.no_grad()
def check_text(
    model: nn.Module,
    hooks: Sequence[str],
    batches: Iterable[Int[np.ndarray, "_ T"]],
    *,
    excluded: tuple[int, ...],
    drop_sinks: bool,
    called: str,
    decode: Decode | None = None,
) -> None:
    """Check the activations of text in one pass up to the deepest hook: they are finite and not degenerate.

    Args:
      model: a nanochat, on its device.
      hooks: which activations.
      batches: token ids, of one forward pass each.
      excluded: ids of tokens that do not count.
      drop_sinks: whether tokens of extreme norm do not count.
      called: the text's name in an error, for example "held-out text".
      decode: returns the text of ids, for errors.

    Raises:
      ActivationsError: activations are NaN, infinite or out of range; names hook, token and position.
      DegenerateError: activations at a hook are all zero, all equal, or too small or large for sums.
    """
    sums: dict[str, _Sums] = {name: _Sums() for name in hooks}
    for forward_pass in activations.read(model, hooks, batches, excluded=excluded, drop_sinks=drop_sinks):
        keep = {name: forward_pass.mask(name) for name in hooks}
        counted = {name: forward_pass.acts[name][keep[name]] for name in hooks}
        if not is_sound(counted.values()):
            name = next(name for name in hooks if not is_sound([counted[name]]))
            flat = {name: forward_pass.acts[name].flatten(0, 1)}
            ids = forward_pass.tokens.cpu().numpy()
            problem = first_unsound(model, flat, keep[name].flatten(), ids.reshape(-1), ids.shape[1], decode)
            raise ActivationsError(f"in {called}, rows {forward_pass.first_row} and on: {problem}")
        for name in hooks:
            sums[name].add(counted[name])
    for name, total in sums.items():
        problem = total.count and degenerate(total.extent(), f"activations at {name} on {called}")
        if problem:
            raise DegenerateError(problem)


class _Sums:
    """Sums of activations in float64, from which their extent follows."""

    def __init__(self) -> None:
        self.count, self._square, self._largest = 0, 0.0, 0.0
        self._total: torch.Tensor | None = None
        self._shift: torch.Tensor | None = None

    def add(self, acts: Float[torch.Tensor, "n d"]) -> None:
        """Add the activations of some tokens."""
        if not len(acts):
            return
        x = acts.double()
        self._largest = max(self._largest, float(x.abs().max()))
        if self._shift is None:
            self._shift, self._total = x[0], torch.zeros_like(x[0])
        centred = x - self._shift
        self._total += centred.sum(0)
        self._square += float(centred.square().sum())
        self.count += len(x)

    def extent(self) -> Extent:
        """Return the extent of all activations so far."""
        mean = self._total / self.count
        spread = max(self._square / self.count - float(mean.square().sum()), 0.0)
        square = spread + float((self._shift + mean).square().sum())
        return Extent(self._largest, (square / len(mean)) ** 0.5, spread / square if square else 0.0, 0)
