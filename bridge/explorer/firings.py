"""Collect what the latents of several SAEs fire on: one pass of the model over a text, and the sums for moments."""

import concurrent.futures
import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
import scipy.sparse
import torch
from jaxtyping import Float, Int, UInt16

from bridge import activations
from bridge.nanochat import Nanochat
from bridge.torch_sae import TorchSAE
from jsae.records.correlation import Moments
from jsae.records.recorder import Recorder

Report = Callable[[str, float], None]
"""Takes the current phase and the share of it that is done, 0 to 1."""

_MOST_NUMBERS = 2**27  # in a batch of latents: half a GiB
_PER_FORWARD = {"cpu": 2048}  # tokens: what stays in a CPU's cache; on other devices `_MANY`
_MANY = 2**14


class Gatherer:
    """Collects the firings of one SAE and the sums for its moments."""

    def __init__(self, sae: TorchSAE, recorder: Recorder):
        self.sae, self.recorder = sae, recorder
        self._tokens = 0
        self._shift: torch.Tensor | None = None

    def add(self, first: int, acts: Float[torch.Tensor, "B T d"], counts: torch.Tensor) -> None:
        """Add a forward pass; `first` is the number of its first token, `counts` (B, T) marks the tokens that count."""
        cells = counts.flatten().nonzero()[:, 0]
        x = acts.flatten(0, 1)[cells].float()
        if not len(x):
            return
        if not x.isfinite().all():
            raise FloatingPointError(f"the model's activations from token {first} on are not finite")
        token, latent, value = codes(self.sae, x)
        lengths = torch.bincount(token, minlength=len(x))
        self._sum(x, token, latent, value)
        columns = (cells + first, lengths, latent, value)
        self.recorder.add(*(column.cpu().numpy() for column in columns))

    def _sum(self, x: torch.Tensor, token: torch.Tensor, latent: torch.Tensor, value: torch.Tensor) -> None:
        """Add to the sums of `Moments`, on the model's device."""
        if self._shift is None:
            self._shift = x.mean(0)
            self._total, self._square = (torch.zeros_like(x[0], dtype=torch.float64) for _ in range(2))
            self._product = x.new_zeros(self.sae.d_sae, x.shape[1])
        centred = x - self._shift
        self._tokens += len(x)
        self._total += centred.sum(0)
        self._square += centred.square().sum(0)
        self._product += latent_sums(token, latent, value, centred, self.sae.d_sae)

    def moments(self) -> Moments:
        """Return the sums."""
        if self._shift is None:
            none = np.zeros(self.sae.d_in)
            return Moments(0, none, none, none, np.zeros((self.sae.d_sae, self.sae.d_in)))
        parts = (self._shift, self._total, self._square, self._product)
        return Moments(self._tokens, *(part.cpu().double().numpy() for part in parts))


def latent_sums(
    token: Int[torch.Tensor, " m"],
    latent: Int[torch.Tensor, " m"],
    value: Float[torch.Tensor, " m"],
    x: Float[torch.Tensor, "n d"],
    d_sae: int,
) -> Float[torch.Tensor, "f d"]:
    """Return for every latent the sum of value * x[token] over its firings.

    A GPU multiplies the dense array of the values faster than torch converts a sparse one. On the processor scipy's
    sparse arrays serve: torch 2.11 warns wherever one of its own is made.
    """
    if x.device.type == "cpu":
        return _sparse_sums(token, latent, value, x, d_sae)
    return _dense_sums(token, latent, value, x, d_sae)


def _sparse_sums(
    token: torch.Tensor, latent: torch.Tensor, value: torch.Tensor, x: torch.Tensor, d_sae: int
) -> torch.Tensor:
    where = (latent.numpy(), token.numpy())
    firings = scipy.sparse.csr_array((value.numpy(), where), shape=(d_sae, len(x)))
    return torch.from_numpy(firings @ x.numpy())


def _dense_sums(
    token: torch.Tensor, latent: torch.Tensor, value: torch.Tensor, x: torch.Tensor, d_sae: int
) -> torch.Tensor:
    fires = x.new_zeros(d_sae, len(x))
    fires[latent, token] = value
    return fires @ x


@torch.no_grad()
def run(
    nano: Nanochat,
    gatherers: Mapping[str, Gatherer],
    tokens: UInt16[np.ndarray, "R T"],
    excluded: tuple[int, ...],
    drop_sinks: bool,
    report: Report,
) -> None:
    """Run the model up to the deepest hook over all tokens, and every SAE on the activations that it reads.

    The SAEs run in a thread of their own while the model reads the next batch. On a CPU each of the two gets half of
    torch's threads: the products are small, and if other programs use the cores too, threads that share one product
    wait for each other, with which the demo took six times as long.
    """
    device = nano.model.lm_head.weight.device
    length = tokens.shape[1]
    step = max(_batch(device, gatherers.values()) // length, 1)

    @torch.no_grad()  # the mode is per thread
    def encode(forward_pass: activations.ForwardPass) -> None:
        for hook, gatherer in gatherers.items():
            gatherer.add(forward_pass.first_row * length, forward_pass.acts[hook], forward_pass.mask(hook))

    with _half_the_threads(device), concurrent.futures.ThreadPoolExecutor(1) as pool:
        encoding: concurrent.futures.Future[None] | None = None
        batches = (tokens[start : start + step] for start in range(0, len(tokens), step))
        passes = activations.read(nano.model, list(gatherers), batches, excluded=excluded, drop_sinks=drop_sinks)
        for forward_pass in passes:
            if encoding is not None:
                encoding.result()
            encoding = pool.submit(encode, forward_pass)
            report("running the model", min((forward_pass.first_row + step) / len(tokens), 1.0))
        if encoding is not None:
            encoding.result()


def _batch(device: torch.device, gatherers: Iterable[Gatherer]) -> int:
    """Return the number of tokens of a forward pass."""
    widest = max(gatherer.sae.d_sae for gatherer in gatherers)
    return min(_PER_FORWARD.get(device.type, _MANY), _MOST_NUMBERS // widest)


@contextlib.contextmanager
def _half_the_threads(device: torch.device) -> Iterator[None]:
    """Within the context, let torch use half of its threads if the device is the CPU."""
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(max(before // 2, 1))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def codes(
    sae: TorchSAE, x: Float[torch.Tensor, "n d"]
) -> tuple[Int[torch.Tensor, " m"], Int[torch.Tensor, " m"], Float[torch.Tensor, " m"]]:
    """Return the firings on tokens: the number of the token (ascending), the latent, and its value above 0.

    For latents that may be negative (AbsTopK) only positive activations count: the two signs have different meanings,
    and records of both would mix them.
    """
    if sae.architecture != "topk":
        latents = sae.encode(x)
        token, latent = (latents > 0).nonzero(as_tuple=True)
        return token, latent, latents[token, latent]
    values, indices = sae.encode_sparse(x, in_order=False)
    fires = values > 0
    return fires.nonzero()[:, 0], indices[fires], values[fires]
