"""GGUF files: reads the header of any model file, writes the model files that we make ourselves.

Owns the format (version 2 and 3, little endian) and its limits. Does not hold tensor data in memory, does not know
what other keys than our own mean, and never trusts a count: each is checked against the bytes that the file still
has. Arrays longer than `KEPT_ARRAY` (vocabularies) are stepped over; `GgufHeader.array` reads one when it is wanted.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any, BinaryIO

from appliance.errors import ModelError

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32
GUIDE_KEY = "appliance.guide"  # likewise: true in the built-in guide
PLACEHOLDER_KEY = "appliance.placeholder"  # our own key: true in models that only stand in for a real one
KEPT_ARRAY = 1_024  # longer arrays stay in the file

MAX_KEYS = 65_536
MAX_TENSORS = 65_536
MAX_NAME = 65_535
MAX_TEXT = 64 * 1024 * 1024  # bytes of all strings together that one reading keeps
MAX_HEADER_ITEMS = 16_777_216  # elements of all arrays together; the largest vocabularies have under a million
MAX_ALIGNMENT = 1024 * 1024
MAX_DIMENSIONS = 4


class ValueType(IntEnum):
    """The types of metadata values."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


class GgmlType(IntEnum):
    """The tensor types that we write or name; others are numbers of `BLOCKS` only."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q8_0 = 8


# ggml type -> (elements of a block, bytes of a block); a test holds it against the library's own table
BLOCKS: Mapping[int, tuple[int, int]] = {
    0: (1, 4),  # F32
    1: (1, 2),  # F16
    2: (32, 18),  # Q4_0
    3: (32, 20),  # Q4_1
    6: (32, 22),  # Q5_0
    7: (32, 24),  # Q5_1
    8: (32, 34),  # Q8_0
    10: (256, 84),  # Q2_K
    11: (256, 110),  # Q3_K
    12: (256, 144),  # Q4_K
    13: (256, 176),  # Q5_K
    14: (256, 210),  # Q6_K
    16: (256, 66),  # IQ2_XXS
    17: (256, 74),  # IQ2_XS
    18: (256, 98),  # IQ3_XXS
    19: (256, 50),  # IQ1_S
    20: (32, 18),  # IQ4_NL
    21: (256, 110),  # IQ3_S
    22: (256, 82),  # IQ2_S
    23: (256, 136),  # IQ4_XS
    24: (1, 1),  # I8
    25: (1, 2),  # I16
    26: (1, 4),  # I32
    27: (1, 8),  # I64
    28: (1, 8),  # F64
    29: (256, 56),  # IQ1_M
    30: (1, 2),  # BF16
    34: (256, 54),  # TQ1_0
    35: (256, 66),  # TQ2_0
    39: (32, 17),  # MXFP4
    40: (64, 36),  # NVFP4
}

SCALARS: Mapping[int, struct.Struct] = {
    ValueType.UINT8: struct.Struct("<B"),
    ValueType.INT8: struct.Struct("<b"),
    ValueType.UINT16: struct.Struct("<H"),
    ValueType.INT16: struct.Struct("<h"),
    ValueType.UINT32: struct.Struct("<I"),
    ValueType.INT32: struct.Struct("<i"),
    ValueType.FLOAT32: struct.Struct("<f"),
    ValueType.BOOL: struct.Struct("<?"),
    ValueType.UINT64: struct.Struct("<Q"),
    ValueType.INT64: struct.Struct("<q"),
    ValueType.FLOAT64: struct.Struct("<d"),
}


@dataclass(frozen=True, slots=True)
class LongArray:
    """An array that was stepped over: what it holds and where it starts in the file."""

    item_type: int
    count: int
    position: int


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor; `offset` counts from the header's `data_offset`, `shape` has the fastest dimension first."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int

    @property
    def elements(self) -> int:
        total = 1
        for extent in self.shape:
            total *= extent
        return total

    @property
    def size(self) -> int | None:
        """Bytes, or None for a type that this table does not know."""
        if self.type not in BLOCKS:
            return None
        block_elements, block_bytes = BLOCKS[self.type]
        return self.elements // block_elements * block_bytes


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """Everything before the tensor data. `expected_size` is None where a tensor type is unknown."""

    path: Path
    version: int
    metadata: Mapping[str, Any]
    tensors: tuple[TensorInfo, ...]
    data_offset: int
    file_size: int
    expected_size: int | None

    def array(self, key: str) -> list[Any]:
        """The array under `key`, read from the file if it was stepped over; empty when there is none."""
        value = self.metadata.get(key, [])
        if not isinstance(value, LongArray):
            return list(value) if isinstance(value, tuple) else []
        with _reader(self.path) as source:
            source.seek(value.position)
            return source.items(value.item_type, value.count)

    def text(self, key: str, default: str = "") -> str:
        """The string under `key`, or `default` when it is absent or no string."""
        value = self.metadata.get(key)
        return value if isinstance(value, str) else default

    def number(self, key: str, default: int = 0) -> int:
        """The integer under `key`, or `default` when it is absent or no integer."""
        value = self.metadata.get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) else default


def read_header(path: str | os.PathLike[str]) -> GgufHeader:
    """The header of the GGUF file at `path`; ModelError when it is missing, not a GGUF file, malformed or truncated."""
    with _reader(Path(path)) as source:
        version = _read_version(source)
        header = _read_body(source, version)
    if header.expected_size is not None and header.file_size < header.expected_size:
        raise ModelError(
            f"The model file {path} is truncated: it ends at byte {header.file_size:,} of {header.expected_size:,}."
        )
    return header


def _read_version(source: _Reader) -> int:
    if source.size < 4 or source.take(4) != MAGIC:
        raise ModelError(f"The file {source.path} is not a GGUF model file.")
    version: int = source.scalar(ValueType.UINT32)
    if version & 0xFFFF == 0 and version:
        raise ModelError(f"The model file {source.path} is big-endian; only little-endian GGUF files can be loaded.")
    if version not in (2, 3):
        raise ModelError(f"The model file {source.path} has GGUF version {version}; versions 2 and 3 can be loaded.")
    return version


def _read_body(source: _Reader, version: int) -> GgufHeader:
    tensor_count = source.scalar(ValueType.UINT64)
    key_count = source.scalar(ValueType.UINT64)
    # the least that a tensor entry (name, dimensions, type, offset) and a key (name, type, value) take in the file
    source.check_count("tensors", tensor_count, MAX_TENSORS, least_bytes=32)
    source.check_count("metadata keys", key_count, MAX_KEYS, least_bytes=13)
    metadata = _read_metadata(source, key_count)
    alignment = _alignment(source, metadata)
    tensors = _read_tensors(source, tensor_count, alignment)
    # without tensors (a vocabulary alone) the padding before them may be missing
    data_offset = _aligned(source.position, alignment) if tensors else source.position
    return GgufHeader(
        source.path, version, metadata, tensors, data_offset, source.size, _expected_size(data_offset, tensors)
    )


def _read_metadata(source: _Reader, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(count):
        key = source.string(MAX_NAME)
        if key in metadata:
            raise source.malformed(f"the key {key[:80]!r} stands in it twice")
        metadata[key] = source.value()
    return metadata


def _read_tensors(source: _Reader, count: int, alignment: int) -> tuple[TensorInfo, ...]:
    tensors: dict[str, TensorInfo] = {}
    for _ in range(count):
        tensor = _read_tensor(source, alignment)
        if tensor.name in tensors:
            raise source.malformed(f"the tensor {tensor.name[:80]!r} stands in it twice")
        tensors[tensor.name] = tensor
    return tuple(tensors.values())


def _read_tensor(source: _Reader, alignment: int) -> TensorInfo:
    name = source.string(MAX_NAME)
    dimensions = source.scalar(ValueType.UINT32)
    if not 0 < dimensions <= MAX_DIMENSIONS:
        raise source.malformed(f"the tensor {name[:80]!r} has {dimensions:,} dimensions")
    shape = tuple(source.scalar(ValueType.UINT64) for _ in range(dimensions))
    tensor = TensorInfo(name, shape, source.scalar(ValueType.UINT32), source.scalar(ValueType.UINT64))
    block = BLOCKS.get(tensor.type, (1, 1))[0]
    if not 0 < tensor.elements < 2**60 or shape[0] % block:
        raise source.malformed(f"the tensor {name[:80]!r} has an impossible shape")
    if tensor.offset % alignment or tensor.offset >= 2**60:
        raise source.malformed(f"the tensor {name[:80]!r} has an impossible offset")
    return tensor


def _alignment(source: _Reader, metadata: Mapping[str, Any]) -> int:
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise source.malformed("its alignment is no power of two")
    return alignment


def _expected_size(data_offset: int, tensors: Sequence[TensorInfo]) -> int | None:
    end = data_offset
    for tensor in tensors:
        size = tensor.size
        if size is None:
            return None
        end = max(end, data_offset + tensor.offset + size)
    return end


def _aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


def _reader(path: Path) -> _Reader:
    """Opens `path` for reading; the one place where a file's absence becomes a ModelError."""
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise ModelError(f"The model {path} is a directory, not a GGUF file.")
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for a writer
            raise ModelError(f"The model {path} is not a regular file.")
        return _Reader(path, path.open("rb"), status.st_size)
    except FileNotFoundError as error:
        raise ModelError(f"The model file {path} does not exist.") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise ModelError(f"The model file {path} cannot be read: {_reason(error)}.") from error


def _reason(error: Exception) -> str:
    return (error.strerror or "I/O error") if isinstance(error, OSError) else str(error)


class _Reader:
    """Typed reads from one open file; every length is compared with what the file still has."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path = path
        self.size = size
        self.position = 0
        self.array_items = 0
        self.text_bytes = 0
        self._file = file

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def malformed(self, what: str) -> ModelError:
        return ModelError(f"The model file {self.path} is malformed: {what}.")

    def truncated(self) -> ModelError:
        return ModelError(f"The model file {self.path} is truncated: its header goes on after {self.size:,} bytes.")

    def check_count(self, what: str, count: int, most: int, least_bytes: int) -> None:
        if count > most:
            raise self.malformed(f"it claims {count:,} {what}")
        if count * least_bytes > self.size - self.position:
            raise self.truncated()

    def seek(self, position: int) -> None:
        self._file.seek(position)
        self.position = position

    def take(self, count: int) -> bytes:
        if count > self.size - self.position:
            raise self.truncated()
        try:
            data = self._file.read(count)
        except OSError as error:
            raise ModelError(f"The model file {self.path} cannot be read: {_reason(error)}.") from error
        if len(data) != count:  # the file shrank since it was opened
            raise self.truncated()
        self.position += count
        return data

    def scalar(self, kind: int) -> Any:
        layout = SCALARS[kind]
        return layout.unpack(self.take(layout.size))[0]

    def string(self, longest: int = MAX_TEXT) -> str:
        length = self.scalar(ValueType.UINT64)
        self.text_bytes += length
        if length > longest or self.text_bytes > MAX_TEXT:
            raise self.malformed(f"it has a string of {length:,} bytes")
        return self.take(length).decode("utf-8", "replace")

    def value(self) -> Any:
        kind = self.scalar(ValueType.UINT32)
        if kind == ValueType.STRING:
            return self.string()
        if kind == ValueType.ARRAY:
            return self._array()
        return self.scalar(self._known(kind))

    def items(self, kind: int, count: int) -> list[Any]:
        if kind == ValueType.STRING:
            return [self.string() for _ in range(count)]
        layout = SCALARS[kind]
        return [item for (item,) in layout.iter_unpack(self.take(layout.size * count))]

    def _array(self) -> tuple[Any, ...] | LongArray:
        kind = self._known(self.scalar(ValueType.UINT32), strings=True)
        count = self.scalar(ValueType.UINT64)
        self.array_items += count
        if self.array_items > MAX_HEADER_ITEMS:
            raise self.malformed(f"its arrays claim {self.array_items:,} elements")
        if count <= KEPT_ARRAY:
            return tuple(self.items(kind, count))
        start = self.position
        self._skip(kind, count)
        return LongArray(kind, count, start)

    def _skip(self, kind: int, count: int) -> None:
        if kind != ValueType.STRING:
            size = SCALARS[kind].size * count
            if size > self.size - self.position:
                raise self.truncated()
            self.seek(self.position + size)
            return
        self.check_count("strings", count, MAX_HEADER_ITEMS, least_bytes=8)
        read, unpack = self._file.read, SCALARS[ValueType.UINT64].unpack  # 400,000 turns for a large vocabulary
        position, size = self.position, self.size
        for _ in range(count):
            head = read(8)
            if len(head) != 8:
                raise self.truncated()
            length: int = unpack(head)[0]
            position += 8 + length
            if position > size:
                raise self.truncated()
            if length < 4_096:  # reading on is cheaper than a seek, but must not fill memory
                read(length)
            else:
                self._file.seek(position)
        self.position = position

    def _known(self, kind: int, *, strings: bool = False) -> int:
        if kind not in SCALARS and not (strings and kind == ValueType.STRING):
            raise self.malformed(f"it has a value of type {kind:,}")
        return kind


Chunks = Callable[[], Iterable[bytes]]


@dataclass(frozen=True, slots=True)
class _Planned:
    info: TensorInfo
    chunks: Chunks


@dataclass(slots=True)
class Writer:
    """Collects metadata and tensors, then writes the file in one pass, tensor by tensor, without holding their data.

    The file appears under its name only when it is complete. ModelError when it cannot be written.
    """

    path: Path
    _keys: dict[str, bytes] = field(default_factory=dict)
    _tensors: dict[str, _Planned] = field(default_factory=dict)
    _data_size: int = 0

    def string(self, key: str, value: str) -> None:
        self._put(key, ValueType.STRING, _packed_string(value))

    def boolean(self, key: str, value: bool) -> None:
        self._put(key, ValueType.BOOL, _packed(ValueType.BOOL, value))

    def uint32(self, key: str, value: int) -> None:
        self._put(key, ValueType.UINT32, _packed(ValueType.UINT32, value))

    def uint64(self, key: str, value: int) -> None:
        self._put(key, ValueType.UINT64, _packed(ValueType.UINT64, value))

    def float32(self, key: str, value: float) -> None:
        self._put(key, ValueType.FLOAT32, _packed(ValueType.FLOAT32, value))

    def strings(self, key: str, values: Sequence[str]) -> None:
        self._array(key, ValueType.STRING, len(values), b"".join(map(_packed_string, values)))

    def int32s(self, key: str, values: Sequence[int]) -> None:
        self._array(key, ValueType.INT32, len(values), struct.pack(f"<{len(values)}i", *values))

    def float32s(self, key: str, values: Sequence[float]) -> None:
        self._array(key, ValueType.FLOAT32, len(values), struct.pack(f"<{len(values)}f", *values))

    def tensor(self, name: str, shape: tuple[int, ...], kind: GgmlType, chunks: Chunks) -> None:
        """Plans a tensor; `chunks()` is called while writing and yields its bytes in any portions."""
        info = TensorInfo(name, shape, kind, self._data_size)
        if info.size is None or shape[0] % BLOCKS[kind][0] or name in self._tensors:
            raise ValueError(f"tensor {name} {shape} does not fit type {kind.name}, or is there already")
        self._tensors[name] = _Planned(info, chunks)
        self._data_size = _aligned(self._data_size + info.size, ALIGNMENT)

    @property
    def data_size(self) -> int:
        """Bytes of all tensors with their padding."""
        return self._data_size

    def write(self, progress: Callable[[int], None] = lambda done: None) -> None:
        """Writes the file; `progress` hears the number of tensor bytes written so far, a few times per tensor."""
        partial = self.path.with_name(self.path.name + ".partial")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                self._write_header(file)
                self._write_tensors(file, progress)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, self.path)
        except OSError as error:
            raise ModelError(f"The model file {self.path} cannot be written: {_reason(error)}.") from error
        finally:
            with suppress(OSError):  # gone after the rename
                partial.unlink()

    def _write_header(self, file: BinaryIO) -> None:
        file.write(MAGIC + struct.pack("<IQQ", VERSION, len(self._tensors), len(self._keys)))
        for key, value in self._keys.items():
            file.write(_packed_string(key) + value)
        for planned in self._tensors.values():
            file.write(_packed_tensor(planned.info))
        _pad(file)

    def _write_tensors(self, file: BinaryIO, progress: Callable[[int], None]) -> None:
        start = file.tell()
        for planned in self._tensors.values():
            written = 0
            for chunk in planned.chunks():
                written += file.write(chunk)
                progress(file.tell() - start)
            if written != planned.info.size:
                raise ValueError(f"tensor {planned.info.name} got {written} bytes, needs {planned.info.size}")
            _pad(file)

    def _array(self, key: str, kind: ValueType, count: int, items: bytes) -> None:
        self._put(key, ValueType.ARRAY, struct.pack("<IQ", kind, count) + items)

    def _put(self, key: str, kind: ValueType, packed: bytes) -> None:
        if key in self._keys:
            raise ValueError(f"the key {key} is there already")
        self._keys[key] = struct.pack("<I", kind) + packed


def _packed(kind: ValueType, value: float) -> bytes:
    return SCALARS[kind].pack(value)


def _packed_string(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def _packed_tensor(info: TensorInfo) -> bytes:
    layout = struct.pack(f"<I{len(info.shape)}Q", len(info.shape), *info.shape)
    return _packed_string(info.name) + layout + struct.pack("<IQ", info.type, info.offset)


def _pad(file: BinaryIO) -> None:
    file.write(b"\0" * (-file.tell() % ALIGNMENT))
