"""Bytes that a training step over a mesh sends, by formula, and their time on GPUs by stated assumptions.

A mesh has `data` x `latent` devices; n tokens in a batch of all of them, d = d_in, f = d_sae, k active latents. Sizes
are bytes of the results on one device, of activations in float32 or bfloat16 and of everything else in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from experiments.benches.shapes import Size

_FLOAT = 4


class Sent(NamedTuple):
    """Bytes that a step of TopK or BatchTopK sends, by their purpose."""

    rows: int
    """Activations, gathered over `latent`."""
    candidates: int
    """Values of selected latents and the answers, exchanged over `latent` (TopK)."""
    decoded: int
    """Decodings of all tokens, added over `latent`."""
    gradients: int
    """Gradients of both weight matrices and the bias, added over `data`."""
    fired: int
    """Counts of latents, added over `data`."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)


def sent(size: Size, data: int, latent: int, architecture: str = "topk", itemsize: int = _FLOAT) -> Sent:
    """Return what one step sends.

    Args:
      size: of the SAE and of the batch of all devices.
      data: devices along `data`.
      latent: devices along `latent`.
      architecture: topk or batchtopk.
      itemsize: bytes of an activation.
    """
    tokens, latents = size.batch // data, size.d_sae // latent
    over_latent, over_data = latent > 1, data > 1
    return Sent(
        rows=over_latent * tokens * size.d_in * itemsize,
        candidates=over_latent * (architecture == "topk") * tokens * (size.k + 2) * _FLOAT,
        decoded=over_latent * tokens * size.d_in * _FLOAT,
        gradients=over_data * latents * (2 * size.d_in + 1) * _FLOAT,
        fired=over_data * latents * _FLOAT,
    )


@dataclass(frozen=True)
class Machine:
    """GPUs and links that a plan assumes."""

    name: str = "H100 SXM, 8 per host"
    per_host: int = 8
    nvlink: float = 450e9 * 0.8
    """Bytes a second that a GPU sends within a host: 450 GB/s, of which collectives reach about 80 %."""
    network: float = 50e9 * 0.8
    """Bytes a second that a GPU sends to other hosts: 400 Gb/s, of which collectives reach about 80 %."""
    latency: float = 20e-6
    """Seconds that a collective takes at least."""
    step: float = 16.1e-3 / (16_384 * 131_072)
    """Seconds of a TopK step per token and latent at d_in 1,280: 16.1 ms for 16,384 tokens and 131,072 latents, as
    measured on one H200, which has the same arithmetic and 1.4 times the memory bandwidth of an H100."""
    forward: float = 1 / 1.057e6
    """Seconds per token of a d20's forward pass to layer 10, measured on the same card."""


class Planned(NamedTuple):
    """The prediction for one mesh."""

    cards: int
    data: int
    latent: int
    nvlink_bytes: float
    """Bytes that a GPU sends within its host in a step."""
    network_bytes: float
    """Bytes that a GPU sends to other hosts in a step."""
    communication: float
    """Seconds of sending, none of it hidden behind work."""
    work: float
    """Seconds of the forward pass and the step."""

    @property
    def efficiency(self) -> float:
        """Share of the time that is work: weak scaling, as every GPU has as much work as a single one."""
        return self.work / (self.work + self.communication)


def plan(per_card: Size, data: int, latent: int, machine: Machine = Machine()) -> Planned:
    """Return the prediction for a mesh whose batch grows with the number of GPUs.

    An all-reduce of B bytes over p GPUs sends 2 (p - 1)/p B from each, a gather or exchange with a result of B bytes
    (p - 1)/p B. GPUs along `latent` are neighbours. What is added over several hosts is first added within each host by
    a reduce-scatter, so that every GPU sends its share to other hosts.

    Args:
      per_card: the SAE, and the tokens of one GPU.
      data: GPUs along `data`.
      latent: GPUs along `latent`, at most those of a host.
      machine: the assumptions.
    """
    cards = data * latent
    whole = per_card._replace(batch=per_card.batch * cards)
    traffic = sent(whole, data, latent, itemsize=2)
    across = (latent - 1) / latent
    in_host = across * (traffic.rows + traffic.candidates + 2 * traffic.decoded)
    hosts = -(-cards // machine.per_host)
    near = min(data, machine.per_host // latent)  # GPUs along `data` that are on one host
    sums = traffic.gradients + traffic.fired
    in_host += 2 * (near - 1) / near * sums
    to_others = 2 * (hosts - 1) / hosts * sums / near if hosts > 1 else 0.0
    collectives = 5 * (latent > 1) + 3 * (data > 1)
    communication = in_host / machine.nvlink + to_others / machine.network + collectives * machine.latency
    tokens = whole.batch // data
    work = per_card.batch * machine.forward + tokens * (whole.d_sae // latent) * machine.step * per_card.d_in / 1280
    return Planned(cards, data, latent, in_host, to_others, communication, work)
