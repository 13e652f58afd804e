"""Run nanochat over text once and write records of what all latents of all SAEs of a run fire on."""

import concurrent.futures
import contextlib
import dataclasses
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import scipy.sparse
import torch
from jaxtyping import Float, Int, Integer, UInt16

from bridge import activations, stored_text
from bridge.explorer import weights
from bridge.hooks import parse
from bridge.nanochat import Nanochat
from bridge.nanochat.corpus import Corpus
from bridge.nanochat.units import Split
from bridge.torch_sae import TorchSAE
from jsae import files
from jsae.records.correlation import Moments
from jsae.records.recorder import Recorder, Settings, distinct_rows
from jsae.records.store import VERSION, ActivationsWriter, AllHeader, Header, Store, StoreError, Texts, TextsHeader
from jsae.settings import Json, require

Report = Callable[[str, float], None]
"""Takes the current phase and the share of it that is done, 0 to 1."""

_MOST_NUMBERS = 2**27  # in a batch of latents: half a GiB
_PER_FORWARD = {"cpu": 2048}  # tokens: what stays in a CPU's cache; on other devices `_MANY`
_MANY = 2**14


@dataclasses.dataclass(frozen=True)
class Plan(Json):
    """Settings of gathering: the text, the number of its tokens, and the records to keep."""

    data: str
    split: Split
    num_tokens: int
    """The maximal number of tokens to read, including BOS and repeated rows."""
    context_length: int
    """Tokens per row, BOS first."""
    drop_sinks: bool
    """Whether to leave out tokens of extreme norm, as in training."""
    keep_activations: bool = True
    """Whether to keep every activation, six bytes each, and not only those of the examples."""
    records: Settings = dataclasses.field(default_factory=Settings)
    excluded: tuple[int, ...] = dataclasses.field(kw_only=True)
    """Ids of tokens that do not count, as in training (`bridge.selection`)."""
    data_fingerprint: str | None = dataclasses.field(default=None, kw_only=True)
    """From `data_fingerprint`; None if the text is not available: then records of any text fit."""

    stage: str | None = dataclasses.field(default=None, kw_only=True)
    """Name of the checkpoint whose own SAEs are read; None for SAEs that are no part of a crosscoder."""

    def settings(self) -> dict[str, object]:
        """Return the settings as the header of a store holds them, flattened."""
        settings = self.to_json() | {"excluded": list(self.excluded)}
        return settings | settings.pop("records")


def mismatch(folder: Path, digests: Mapping[str, str], nano: Nanochat, plan: Plan) -> str | None:
    """Return why `folder` does not hold records of these SAEs, this model and this plan; None if it does.

    Records that keep more activations than the plan asks for fit.
    """
    any_kept = {"keep_activations": True}
    wanted = plan.settings() | any_kept
    del wanted["data_fingerprint"]
    try:
        for hook, digest in digests.items():
            stage = Store(folder / hook, hook=hook).header.settings.get("stage")
            if stage != plan.stage:
                return (
                    f"the records of {hook} are of {'one checkpoint alone' if stage is None else f'checkpoint {stage}'}"
                )
            store = Store(folder / hook, digest, hook)
            settings = store.header.settings | any_kept
            differences = [f"{n} was {settings.get(n)}" for n, value in wanted.items() if settings.get(n) != value]
            if plan.data_fingerprint not in (None, settings.get("data_fingerprint")):
                return f"the text of {plan.data} has changed since the records of {hook} were gathered"
            if differences:
                return f"the records of {hook} have other settings: {', '.join(differences)}"
            if store.texts.header.fingerprint != nano.fingerprint:
                return f"the records of {hook} are of another model"
            if plan.keep_activations:
                store.all  # noqa: B018 - raises where there are none
    except FileNotFoundError:
        return f"{folder} does not hold the records of every SAE"
    except StoreError as error:
        return error.problem
    return None


def gather(
    nano: Nanochat,
    saes: Mapping[str, TorchSAE],
    digests: Mapping[str, str],
    folder: Path,
    plan: Plan,
    report: Report = lambda phase, share: None,
) -> None:
    """Write the records of SAEs, by hook name, into `folder`, atomically; earlier records there are replaced.

    Args:
      nano: the model with its tokenizer.
      saes: SAEs of hooks of this model.
      digests: `jsae.records.store.digest` of the export of each SAE.
      folder: `explorer/records` of a run.
      plan: what to read and keep.
      report: called with the progress.

    Raises:
      ConfigError: rows are longer than the model accepts, or its vocabulary has more than 65,536 tokens.
      FileNotFoundError, ValueError: the text does not exist, or is too short.
      OSError: the records cannot be written, for example because the disk is full; earlier records stay.
    """
    _check(nano, plan)
    for hook, sae in saes.items():
        factor = weights.direct_path(nano.model, weights.written_hook(hook, sae))
        if factor <= 0:
            warnings.warn(
                f"{hook}: nanochat's lambdas and backout multiply the direct path to the logits by {factor:.3g}: "
                "latents of this SAE lower the logits that their decoder rows point to, and tables show the logits so",
                stacklevel=2,
            )
    with files.replacing_folder(folder) as partial:
        report("reading text", 0.0)
        tokens, dropped = read(nano, plan)
        names = {hook: str((sae.metadata or {}).get("model_name") or nano.name) for hook, sae in saes.items()}
        _write_texts(partial / "texts", nano, tokens, plan, next(iter(names.values())))
        with contextlib.ExitStack() as stack:
            gatherers = {}
            for hook, sae in saes.items():
                scratch = partial / hook / "scratch"
                scratch.mkdir(parents=True)
                gatherers[hook] = Gatherer(sae, Recorder(scratch, tokens, sae.d_sae, plan.records))
                stack.callback(gatherers[hook].recorder.close)
            run(nano, gatherers, tokens, plan.excluded, plan.drop_sinks, report)
            for hook, gatherer in gatherers.items():
                _write(partial / hook, nano, hook, gatherer, digests[hook], dropped, plan, report)


def data_fingerprint(nano: Nanochat, data: str, split: Split) -> str | None:
    """Return the fingerprint of a text's content; None if the text is not on this machine.

    Raises:
      ValueError: the text exists, but cannot be read.
    """
    if stored_text.is_stored(data):
        return stored_text.open_text(data, split, nano.tokenizer).manifest.digest[:16]
    try:
        return Corpus(data, nano.tokenizer, split=split, row_len=2).fingerprint
    except FileNotFoundError:
        return None


def read(nano: Nanochat, plan: Plan) -> tuple[UInt16[np.ndarray, "R T"], int]:
    """Return the distinct rows of text, and how many repetitions were dropped.

    Raises:
      FileNotFoundError, ValueError: the text does not exist, or does not fill one row.
    """
    length = plan.context_length
    most = max(plan.num_tokens // length, 1)
    rows = _stored_rows(nano, plan, most) if stored_text.is_stored(plan.data) else _corpus_rows(nano, plan, most)
    require(
        bool(rows),
        f"the {plan.split} part of {plan.data} does not fill one row of {length} tokens: give more text, another "
        "split or shorter rows",
    )
    tokens = distinct_rows(np.stack(rows).astype(np.uint16))
    return tokens, len(rows) - len(tokens)


def _corpus_rows(nano: Nanochat, plan: Plan, most: int) -> list[np.ndarray]:
    corpus = Corpus(plan.data, nano.tokenizer, split=plan.split, row_len=plan.context_length)
    return list(corpus.one_pass(most))


def _stored_rows(nano: Nanochat, plan: Plan, most: int) -> list[np.ndarray]:
    store = stored_text.open_text(plan.data, plan.split, nano.tokenizer)
    require(
        store.row_len == plan.context_length,
        f"the rows of {store.location} have {store.row_len} tokens, and rows of {plan.context_length} are asked for: "
        "ask for the length of the store",
    )
    return list(stored_text.rows(store, most))


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
    if x.device.type == "cpu":
        values, indices = _largest(((x - sae.b_dec) @ sae.W_enc + sae.b_enc), sae.cfg["k"])
    else:
        values, indices = sae.encode_sparse(x)
    fires = values > 0
    return fires.nonzero()[:, 0], indices[fires], values[fires]


def _largest(pre: Float[torch.Tensor, "n f"], k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `pre.topk(k)` without the order: on a CPU numpy selects in a third of the time that torch takes."""
    if k == pre.shape[1]:
        return pre, torch.arange(k).expand_as(pre)
    dense = pre.numpy()
    indices = np.argpartition(dense, -k, axis=1)[:, -k:]
    return torch.from_numpy(np.take_along_axis(dense, indices, 1)), torch.from_numpy(indices)


# ---- writing ------------------------------------------------------------------------------------------------------


def _check(nano: Nanochat, plan: Plan) -> None:
    size, longest = nano.config.vocab_size, nano.config.max_positions
    require(size <= 2**16, f"this model has {size} tokens; records hold tokens in 16 bits, up to {2**16}")
    require(
        2 <= plan.context_length <= longest,
        f"context_length is {plan.context_length}: this model takes 2 to {longest} tokens",
    )


def _write_texts(folder: Path, nano: Nanochat, tokens: Integer[np.ndarray, "R T"], plan: Plan, name: str) -> None:
    tokenizer = nano.tokenizer
    header = TextsHeader(
        version=VERSION,
        rows=tokens.shape[0],
        row_length=tokens.shape[1],
        vocab_size=tokenizer.vocab_size,
        bos=tokenizer.bos_token_id,
        special=sorted(tokenizer.special_tokens.values()),
        dataset=plan.data,
        split=plan.split,
        model=name,
        fingerprint=nano.fingerprint,
        seed=plan.records.seed,
    )
    Texts.write(folder, header, tokens, [tokenizer.token_bytes_of(i) for i in range(tokenizer.vocab_size)])


def _write(
    folder: Path,
    nano: Nanochat,
    hook: str,
    gatherer: Gatherer,
    digest: str,
    dropped: int,
    plan: Plan,
    report: Report,
) -> None:
    """Write the records of one hook, the header last."""
    sae, recorder, settings = gatherer.sae, gatherer.recorder, plan.records
    moments = gatherer.moments()

    def report_count(latents: int) -> None:
        report(f"counting {hook}", latents / sae.d_sae)

    if plan.keep_activations:
        with contextlib.closing(ActivationsWriter(folder / "all")) as everything:
            columns = recorder.finish(moments, everything.append, report_count)
            everything.finish(AllHeader(VERSION, sae.d_sae, *recorder.shape, digest), columns["count"])
    else:
        columns = recorder.finish(moments, progress=report_count)
    report(f"reading the weights of {hook}", 0.0)
    written = weights.written_hook(hook, sae)
    columns |= weights.columns(nano.model, written, sae, nearest=settings.nearest, bins=settings.bins)
    shutil.rmtree(folder / "scratch")
    header = Header(
        version=VERSION,
        hook=hook,
        layer=parse(hook)[0],
        d_in=sae.d_in,
        d_sae=sae.d_sae,
        architecture=sae.architecture,
        sae_sha256=digest,
        tokens=recorder.counted,
        direct_path=weights.direct_path(nano.model, written),
        duplicate_rows=dropped,
        settings=plan.settings(),
    )
    Store.write(folder, header, columns)
