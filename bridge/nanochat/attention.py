"""Causal attention within sliding windows: on any device, under a mask that is given, or in flex_attention."""

import functools
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)  # a cached mask that was created in inference mode may be used in training later
def window_mask(queries: int, keys: int, window: int | None, device: torch.device) -> Bool[Tensor, "queries keys"]:
    """Return the mask of the keys s that query t sees: t - window <= s <= t. The last query is at the last key."""
    t = torch.arange(keys - queries, keys, device=device)[:, None]
    s = torch.arange(keys, device=device)
    causal = s <= t
    return causal if window is None else causal & (s >= t - window)


def is_causal(length: int, window: int | None) -> bool:
    """Return whether the attention within a text of this length is plainly causal, since its window covers the text."""
    return window is None or length <= window + 1


def attend(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B Hkv S D"],
    v: Float[Tensor, "B Hkv S D"],
    window: int | None,
    mask: Any = None,
) -> Float[Tensor, "B H T D"]:
    """Return softmax(q k^T / sqrt(D)) v over the keys in the window; the last query is at the last key.

    Keys that no query sees are dropped; a single query then needs no mask. If the window covers all keys, attention is
    plainly causal. Otherwise a boolean mask is used, which works on all devices (flex_attention compiles for GPUs
    only). Key head j serves the query heads j r .. j r + r - 1, where r = H / Hkv.

    Args:
        q: queries.
        k: keys.
        v: values.
        window: see `window_mask`.
        mask: the mask, if the caller has it already: True or 0 where a query sees a key, or a BlockMask, with which
            attention is computed by flex_attention.
    """
    if mask is not None:
        return _attend_masked(q, k, v, mask)
    queries, keys = q.size(2), k.size(2)
    unseen = 0 if window is None else max(0, keys - queries - window)
    k, v, keys = k[:, :, unseen:], v[:, :, unseen:], keys - unseen
    causal = queries == keys and is_causal(queries, window)
    groups = q.size(1) // k.size(1)
    if causal or queries == 1:
        return scaled_dot_product_attention(q, k, v, is_causal=causal and queries > 1, enable_gqa=groups > 1)
    return _attend_masked(q, k, v, window_mask(queries, keys, window, q.device))


def _attend_masked(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    """Return attention under a mask: a tensor, or a BlockMask."""
    groups = q.size(1) // k.size(1)
    if not isinstance(mask, Tensor):
        return torch.nn.attention.flex_attention.flex_attention(q, k, v, block_mask=mask, enable_gqa=groups > 1)
    # On CUDA, enable_gqa with a mask leaves only the kernel that stores all scores, so the heads are copied.
    k, v = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask)
