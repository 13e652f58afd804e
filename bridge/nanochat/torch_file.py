"""Read files of torch.save without torch's unpickler: every size is checked before memory is allocated."""

import dataclasses
import math
import struct
import sys
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bridge.nanochat import pickles
from bridge.nanochat.names import shown
from bridge.nanochat.pickles import ForbiddenError, Global

_MAX_DIRECTORY_BYTES = 2**22
_MAX_MEMBERS = 2**14
_MAX_PICKLE_BYTES = 2**23
_MAX_OPCODES = 2**20
_MAX_TENSORS = 2**14
_MAX_DIMENSIONS = 8
_CHUNK = 2**22  # bytes of a member in memory while its checksum is computed
_END, _END64, _LOCATOR = struct.Struct("<4s4H2LH"), struct.Struct("<4sQ2H2L4Q"), struct.Struct("<4sLQL")
_LOCAL = struct.Struct("<4s5H3L2H")

_DTYPES = {
    "torch.FloatStorage": torch.float32,
    "torch.DoubleStorage": torch.float64,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
    "torch.ComplexFloatStorage": torch.complex64,
    "torch.ComplexDoubleStorage": torch.complex128,
}
_QUANTIZED = {f"torch.{name}Storage" for name in ("QInt8", "QUInt8", "QInt32", "QUInt4x2", "QUInt2x4")}
_UNTYPED = "torch.storage.UntypedStorage"
_UNREADABLE = {  # the kind of value, by the function that rebuilds it
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils._rebuild_meta_tensor_no_storage": "a tensor of the meta device, which has no values",
    "torch._utils._rebuild_qtensor": "a quantized tensor",
    "torch._utils._rebuild_nested_tensor": "a nested tensor",
    "torch.serialization._get_layout": "a layout",
    "torch.Size": "a size",
    "torch.device": "a device",
}
_REBUILD = {
    "collections.OrderedDict",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
    "torch._tensor._rebuild_from_type_v2",
}
_DTYPE_NAMES = {f"torch.{name}" for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
_NAMES = (
    _DTYPES.keys()
    | _QUANTIZED
    | _UNREADABLE.keys()
    | _REBUILD
    | _DTYPE_NAMES
    | {_UNTYPED, "torch.Tensor", "torch.per_tensor_affine", "torch.per_channel_affine", "torch.nn.parameter.Buffer"}
)
_OPCODES = (
    "PROTO FRAME STOP MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET MARK GLOBAL STACK_GLOBAL REDUCE BUILD BINPERSID "
    "EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT SETITEM SETITEMS EMPTY_LIST APPEND APPENDS "
    "NONE NEWTRUE NEWFALSE BINUNICODE SHORT_BINUNICODE BINBYTES SHORT_BINBYTES BININT BININT1 BININT2 LONG1 BINFLOAT"
)


@dataclasses.dataclass(frozen=True)
class Other:
    """A value that is not an ordinary tensor, with its kind in words."""

    kind: str


@dataclasses.dataclass(frozen=True)
class _Member:
    start: int
    size: int
    checksum: int


@dataclasses.dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype | None  # None: given by the tensor
    quantized: bool
    start: int
    size: int


def read(path: Path) -> Any:
    """Return the value that torch.save wrote: dicts, lists, numbers, and memory-mapped tensors.

    Tensors that are sparse, quantized, or on the meta device are returned as `Other`. The checksums of all storages are
    verified, which reads the file once.

    Raises:
        pickles.ForbiddenError: the file has a call or a name that tensors do not need. It is never executed.
        ValueError: the file is damaged, compressed, or not a file of torch.save.
        OSError: the file cannot be read.
    """
    members = _members(path)
    root = next((name.removesuffix("data.pkl") for name in members if name.endswith("/data.pkl")), None)
    if root is None or root.count("/") != 1:
        raise ValueError("it is not an archive of torch.save: it has no data.pkl")
    if members[f"{root}data.pkl"].size > _MAX_PICKLE_BYTES:
        raise ValueError(f"its description of the tensors has more than {_MAX_PICKLE_BYTES} bytes")
    with path.open("rb") as file:
        _verify(file, f"{root}data.pkl", members[f"{root}data.pkl"])
        order = _content(file, members.get(f"{root}byteorder")) or b"little"
        data = _content(file, members[f"{root}data.pkl"])
    if order != sys.byteorder.encode():
        raise ValueError(f"its numbers have the byte order {order[:10]!r}; this machine's is {sys.byteorder}")
    builder = _Builder(path, {name.removeprefix(root): member for name, member in members.items()})
    content = pickles.read(
        data,
        opcodes=_OPCODES,
        names=_NAMES,
        max_opcodes=_MAX_OPCODES,
        call=builder.call,
        build=builder.build,
        persistent=builder.storage,
    )
    with path.open("rb") as file:
        for name in builder.used:
            _verify(file, name, members[f"{root}{name}"])
    return content


class _Builder:
    """Callbacks that create the tensors of a pickle from the storages in its archive."""

    def __init__(self, path: Path, members: Mapping[str, _Member]):
        self._members = members
        try:
            self._file = torch.UntypedStorage.from_file(str(path), False, path.stat().st_size)
        except RuntimeError as error:
            raise OSError(f"{path} cannot be mapped into memory: {str(error).splitlines()[0]}") from error
        self._tensors = 0
        self.used: dict[str, None] = {}
        """Names of the members with the numbers of a tensor."""

    def storage(self, key: Any) -> _Storage:
        """Return the storage of a persistent id ("storage", type, key, device, number of elements)."""
        if type(key) is not tuple or len(key) != 5 or key[0] != "storage" or type(key[1]) is not Global:
            raise ForbiddenError("it refers to an external object that is not a storage")
        name, (kind, member, _, count) = key[1].name, key[1:]
        dtype = _DTYPES.get(kind.name)
        quantized = kind.name in _QUANTIZED
        if dtype is None and not quantized and name != _UNTYPED:
            raise ForbiddenError(f"it uses {shown(name)} as a storage")
        entry = self._members.get(f"data/{member}") if type(member) is str else None
        if entry is None or not _whole(count):
            raise ValueError("a tensor's numbers are missing from the archive")
        if dtype is not None and count * dtype.itemsize != entry.size:
            raise ValueError(f"the numbers {shown(member)} have {entry.size} bytes instead of {count * dtype.itemsize}")
        self.used[f"data/{member}"] = None
        return _Storage(dtype, quantized, entry.start, entry.size)

    def call(self, name: str, arguments: tuple) -> Any:
        """Return the result of calling one of the permitted names."""
        if name == "collections.OrderedDict" and arguments == ():
            return {}
        if name in _UNREADABLE:
            return Other(_UNREADABLE[name])
        if name in ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3") and len(arguments) >= 6:
            dtype = arguments[6] if name.endswith("v3") and len(arguments) > 6 else None
            storage, offset, size, stride = arguments[:4]
            return self._tensor(storage, offset, size, stride, dtype)
        if name.startswith("torch._utils._rebuild_parameter") and arguments:
            return arguments[0]
        if name == "torch._tensor._rebuild_from_type_v2" and len(arguments) == 4:
            function, _, inner, _ = arguments
            if type(function) is Global and function.name.startswith("torch._utils.") and type(inner) is tuple:
                return self.call(function.name, inner)
        raise ForbiddenError(f"it calls {name} in a way that tensors do not need")

    def build(self, target: Any, state: Any) -> Any:
        """Return the object without its state: that of a state_dict, the versions of modules, is not needed."""
        if type(target) is not dict or type(state) is not dict:
            raise ForbiddenError("it sets the state of something that is not a dict")
        return target

    def _tensor(self, storage: Any, offset: Any, size: Any, stride: Any, dtype: Any) -> Tensor | Other:
        if type(storage) is not _Storage:
            raise ValueError("it is broken: a tensor without storage")
        if storage.quantized:
            return Other("a quantized tensor")
        if type(dtype) is Global and dtype.name in _DTYPE_NAMES:
            element_type = getattr(torch, dtype.name.removeprefix("torch."))
        else:
            element_type = storage.dtype
        if element_type is None:
            raise ValueError("it is broken: a tensor without a dtype")
        if (
            not _fits(storage.size // element_type.itemsize, offset, size, stride)
            or storage.start % element_type.itemsize
        ):
            raise ValueError("it is broken: a tensor extends beyond its storage")
        self._tensors += 1
        if self._tensors > _MAX_TENSORS:
            raise ValueError(f"it has more than {_MAX_TENSORS} tensors")
        bytes_ = self._file[storage.start : storage.start + storage.size]
        return torch.empty(0, dtype=element_type, device="cpu").set_(bytes_, offset, size, stride)


def _fits(count: int, offset: Any, size: Any, stride: Any) -> bool:
    """Return whether a view with this offset, size and stride stays within count elements."""
    if not (type(size) is type(stride) is tuple and len(size) == len(stride) <= _MAX_DIMENSIONS and _whole(offset)):
        return False
    if not all(map(_whole, (*size, *stride))) or math.prod(size) >= 2**62:
        return False
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    return offset <= count and (0 in size or last < count)


def _whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62


# ---- the archive --------------------------------------------------------------------------------------------------


def _members(path: Path) -> dict[str, _Member]:
    """Return the members of a zip archive of torch.save after checking its directory.

    Raises ValueError if the archive is damaged, compressed or encrypted, or its members are too many, overlap, or have
    duplicate names.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        end = _directory_end(file, size)
        try:
            with zipfile.ZipFile(file) as archive:
                entries = archive.infolist()
        except (zipfile.BadZipFile, NotImplementedError, UnicodeError, struct.error) as error:
            raise ValueError(str(error) or "its directory is broken") from error
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("it is compressed, so reading it may fill the memory")
        members: dict[str, _Member] = {}
        for entry in entries:
            if entry.flag_bits & 1 or entry.file_size != entry.compress_size or entry.filename in members:
                raise ValueError(f"its member {entry.filename[:100]!r} is encrypted, truncated or duplicated")
            start = _data_start(file, entry, size)
            members[entry.filename] = _Member(start, entry.file_size, entry.CRC)
    spans = sorted(((entry.header_offset, members[entry.filename]) for entry in entries), key=lambda span: span[0])
    stops = [member.start + member.size for _, member in spans]
    if any(start < last for (start, _), last in zip(spans[1:], stops, strict=False)) or (stops and stops[-1] > end):
        raise ValueError("its members overlap")
    return members


def _directory_end(file: Any, size: int) -> int:
    """Return the offset of an archive's directory after checking its size, because zipfile reads all of it."""
    if size < _END.size:
        raise ValueError("it is too short")
    file.seek(size - _END.size)
    magic, _, _, _, count, length, start, comment = _END.unpack(file.read(_END.size))
    if magic != b"PK\x05\x06" or comment:
        raise ValueError("File is not a zip file")
    if count == 0xFFFF or 0xFFFFFFFF in (length, start):
        file.seek(max(size - _END.size - _LOCATOR.size, 0))
        magic, _, offset, _ = _LOCATOR.unpack(file.read(_LOCATOR.size))
        if magic != b"PK\x06\x07" or offset > size - _END64.size:
            raise ValueError("its directory is broken")
        file.seek(offset)
        fields = _END64.unpack(file.read(_END64.size))
        count, length, start = fields[-3:]
    if count > _MAX_MEMBERS or length > _MAX_DIRECTORY_BYTES or start + length > size:
        raise ValueError(f"its directory has {count} members and {length} bytes, too many for a weights file")
    return start


def _data_start(file: Any, entry: zipfile.ZipInfo, size: int) -> int:
    """Return the offset of a member's data."""
    if not 0 <= entry.header_offset <= size - _LOCAL.size:
        raise ValueError("its directory is broken")
    file.seek(entry.header_offset)
    fields = _LOCAL.unpack(file.read(_LOCAL.size))
    start = entry.header_offset + _LOCAL.size + fields[-2] + fields[-1]
    if fields[0] != b"PK\x03\x04" or fields[3] != zipfile.ZIP_STORED or start + entry.file_size > size:
        raise ValueError(f"its member {entry.filename[:100]!r} is truncated or broken")
    return start


def _verify(file: Any, name: str, member: _Member) -> None:
    """Raise ValueError unless a member has the checksum in the archive's directory."""
    file.seek(member.start)
    checksum, remaining = 0, member.size
    while remaining:
        chunk = file.read(min(remaining, _CHUNK))
        if not chunk:
            raise ValueError("it is truncated")
        checksum, remaining = zlib.crc32(chunk, checksum), remaining - len(chunk)
    if checksum != member.checksum:
        raise ValueError(f"the bytes of its member {name[:100]!r} have changed since it was written (checksum)")


def _content(file: Any, member: _Member | None) -> bytes:
    if member is None:
        return b""
    file.seek(member.start)
    return file.read(min(member.size, _MAX_PICKLE_BYTES))
