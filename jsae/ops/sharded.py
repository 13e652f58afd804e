"""The operations on several devices: each computes its tokens and its latents, and sends what others need of them.

Batches are divided over the mesh axis `data`, latents over `latent` (`jsae.axes`). Codes have a column for every
candidate of every shard of latents: each device holds the codes of its own latents. A step sends

- over `latent`: the activations of the tokens whose latents are divided; the values of candidates to the device that
  compares those of a token, and its answers back; the decoding of every token, added up (n/data, o);
- over `data`: the gradients of this device's latents, added up; counts of latents that fired;
- over both: thresholds of a batch, as counts; sums of metrics; while latents are dead, their largest pre-activations.

Weights, pre-activations and codes stay where they are. What is elementwise or a product the compiler partitions itself.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from jsae.axes import DATA, LATENT
from jsae.ops import exchange
from jsae.ops.cpu import adam_in_place
from jsae.ops.formulas import Formula, Maps, PerLatent
from jsae.ops.interface import AdamScalars, AdamSettings, Moments, Result
from jsae.ops.local import LocalOps
from jsae.ops.sparse import SparseOps
from jsae.ops.types import Codes, Input, Select
from jsae.ops.xla import Xla
from jsae.settings import ConfigError

_TOKENS, _LATENTS, _BOTH = P(DATA), P(LATENT), P(DATA, LATENT)
_ROOM = 2
"""Codes that a device has room for where a batch shares them, as a multiple of its share: more than that of the others
it needs only where its tokens have so many more active latents. Then its smallest codes are left out."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sharded(SparseOps):
    """Operations over a mesh, by an implementation for one device.

    Args:
      inner: computes the part of a device.
      mesh: (data, latent).
    """

    inner: LocalOps
    mesh: Mesh

    name: ClassVar[str] = "sharded"

    def __post_init__(self) -> None:
        object.__setattr__(self, "matmul_dtype", self.inner.matmul_dtype)
        object.__setattr__(self, "narrow", self.inner.narrow)

    @property
    def shards(self) -> int:
        """Number of devices that divide the latents among themselves."""
        return self.mesh.shape[LATENT]

    def on_devices(self, function: Callable[..., Result], *arguments: tuple[Any, Any], out: Any) -> Result:
        """Return `function` of every device's part of the arguments; each comes with its partition, results as `out`.

        A partition stands for all arrays of a tree. None is no array.
        """
        present = [(value, spec) for value, spec in arguments if value is not None]
        places = [value is not None for value, _ in arguments]

        def local(*parts: Any) -> Result:
            rest = iter(parts)
            return function(*(next(rest) if place else None for place in places))

        mapped = jax.shard_map(
            local, mesh=self.mesh, in_specs=tuple(spec for _, spec in present), out_specs=out, check_vma=False
        )
        return mapped(*(value for value, _ in present))

    # ---- selection -------------------------------------------------------------------------------------------------

    def top_k(
        self,
        pre: Float[Array, "n f"],
        k: int,
        limit: Int[Array, ""] | None = None,
        bias: Float[Array, " f"] | None = None,
    ) -> Codes:
        """Select as the compiler partitions it; `encode` does without whole rows of pre-activations."""
        return self._whole.top_k(pre, k, limit, bias)

    def abs_top_k(
        self,
        pre: Float[Array, "n f"],
        k: int,
        limit: Int[Array, ""] | None = None,
        bias: Float[Array, " f"] | None = None,
    ) -> Codes:
        """Select as the compiler partitions it."""
        return self._whole.abs_top_k(pre, k, limit, bias)

    def batch_top_k(
        self,
        pre: Float[Array, "n f"],
        k: int,
        limit: Int[Array, ""] | None = None,
        bias: Float[Array, " f"] | None = None,
    ) -> Codes:
        """Select as the compiler partitions it."""
        return self._whole.batch_top_k(pre, k, limit, bias)

    @property
    def _whole(self) -> Xla:
        """Operations on whole arrays, which the compiler partitions."""
        return Xla(self.matmul_dtype)

    def pick(
        self,
        select: Select,
        by_token: bool,
        inputs: Input,
        W_enc: Float[Array, "f d"],
        b_enc: Float[Array, " f"],
        allowed: Bool[Array, " f"] | None,
        limit: Int[Array, ""] | None,
    ) -> Codes:
        """Select among every device's latents, then among the candidates of all.

        A selection of another's is made on whole rows of pre-activations, which then travel.

        Raises:
          ConfigError: a selection of another's that does not treat every token by itself.
        """
        own: dict[Any, Callable[..., Codes]] = {
            self.top_k: functools.partial(self._pick_of_token, magnitudes=False),
            self.abs_top_k: functools.partial(self._pick_of_token, magnitudes=True),
            self.batch_top_k: self._pick_of_batch,
        }
        function, settings = getattr(select, "func", None), getattr(select, "keywords", {})
        if function not in own or settings.keys() != {"k"}:
            codes = self._whole.pick(select, by_token, inputs, W_enc, b_enc, allowed, limit)
            return self._spread(codes, len(W_enc) // self.shards)
        local = functools.partial(own[function], k=settings["k"])
        parts = ((inputs, self._input_spec(inputs)), (W_enc, _LATENTS), (b_enc, _LATENTS))
        return self.on_devices(local, *parts, (allowed, _LATENTS), (limit, P()), out=_BOTH)

    def _pick_of_token(
        self,
        inputs: Input,
        W_enc: Float[Array, "f d"],
        b_enc: Float[Array, " f"],
        allowed: Bool[Array, " f"] | None,
        limit: Int[Array, ""] | None,
        *,
        k: int,
        magnitudes: bool,
    ) -> Codes:
        """Return the candidates of this device; those that are not among the k largest of all have value 0."""
        candidates = min(k, len(W_enc))
        select = functools.partial(self.inner.abs_top_k if magnitudes else self.inner.top_k, k=candidates)
        if self.shards == 1:
            return self.inner.pick(select, True, inputs, W_enc, b_enc, allowed, limit)
        codes = self.inner.pick(select, True, inputs, W_enc, b_enc, allowed, None)
        missing = jnp.isneginf(codes.values)
        sizes = jnp.where(missing | (not magnitudes), codes.values, jnp.abs(codes.values))
        is_selected = exchange.largest_of_token(sizes, k, limit, self.inner.top_k, self.shards)
        return Codes(jnp.where(is_selected, codes.values, 0), codes.indices + self._first(len(W_enc)))

    def _pick_of_batch(
        self,
        inputs: Input,
        W_enc: Float[Array, "f d"],
        b_enc: Float[Array, " f"],
        allowed: Bool[Array, " f"] | None,
        limit: Int[Array, ""] | None,
        *,
        k: int,
    ) -> Codes:
        """Return the codes of this device that are among the largest of the batch, in the order of their tokens."""
        n, data = len(inputs.x), self.mesh.shape[DATA]
        room = min(k if data == 1 else _ROOM * k, len(W_enc))
        select = functools.partial(self.inner.batch_top_k, k=room)
        codes = self.inner.pick(select, False, inputs, W_enc, b_enc, allowed, None)
        count = n * data * (k if limit is None else limit)
        values = jnp.where(exchange.largest_of_all(codes.values, count), codes.values, 0)
        return Codes(values, codes.indices + self._first(len(W_enc)), codes.tokens + lax.axis_index(DATA) * n)

    def _spread(self, codes: Codes, latents: int) -> Codes:
        """Return codes with columns for every shard of so many latents, which has the values of its own."""
        if codes.rows is not None:
            raise ConfigError(
                "an own selection from the whole batch runs on one device only: select with context.ops.batch_top_k, "
                "or every token by itself"
            )
        n, k = codes.values.shape
        owners, shards = codes.indices // latents, jnp.arange(self.shards)[:, None]
        values = jnp.where(owners[:, None] == shards, codes.values[:, None], 0)
        indices = jnp.where(owners[:, None] == shards, codes.indices[:, None], shards * latents)
        both = NamedSharding(self.mesh, _BOTH)
        parts = (lax.with_sharding_constraint(a.reshape(n, self.shards * k), both) for a in (values, indices))
        return Codes(*parts)

    def _first(self, latents: int) -> Int[Array, ""]:
        """Return the number of the first latent of this device, which has `latents`."""
        return lax.axis_index(LATENT) * latents

    # ---- sums of rows ----------------------------------------------------------------------------------------------

    def decoded(self, codes: Codes, W: Float[Array, "f d"], start: Float[Array, "n d"]) -> Float[Array, "n d"]:
        """Decode every device's codes, and add them up over the latents."""

        def local(codes: Codes, W: Float[Array, "f d"], start: Float[Array, "n d"]) -> Float[Array, "n d"]:
            own = self._own(codes, len(W), len(start))
            if self.shards == 1:
                return self.inner.decoded(own, W, start)
            decoded = self._of_present(own, lambda some: self.inner.decoded(some, W, jnp.zeros_like(start)))
            return lax.psum(decoded, LATENT) + start

        return self.on_devices(local, (codes, _BOTH), (W, _LATENTS), (start, _TOKENS), out=_TOKENS)

    def dots(self, codes: Codes, g: Float[Array, "n d"], W: Float[Array, "f d"]) -> Float[Array, "m k"]:
        """Multiply every device's rows; nothing is sent. Codes of value 0 may get 0."""

        def local(codes: Codes, g: Float[Array, "n d"], W: Float[Array, "f d"]) -> Float[Array, "m k"]:
            def back(dots: Float[Array, "m few"], where: Int[Array, " c"]) -> Float[Array, "m k"]:
                zeros = jnp.zeros(codes.values.size, dots.dtype)
                return zeros.at[where].set(dots.ravel(), mode="drop").reshape(codes.values.shape)

            return self._of_present(self._own(codes, len(W), len(g)), lambda some: self.inner.dots(some, g, W), back)

        return self.on_devices(local, (codes, _BOTH), (g, _TOKENS), (W, _LATENTS), out=_BOTH)

    def latent_sums(self, codes: Codes, inputs: Input, f: int) -> Float[Array, "f d"]:
        """Add every device's tokens, and the sums over `data`."""

        def local(codes: Codes, inputs: Input) -> Float[Array, "f d"]:
            own, latents = self._own(codes, f // self.shards, len(inputs.x)), f // self.shards
            sums = self._of_present(own, lambda some: self.inner.latent_sums(some, inputs, latents))
            return lax.psum(sums, DATA)

        return self.on_devices(local, (codes, _BOTH), (inputs, self._input_spec(inputs)), out=_LATENTS)

    def value_sums(self, codes: Codes, f: int) -> Float[Array, " f"]:
        """Add every device's values, and the sums over `data`."""

        def local(codes: Codes) -> Float[Array, " f"]:
            own, latents = self._own(codes, f // self.shards, 0), f // self.shards
            return lax.psum(self._of_present(own, lambda some: self.inner.value_sums(some, latents)), DATA)

        return self.on_devices(local, (codes, _BOTH), out=_LATENTS)

    def times_fired(self, codes: Codes, f: int) -> Int[Array, " f"]:
        """Count every device's codes, and add the counts over `data`."""

        def local(codes: Codes) -> Int[Array, " f"]:
            return lax.psum(self.inner.times_fired(self._own(codes, f // self.shards, 0), f // self.shards), DATA)

        return self.on_devices(local, (codes, _BOTH), out=_LATENTS)

    def decode_parts(
        self, codes: Codes, W_dec: Float[Array, "f o"], level: Int[Array, "n k"], levels: int, n: int
    ) -> Float[Array, "l n o"]:
        """Decode all levels in one pass, each code into its own, and add them up."""
        inside = level < levels
        rows = codes.tokens * levels + jnp.where(inside, level, 0)  # a token's levels side by side: on one device
        moved = Codes(jnp.where(inside, codes.values, 0), codes.indices, rows)
        ordered = self.on_devices(self.inner.in_token_order, (moved, _BOTH), out=_BOTH)
        parts = self.decode(ordered, W_dec, jnp.zeros((n * levels, W_dec.shape[1])))
        return jnp.cumsum(parts.reshape(n, levels, -1), axis=1).swapaxes(0, 1)

    def _of_present(
        self, codes: Codes, function: Callable[[Codes], Result], back: Callable[[Any, Any], Any] = lambda made, _: made
    ) -> Result:
        """Return what a function gives of the codes of a device, from those that are not zero where they are few.

        Of the k candidates of a token a device keeps one in `shards` on average, so that the sums of all devices
        together take as long as those of one. Where it keeps more than twice as many it sums all.

        Args:
          codes: those of this device.
          function: of all codes, or of those that are not zero.
          back: of what the latter gave and the places of these codes, what the former would have given.
        """
        n, k = codes.values.shape
        few = -(-_ROOM * k // self.shards)
        if few >= k:
            return function(codes)
        values, last = codes.values.ravel(), n * k - 1
        (where,) = jnp.nonzero(values != 0, size=n * few, fill_value=n * k)
        at = jnp.minimum(where, last)  # what fills up has the last token, so that the order stays, and value 0
        tokens = jnp.broadcast_to(codes.tokens, (n, k)).ravel()[at]
        parts = (values.at[where].get(mode="fill", fill_value=0), codes.indices.ravel()[at], tokens)
        present = Codes(*(part.reshape(n, few) for part in parts))
        count = (values != 0).sum()
        return lax.cond(count <= n * few, lambda: back(function(present), where), lambda: function(codes))

    def _own(self, codes: Codes, latents: int, tokens: int) -> Codes:
        """Return the codes of this device, with latents and tokens counted from its first ones."""
        rows = None if codes.rows is None else codes.rows - lax.axis_index(DATA) * tokens
        return Codes(codes.values, codes.indices - self._first(latents), rows)

    @staticmethod
    def _input_spec(inputs: Input) -> Input:
        parts = [None if a is None else P() for a in inputs[1:]]
        return Input(_TOKENS, *parts)  # type: ignore[arg-type]  # partitions of a tree

    # ---- all latents -----------------------------------------------------------------------------------------------

    def map_latents(
        self,
        inputs: Input,
        W_enc: Float[Array, "f d"],
        b_enc: Float[Array, " f"],
        formula: Formula,
        arrays: PerLatent,
    ) -> tuple[Maps, PerLatent]:
        """Evaluate every device's part, and add the sums over `data`."""

        def local(inputs: Input, W_enc: Array, b_enc: Array, arrays: PerLatent) -> tuple[Maps, PerLatent]:
            maps, sums = self.inner.map_latents(inputs, W_enc, b_enc, formula, arrays)
            return maps, lax.psum(sums, DATA)

        parts = ((inputs, self._input_spec(inputs)), (W_enc, _LATENTS), (b_enc, _LATENTS), (arrays, _LATENTS))
        return self.on_devices(local, *parts, out=(_BOTH, _LATENTS))

    def latent_totals(self, latents: Float[Array, "n f"]) -> tuple[Int[Array, " f"], Float[Array, " f"]]:
        """Count and add every device's part, and the totals over `data`."""

        def local(latents: Float[Array, "n f"]) -> tuple[Array, Array]:
            return lax.psum(self.inner.latent_totals(latents), DATA)

        return self.on_devices(local, (lax.stop_gradient(latents), _BOTH), out=_LATENTS)

    def rows_of_tokens(self, x: Float[Array, "n d"], tokens: Int[Array, " f"]) -> Float[Array, "f d"]:
        """Bring the rows of all tokens to every device; each reads those of its latents."""

        def local(x: Float[Array, "n d"], tokens: Int[Array, " f"]) -> Float[Array, "f d"]:
            return lax.all_gather(x, DATA, tiled=True)[tokens]

        return self.on_devices(local, (x, _TOKENS), (tokens, _LATENTS), out=_LATENTS)

    # ---- whole step ------------------------------------------------------------------------------------------------

    def sum_over_tokens(
        self, function: Callable[[Any], Result], arrays: Any, d_in: int, d_sae: int, *, gradients: bool
    ) -> Result:
        """Return `function(arrays)`: in parts, every part's gradients would be added over the devices by itself."""
        return function(arrays)

    def adam(self, scalars: AdamScalars, settings: AdamSettings, g: Array, moments: Moments) -> Moments:
        """Update every device's latents; nothing is sent."""
        if not settings.of_latents or g.ndim < 2:
            return adam_in_place(scalars, settings, g, moments, lambda a: a, lambda _, new: new)

        def local(scalars: AdamScalars, g: Array, moments: Moments) -> Moments:
            return self.inner.adam(scalars, settings, g, moments)

        return self.on_devices(local, (scalars, P()), (g, _LATENTS), (moments, _LATENTS), out=_LATENTS)
