"""Keys and values of the tokens that a model has read, in memory that is read from the start or as a whole."""

import abc
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor


class KeyValues(abc.ABC):
    """Keys and values of the tokens seen so far, and the last token and its embedding, which G4e and G7 need.

    k, v: (n_layer, B, n_kv_head, max_len, head_dim). No gradient flows through them.
    """

    def __init__(self, k: Tensor, v: Tensor):
        self.k, self.v = k, v
        self.position = 0  # tokens seen so far
        self.last_token: Int[Tensor, "B 1"] | None = None
        self.last_embedding: Float[Tensor, "B 1 C"] | None = None  # normed, before the smear

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        return self.k.size(1)

    @property
    def max_len(self) -> int:
        """Capacity in tokens per row."""
        return self.k.size(3)

    @abc.abstractmethod
    def append(
        self, layer: int, k: Float[Tensor, "B Hkv T D"], v: Float[Tensor, "B Hkv T D"]
    ) -> tuple[Float[Tensor, "B Hkv S D"], Float[Tensor, "B Hkv S D"]]:
        """Append one layer's keys and values and return those of that layer to attend to. `position` stays the same."""

    @abc.abstractmethod
    def rows(self, count: int) -> Any:
        """Return an index of the rope tables: the rows of the next `count` positions."""

    @abc.abstractmethod
    def mask(self, window: int | None) -> Float[Tensor, "1 1 1 S"] | None:
        """Return the mask of the next token over the keys of `append`; None: the last key is that of the last token."""

    @abc.abstractmethod
    def advance(self, tokens: Int[Tensor, "B T"], embedded: Float[Tensor, "B T C"] | None) -> None:
        """End a forward pass over tokens; `embedded` are their normed embeddings, which G7 needs."""


@final
class Cache(KeyValues):
    """A cache that is read up to its last token; a pass may have any number of tokens."""

    def append(
        self, layer: int, k: Float[Tensor, "B Hkv T D"], v: Float[Tensor, "B Hkv T D"]
    ) -> tuple[Float[Tensor, "B Hkv S D"], Float[Tensor, "B Hkv S D"]]:
        """Append one layer's keys and values and return all of that layer."""
        end = self.position + k.size(2)
        self.k[layer, :, :, self.position : end] = k.detach()
        self.v[layer, :, :, self.position : end] = v.detach()
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def rows(self, count: int) -> slice:
        """Return the next positions."""
        return slice(self.position, self.position + count)

    def mask(self, window: int | None) -> None:
        """Return None: `attend` makes the mask."""

    def advance(self, tokens: Int[Tensor, "B T"], embedded: Float[Tensor, "B T C"] | None) -> None:
        """End a forward pass."""
        self.position += tokens.size(1)
        self.last_token = tokens[:, -1:]
        self.last_embedding = None if embedded is None else embedded[:, -1:].detach().clone()

    def repeat(self, n: int) -> "Cache":
        """Return a copy of a one-row cache with n rows, to continue one prompt n times.

        Raises ValueError if the cache has more than one row or n < 1.
        """
        if self.batch_size != 1 or n < 1:
            raise ValueError(f"repeat needs n >= 1 and a cache with one row, got n={n} and {self.batch_size} rows")
        rows = Cache(self.k.repeat(1, n, 1, 1, 1), self.v.repeat(1, n, 1, 1, 1))
        rows.position = self.position
        rows.last_token = None if self.last_token is None else self.last_token.repeat(n, 1)
        rows.last_embedding = None if self.last_embedding is None else self.last_embedding.repeat(n, 1, 1)
        return rows


@final
class StaticCache(KeyValues):
    """A cache that is written at a position held on the device, and read as a whole under a mask.

    Args:
      cache: a cache whose text continues.
      capacity: tokens per row of the new one.
    """

    def __init__(self, cache: Cache, capacity: int):
        shape = (*cache.k.shape[:3], capacity, cache.k.shape[4])
        super().__init__(cache.k.new_zeros(shape), cache.v.new_zeros(shape))
        for ours, theirs in ((self.k, cache.k), (self.v, cache.v)):
            ours[:, :, :, : cache.position] = theirs[:, :, :, : cache.position]
        self.position = cache.position
        self.last_token = cache.last_token.clone()
        self.last_embedding = None if cache.last_embedding is None else cache.last_embedding.clone()
        self.keys = capacity
        self._at = torch.full((1,), cache.position, device=self.k.device)
        self._masks: dict[int | None, Tensor] = {}

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write one layer's key and value of a token, and return the first `keys` of that layer."""
        self.k[layer].index_copy_(2, self._at, k.detach())
        self.v[layer].index_copy_(2, self._at, v.detach())
        return self.k[layer, :, :, : self.keys], self.v[layer, :, :, : self.keys]

    def rows(self, count: int) -> Any:
        """Return the position of the next token, on the device."""
        if count != 1:
            raise ValueError(f"a static cache takes one token at a time, not {count}")
        return self._at

    def mask(self, window: int | None) -> Float[Tensor, "1 1 1 keys"]:
        """Return 0 for the keys that the next token sees and -inf for the others."""
        if window not in self._masks:
            s = torch.arange(self.keys, device=self.k.device)
            visible = s <= self._at if window is None else (s <= self._at) & (s >= self._at - window)
            bias = torch.zeros(self.keys, dtype=self.k.dtype, device=self.k.device)
            self._masks[window] = bias.masked_fill(~visible, -torch.inf)[None, None, None]
        return self._masks[window]

    def advance(self, tokens: Int[Tensor, "B 1"], embedded: Float[Tensor, "B 1 C"] | None) -> None:
        """End a forward pass over one token per row."""
        self._masks = {}  # a later step, and a recorded one, makes its own
        self.position += 1
        self._at += 1
        self.last_token.copy_(tokens)
        if embedded is not None:
            self.last_embedding.copy_(embedded)

    def state(self) -> tuple[int, Tensor, Tensor, Tensor | None]:
        """Return a copy of what a step changes, except for the key and value that it writes, which it writes again."""
        embedding = None if self.last_embedding is None else self.last_embedding.clone()
        return self.position, self._at.clone(), self.last_token.clone(), embedding

    def restore(self, state: tuple[int, Tensor, Tensor, Tensor | None]) -> None:
        """Return to a `state`."""
        self.position, at, token, embedding = state
        self._at.copy_(at)
        self.last_token.copy_(token)
        if embedding is not None:
            self.last_embedding.copy_(embedding)
        self._masks = {}

    def replayed(self) -> None:
        """Count a token that a recorded step has added."""
        self.position += 1
