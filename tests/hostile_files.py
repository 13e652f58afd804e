"""Files that attack their reader: small files that demand gigabytes, minutes, or the execution of code."""

import io
import json
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from tiny_nanochat import tiny, write

from bridge.nanochat.tokenizer import PATTERN, SPECIAL_TOKENS

Maker = Callable[[Path], Path]


def weights(data: bytes, **members: bytes) -> Maker:
    """Return a function that writes a model_*.pt with this pickle and these further members."""

    def make(folder: Path) -> Path:
        with zipfile.ZipFile(folder / "model_000000.pt", "w") as archive:
            archive.writestr("m/data.pkl", data)
            for name, content in members.items():
                archive.writestr(f"m/data/{name.strip('_')}", content)
        return folder

    return make


def saved(content: object) -> Maker:
    """Return a function that writes a model_*.pt with torch.save."""

    def make(folder: Path) -> Path:
        torch.save(content(), folder / "model_000000.pt")
        return folder

    return make


def file(name: str, content: Callable[[], bytes]) -> Maker:
    """Return a function that writes one file."""

    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content())
        return folder

    return make


def beside_a_model(name: str, content: Callable[[], bytes]) -> Maker:
    """Return a function that writes a file into the folder of a valid checkpoint."""

    def make(folder: Path) -> Path:
        return file(name, content)(write(folder, tiny("G7"), "G7"))

    return make


def tokenizer(pattern: str) -> Maker:
    """Return a function that writes a tokenizer.pkl that is valid except for the split pattern."""

    def make(folder: Path) -> Path:
        ranks = b"".join(b"C\x01" + bytes([i]) + (b"K" + bytes([i])) for i in range(256))
        special = b"".join(_text(name) + b"M" + struct.pack("<H", 256 + i) for i, name in enumerate(SPECIAL_TOKENS))
        state = b"}(" + _text("name") + _text("x") + _text("pat_str") + _text(pattern)
        state += _text("mergeable_ranks") + b"}(" + ranks + b"u" + _text("special_tokens") + b"}(" + special + b"uu"
        data = b"\x80\x04\x8c\x0dtiktoken.core\x8c\x08Encoding\x93)\x81" + state + b"b."
        (folder / "tokenizer.pkl").write_bytes(data)
        return folder

    return make


def _text(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text.encode())) + text.encode()


def tensor(numel: int, size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> bytes:
    """Return a pickle of one tensor "w" of numel float32 numbers in data/0, with any view of them."""

    def number(value: int) -> bytes:
        data = value.to_bytes(16, "little", signed=True)
        return b"\x8a\x10" + data

    def numbers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(map(number, values)) + b"t"

    storage = b"(" + _text("storage") + b"ctorch\nFloatStorage\n" + _text("0") + _text("cpu") + number(numel) + b"tQ"
    call = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(offset) + numbers(size) + numbers(stride)
    return b"\x80\x02}" + _text("w") + call + b"\x89ccollections\nOrderedDict\n)RtRs."


def deflated(folder: Path) -> Path:
    """Write 4.3 GB of zeros as one deflated member of two megabytes."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = packer.compress(bytes(2**26)) + packer.flush(zlib.Z_FULL_FLUSH)
    data, name = block * 64 + zlib.compressobj(9, zlib.DEFLATED, -15).flush(), b"m/data.pkl"
    sizes = struct.pack("<LLL", 0, len(data), 2**32 - 1)
    head = struct.pack("<4s5H", b"PK\x03\x04", 20, 0, 8, 0, 33) + sizes + struct.pack("<2H", len(name), 0) + name
    entry = struct.pack("<4s6H", b"PK\x01\x02", 20, 20, 0, 8, 0, 33) + sizes
    entry += struct.pack("<5H2L", len(name), 0, 0, 0, 0, 0, 0) + name
    place = len(head) + len(data)
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 1, 1, len(entry), place, 0)
    (folder / "model_000000.pt").write_bytes(head + data + entry + end)
    return folder


def hole(folder: Path) -> Path:
    """Write an archive whose first member is a hole of 64 GB, which no tensor uses."""
    size, end, data = 2**36, 2**32 - 1, b"\x80\x02}."
    names = (b"m/data/0", b"m/data.pkl")
    wide = (struct.pack("<2HQQ", 1, 16, size, size), b"")
    sizes = ((0, end, end), (zlib.crc32(data), len(data), len(data)))
    heads = [
        struct.pack("<4s5H3L2H", b"PK\x03\x04", 45, 0, 0, 0, 33, *s, len(n), len(w)) + n + w
        for n, w, s in zip(names, wide, sizes, strict=True)
    ]
    place = len(heads[0]) + size
    wide = (wide[0], struct.pack("<2HQ", 1, 8, place))
    entries = b"".join(
        struct.pack("<4s6H3L5H2L", b"PK\x01\x02", 45, 45, 0, 0, 0, 33, *s, len(n), len(w), 0, 0, 0, 0, where) + n + w
        for n, w, s, where in zip(names, wide, sizes, (0, end), strict=True)
    )
    start = place + len(heads[1]) + len(data)
    tail = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 2, 2, len(entries), start)
    tail += struct.pack("<4sLQL", b"PK\x06\x07", 0, start + len(entries), 1)
    tail += struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 2, 2, len(entries), end, 0)
    with (folder / "model_000000.pt").open("wb") as file:
        file.write(heads[0])
        file.seek(place)
        file.write(heads[1] + data + entries + tail)
    return folder


def many_members(folder: Path) -> Path:
    """Write an archive of sixty thousand empty members."""
    with zipfile.ZipFile(folder / "model_000000.pt", "w") as archive:
        for i in range(60_000):
            archive.writestr(f"m/data/{i}", b"")
    return folder


def overlapping(folder: Path) -> Path:
    """Write an archive whose members share their bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("m/data.pkl", b"\x80\x02}.")
        archive.writestr("m/data/0", bytes(4096))
    data = buffer.getvalue()
    start = data.index(b"PK\x01\x02")
    second = data.index(b"PK\x01\x02", start + 1)
    entry = bytearray(data[start:second])  # data.pkl once more, under another name
    entry[46 : 46 + 10] = b"m/data/abc"
    end = bytearray(data[data.index(b"PK\x05\x06") :])
    count, size = struct.unpack_from("<H", end, 8)[0], struct.unpack_from("<L", end, 12)[0]
    struct.pack_into("<2H", end, 8, count + 1, count + 1)
    struct.pack_into("<L", end, 12, size + len(entry))
    (folder / "model_000000.pt").write_bytes(data[: data.index(b"PK\x05\x06")] + bytes(entry) + bytes(end))
    return folder


def safetensors(header: bytes, data: bytes = b"", length: int | None = None) -> Callable[[], bytes]:
    """Return a function that writes a safetensors file with a raw header."""
    return lambda: struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict:
    """Return the entry of one tensor in a safetensors header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def one(dtype: str, shape: list[int], begin: int, end: int, data: bytes) -> Callable[[], bytes]:
    """Return a function that writes a safetensors file with one tensor."""
    return safetensors(json.dumps({"transformer.wte.weight": entry(dtype, shape, begin, end)}).encode(), data)


_NESTED_KEY = b"\x80\x02}(K\x01\x85" + b"q\x00h\x00\x86" * 60 + b"K\x01u."  # a tuple of pairs of pairs: 2^60 to hash

# What is attacked, how it is opened ("checkpoint" or "tokenizer"), and what writes the file into an empty folder.
HOSTILE: list[tuple[str, str, Maker]] = [
    ("bytearray(2e9) by REDUCE", "checkpoint", weights(b"\x80\x02c__builtin__\nbytearray\nJ\x005w\x85\x85R.")),
    (
        "bytearray(2e9) in a bare pickle",
        "checkpoint",
        file("model_0.pt", lambda: b"\x80\x02c__builtin__\nbytearray\n."),
    ),
    ("os.system", "checkpoint", weights(b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.")),
    ("2 MB that inflate to 4.3 GB", "checkpoint", deflated),
    ("a hole of 64 GB", "checkpoint", hole),
    ("60,000 members", "checkpoint", many_members),
    ("members that overlap", "checkpoint", overlapping),
    ("8 MB of }", "checkpoint", weights(b"\x80\x02" + b"}" * (2**23 - 3))),
    ("16 MB of }", "checkpoint", weights(b"\x80\x02" + b"}" * 2**24)),
    ("8 MB of PROTO", "checkpoint", weights(b"\x80\x02" * (2**22 - 1))),
    ("a million nested tuples", "checkpoint", weights(b"\x80\x02)" + b"\x85" * 2**20 + b".")),
    ("a key that takes 2^60 to hash", "checkpoint", weights(_NESTED_KEY)),
    ("strings of 8 MB", "checkpoint", weights(b"\x80\x02(" + b"U\x01a" * 2**21 + b".")),
    (
        "a memo without end",
        "checkpoint",
        weights(b"\x80\x02}" + b"".join(b"r" + struct.pack("<I", i) for i in range(2**20))),
    ),
    ("a tensor of 4e12 numbers by stride 0", "checkpoint", weights(tensor(1, (2 * 10**6,) * 2, (0, 0)), _0=bytes(4))),
    ("a tensor beyond its numbers", "checkpoint", weights(tensor(4, (5,), (1,)), _0=bytes(16))),
    ("a tensor before its numbers", "checkpoint", weights(tensor(4, (2,), (1,), -1), _0=bytes(16))),
    ("a tensor of 2^120 numbers", "checkpoint", weights(tensor(4, (2**60, 2**60), (0, 0)), _0=bytes(16))),
    ("numbers that are missing", "checkpoint", weights(tensor(4, (4,), (1,)))),
    ("more numbers than the file has", "checkpoint", weights(tensor(2**40, (2**40,), (1,)), _0=bytes(16))),
    ("a sparse tensor", "checkpoint", saved(lambda: {"w": torch.eye(3).to_sparse()})),
    ("a meta tensor", "checkpoint", saved(lambda: {"w": torch.empty(2**40, device="meta")})),
    ("a float8 tensor", "checkpoint", saved(lambda: {"w": torch.zeros(3).to(torch.float8_e4m3fn)})),
    (
        "a quantized tensor",
        "checkpoint",
        saved(lambda: {"w": torch.ops.aten.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8)}),
    ),
    ("a complex tensor", "checkpoint", saved(lambda: {"w": torch.zeros(3, dtype=torch.complex64)})),
    ("a GGUF file with another name", "checkpoint", file("model_0.pt", lambda: b"GGUF" + bytes(100))),
    ("a header of 2^60 bytes", "checkpoint", file("model.safetensors", safetensors(b"{}", length=2**60))),
    ("a header of 64 MB", "checkpoint", file("model.safetensors", safetensors(b" " * 2**26))),
    ("a header 4,000,000 deep", "checkpoint", file("model.safetensors", safetensors(b"[" * 4_000_000))),
    ("a tensor of 2^62 bytes", "checkpoint", file("model.safetensors", one("F32", [2**60], 0, 2**62, b""))),
    (
        "a shape other than its bytes",
        "checkpoint",
        file("model.safetensors", one("F32", [2**30, 2**30], 0, 4, bytes(4))),
    ),
    ("offsets behind the file", "checkpoint", file("model.safetensors", one("F32", [4], 16, 32, bytes(16)))),
    ("float8 in safetensors", "checkpoint", file("model.safetensors", one("F8_E4M3", [4], 0, 4, bytes(4)))),
    ("int4 words in safetensors", "checkpoint", file("model.safetensors", one("U32", [4], 0, 16, bytes(16)))),
    (
        "a million shards",
        "checkpoint",
        file(
            "model.safetensors.index.json",
            lambda: json.dumps({"weight_map": {str(i): f"{i}.safetensors" for i in range(150_000)}}).encode(),
        ),
    ),
    (
        "a shard elsewhere",
        "checkpoint",
        file("model.safetensors.index.json", lambda: b'{"weight_map": {"a": "../../etc/x.safetensors"}}'),
    ),
    ("a meta file 100,000 deep", "checkpoint", beside_a_model("meta_000000.json", lambda: b'{"a":' * 100_000)),
    (
        "a meta file of 4 MB of {}",
        "checkpoint",
        beside_a_model("meta_000000.json", lambda: b'{"a":[' + b"{}," * 1_300_000 + b"1]}"),
    ),
    (
        "a meta file with a number of 4 MB",
        "checkpoint",
        beside_a_model("meta_000000.json", lambda: b'{"a":' + b"1" * 4_000_000 + b"}"),
    ),
    ("a config 100,000 deep", "checkpoint", beside_a_model("config.json", lambda: b'{"a":' * 100_000)),
    ("64 MB of }", "tokenizer", file("tokenizer.pkl", lambda: b"\x80\x04" + b"}" * (2**26 - 3))),
    ("32 MB of }", "tokenizer", file("tokenizer.pkl", lambda: b"\x80\x04" + b"}" * (2**25 - 3))),
    ("32 MB of PROTO", "tokenizer", file("tokenizer.pkl", lambda: b"\x80\x04" * 2**24)),
    (
        "30 MB of tokens",
        "tokenizer",
        file(
            "tokenizer.pkl",
            lambda: b"\x80\x04}(" + b"".join(b"C\x03" + i.to_bytes(3, "big") + b"K\x01" for i in range(2**22)),
        ),
    ),
    ("32 MB of memo", "tokenizer", file("tokenizer.pkl", lambda: b"\x80\x04}" + b"\x94" * (2**25 - 4))),
    (
        "a pickle of bytearray(2e9)",
        "tokenizer",
        file("tokenizer.pkl", lambda: b"\x80\x02c__builtin__\nbytearray\nJ\x005w\x85\x85R."),
    ),
    ("a tokenizer.json 100,000 deep", "tokenizer", file("tokenizer.json", lambda: b'{"a":' * 100_000)),
    (
        "a tokenizer.json of 12 MB of []",
        "tokenizer",
        file("tokenizer.json", lambda: b'{"a":[' + b"[]," * 4_000_000 + b"1]}"),
    ),
    (
        "a tokenizer.json of 12 MB of strings",
        "tokenizer",
        file("tokenizer.json", lambda: b'{"a":[' + b'"abc",' * 2_000_000 + b"1]}"),
    ),
    (
        "a tokenizer.json of 1,000,000 tokens",
        "tokenizer",
        file(
            "tokenizer.json",
            lambda: b'{"model":{"vocab":{' + b",".join(b'"%05x":1' % i for i in range(1_000_000)) + b"}}}",
        ),
    ),
    (
        "token_bytes.pt with bytearray(2e9)",
        "tokenizer",
        lambda folder: _table(folder, b"\x80\x02c__builtin__\nbytearray\nJ\x005w\x85\x85R."),
    ),
    ("a pattern that matches nothing", "tokenizer", tokenizer(r"(?=a)|")),
    ("a pattern that keeps out", "tokenizer", tokenizer(r"a\Kb|\K")),
    ("a pattern of 800 MB", "tokenizer", tokenizer("|".join([r"\w{99}(?=a)"] * 140))),
    ("a pattern of nested repetitions", "tokenizer", tokenizer(r"(?:(?:a+)+)+(?=b)")),
    ("a pattern that calls itself", "tokenizer", tokenizer(r"(?R)")),
    ("a pattern 1,000 deep", "tokenizer", tokenizer("(" * 1000 + "a" + ")" * 1000)),
]


def _table(folder: Path, data: bytes) -> Path:
    tokenizer(PATTERN)(folder)
    with zipfile.ZipFile(folder / "token_bytes.pt", "w") as archive:
        archive.writestr("m/data.pkl", data)
    return folder
