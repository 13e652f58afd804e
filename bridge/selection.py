"""Select the tokens on which an SAE is trained and evaluated, and read the selection from metadata."""

from collections.abc import Mapping
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int

ExcludeTokens = Literal["bos", "special", "nothing"]
"""Which special tokens are left out: BOS, all nine of nanochat (the markers of a chat among them), or none."""

SINK_NORM_MULTIPLE = 10.0
"""A token whose norm exceeds this multiple of the `SINK_NORM_QUANTILE` of its row is an attention sink: such tokens are
few, carry no information about the text, and would dominate the squared error."""

SINK_NORM_QUANTILE = 0.9
"""High, because an MLP may write nearly nothing on half of the tokens: those that it writes on are no sinks."""


@runtime_checkable
class SpecialTokens(Protocol):
    """The part of a tokenizer that this module uses."""

    bos_token_id: int
    special_tokens: dict[str, int]


def excluded_ids(choice: ExcludeTokens, tokenizer: SpecialTokens) -> tuple[int, ...]:
    """Return the ids that a choice leaves out, ascending.

    Raises:
      ValueError: the choice is not one of `ExcludeTokens`.
    """
    if choice not in get_args(ExcludeTokens):
        raise ValueError(f"exclude_tokens is {choice!r}: expected one of {', '.join(get_args(ExcludeTokens))}")
    if choice == "nothing":
        return ()
    return (tokenizer.bos_token_id,) if choice == "bos" else tuple(sorted(tokenizer.special_tokens.values()))


def recorded_ids(metadata: Mapping[str, Any] | None, tokenizer: SpecialTokens) -> tuple[int, ...]:
    """Return the ids that were left out when an SAE was trained, from the metadata of its export.

    SAELens writes a list of ids, or true for all special tokens, or false. Without an entry BOS was left out. Exports
    of early versions of jsae, without `drop_sinks`, list all special tokens, but only BOS was left out.

    Raises:
      ValueError: `exclude_special_tokens` is neither true, false nor a list of token ids.
    """
    recorded = metadata.get("exclude_special_tokens") if isinstance(metadata, Mapping) else None
    if recorded is None:
        return (tokenizer.bos_token_id,)
    if isinstance(recorded, bool):
        return excluded_ids("special" if recorded else "nothing", tokenizer)
    if not isinstance(recorded, list) or not all(type(i) is int and 0 <= i < 2**31 for i in recorded):
        raise ValueError(f"exclude_special_tokens is {recorded!r}: expected true, false or a list of token ids")
    assert metadata is not None
    if metadata.get("sae_lens_training_version") == "jsae" and "drop_sinks" not in metadata:
        return (tokenizer.bos_token_id,)
    return tuple(sorted(recorded))


def among(tokens: Int[torch.Tensor, "*B"], ids: tuple[int, ...]) -> Bool[torch.Tensor, "*B"]:
    """Return which tokens have one of the ids."""
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    for i in ids:
        mask |= tokens == i
    return mask


def kept(
    acts: Float[torch.Tensor, "B T C"], tokens: Int[torch.Tensor, "B T"], excluded: tuple[int, ...], drop_sinks: bool
) -> Bool[torch.Tensor, "B T"]:
    """Return the tokens that count: not those with an id of `excluded`, nor, with `drop_sinks`, those of extreme norm.

    A token whose norm is not finite is not a sink: it is kept, so that the run can report it.
    """
    mask = ~among(tokens, excluded)
    if drop_sinks:
        norms = acts.float().norm(dim=-1)
        mask &= ~(norms > SINK_NORM_MULTIPLE * high(norms)) | ~norms.isfinite()
    return mask


def high(norms: Float[torch.Tensor, "B T"]) -> Float[torch.Tensor, "B 1"]:
    """Return the `SINK_NORM_QUANTILE` of the numbers of every row that are not NaN, or the number below it.

    A GPU is not waited for.
    """
    values = norms.sort(dim=1).values  # NaN is last
    last = (norms.shape[1] - 1 - norms.isnan().sum(dim=1, keepdim=True)).clamp(min=0)
    return values.gather(1, (last * SINK_NORM_QUANTILE).long())


def sink_rule(drop_sinks: bool) -> dict[str, float | None]:
    """Return what metadata say of the tokens that were left out as sinks."""
    return {
        "sink_norm_multiple": SINK_NORM_MULTIPLE if drop_sinks else None,
        "sink_norm_quantile": SINK_NORM_QUANTILE if drop_sinks else None,
    }
