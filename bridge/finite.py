"""Weights and activations that are NaN, infinite or degenerate: where they are, before a long run meets them."""

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
_SHOWN = 12  # tokens of text before one that is named


def broken_weights(model: nn.Module) -> list[str]:
    """Return a description of every parameter and buffer of a model that holds NaN or infinite numbers."""
    found = []
    for name, weight in (*model.named_parameters(), *model.named_buffers()):
        if not weight.is_floating_point() or bool(weight.detach().isfinite().all()):
            continue
        odd = ~weight.detach().isfinite()
        rows = odd.flatten(1).any(1).nonzero().flatten().tolist() if odd.ndim > 1 else []
        where = f" in rows {', '.join(map(str, rows[:5]))}{' …' * (len(rows) > 5)} of {len(odd)}" if rows else ""
        found.append(f"{int(odd.sum())} numbers of {name}{where}")
    return found


def warn_of_broken_weights(model: nn.Module) -> None:
    """Print a warning to stderr for every weight of a model that holds NaN or infinite numbers."""
    for found in broken_weights(model):
        print(f"warning: {found} are not finite: text that needs them has no activations", file=sys.stderr, flush=True)


def is_sound(parts: Iterable[Float[torch.Tensor, "n _"]]) -> bool:
    """Return whether all numbers are finite and none is beyond what float32 sums of squares hold."""
    bounds = [torch.stack(torch.aminmax(part)).float().abs().amax() for part in parts if part.numel()]
    return not bounds or bool((torch.stack(bounds) <= LARGEST).all())  # NaN is not


def first_unsound(
    model: nn.Module,
    acts: Mapping[str, Float[torch.Tensor, "n d"]],
    keep: Bool[torch.Tensor, " n"],
    tokens: Int[np.ndarray, " n"],
    row_len: int,
    decode: Decode | None = None,
) -> str:
    """Return what is wrong with activations that are not sound: at which hook, on how many tokens, and which began it.

    In attention one token without numbers makes its whole row so. The one that began it ends the shortest part of the
    row that is not sound, which is searched by running such parts.

    Args:
      model: what gave the activations.
      acts: by hook name, in the order of the text.
      keep: which tokens count.
      tokens: the ids, row after row.
      row_len: tokens of a row of text.
      decode: makes text of ids.

    Raises:
      ValueError: all activations are sound.
    """
    for name, found in acts.items():
        largest = found.float().abs().amax(-1)
        odd = (~(largest <= LARGEST) & keep).nonzero().flatten().tolist()
        if odd:
            start, place = odd[0] // row_len * row_len, odd[0] % row_len
            row = tokens[start : start + row_len]
            return (
                f"{len(odd)} of {int(keep.sum())} tokens have activations at {name} that are "
                f"{_described(float(largest[odd[0]]), found.dtype)}; it begins with "
                f"{_token(row, _shortest(model, name, row, place) - 1, decode)}"
            )
    raise ValueError(f"the activations at {', '.join(acts)} are finite and within range")


@torch.no_grad()
def _shortest(model: nn.Module, name: str, row: Int[np.ndarray, " n"], sound: int) -> int:
    """Return the length of the shortest part of a row whose activations are not sound; that of `sound` tokens is."""
    device = next(model.parameters()).device
    unsound = len(row)
    while unsound - sound > 1:
        middle = (sound + unsound) // 2
        with capture(model, [name], stop=True) as acts:
            model(torch.from_numpy(row[None, :middle].astype(np.int64)).to(device))
        if is_sound([acts[name][0, 1:]]):  # the first token is BOS, which may be as large as it likes
            sound = middle
        else:
            unsound = middle
    return unsound


def _described(largest: float, dtype: torch.dtype) -> str:
    if np.isfinite(largest):
        return f"as large as {largest:.3g}"
    bound = f": {dtype} ends at {torch.finfo(dtype).max:.3g}" if np.isinf(largest) else ""
    return f"{'infinite' if np.isinf(largest) else 'not numbers'}{bound}"


def _token(row: Int[np.ndarray, " n"], place: int, decode: Decode | None) -> str:
    """A token, its place in its row, and the text that leads to it."""
    token = int(row[place])
    if decode is None:
        return f"token {token} at position {place} of its row"
    before = row[max(place - _SHOWN, 0) : place + 1].tolist()
    return f"token {token}, {decode([token])!r}, at position {place} of its row, after {decode(before)!r}"


@torch.no_grad()
def check_text(
    model: nn.Module,
    hooks: Sequence[str],
    batches: Iterable[Int[np.ndarray, "B T"]],
    *,
    excluded: tuple[int, ...],
    drop_sinks: bool,
    called: str,
    decode: Decode | None = None,
) -> None:
    """Run text up to the deepest hook and check that all its activations can be measured, in one pass.

    Args:
      model: a nanochat, on its device.
      hooks: which activations.
      batches: token ids, of one forward pass each.
      excluded: ids that do not count.
      drop_sinks: whether tokens of extreme norm do not count.
      called: the text's name in an error, for example "held-out text".
      decode: makes text of ids, for errors.

    Raises:
      ActivationsError: activations that are NaN, infinite or out of range; names hook, token and place.
      DegenerateError: activations at a hook that are all zero, all alike, or of a scale that sums do not hold.
    """
    sums: dict[str, _Sums] = {name: _Sums() for name in hooks}
    for done in activations.read(model, hooks, batches, excluded=excluded, drop_sinks=drop_sinks):
        keep = {name: done.mask(name) for name in hooks}
        counted = {name: done.acts[name][keep[name]] for name in hooks}
        if not is_sound(counted.values()):
            name = next(name for name in hooks if not is_sound([counted[name]]))
            flat = {name: done.acts[name].flatten(0, 1)}
            ids = done.tokens.cpu().numpy()
            problem = first_unsound(model, flat, keep[name].flatten(), ids.reshape(-1), ids.shape[1], decode)
            raise ActivationsError(f"in {called}, rows {done.first_row} and on: {problem}")
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
        """Take the activations of some tokens."""
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
        """Return what was seen."""
        mean = self._total / self.count
        spread = max(self._square / self.count - float(mean.square().sum()), 0.0)
        square = spread + float((self._shift + mean).square().sum())
        return Extent(self._largest, (square / len(mean)) ** 0.5, spread / square if square else 0.0, 0)
