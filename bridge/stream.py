"""Stream activations of a nanochat to jax. Beside `handover` and `bridge.finetuning`, all that uses torch and jax."""

import contextlib
import itertools
import warnings
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from bridge import activations, finite, handover
from bridge.ahead import ReadAhead, Rows
from bridge.hooks import find
from bridge.nanochat.corpus import whole_position
from bridge.nanochat.model import Runner
from bridge.passes import unwrapped
from jsae.data import Filling
from jsae.health import ActivationsError
from jsae.settings import require


class ActivationStream:
    """A `jsae.data.Source` that runs a nanochat and yields the activations of the tokens that count.

    A block has a fixed number of tokens of text. Its rows of text are dealt to shards of one size, one after the
    other in it. Tokens that are left out (`excluded` ones, and sinks at any hook of a site) are replaced by
    repetitions of their shard's first other tokens. So a site's shard depends only on its text, not on other sites of
    the same pass nor on other shards, and no shape depends on the data.

    Several checkpoints of a model read the same tokens, one after the other. A site then has the activations of its
    hooks in the first, in the second and so on, and its tokens count in all of them.

    Args:
      model: a nanochat, on its device, in its compute dtype; or several of one width, which are iterated once for
        every block (`bridge.stages.loading.models`).
      rows: the source of token rows; on a GPU a thread reads them ahead, and nothing else may use it.
      sites: for every SAE the hooks that it reads on the same tokens: one, a transcoder's two, or a crosscoder's.
      excluded: ids of tokens to leave out (`bridge.selection.excluded_ids`); () keeps every token.
      rows_per_forward: rows in one forward pass.
      drop_sinks: whether to leave out tokens of extreme norm.
      decode: returns the text of token ids, for errors.
      run: calls the parts of the forward passes (`bridge.nanochat.compiled`), which then all have one shape; None:
        eager passes, of which the last of a block may have fewer rows.
      shards: number of shards; row i of the text is in shard i modulo their number.

    Raises:
      ValueError: the model does not have a hook, or a site has none.
    """

    def __init__(
        self,
        model: torch.nn.Module | Collection[torch.nn.Module],
        rows: Rows,
        sites: Sequence[Sequence[str]],
        *,
        excluded: tuple[int, ...],
        rows_per_forward: int = 16,
        drop_sinks: bool = True,
        decode: finite.Decode | None = None,
        run: Runner | None = None,
        shards: int = 1,
    ):
        self._sites = tuple(tuple(site) for site in sites)
        self._hooks = tuple(dict.fromkeys(name for site in self._sites for name in site))
        require(bool(self._sites) and all(self._sites), "a stream needs at least one hook for every SAE")
        self._models: Collection[torch.nn.Module] = (model,) if isinstance(model, torch.nn.Module) else model
        for one in self._models:
            for name in self._hooks:
                find(one, name)
        require(rows_per_forward >= 1, f"rows_per_forward is {rows_per_forward}: it must be at least 1")
        self.d_in, self._device = unwrapped(one).config.n_embd, next(one.parameters()).device
        self.tokens_seen = 0
        self._excluded, self._rows_per_forward, self._drop_sinks = excluded, rows_per_forward, drop_sinks
        self._decode, self._run = decode, run
        self._shards = shards
        self._rows: Rows = ReadAhead(rows) if self._device.type == "cuda" else rows

    def fill(self, rows: int) -> Filling:
        """Return the next block: for every site a tuple of (rows, d_in) in the dtype of the models.

        A generator that runs one forward pass per step and yields the share of rows that are done. The tokens of the
        next pass are on their way to the device before it yields. On a GPU nothing waits for the device before the last
        step, which waits for the activations of the block, not for training.

        Raises:
          ActivationsError: activations are NaN, infinite or out of float32's range; names hook, token and position.
          ConfigError: a block that cannot be divided into the shards.
          ValueError: no token of a shard counts at a site.
        """
        require(rows % self._shards == 0, f"a block of {rows} tokens cannot be divided into {self._shards} shards")
        blocks: list[dict[str, torch.Tensor]] = [{} for _ in self._models]
        places = _places(rows, self._shards, self._rows.row_len, self._device)
        size = places.shape[0] * -(-places.shape[1] // self._rows.row_len) * self._rows.row_len
        text = np.empty(size, np.int32)
        keep = torch.ones(len(self._sites), size, dtype=torch.bool, device=self._device)
        passes = [self._next_tokens(size, size)]
        done, total = 0, size * len(self._models)
        for own, model in zip(blocks, self._models, strict=True):
            filled = 0
            for number in itertools.count():
                ids, tokens = passes[number]
                end = filled + ids.size
                forward_pass = self._forward(model, ids, tokens)
                for name, acts in forward_pass.acts.items():
                    if name not in own:
                        own[name] = torch.empty(size, self.d_in, dtype=acts.dtype, device=acts.device)
                    own[name][filled:end] = acts.reshape(-1, self.d_in)
                keep[:, filled:end] &= torch.stack([forward_pass.mask(*site).flatten() for site in self._sites])
                text[filled:end] = ids.reshape(-1)
                done, filled = done + ids.size, end
                if own is blocks[0]:  # the first model reads the text that all of them read
                    self.tokens_seen += ids.size
                    if filled < size:
                        passes.append(self._next_tokens(size, size - filled))
                if done < total:
                    yield done / total
                if filled == size:
                    break
        by_shard = keep[:, places]
        packed = [
            _packed([own[name] for own in blocks for name in site], places, by_shard[i])
            for i, site in enumerate(self._sites)
        ]
        sound = finite.soundness(part for parts in packed for part in parts)
        flags = _Flags(torch.cat([sound[None].to(keep.device), by_shard.any(dim=2).all(dim=1)]))
        yield 1.0
        is_sound, *all_kept = flags.read()
        self._require_kept(all_kept, rows // self._shards)
        if not is_sound:
            self._refuse_unsound(blocks, _only(keep, places), text)
        return tuple(tuple(handover.to_jax(part) for part in parts) for parts in packed)

    def _forward(
        self, model: torch.nn.Module, ids: Int[np.ndarray, "R T"], tokens: Int[torch.Tensor, "B T"]
    ) -> activations.ForwardPass:
        """Return one forward pass of a model up to the deepest hook."""
        return activations.forward(
            model,
            self._hooks,
            tokens,
            excluded=self._excluded,
            drop_sinks=self._drop_sinks,
            rows=len(ids),
            run=self._run,
        )

    def _next_tokens(self, block: int, missing: int) -> tuple[Int[np.ndarray, "R T"], Int[torch.Tensor, "B T"]]:
        """Return the next rows for a block of which `missing` tokens are missing, and the tokens of their pass."""
        row_len, most = self._rows.row_len, self._rows_per_forward
        ids = self._rows.next_rows(min(most, -(-missing // row_len)))
        padding = 0 if self._run is None else min(most, -(-block // row_len)) - len(ids)
        return ids, activations.upload(np.pad(ids, ((0, padding), (0, 0)), mode="edge"), self._device)

    def _require_kept(self, all_kept: Sequence[bool], rows: int) -> None:
        """Raise ValueError for a site at which no token of a shard is kept."""
        of = "a block" if self._shards == 1 else "a shard of a block"
        for site, is_kept in zip(self._sites, all_kept, strict=True):
            if not is_kept:
                raise ValueError(
                    f"none of the {rows} tokens of {of} is kept at {', '.join(site)}: each is BOS, another "
                    "excluded token or a token of extreme norm; read larger blocks, or exclude fewer tokens"
                )

    def _refuse_unsound(
        self,
        blocks: Sequence[dict[str, torch.Tensor]],
        keep: Bool[torch.Tensor, "sites rows"],
        text: Int[np.ndarray, " rows"],
    ) -> None:
        """Raise ActivationsError for the first site with activations that are not sound."""
        for site, stay in zip(self._sites, keep, strict=True):
            for model, own in zip(self._models, blocks, strict=True):
                acts = {name: own[name] for name in site}
                if not finite.is_sound(block[stay] for block in acts.values()):
                    location = (acts, stay, text, self._rows.row_len)
                    raise ActivationsError(finite.first_unsound(model, *location, self._decode))

    def position(self) -> dict[str, Any]:
        """Return the position of the next block's text."""
        return self._rows.position()

    def seek(self, position: dict[str, Any]) -> None:
        """Continue from a position."""
        self._rows.seek(position)

    @staticmethod
    def whole_position(positions: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return the position of all processes together (`bridge.nanochat.corpus.whole_position`)."""
        return whole_position(positions)


class _Flags:
    """Booleans on their way from a device to the host, which does not wait for them until they are read."""

    def __init__(self, flags: Bool[torch.Tensor, " n"]):
        self._flags, self._copied = flags, None
        if flags.is_cuda:
            self._flags = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)
            self._flags.copy_(flags, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> list[bool]:
        """Return them, after the device has computed them."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._flags.tolist()


def _places(rows: int, shards: int, row_len: int, device: torch.device) -> Int[torch.Tensor, "shards r"]:
    """Return where in the text of a block, of rows that are dealt to shards in turn, the tokens of every shard are."""
    own = torch.arange(rows // shards, device=device)
    return (own // row_len * shards + torch.arange(shards, device=device)[:, None]) * row_len + own % row_len


def _only(keep: Bool[torch.Tensor, "sites n"], places: Int[torch.Tensor, "shards r"]) -> Bool[torch.Tensor, "sites n"]:
    """Return a mask without the tokens behind the end of their shard."""
    within = torch.zeros_like(keep[0])
    within[places.flatten()] = True
    return keep & within


def _packed(
    parts: list[Float[torch.Tensor, "n d"]], places: Int[torch.Tensor, "shards r"], keep: Bool[torch.Tensor, "shards r"]
) -> list[Float[torch.Tensor, "rows d"]]:
    """Return of every shard the rows to keep, in order, and repetitions of the first of them up to the same number."""
    order = torch.argsort(~keep, dim=1, stable=True)
    turns = torch.arange(keep.shape[1], device=keep.device) % keep.sum(dim=1, keepdim=True).clamp(min=1)
    order = places.gather(1, order.gather(1, turns)).flatten()
    return [part[order] for part in parts]


@contextlib.contextmanager
def forbid_waiting() -> Iterator[None]:
    """Raise an error within the context where torch waits for a GPU, or where jax copies from or to it implicitly.

    For tests of the loop between two reports: neither may happen there.
    """
    before = torch.cuda.get_sync_debug_mode() if torch.cuda.is_available() else None
    if before is not None:
        with warnings.catch_warnings():  # torch warns that the mode is a prototype
            warnings.filterwarnings("ignore", message="Synchronization debug mode", category=UserWarning)
            torch.cuda.set_sync_debug_mode("error")
    try:
        with jax.transfer_guard("disallow"):
            yield
    finally:
        if before is not None:
            torch.cuda.set_sync_debug_mode(before)
