"""Random-weight models of a chosen shape, for speed and memory tests only: what such a model says is noise.

Computing a token costs the same whatever the weights are, so that a file of the right shape, type and vocabulary size
stands in for a model of many gigabytes. Quantised blocks are random quants under one sane scale, made and written in
portions: the 70B shape needs the disk for 40 GB but the memory for none of it. The same bytes for the same arguments.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import islice
from pathlib import Path

import numpy as np

from appliance import tinymodel
from appliance.errors import ModelError, UsageError
from appliance.gguf import BLOCKS, GgmlType, Writer
from appliance.tinymodel import CONTROL, Vocabulary

SEED = 20_240_229
PORTION = 4 * 1024 * 1024  # elements made at a time
ROPE_BASE = 500_000.0
TYPES = {"q8_0": GgmlType.Q8_0, "q4_0": GgmlType.Q4_0, "f16": GgmlType.F16}
FILE_TYPES = {GgmlType.F16: 1, GgmlType.Q4_0: 2, GgmlType.Q8_0: 7}  # llama.cpp's numbers for "mostly ..."


@dataclass(frozen=True, slots=True)
class Shape:
    """Dimensions of a `llama` architecture; `tied` uses the token embedding as the output matrix too."""

    embedding: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int = 128_256
    context: int = 131_072
    tied: bool = False

    @property
    def head_width(self) -> int:
        return self.embedding // self.heads

    def check(self) -> None:
        """UsageError when llama.cpp could not load a model of this shape, or its vocabulary cannot be made."""
        low, high = 256 + len(CONTROL), 256 + len(CONTROL) + _SYNTHETIC
        if not low <= self.vocab <= high:
            raise UsageError(f"--vocab is from {low:,} to {high:,} here.")
        sizes = (self.embedding, self.layers, self.heads, self.kv_heads, self.ffn, self.context)
        if min(sizes) < 1 or max(sizes) >= 2**31:
            raise UsageError("Every dimension is at least 1 and below 2^31.")
        if self.embedding % self.heads or self.head_width % 2 or self.heads % self.kv_heads:
            raise UsageError("--heads divides --embedding into an even width, and --kv-heads divides --heads.")
        if self.embedding % 32 or self.ffn % 32 or (self.kv_heads * self.head_width) % 32:
            raise UsageError("--embedding, --ffn and the width of all KV heads are multiples of 32.")


PRESETS = {
    "smol": Shape(576, 30, 9, 3, 1_536, tied=True),
    "1b": Shape(2_048, 16, 32, 8, 8_192, tied=True),
    "8b": Shape(4_096, 32, 32, 8, 14_336),
    "70b": Shape(8_192, 80, 64, 8, 28_672),
}


def write(
    path: Path,
    shape: Shape,
    kind: GgmlType = GgmlType.Q8_0,
    progress: Callable[[int, int], None] = lambda done, all: None,
) -> None:
    """Writes a model of `shape` with matrices of type `kind`; `progress` hears bytes written and bytes in all.

    UsageError when the shape is impossible; ModelError when the disk is too small or the file cannot be written.
    """
    shape.check()
    writer = Writer(path)
    name = f"appliance-bench-{shape.embedding}x{shape.layers}-{kind.name.lower()}"
    tinymodel.describe(writer, name, synthetic_vocabulary(shape.vocab), context=shape.context, placeholder=True)
    _dimensions(writer, shape, kind)
    for number, (tensor, extents, gain) in enumerate(_tensors(shape)):
        chunks = _chunks(number, extents, kind, gain)
        writer.tensor(tensor, extents, GgmlType.F32 if len(extents) == 1 else kind, chunks)
    _require_space(path, writer.data_size)
    writer.write(lambda done: progress(done, writer.data_size))


def synthetic_vocabulary(size: int) -> Vocabulary:
    """Exactly `size` tokens: the bytes, then pairs, triples and fours of lower-case letters with their merges.

    English text comes to about three characters a token, which is near enough to real vocabularies for timing.
    """
    pairs = sorted(
        ((first, second) for first in _LETTERS for second in _LETTERS[1:]),  # a space only at the front of a word
        key=lambda pair: _LETTERS.index(pair[0]) + _LETTERS.index(pair[1]),
    )
    merges = tuple(islice(_synthetic_merges(pairs), size - 256 - len(CONTROL)))
    merged = ("".join(merge) for merge in merges)
    return Vocabulary((*tinymodel.byte_letters(), *merged, *CONTROL), merges)


_LETTERS = "\u0120etaoinshrdlucmfwypvbgkjqxz"  # U+0120 stands for the space; then letters by frequency
_PAIRS = len(_LETTERS) * (len(_LETTERS) - 1)
_INNER_PAIRS = (len(_LETTERS) - 1) ** 2  # without a space
_SYNTHETIC = _PAIRS + _PAIRS * (len(_LETTERS) - 1) + _PAIRS * _INNER_PAIRS


def _synthetic_merges(pairs: Sequence[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    yield from pairs
    joined = ["".join(pair) for pair in pairs]
    yield from ((pair, letter) for pair in joined for letter in _LETTERS[1:])
    inner = [pair for pair in joined if pair[0] != _LETTERS[0]]
    for both in range(len(joined) + len(inner) - 1):  # by the sum of the ranks: common fours first
        for rank in range(max(0, both - len(inner) + 1), min(both + 1, len(joined))):
            yield joined[rank], inner[both - rank]


def _dimensions(writer: Writer, shape: Shape, kind: GgmlType) -> None:
    writer.uint32("general.file_type", FILE_TYPES[kind])
    tinymodel.shape(
        writer,
        width=shape.embedding,
        layers=shape.layers,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_width=shape.head_width,
        ffn=shape.ffn,
        rope_base=ROPE_BASE,
    )


def _tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...], float]]:
    """Name, extents (fastest first) and gain of each tensor; a matrix of gain 1 keeps the variance of its input."""
    width, keys = shape.embedding, shape.kv_heads * shape.head_width
    yield "token_embd.weight", (width, shape.vocab), 1.0
    yield "output_norm.weight", (width,), 1.0
    if not shape.tied:
        yield "output.weight", (width, shape.vocab), 1.0
    for layer in range(shape.layers):
        for name, extents in (
            ("attn_norm", (width,)),
            ("attn_q", (width, width)),
            ("attn_k", (width, keys)),
            ("attn_v", (width, keys)),
            ("attn_output", (width, width)),
            ("ffn_norm", (width,)),
            ("ffn_gate", (width, shape.ffn)),
            ("ffn_up", (width, shape.ffn)),
            ("ffn_down", (shape.ffn, width)),
        ):
            yield f"blk.{layer}.{name}.weight", extents, 1.0


def _chunks(number: int, extents: tuple[int, ...], kind: GgmlType, gain: float) -> Callable[[], Iterator[bytes]]:
    if len(extents) == 1:
        ones = np.ones(extents[0], "<f4").tobytes()
        return lambda: iter([ones])

    def portions() -> Iterator[bytes]:
        random = np.random.Generator(np.random.PCG64([SEED, number]))
        deviation = gain / math.sqrt(extents[0])
        left = extents[0] * extents[1]
        while left:
            count = min(left, PORTION)
            yield _random_weights(random, count, kind, deviation)
            left -= count

    return portions


def _random_weights(random: np.random.Generator, count: int, kind: GgmlType, deviation: float) -> bytes:
    """`count` weights of about this standard deviation, uniformly distributed."""
    if kind == GgmlType.F16:
        quants = np.frombuffer(random.bytes(count), np.int8).astype(np.float32)
        return (quants * np.float32(deviation / _SPREAD[GgmlType.Q8_0])).astype("<f2").tobytes()
    block, size = BLOCKS[kind]
    blocks = np.frombuffer(bytearray(random.bytes(count // block * size)), np.uint8).reshape(-1, size)
    blocks[:, :2] = np.frombuffer(np.array(deviation / _SPREAD[kind], "<f2").tobytes(), np.uint8)
    return blocks.tobytes()


_SPREAD = {GgmlType.Q8_0: 256 / math.sqrt(12), GgmlType.Q4_0: 16 / math.sqrt(12)}  # of uniformly random quants


def _require_space(path: Path, size: int) -> None:
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    free = shutil.disk_usage(folder).free
    if free < size:
        raise ModelError(f"The model needs {size / 1e9:.1f} GB, but {folder} has only {free / 1e9:.1f} GB free.")


@dataclass(slots=True)
class _Progress:
    """A line on stderr every two seconds."""

    last: float = field(default_factory=time.monotonic)

    def __call__(self, done: int, all: int) -> None:
        now = time.monotonic()
        if now - self.last >= 2.0:
            self.last = now
            print(f"{done / 1e9:.1f} of {all / 1e9:.1f} GB written ({done / all:.0%})", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="make-bench-model", description="Write a random-weight model for speed tests."
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--preset", choices=PRESETS, default="smol")
    parser.add_argument("--type", choices=TYPES, default="q8_0")
    for dimension in fields(Shape):
        flag = "--" + dimension.name.replace("_", "-")
        if dimension.name == "tied":
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help="embedding as output matrix")
        else:
            parser.add_argument(flag, type=int, metavar="N", help="instead of the preset's")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m appliance.benchmodel OUT [--preset P] [--type T] [--layers N ...]`; the error's exit code, or 0."""
    options = vars(_parser().parse_args(arguments))
    given = {name.name: options[name.name] for name in fields(Shape) if options[name.name] is not None}
    try:
        write(options["out"], replace(PRESETS[options["preset"]], **given), TYPES[options["type"]], _Progress())
    except (ModelError, UsageError) as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(f"{options['out']}: {options['out'].stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
