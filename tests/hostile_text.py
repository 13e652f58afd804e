"""Text files made to exhaust a machine: `python -m tests.hostile_text` prints the cost of reading each of them.

`CASES` says how each is written, `read` is how a user's command reads it, and `measure` does so in a process of its
own.
"""

import json
import os
import resource
import struct
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow
import pyarrow.parquet

from bridge.nanochat.corpus import Corpus
from bridge.nanochat.tokenizer import Tokenizer

MAX_SECONDS, MAX_BYTES = 30, 500 * 2**20
GIB = 2**30


class Case(NamedTuple):
    """A file, and the expected text of its refusal."""

    name: str
    write: Callable[[Path], None]
    message: str


class Outcome(NamedTuple):
    """The cost of reading a file."""

    message: str
    seconds: float
    cpu: float
    """CPU seconds, which do not depend on other programs."""
    peak: int
    """Bytes of the whole process, including libraries."""


def read(path: Path) -> None:
    """Read a corpus as training does: all checks, then some rows."""
    corpus = Corpus(str(path), Tokenizer({bytes([i]): i for i in range(256)}), split="train", row_len=257)
    corpus.next_rows(64)


# ---- gzip ---------------------------------------------------------------------------------------------------------


def _gzip(path: Path, before: bytes, block: bytes, times: int) -> None:
    """Return a gzip file of many copies of a block, deflated once. Its checksum is wrong, but never reached."""
    with path.open("wb") as file:
        file.write(b"\x1f\x8b\x08\0\0\0\0\0\0\xff")
        start = zlib.compressobj(9, zlib.DEFLATED, -15)
        file.write(start.compress(before) + start.flush(zlib.Z_FULL_FLUSH))
        one = zlib.compressobj(9, zlib.DEFLATED, -15)
        packed = one.compress(block) + one.flush(zlib.Z_FULL_FLUSH)
        for _ in range(times):
            file.write(packed)
        end = zlib.compressobj(9, zlib.DEFLATED, -15)
        file.write(end.flush() + bytes(8))


def gz_long_line(path: Path) -> None:
    """A line of 1.5 GB."""
    _gzip(path, b'{"text": "', b"a" * 2**24, 96)


def gz_many_lines(path: Path) -> None:
    """4 GB of short lines in 4 MB."""
    _gzip(path, b"", b'{"text": "aaaaa"}\n' * 2**20, 240)


def gz_array(path: Path) -> None:
    """An array with an element of 1.5 GB."""
    _gzip(path, b'[{"text": "', b"a" * 2**24, 96)


def gz_blank_array(path: Path) -> None:
    """An array after 4 GB of blanks."""
    _gzip(path, b"[", b" " * 2**24, 256)


# ---- JSON ---------------------------------------------------------------------------------------------------------


def sparse_lines(path: Path) -> None:
    """A line of 2 GB of which nothing is on the disk."""
    with path.open("wb") as file:
        file.truncate(2 * GIB)


def nested_lists(path: Path) -> None:
    """A line of a million brackets."""
    path.write_bytes(b'{"text": "first"}\n' + b"[" * 10**6 + b"\n")


def nested_objects(path: Path) -> None:
    """A chat that is nested a hundred thousand times."""
    path.write_bytes(b'{"messages": ' * 10**5 + b"\n")


def nested_array(path: Path) -> None:
    """The same as an array."""
    path.write_bytes(b"[" * 10**6)


def many_values(path: Path) -> None:
    """15 MB of empty objects, each of which takes twenty times as much."""
    path.write_bytes(b'{"messages": [' + b"{}," * 5_000_000 + b"{}]}\n")


def many_quotes(path: Path) -> None:
    """15 MB of escaped quotes in a string that never ends, the worst for a search by a pattern."""
    path.write_bytes(b'{"text": "' + b'\\"' * 7_500_000 + b"\n")


def long_number(path: Path) -> None:
    """A number of ten million digits."""
    path.write_bytes(b'{"text": ' + b"9" * 10**7 + b"}\n")


def broken_array(path: Path) -> None:
    """An array whose second element never ends."""
    path.write_bytes(b'[{"text": "first"}, "' + b"a" * 40_000_000)


# ---- text ---------------------------------------------------------------------------------------------------------


def sparse_text(path: Path) -> None:
    """2 GB of nothing."""
    with path.open("wb") as file:
        file.truncate(2 * GIB)


# ---- parquet ------------------------------------------------------------------------------------------------------


def _parquet(path: Path, columns: dict[str, pyarrow.Array], **settings: object) -> None:
    settings = {"compression": "zstd", "use_dictionary": False, "row_group_size": 2**31} | settings
    pyarrow.parquet.write_table(pyarrow.table(columns), path, **settings)


def parquet_page(path: Path) -> None:
    """A document of 256 MiB in one page of a few kilobytes."""
    _parquet(path, {"text": pyarrow.array(["a" * 2**28])})


def parquet_ratio(path: Path) -> None:
    """A row group of 192 MiB in many pages, packed to nothing."""
    _parquet(path, {"text": pyarrow.array(["a" * 2**20] * 192)}, write_batch_size=8)


def parquet_dictionary(path: Path) -> None:
    """A hundred thousand rows, each the same 24 MiB."""
    indices = pyarrow.array([0] * 100_000, pyarrow.int32())
    column = pyarrow.DictionaryArray.from_arrays(indices, pyarrow.array(["a" * (24 * 2**20)]))
    _parquet(path, {"text": column}, use_dictionary=True, dictionary_pagesize_limit=2**28)


def parquet_list(path: Path) -> None:
    """A chat of twenty million empty messages."""
    count = 20_000_000
    empty = pyarrow.nulls(count, pyarrow.string())
    messages = pyarrow.StructArray.from_arrays([empty, empty], ["role", "content"])
    chat = pyarrow.ListArray.from_arrays(pyarrow.array([0, count], pyarrow.int32()), messages)
    _parquet(path, {"messages": chat})


def parquet_many_messages(path: Path) -> None:
    """A chat of two million messages, below what a row group may hold."""
    count = 2_000_000
    empty = pyarrow.array([""] * count)
    messages = pyarrow.StructArray.from_arrays([empty, empty], ["role", "content"])
    chat = pyarrow.ListArray.from_arrays(pyarrow.array([0, count], pyarrow.int32()), messages)
    _parquet(path, {"messages": chat}, use_dictionary=True)


def parquet_liar(path: Path) -> None:
    """A page whose header asks for 1.9 GB."""
    _parquet(path, {"text": pyarrow.array(["abc" * 100])}, compression="none", write_statistics=False)
    data = path.read_bytes()
    if data[4:7] != b"\x15\x00\x15":  # a data page, and then its unpacked size
        raise ValueError("this pyarrow writes other headers of pages")
    end = next(at for at in range(7, 20) if data[at] < 0x80) + 1
    path.write_bytes(data[:7] + _varint(2 * 1_900_000_000) + data[end:])


def _footer(path: Path, footer: bytes, length: int | None = None) -> None:
    path.write_bytes(b"PAR1" + footer + struct.pack("<I", len(footer) if length is None else length) + b"PAR1")


def _varint(number: int) -> bytes:
    parts = []
    while number > 0x7F:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*parts, number])


def _schema(children: list[int]) -> bytes:
    """A footer in Thrift's compact protocol with a schema of columns `a`, each with so many children."""
    columns = b"".join(
        b"\x35\x02\x18\x01a" + (b"\x15" + _varint(2 * count) if count else b"\x25\x00") + b"\0" for count in children
    )
    return b"\x15\x02\x19\xfc" + _varint(len(children)) + columns + b"\x16\x00\x19\x0c\0"


def parquet_deep(path: Path) -> None:
    """A column nested five thousand times."""
    _footer(path, _schema([1] * 5_000 + [0]))


def parquet_wide(path: Path) -> None:
    """A million columns."""
    _footer(path, _schema([1_000_000] + [0] * 1_000_000))


def parquet_footer(path: Path) -> None:
    """A footer that would be 2 GB long."""
    with path.open("wb") as file:
        file.write(b"PAR1")
        file.truncate(2 * GIB)
        file.seek(0, 2)
        file.write(struct.pack("<I", 2**31 - 1) + b"PAR1")


def parquet_pages(path: Path) -> None:
    """Fifty thousand pages of a letter."""
    _parquet(path, {"text": pyarrow.array(["a"] * 50_000)}, data_page_size=1, write_batch_size=1)


CASES = {
    case.name: case
    for case in (
        Case("long-line.jsonl.gz", gz_long_line, "more than 200 times its size"),
        Case("many-lines.jsonl.gz", gz_many_lines, "more than 200 times its size"),
        Case("long-element.json.gz", gz_array, "more than 200 times its size"),
        Case("blanks.json.gz", gz_blank_array, "more than 200 times its size"),
        Case("sparse.jsonl", sparse_lines, "line 1 is longer than 16 MiB"),
        Case("nested-lists.jsonl", nested_lists, "line 2: the JSON is nested too deeply"),
        Case("nested-objects.ndjson", nested_objects, "line 1: the JSON is nested too deeply"),
        Case("nested.json", nested_array, "nested too deeply"),
        Case("many-values.jsonl", many_values, "line 1: the document has 10,000,003 values; at most 500,000"),
        Case("many-quotes.jsonl", many_quotes, "line 1: Invalid control character"),
        Case("long-number.jsonl", long_number, "line 1: Exceeds the limit"),
        Case("broken-array.json", broken_array, "element 2 is longer than 16 MiB"),
        Case("sparse.txt", sparse_text, "byte 0 is 0x00"),
        Case("page.parquet", parquet_page, "a page of 256 MiB; at most 64"),
        Case("ratio.parquet", parquet_ratio, "unpacks to more than 200 times its size"),
        Case("dictionary.parquet", parquet_dictionary, "a page of 24 MiB; at most 16"),
        Case("list.parquet", parquet_list, "more than 8,388,608 values in lists"),
        Case("messages.parquet", parquet_many_messages, "values in 8 chats; at most 500,000"),
        Case("liar.parquet", parquet_liar, "a page of 1,812 MiB; at most 64"),
        Case("deep.parquet", parquet_deep, "nested more than 32 deep"),
        Case("wide.parquet", parquet_wide, "columns; at most 10,000"),
        Case("footer.parquet", parquet_footer, "its footer claims 2147483647 bytes"),
        Case("pages.parquet", parquet_pages, "more than 16,384 pages"),
    )
}


def write(case: Case, folder: Path) -> Path:
    """Write the file of a case in a separate process, so that its cost is not measured."""
    path = folder / case.name
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            case.write(path)
            status = 0
        finally:
            os._exit(status)
    if os.waitpid(pid, 0)[1]:
        raise RuntimeError(f"{case.name} could not be written")
    return path


def measure(case: Case, path: Path) -> Outcome:
    """Read the file of a case in a separate process."""
    ours, theirs = os.pipe()
    started = time.perf_counter()
    idle = _peak()
    pid = os.fork()
    if pid == 0:
        begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # what is shared with the parent counts in part
        message = "read to the end"
        try:
            read(path)
        except (ValueError, OSError) as error:
            message = str(error)
        except BaseException as error:
            message = f"a traceback of {type(error).__name__}"
        finally:
            os.write(theirs, f"{begun} {message}".encode()[:4000])
            os._exit(0)
    os.close(theirs)
    message = b""
    while part := os.read(ours, 4096):
        message += part
    os.close(ours)
    _, status, used = os.wait4(pid, 0)
    seconds = time.perf_counter() - started
    begun, _, message = message.decode().partition(" ")
    grown = used.ru_maxrss - int(begun or 0)
    peak = (idle + max(grown, 0)) * 1024
    return Outcome(message or f"died with status {status}", seconds, used.ru_utime + used.ru_stime, peak)


def _peak() -> int:
    """Return the peak memory of this process in KiB; `ru_maxrss` begins with that of the process that started it."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def outcomes(cases: Iterable[Case]) -> Iterator[tuple[Case, int, Outcome]]:
    """Write, read and remove one file after the other; yield the cost and size of each."""
    with tempfile.TemporaryDirectory() as folder:
        for case in cases:
            path = write(case, Path(folder))
            size = path.stat().st_size
            outcome = measure(case, path)
            path.unlink()
            yield case, size, outcome._replace(message=outcome.message.replace(f"{folder}/", ""))


def main() -> None:
    """Print a line per case, of all cases or the named ones; with --json as JSON."""
    wanted = [word for word in sys.argv[1:] if word != "--json"] or CASES
    results = outcomes(CASES[name] for name in wanted)
    if "--json" in sys.argv:
        for case, _, outcome in results:
            print(json.dumps([case.name, *outcome]), flush=True)
        return
    idle = _peak() * 1024 / 1e6
    print(f"peak memory is of the whole process, which has {idle:.0f} MB before it reads\n")
    print("| file | bytes | seconds | of processors | peak, MB | what is said |\n|---|---|---|---|---|---|")
    for case, size, outcome in results:
        message = outcome.message.replace("|", "\\|")
        figures = f"{outcome.seconds:.1f} | {outcome.cpu:.1f} | {outcome.peak / 1e6:.0f}"
        print(f"| {case.name} | {size:,} | {figures} | {message} |", flush=True)


if __name__ == "__main__":
    main()
