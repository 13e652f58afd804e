"""Write the activations of a nanochat on text to a store: several hooks in one pass, several processes at once."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import torch
from jaxtyping import Float, Int, Int32

from bridge import activations, finite, launch
from bridge.hooks import find
from bridge.nanochat.corpus import Corpus
from bridge.nanochat.units import Split
from bridge.run import directory
from bridge.selection import ExcludeTokens, excluded_ids
from jsae.progress import Progress
from jsae.settings import require
from jsae.store.backend import Place, locate
from jsae.store.layout import COLUMNS, Layout, Storage, suited
from jsae.store.manifest import COMPLETE, SHARDS, WRITING, Identity, Manifest
from jsae.store.shards import Buffer, ShardWriter

if TYPE_CHECKING:
    from bridge.nanochat import Nanochat

StopRequests = Callable[[], contextlib.AbstractContextManager[Collection[object]]]
"""Returns a context manager; the collection it yields is empty until collecting should stop."""


class Stopped(Exception):  # noqa: N818 - not an error: what was written is kept
    """Collecting was asked to stop. Complete shards are kept, and `resume` continues behind them."""


@dataclass(frozen=True)
class Text:
    """The text that is read, and what is stored of it."""

    data: str = "stdlib"
    split: Split = "train"
    num_tokens: int = 10_000_000
    """Tokens to read, with BOS and others that do not count; rounded up to whole rows of text."""
    context_size: int | None = None
    """Tokens in a row of text, BOS first; None is the model's own length."""
    data_seed: int = 0
    exclude_tokens: ExcludeTokens = "bos"
    """Special tokens that are marked as not counting."""
    drop_sinks: bool = True
    """Whether tokens of extreme norm are marked so, too."""
    tokens_per_forward: int = 2048
    storage: Storage = "bfloat16"
    shard_rows: int | None = None
    """Rows in a file; None is about 65,536."""
    streams: int = 8
    """Most parts in which the text is read, and processes that can write at once."""


def this_process() -> tuple[int, int]:
    """Return the number of this process and the number of all that collect together, as a launcher says.

    Raises:
      ConfigError: a launcher that does not say how many there are.
    """
    launched = launch.detected()
    if launched is None:
        return 0, 1
    require(
        launched.count is not None,
        "Kubernetes does not say how many processes there are: set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT",
    )
    return launched.index, launched.count


def collect(
    nano: Nanochat,
    hooks: Sequence[str],
    out: str | Path,
    text: Text,
    *,
    resume: bool = False,
    process: tuple[int, int] | None = None,
    stop_requests: StopRequests | None = None,
    show_progress: bool = False,
) -> Manifest | None:
    """Write activations, with tokens, documents and the rows that count, to a store.

    The text is read in streams. Shard j is of stream j modulo their number, and process p writes the shards of the
    streams p, p + processes, ...: no number in the store depends on how many processes there are.

    Args:
      nano: the model, with its tokenizer.
      hooks: names of the activations.
      out: a path, `gs://bucket/path`, `s3://bucket/path` or `memory://name`.
      text: what is read and stored.
      resume: continue an interrupted store, or begin one.
      process: number of this process and of all; None is `this_process()`.
      stop_requests: entered while shards are written; see `StopRequests`.
      show_progress: whether to show progress on stderr.

    Returns:
      The manifest; None if other processes have shards left to write.

    Raises:
      ConfigError: settings that cannot work, a location that holds something else, or too little disk space.
      ValueError: a hook that the model does not have, or text that is empty or cannot be read.
      ActivationsError: activations that are not finite; names the hook.
      Stopped: it was asked to stop.
      OSError: the store cannot be written.
    """
    index, count = this_process() if process is None else process
    row_len = nano.row_length(text.context_size)
    for hook in hooks:
        find(nano.model, hook)
    require(len(set(hooks)) == len(hooks) > 0, f"hooks must be named once: {', '.join(hooks)}")
    _check_outside(out)
    rows = -(-text.num_tokens // row_len) * row_len
    widths = dict.fromkeys(hooks, nano.config.n_embd)
    layout = suited(
        widths, text.storage, row_len=row_len, rows=rows, columns=tuple(COLUMNS), shard_rows=text.shard_rows
    )
    corpus = _corpus(nano, text, row_len, 0, 1)
    streams = _stream_count(corpus, text.streams, layout.shards(rows))
    require(
        0 <= index < count <= streams,
        f"this text is read in {streams} streams, by at most as many processes, and this is process {index} of {count}",
    )
    _check_space(out, layout, rows)
    finite.warn_of_broken_weights(nano.model)
    identity = Identity(layout, rows, _origin(nano, text, corpus, streams))
    del corpus
    writer = ShardWriter(out, identity, resume=resume, join=index > 0)
    if writer.complete is not None:
        return writer.complete
    collector = _Collector(nano, text, writer, streams)
    done = min(len(writer.written) * layout.shard_rows, rows)
    share = f"process {index} of {count} " * (count > 1)
    with (
        Progress(f"{share}collecting", rows, "tokens", done) if show_progress else contextlib.nullcontext() as progress,
        contextlib.nullcontext(()) if stop_requests is None else stop_requests() as requests,
    ):
        for stream in range(index, streams, count):
            collector.write(stream, requests, progress)
    return writer.finish()


def warn_of_degenerate(manifest: Manifest) -> None:
    """Print a warning to stderr for every hook whose activations no SAE can learn from."""
    for hook, statistics in manifest.statistics.items():
        problem = statistics.problem(f"activations at {hook}")
        if problem is not None:
            print(f"warning: {problem}", file=sys.stderr, flush=True)


class TextRows:
    """Rows of a corpus with the number of every token's document, and its position in the document.

    Documents are numbered in the order in which they begin, `number * streams + stream`, so that a number is unique in
    the store. A document that continues in a later row keeps its number. BOS has position 0, a document's first token
    position 1; the BOS of a row in which a document continues has that document's number.

    Args:
      corpus: one stream of the text.
      bos: the token that begins rows and documents.
      stream: its number.
      streams: the number of streams.
    """

    def __init__(self, corpus: Corpus, bos: int, stream: int = 0, streams: int = 1):
        self._corpus, self._bos, self._stream, self._streams = corpus, bos, stream, streams
        self._begun, self._last = 0, [0] * len(corpus.position()["lanes"])

    def next_rows(self, n: int) -> dict[str, Int[np.ndarray, "n T"]]:
        """Return the next rows: `tokens`, `text` and `position`."""
        rows = [self._next_row() for _ in range(n)]
        return {name: np.stack([row[name] for row in rows]) for name in COLUMNS}

    def position(self) -> dict[str, Any]:
        """Return the position of the next row, as JSON values."""
        return {"corpus": self._corpus.position(), "begun": self._begun, "last": list(self._last)}

    def seek(self, position: Mapping[str, Any]) -> None:
        """Continue from a position.

        Raises:
          ValueError: it is of another corpus.
        """
        self._corpus.seek(position["corpus"])
        self._begun, self._last = position["begun"], list(position["last"])

    def _next_row(self) -> dict[str, np.ndarray]:
        before = self._corpus.position()
        lane = before["turn"]
        done = before["lanes"][lane][2]  # tokens of the document in earlier rows
        tokens: Int32[np.ndarray, " T"] = self._corpus.next_rows(1)[0]
        begins = tokens == self._bos
        begins[0] = done == 0
        segment, columns = np.cumsum(begins), np.arange(len(tokens))
        numbers = np.where(segment == 0, self._last[lane], self._begun + segment - 1)
        first_columns = np.maximum.accumulate(np.where(begins, columns, 0))
        position = np.where(segment == 0, np.where(columns == 0, 0, done + columns), columns - first_columns)
        self._begun += int(segment[-1])
        self._last[lane] = int(numbers[-1])
        return {"tokens": tokens, "text": numbers * self._streams + self._stream, "position": position}


class _Collector:
    """Fills and writes the shards of streams.

    Args:
      nano: the model.
      text: what is read.
      writer: of the store.
      streams: number of streams.
    """

    def __init__(self, nano: Nanochat, text: Text, writer: ShardWriter, streams: int):
        self._nano, self._text, self._writer, self._streams = nano, text, writer, streams
        self._layout, self._rows = writer.layout, writer.identity.rows
        self._hooks = list(self._layout.widths)
        self._excluded = excluded_ids(text.exclude_tokens, nano.tokenizer)

    def write(self, stream: int, requests: Collection[object], progress: Progress | None) -> None:
        """Write the shards of a stream that are missing.

        Raises:
          Stopped: there is a request to stop.
        """
        shards = range(stream, self._layout.shards(self._rows), self._streams)
        records = [self._writer.record(shard) for shard in shards]
        if all(records):
            return
        corpus = _corpus(self._nano, self._text, self._layout.row_len, stream, self._streams)
        rows = TextRows(corpus, self._nano.tokenizer.bos_token_id, stream, self._streams)
        position = None
        for shard, record in zip(shards, records, strict=True):
            if record is not None:
                position = record.position
                continue
            if position is not None:
                rows.seek(position)
            buffer = self._fill(shard, rows, requests, progress)
            position = rows.position()
            self._writer.begin(shard, buffer, position)
        self._writer.wait()

    def _fill(self, shard: int, rows: TextRows, requests: Collection[object], progress: Progress | None) -> Buffer:
        """Return a shard's rows; forward passes begin with the shard, so that they do not depend on other shards."""
        start, stop = self._layout.bounds(shard, self._rows)
        buffer, row_len = Buffer(self._layout, start, stop - start), self._layout.row_len
        per_forward = max(self._text.tokens_per_forward // row_len, 1)
        while buffer.missing:
            if requests:
                self._writer.wait()
                raise Stopped
            columns = rows.next_rows(min(per_forward, buffer.missing // row_len))
            forward_pass = activations.forward(
                self._nano.model,
                self._hooks,
                columns["tokens"],
                excluded=self._excluded,
                drop_sinks=self._text.drop_sinks,
            )
            buffer.add(
                {hook: _on_host(forward_pass.acts[hook].flatten(0, 1)) for hook in self._hooks},
                {hook: forward_pass.mask(hook).flatten().cpu().numpy() for hook in self._hooks},
                {name: column.reshape(-1) for name, column in columns.items()},
            )
            if progress is not None:
                progress.advance(columns["tokens"].size)
        return buffer


def _on_host(acts: Float[torch.Tensor, "n d"]) -> np.ndarray:
    """Return activations as an array of numpy, bfloat16 as it is."""
    acts = acts.detach().contiguous().cpu()
    if acts.dtype == torch.bfloat16:
        return acts.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return acts.float().numpy()


def _corpus(nano: Nanochat, text: Text, row_len: int, stream: int, streams: int) -> Corpus:
    """Return one stream of the text."""
    return Corpus(
        text.data,
        nano.tokenizer,
        split=text.split,
        row_len=row_len,
        seed=text.data_seed,
        process_index=stream,
        process_count=streams,
    )


def _stream_count(corpus: Corpus, most: int, shards: int) -> int:
    """Return the number of streams: the corpus's lanes are divided evenly, and every stream has a shard."""
    lanes = corpus.position()["lane_count"]
    return max(
        streams for streams in range(1, lanes + 1) if lanes % streams == 0 and streams <= max(min(most, shards), 1)
    )


def _origin(nano: Nanochat, text: Text, corpus: Corpus, streams: int) -> dict[str, Any]:
    """Return where the activations are from: everything that the numbers in the store depend on."""
    return {
        "model": nano.fingerprint,
        "model_name": nano.name,
        "dtype": str(nano.model.lm_head.weight.dtype).removeprefix("torch."),
        "tokenizer": nano.tokenizer.fingerprint,
        "data": text.data,
        "data_fingerprint": corpus.fingerprint,
        "data_files": corpus.files,
        "split": text.split,
        "data_seed": text.data_seed,
        "streams": streams,
        "excluded": list(excluded_ids(text.exclude_tokens, nano.tokenizer)),
        "drop_sinks": text.drop_sinks,
        "tokens_per_forward": text.tokens_per_forward,
    }


def _check_outside(out: str | Path) -> None:
    """Check that a folder is not within a store or a run; raise ConfigError."""
    folder = locate(out).folder
    if folder is None:
        return
    for parent in folder.parents:
        within = any((parent / name).is_file() for name in (COMPLETE, WRITING))
        require(not within, f"{out} lies within the store {parent}: choose another --out")
    run = directory.enclosing(folder)
    require(run is None, f"{out} lies within the run {run}: choose another --out")


def _check_space(out: str | Path, layout: Layout, rows: int) -> None:
    """Check that what is left to write fits on the disk; raise ConfigError."""
    place = Place(out)
    folder = place.location.folder
    if folder is None:
        return
    missing = max(rows - len(place.keys(SHARDS)) * layout.shard_rows, 0)
    needed = missing * layout.row_bytes
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    require(
        needed <= free,
        f"{missing:,} tokens need {needed / 2**30:,.1f} GiB in {out} ({layout.row_bytes:,} bytes a token), and "
        f"{free / 2**30:,.1f} are free: lower --num_tokens, choose fewer hooks or --storage=int8",
    )
