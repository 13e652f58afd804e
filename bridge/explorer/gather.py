"""Run nanochat over text once and write records of what all latents of all SAEs of a run fire on."""

import contextlib
import dataclasses
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Integer, UInt16

from bridge import stored_text
from bridge.explorer import firings, weights
from bridge.explorer.firings import Gatherer, Report
from bridge.hooks import parse
from bridge.nanochat import Nanochat
from bridge.nanochat.corpus import Corpus
from bridge.nanochat.units import Split
from bridge.torch_sae import TorchSAE
from jsae import files
from jsae.records.recorder import Recorder, Settings, distinct_rows
from jsae.records.store import VERSION, ActivationsWriter, AllHeader, Header, Store, StoreError, Texts, TextsHeader
from jsae.settings import Json, require


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
            firings.run(nano, gatherers, tokens, plan.excluded, plan.drop_sinks, report)
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
