"""Text of a training run: its training and held-out rows, their checks, and the stream of activations on them."""

from collections.abc import Collection, Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Int

from bridge import finite
from bridge.hooks import parse
from bridge.nanochat import Nanochat, compiled
from bridge.nanochat.corpus import Corpus, changed
from bridge.nanochat.model import GPT
from bridge.run import Run
from bridge.selection import excluded_ids
from bridge.stream import ActivationStream
from bridge.training.config import RunConfig
from jsae import processes
from jsae.settings import require

_MAX_TOKENS = 2**16  # in a forward pass over held-out text


_LANES = 32  # documents that are read at once, at least
_MOST_SHARDS = 8  # by default


def texts(
    config: RunConfig, nano: Nanochat, data_shards: int | None = None, row_len: int | None = None
) -> tuple[Corpus, Corpus]:
    """Return training and held-out text.

    Args:
      config: the run.
      nano: its model.
      data_shards: number of parts of the training text; None chooses it.
      row_len: tokens of a row; None is as the model and `--context_size` say.

    Raises:
      ConfigError: a model without a tokenizer, rows longer than its context, or too little held-out text.
      FileNotFoundError, ValueError: data that cannot be read.
    """
    row_len = nano.row_length(config.context_size) if row_len is None else row_len
    read = {"row_len": row_len, "seed": config.data_seed}
    lanes = _LANES if data_shards is None else data_shards * max(-(-_LANES // data_shards), 4)
    train = Corpus(config.data, nano.tokenizer, split="train", lanes=lanes, data_shards=data_shards or 1, **read)
    heldout = Corpus(config.data, nano.tokenizer, split="heldout", **read)
    shards = shards_of(config, data_shards, row_len, train.lanes)
    train.divide(shards, jax.process_index(), processes.count())
    if train.split_by_place:
        print("too few documents to hold out whole ones: the last 5 % of each is held out", flush=True)
    require(
        next(heldout.one_pass(1), None) is not None,
        f"the held-out part of {config.data!r} is shorter than one row of {row_len} tokens, and the trained SAE is "
        "measured on it: give more text, or a smaller --context_size",
    )
    return train, heldout


def shards_of(config: RunConfig, data_shards: int | None, row_len: int, lanes: int) -> int:
    """Return the number of parts of data and batches: a given one, or the default.

    Args:
      config: the run.
      data_shards: the given one.
      row_len: tokens that stay together.
      lanes: documents or chunks that are read at once.

    Raises:
      ConfigError: the processes cannot share so many.
    """
    count, is_recorded = processes.count(), config.resume and data_shards is not None
    if data_shards is None:
        data_shards = default_shards(config.batch_size, config.block_size, row_len, lanes)
    remedy = f"give --data_shards={count}, or another multiple of {count}, and a --batch_size that it divides"
    if is_recorded:
        remedy = f"resume the run in {config.output_dir} with a number of processes that divides this"
    require(
        data_shards % count == 0, f"{count} processes cannot share {data_shards} part(s) of text and batches: {remedy}"
    )
    return data_shards


def default_shards(batch_size: int, block_size: int, row_len: int, lanes: int) -> int:
    """Return the number of parts of text and batches: 8, or the largest smaller power of two that wastes no text.

    A part of a block is filled with whole rows of text, of which the last is cut.

    Args:
      batch_size: tokens per batch, which all parts share.
      block_size: tokens that are shuffled together.
      row_len: tokens of a row.
      lanes: documents that are read at once.
    """
    block = block_size // batch_size * batch_size
    shards = _MOST_SHARDS
    while shards > 1 and (batch_size % shards or lanes < shards or (block // shards) % row_len):
        shards //= 2
    return shards


def heldout_rows(config: RunConfig, heldout: Corpus) -> Int[np.ndarray, "R T"]:
    """Return the held-out rows that the exported SAEs are measured on."""
    return np.stack(list(heldout.one_pass(-(-config.heldout_tokens // heldout.row_len))))


def check_data(run: Path, corpus: Corpus) -> None:
    """Refuse to continue a run on other data than it started with.

    Raises:
      ConfigError: the data has changed; names the files.
    """
    if not Run(run).config_file.is_file():
        return
    files = Run(run).facts.get("data_files")
    require(
        isinstance(files, list),
        f"the run in {run} is from a version that did not record its data, and cannot continue: start a new one",
    )
    difference = changed(files, corpus.files)
    require(not difference, f"{run} cannot continue with the same numbers, its data has changed: {difference}")


def check_activations(
    config: RunConfig, nano: Nanochat, sites: Sequence[tuple[str, ...]], rows: Int[np.ndarray, "R T"]
) -> None:
    """Warn of weights that are not finite, and check the activations on held-out text.

    Raises:
      ActivationsError, DegenerateError: activations that nothing can be learned from; names hook, token and position.
    """
    finite.warn_of_broken_weights(nano.model)
    step = max(min(config.tokens_per_forward, _MAX_TOKENS) // rows.shape[1], 1)
    finite.check_text(
        nano.model,
        list(dict.fromkeys(hook for site in sites for hook in site)),
        [rows[start : start + step] for start in range(0, len(rows), step)],
        excluded=excluded_ids(config.exclude_tokens, nano.tokenizer),
        drop_sinks=config.drop_sinks,
        called=f"the held-out part of {config.data!r}",
        decode=nano.tokenizer.decode,
    )


def programs(
    config: RunConfig, nano: Nanochat, corpus: Corpus, sites: Sequence[tuple[str, ...]]
) -> tuple[compiled.Programs | None, str]:
    """Choose whether passes over the training text are compiled, and say so.

    Returns:
      The compiled parts of the model, None for eager passes, and why.
    """
    deepest = max(parse(hook)[0] for site in sites for hook in site)
    rows = max(config.tokens_per_forward // corpus.row_len, 1)
    device = next(nano.model.parameters()).device
    chosen, reason = compiled.choose(
        config.compile_model, nano.config, device, deepest, config.num_activations, rows * corpus.row_len
    )
    if device.type != "cpu" or config.compile_model == "on":
        way = "eager" if chosen is None else "compiled (the first takes some seconds)"
        print(f"the model's forward passes are {way}: {reason}", flush=True)
    return chosen, reason


def stream(
    config: RunConfig,
    nano: Nanochat,
    models: Collection[GPT],
    corpus: Corpus,
    sites: Sequence[tuple[str, ...]],
    run: compiled.Programs | None = None,
) -> ActivationStream:
    """Return the activations of all sites on the training text.

    Args:
      config: the run.
      nano: the model, or the first of several.
      models: all of them.
      corpus: the text.
      sites: the hooks of every site.
      run: the compiled parts of the models.
    """
    return ActivationStream(
        models,
        corpus,
        sites,
        excluded=excluded_ids(config.exclude_tokens, nano.tokenizer),
        rows_per_forward=max(config.tokens_per_forward // corpus.row_len, 1),
        drop_sinks=config.drop_sinks,
        decode=nano.tokenizer.decode,
        run=run,
        shards=len(corpus.own_shards),
    )
