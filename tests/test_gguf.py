"""GGUF reading and writing: what is written reads back, and no file, however hostile, gets more than one sentence."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance import gguf
from appliance.errors import ModelError
from appliance.gguf import GgmlType, LongArray, Writer, read_header

STRING, ARRAY, UINT32 = 8, 9, 4


def head(tensors: int = 0, keys: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys)


def text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def tensor(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def small_file(path: Path) -> Path:
    """One key and two F32 tensors; 200-odd bytes."""
    writer = Writer(path)
    writer.string("general.name", "small")
    writer.tensor("a", (8,), GgmlType.F32, lambda: [b"\1" * 32])
    writer.tensor("b", (4, 2), GgmlType.F32, lambda: [b"\2" * 16, b"\3" * 16])
    writer.write()
    return path


def refusal(path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        read_header(path)
    assert caught.value.exit_code == 9
    assert str(path) in caught.value.message
    return caught.value.message


def refusal_of(tmp_path: Path, data: bytes) -> str:
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    return refusal(path)


def test_everything_written_reads_back(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "deep" / "model.gguf")
    writer.string("s", "grüße 🎉")
    writer.boolean("b", True)
    writer.uint32("u", 4_000_000_000)
    writer.uint64("q", 2**63)
    writer.float32("f", 0.5)
    writer.strings("ss", ["a", "", "ü"])
    writer.int32s("is", [-1, 2])
    writer.float32s("fs", [0.25, -8.0])
    writer.tensor("t", (32, 3), GgmlType.Q8_0, lambda: [b"\7" * 34 * 3])
    writer.write()
    header = read_header(tmp_path / "deep" / "model.gguf")
    assert header.metadata == {
        "s": "grüße 🎉",
        "b": True,
        "u": 4_000_000_000,
        "q": 2**63,
        "f": 0.5,
        "ss": ("a", "", "ü"),
        "is": (-1, 2),
        "fs": (0.25, -8.0),
    }
    assert header.text("s") == "grüße 🎉" and header.text("u", "none") == "none"
    assert header.number("u") == 4_000_000_000 and header.number("b", 7) == 7
    assert header.array("ss") == ["a", "", "ü"] and header.array("absent") == []
    assert [(t.name, t.shape, t.type, t.size) for t in header.tensors] == [("t", (32, 3), 8, 102)]
    assert header.expected_size == header.data_offset + 102 <= header.file_size


def test_tensor_data_lies_aligned_where_the_header_says(tmp_path: Path) -> None:
    header = read_header(small_file(tmp_path / "model.gguf"))
    data = (tmp_path / "model.gguf").read_bytes()
    starts = [header.data_offset + tensor.offset for tensor in header.tensors]
    assert [start % 32 for start in starts] == [0, 0]
    assert data[starts[0] : starts[0] + 32] == b"\1" * 32
    assert data[starts[1] : starts[1] + 32] == b"\2" * 16 + b"\3" * 16


def test_block_sizes_are_the_library_s_own() -> None:
    import ctypes

    import llama_cpp  # noqa: F401  (loads libggml-base into the process)
    from llama_cpp import llama_cpp as bindings

    folder = Path(bindings.__file__).parent / "lib"
    library = ctypes.CDLL(str(next(folder.glob("libggml-base*"))))
    library.ggml_type_size.restype = ctypes.c_size_t
    library.ggml_blck_size.restype = ctypes.c_int64
    table = {kind: (library.ggml_blck_size(kind), library.ggml_type_size(kind)) for kind in gguf.BLOCKS}
    assert table == dict(gguf.BLOCKS)


def test_long_arrays_stay_in_the_file_until_wanted(tmp_path: Path) -> None:
    words = [f"token{number}" for number in range(150_000)]
    words[70_000] = "x" * 10_000  # longer than what is stepped over by reading
    writer = Writer(tmp_path / "model.gguf")
    writer.strings("tokens", words)
    writer.int32s("types", range(150_000))
    writer.string("after", "found")
    writer.write()
    began = time.monotonic()
    header = read_header(tmp_path / "model.gguf")
    assert time.monotonic() - began < 2
    assert isinstance(header.metadata["tokens"], LongArray) and header.metadata["tokens"].count == 150_000
    assert header.text("after") == "found"
    assert header.array("tokens") == words
    assert header.array("types") == list(range(150_000))


def test_every_truncation_is_refused_and_the_whole_file_is_not(tmp_path: Path) -> None:
    whole = small_file(tmp_path / "whole.gguf").read_bytes()
    expected = read_header(tmp_path / "whole.gguf").expected_size
    assert expected is not None
    for length in range(expected):
        message = refusal_of(tmp_path, whole[:length])
        assert ("truncated" in message) if length >= 4 else ("not a GGUF" in message)
    assert f"ends at byte {expected - 1:,} of {expected:,}" in refusal_of(tmp_path, whole[: expected - 1])


def test_an_unknown_tensor_type_skips_the_size_check_only(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(head(tensors=1) + tensor("t", (7,), kind=9_999))
    header = read_header(path)
    assert header.expected_size is None and header.tensors[0].size is None


def test_version_2_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(head(keys=1, version=2) + text("k") + struct.pack("<II", UINT32, 5))
    assert (read_header(path).version, read_header(path).number("k")) == (2, 5)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "is not a GGUF"),
        (b"GGM", "is not a GGUF"),
        (b"PK\3\4" + b"\0" * 100, "is not a GGUF"),
        (head(version=1), "version 1"),
        (head(version=4), "version 4"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (head(tensors=2**63), "claims 9,223,372,036,854,775,808 tensors"),
        (head(keys=2**64 - 1), "metadata keys"),
        (head(tensors=65_536), "truncated"),
        (head(keys=60_000) + b"\0" * 1_000, "truncated"),
        (head(keys=1) + struct.pack("<Q", 2**62) + b"\0" * 99, "string of"),
        (head(keys=1) + struct.pack("<Q", 60_000) + b"\0" * 99, "truncated"),
        (head(keys=1) + text("k") + struct.pack("<IQ", STRING, 2**40) + b"\0" * 99, "string of"),
        (head(keys=1) + text("k") + struct.pack("<I", 77) + b"\0" * 99, "type 77"),
        (head(keys=1) + text("k") + struct.pack("<IIQ", ARRAY, ARRAY, 1) + b"\0" * 99, "type 9"),
        (head(keys=1) + text("k") + struct.pack("<IIQ", ARRAY, UINT32, 2**60) + b"\0" * 99, "arrays claim"),
        (head(keys=1) + text("k") + struct.pack("<IIQ", ARRAY, UINT32, 2_000_000) + b"\0" * 99, "truncated"),
        (head(keys=1) + text("k") + struct.pack("<IIQ", ARRAY, STRING, 2_000_000) + b"\0" * 99, "truncated"),
        (head(keys=1) + text("k") + struct.pack("<IIQQ", ARRAY, STRING, 2_000, 2**63) + b"\0" * 20_000, "truncated"),
        (head(keys=2) + (text("k") + struct.pack("<II", UINT32, 5)) * 2, "twice"),
        (head(keys=1) + text("general.alignment") + struct.pack("<II", UINT32, 0), "alignment"),
        (head(keys=1) + text("general.alignment") + struct.pack("<II", UINT32, 48), "alignment"),
        (head(tensors=1) + tensor("t", (1,) * 5) + b"\0" * 99, "5 dimensions"),
        (head(tensors=1) + tensor("t", ()) + b"\0" * 99, "0 dimensions"),
        (head(tensors=1) + tensor("t", (0, 8)) + b"\0" * 99, "impossible shape"),
        (head(tensors=1) + tensor("t", (2**32, 2**32)) + b"\0" * 99, "impossible shape"),
        (head(tensors=1) + tensor("t", (33,), kind=8) + b"\0" * 99, "impossible shape"),
        (head(tensors=1) + tensor("t", (8,), offset=7) + b"\0" * 99, "impossible offset"),
        (head(tensors=1) + tensor("t", (8,), offset=2**63) + b"\0" * 99, "impossible offset"),
        (head(tensors=1) + tensor("t", (2**40,)) + b"\0" * 99, "truncated: it ends at byte"),
        (head(tensors=2) + tensor("t", (8,)) * 2 + b"\0" * 99, "twice"),
    ],
)
def test_malformed_files_get_one_sentence(tmp_path: Path, data: bytes, expected: str) -> None:
    message = refusal_of(tmp_path, data)
    assert expected in message
    assert message.endswith(".") and "\n" not in message


def test_a_hostile_pile_of_large_strings_is_not_kept(tmp_path: Path) -> None:
    """A sparse file costs nothing to make; its strings would cost the memory."""
    path = tmp_path / "model.gguf"
    length = gguf.MAX_TEXT // 2 + 1
    with path.open("wb") as file:
        file.write(head(keys=2))
        for key in ("a", "b"):
            file.write(text(key) + struct.pack("<IQ", STRING, length))
            file.seek(length, os.SEEK_CUR)
        file.truncate()
        file.write(b"\0" * 64)
    assert "string of" in refusal(path)


@given(data=st.binary(max_size=400))
def test_random_bytes_never_raise_anything_else(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "random.gguf"
    path.write_bytes(head(tensors=1, keys=1) + data)
    try:
        read_header(path)
    except ModelError as error:
        assert error.message.endswith(".")


@given(position=st.integers(0, 10_000), value=st.integers(0, 255))
def test_one_changed_byte_never_raises_anything_else(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "changed.gguf"
    data = bytearray(small_file(path).read_bytes())
    data[position % len(data)] = value
    path.write_bytes(data)
    try:
        read_header(path)
    except ModelError as error:
        assert error.message.endswith(".")


def make_directory(path: Path) -> None:
    path.mkdir()


def make_loop(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda path: None, "does not exist"),
        (make_directory, "is a directory"),
        (os.mkfifo, "is not a regular file"),
        (make_loop, "cannot be read"),
    ],
)
def test_what_is_no_file_is_refused(tmp_path: Path, make: Callable[[Path], None], expected: str) -> None:
    make(tmp_path / "model.gguf")
    assert expected in refusal(tmp_path / "model.gguf")


def test_a_path_that_cannot_exist_is_refused(tmp_path: Path) -> None:
    assert "cannot be read" in refusal(tmp_path / "a\0b.gguf")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = small_file(tmp_path / "model.gguf")
    before = path.read_bytes()
    writer = Writer(path)
    writer.tensor("t", (8,), GgmlType.F32, lambda: [b"\0" * 31])
    with pytest.raises(ValueError, match="got 31 bytes, needs 32"):
        writer.write()
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["model.gguf"]


def test_a_directory_that_is_a_file_is_a_clear_refusal(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ModelError, match="cannot be written"):
        Writer(tmp_path / "file" / "model.gguf").write()


def test_the_writer_refuses_what_llama_cpp_would(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "model.gguf")
    writer.uint32("k", 1)
    with pytest.raises(ValueError, match="k is there already"):
        writer.uint32("k", 1)
    with pytest.raises(ValueError, match="does not fit"):
        writer.tensor("t", (33,), GgmlType.Q8_0, lambda: [])
