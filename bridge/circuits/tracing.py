"""Compute the attribution graph of a prompt."""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bridge.circuits.frozen import check_model
from bridge.circuits.graph import Graph
from bridge.circuits.replacement import Replacement
from bridge.circuits.rows import direct_effects
from bridge.circuits.scores import influence, normalised
from bridge.compatibility import check_transcoders
from bridge.torch_sae import TorchSAE

Measure = Literal["logit", "logprob"]
Node = tuple[int, int, int | None]
"""Layer, position and latent of a feature; None for the latent is an error."""
_BATCH_BYTES = 2**28
"""Gradients of one backward pass on a CPU, unless a batch size is given; more would leave its caches."""
_LARGEST_BATCH = 512
_RERANKED_AFTER = 1024
"""Features between two rankings by influence."""
_COPIES = 5
"""Arrays of the size of the matrix that are held at once, in pruning."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """Sizes of a graph.

    Attributes:
      max_features: nodes for the features of the largest influence; the errors take in all others.
      max_logits: explain at most as many of the most likely tokens.
      logit_probability: explain no more of them than together have this probability.
      batch_size: targets per backward pass; None is at most 512, as many as 256 MiB or an eighth of a GPU's memory
        hold.
    """

    max_features: int = 7500
    max_logits: int = 10
    logit_probability: float = 0.95
    batch_size: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_features", "max_logits", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}: it must be at least 1")
        if not 0 < self.logit_probability <= 1:
            raise ValueError(f"logit_probability is {self.logit_probability}: it must be above 0, and at most 1")


@dataclasses.dataclass(frozen=True)
class Traced:
    """The graph of a prompt, with the replacement model that it is of."""

    graph: Graph
    replacement: Replacement
    targets: Float[Tensor, "n C"]
    """The direction of the normed final stream that each logit reads."""


def trace(
    model: torch.nn.Module,
    transcoders: Mapping[str, TorchSAE],
    tokens: Int[Tensor, " T"],
    *,
    untrained: tuple[int, ...] = (),
    measure: Measure = "logit",
    limits: Limits | None = None,
    between: Callable[[], object] = lambda: None,
    node: Node | None = None,
) -> Traced:
    """Return the attribution graph of a prompt: why the model predicts what it predicts after its last token.

    Args:
      model: a nanochat in float32 or float64.
      transcoders: by the hook of their input, `blocks.L.ln2.hook_normalized`; one for every layer, from there to
        `blocks.L.hook_mlp_out`, on the model's device and in its precision.
      tokens: the prompt, (T,), on the same device, usually with BOS first.
      untrained: ids of tokens on which the transcoders were not trained; there the errors take in the features.
      measure: what is explained of a token t: "logit" is its logit before the softcap minus the mean over all tokens;
        "logprob" is the linear part of its log-probability, sum_v (δ_tv - p_v) (1 - tanh²(z_v / c)) z_v.
      limits: of the graph.
      between: called before every backward pass; what it raises ends the computation.
      node: a feature or error that the caller asks for, as of `Replacement.column`; checked before the backward passes.

    Raises:
      ValueError: the transcoders or the model do not fit (`bridge.compatibility.check_transcoders`, `Frozen`), there
        are fewer than two tokens or more than the model's context, there is no such `node`, or the graph does not fit
        into memory; says how large it is.
    """
    limits = limits or Limits()
    check_transcoders(model, transcoders)
    check_length(len(tokens), check_model(model).config.sequence_len)
    replacement = Replacement(model, transcoders, tokens, untrained)
    if node is not None:
        replacement.column(*node)
    with torch.inference_mode(False), torch.no_grad():
        logits, probabilities = _likely(replacement, limits)
        targets = _target_vectors(replacement, logits, measure)
        _check_memory(replacement, limits, len(logits))
        active = len(replacement.features)
        matrix, biases = _matrix(replacement, targets, probabilities, limits, between)
        graph = _graph(replacement, logits, probabilities, targets, matrix, biases, active)
    return Traced(graph, replacement, targets)


def check_length(tokens: int, context: int) -> None:
    """Raise ValueError for a prompt of which no graph can be computed."""
    if not 2 <= tokens <= context:
        raise ValueError(
            f"the prompt has {tokens} tokens: an attribution graph needs 2, of which the first may be BOS, to "
            f"{context}, the model's context"
        )


def _likely(r: Replacement, limits: Limits) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
    """Return the fewest most likely next tokens that reach the wanted probability, and their probabilities."""
    probabilities = r.frozen.logits[-1].softmax(-1)
    top = probabilities.topk(min(limits.max_logits, len(probabilities)))
    count = int(torch.searchsorted(top.values.cumsum(0), limits.logit_probability)) + 1
    return top.indices[:count], top.values[:count]


def _target_vectors(r: Replacement, logits: Int[Tensor, " n"], measure: Measure) -> Float[Tensor, "n C"]:
    """Return what is read of the normed final stream for each token, see `trace`."""
    config, head = r.frozen.config, r.frozen.model.lm_head.weight.detach()[: r.frozen.config.vocab_size]
    if measure == "logit":
        return head[logits] - head.mean(0)
    slopes = 1 - torch.tanh(r.frozen.final[-1] @ head.T / config.softcap).square()
    weights = -r.frozen.logits[-1].softmax(-1).to(head.dtype).expand(len(logits), -1).clone()
    weights[torch.arange(len(logits), device=head.device), logits] += 1
    return (weights * slopes) @ head


def _matrix(
    r: Replacement,
    targets: Float[Tensor, "n C"],
    probabilities: Float[Tensor, " n"],
    limits: Limits,
    between: Callable[[], object],
) -> tuple[Float[Tensor, "R S"], Float[Tensor, "R 2"]]:
    """Return the rows of the features that become nodes, and of the logits; `r` keeps these features only."""
    last = torch.full((len(targets),), r.length - 1, device=targets.device)
    outer = [_rows(r, None, targets, last)]
    kept = torch.ones(len(r.features), dtype=torch.bool, device=targets.device)
    if len(kept) <= limits.max_features:
        inner = [(part, *_feature_rows(r, part)) for part in _batches(r, kept, limits, between)]
    else:
        inner, kept = _most_influential(r, outer[0][0], probabilities, limits, between)
    inner.sort(key=lambda part: int(part[0][0]))
    order = torch.cat([part for part, _, _ in inner]) if inner else kept.nonzero()[:, 0]
    matrix = torch.cat([rows for _, rows, _ in inner] + [rows for rows, _ in outer])
    biases = torch.cat([parts for _, _, parts in inner] + [parts for _, parts in outer])
    rows = torch.cat([order.argsort(), torch.arange(len(order), len(matrix), device=order.device)])
    if not bool((rows[1:] > rows[:-1]).all()):
        matrix, biases = matrix[rows], biases[rows]
    if not bool(kept.all()):
        matrix = _folded(r, matrix, kept)
        r.keep(kept)
    return matrix, biases


def _rows(
    r: Replacement, layer: int | None, vectors: Float[Tensor, "B C"], positions: Int[Tensor, " B"]
) -> tuple[Float[Tensor, "B S"], Float[Tensor, "B 2"]]:
    """Return rows with the two columns of biases; the encoder's is added by the caller."""
    rows, decoder = direct_effects(r, layer, vectors, positions)
    return rows, torch.stack([decoder, torch.zeros_like(decoder)], dim=1)


def _feature_rows(r: Replacement, part: Int[Tensor, " B"]) -> tuple[Float[Tensor, "B S"], Float[Tensor, "B 2"]]:
    """Return the rows of some features of one layer."""
    layer = int(r.features[part[0], 0])
    positions, latents = r.features[part, 1], r.features[part, 2]
    rows, biases = _rows(r, layer, r.encoders(layer, latents), positions)
    biases[:, 1] = r.transcoders[layer].b_enc[latents]
    return rows, biases


def _batches(
    r: Replacement, wanted: Bool[Tensor, " F"], limits: Limits, between: Callable[[], object]
) -> Iterator[Int[Tensor, " B"]]:
    """Yield the wanted features in batches of one layer, by position; call `between` before each."""
    for layer in range(r.depth):
        of_layer = r.of_layer(layer)
        places = wanted[of_layer].nonzero()[:, 0] + of_layer.start
        if len(places):
            for part in places.split(_batch_size(r, limits)):
                between()
                yield part


def _batch_size(r: Replacement, limits: Limits) -> int:
    """Return the targets of a backward pass, whose gradients are arrays of all sites and all positions."""
    if limits.batch_size is not None:
        return limits.batch_size
    embedding = r.frozen.embedding
    sites = r.depth + len(r.frozen.values) + 3
    budget = free_memory(embedding.device) // 8 if embedding.is_cuda else _BATCH_BYTES
    return max(1, min(_LARGEST_BATCH, budget // (sites * embedding.numel() * embedding.element_size())))


def _most_influential(
    r: Replacement,
    outer: Float[Tensor, "n S"],
    probabilities: Float[Tensor, " n"],
    limits: Limits,
    between: Callable[[], object],
) -> tuple[list[tuple[Tensor, Tensor, Tensor]], Bool[Tensor, " F"]]:
    """Return the rows of the most influential features, and which they are.

    The influence of a feature whose row is not known yet ends there, so the features are ranked again after some
    batches, as circuit-tracer does.
    """
    count, depth = len(r.features), r.depth
    visited = torch.zeros(count, dtype=torch.bool, device=outer.device)
    inner: list[tuple[Tensor, Tensor, Tensor]] = []
    shares, targets = normalised(outer), torch.zeros(0, dtype=torch.long, device=outer.device)
    while (left := limits.max_features - len(targets)) > 0:
        scores = influence(shares, targets, probabilities, depth)[:count].masked_fill(visited, -1)
        best = scores.argsort(descending=True, stable=True)[: min(left, _RERANKED_AFTER)]
        chosen = torch.zeros_like(visited)
        chosen[best] = True
        visited |= chosen
        new = [(part, *_feature_rows(r, part)) for part in _batches(r, chosen, limits, between)]
        inner += new
        targets = torch.cat([targets, *(part for part, _, _ in new)])
        shares = torch.cat([shares[: -len(outer)], *(normalised(rows) for _, rows, _ in new), shares[-len(outer) :]])
    return inner, visited


def _folded(r: Replacement, matrix: Float[Tensor, "R S"], kept: Bool[Tensor, " F"]) -> Float[Tensor, "R s"]:
    """Return the matrix without the columns of some features, whose effects go to the errors of their places."""
    count = len(kept)
    dropped = (~kept).nonzero()[:, 0]
    places = r.features[dropped, 0] * r.length + r.features[dropped, 1]
    rest = matrix[:, count:].clone()
    rest.index_add_(1, places, matrix[:, dropped])
    return torch.cat([matrix[:, :count][:, kept], rest], dim=1)


def _graph(
    r: Replacement,
    logits: Int[Tensor, " n"],
    probabilities: Float[Tensor, " n"],
    targets: Float[Tensor, "n C"],
    matrix: Float[Tensor, "R S"],
    biases: Float[Tensor, "R 2"],
    active: int,
) -> Graph:
    values = torch.cat([r.activations, targets @ r.frozen.final[-1]])
    return Graph(
        tuple(r.frozen.tokens.tolist()),
        r.depth,
        r.features,
        r.activations,
        tuple(logits.tolist()),
        probabilities,
        matrix,
        biases,
        values,
        active,
    )


def _check_memory(r: Replacement, limits: Limits, logits: int) -> None:
    """Raise ValueError for a graph that does not fit."""
    nodes, size = min(len(r.features), limits.max_features), r.activations.element_size()
    need = _COPIES * (nodes + logits) * r.sources * size
    free = free_memory(r.activations.device)
    if free is not None and need > free:
        raise ValueError(
            f"the graph of {r.length} tokens has {len(r.features):,} active features, {nodes:,} of them nodes: it "
            f"needs about {need / 2**30:.1f} GiB, and {free / 2**30:.1f} are free: give a shorter prompt, or lower "
            "max_features"
        )


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that are available on a device; None if the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        available = re.search(r"^MemAvailable: +(\d+) kB$", Path("/proc/meminfo").read_text(encoding="ascii"), re.M)
    except (OSError, ValueError):
        return None
    return None if available is None else int(available[1]) * 1024
