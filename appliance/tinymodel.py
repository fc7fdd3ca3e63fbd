"""The tiny model: a few hundred kilobytes of GGUF that llama.cpp loads and decodes like any other, made in a second.

It stands in wherever no real model is at hand (tests, the first start), and says so in its metadata. Its text is a
random walk over the sentences in `TEXT`: the output rows hold which token follows which, the layers add an influence
of everything before, so that a wrong cell or position of the KV cache shows in every logit. Nothing is trained but the
byte-level vocabulary. The same bytes on every run: NumPy's PCG64, and sums in a fixed order instead of BLAS.
"""

from __future__ import annotations

import argparse
import heapq
import math
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from appliance.errors import ModelError
from appliance.gguf import PLACEHOLDER_KEY, GgmlType, Writer

Floats = npt.NDArray[np.float32]

NAME = "appliance-tiny-placeholder"
DEFAULT_FILE = Path(__file__).parents[1] / "models" / "tiny.gguf"
SEED = 20_240_229
VOCABULARY = 960
CONTEXT = 8_192

WIDTH = 128
LAYERS = 3
HEADS = 4
KV_HEADS = 2
HEAD_WIDTH = 64  # the narrowest head that flash attention on GPUs and every quantised KV type take
FEED_FORWARD = 256

BOS, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CONTROL = (BOS, TURN_START, TURN_END)
NORMAL_TYPE, CONTROL_TYPE = 1, 3  # llama.cpp's token types

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)

TEXT = """\
This is a small model that stands in for a real one. It was never trained, so it does not know anything, and what it
says means nothing. It walks from word to word through a short text, as a child skips from stone to stone across a
river, and it never looks back to see whether the sentence makes sense.

The machine in the corner of the office hums through the night. Every evening somebody asks it a question, and every
morning the answer lies on the desk: three pages about the weather, a list of names, a poem about rain. Nobody told the
machine what to say. It reads the words that it was given, one after the other, and then it goes on where they stop.

When the team came back from lunch, the server was still running. The first request had waited for two seconds, the
second for one, and the third did not wait at all. "How many people can use it at the same time?" asked the new
colleague. "As many as there are chairs in this room," said the woman who had built it, "and a few more, if they are
patient." They opened the door, counted the chairs, and found that there were twelve.

A good answer is short. A better answer is short and true. The best answer is short, true and kind, and it comes before
the question has been asked twice. If you do not know, say that you do not know. If you think that you know, think
again. If you are sure, write it down, with the date, and show it to someone who was there.

In the north the winters are long and the houses are built of wood. In the south the summers are long and the houses
are white. Between them runs a railway, and along the railway stand small towns with a market, a school, a mill and a
bridge. The trains carry apples, letters, coal, children on their way home, and once a year the circus. The driver of
the night train knows every signal by its light, and he says good morning to each of them.

To bake bread you need flour, water, salt, and time. Mix the flour with the water, and wait for an hour. Add the salt,
fold the dough, and wait again. Heat the oven until the stone is hot. Then put the bread into the oven and do not open
the door. After forty minutes the kitchen smells of bread, and everybody who lives in the house stands at the table.

The list has 5 items: 1, 2, 3, 4 and 5. The price was 12.50 and is now 10.00, which is 20 % less. In 2019 there were
1,000 books in the library, in 2024 there were 3,600. Call me at 8:30, or write to the office before Monday.

Cafés in Köln, Málaga, Łódź und Zürich – „fein“, naïve, déjà vu, 5 €. Привет, κόσμε, 你好, こんにちは.

{"name": "bread", "items": ["flour", "water", "salt"], "count": 3, "ready": true, "price": null}
def answer(question): return "I do not know." if question is None else read(question)[0:10]

Who reads this far may ask what a model is. It is a long list of numbers, and a rule for using them. Give it a word and
it gives you a word back; give it that word and it gives you the next one. There is no voice in it and no will. But the
numbers were made from what people wrote, and so it often sounds like us, in the way that the sea sounds in a shell.
"""

_WORDS = re.compile(r"[^\r\n\w]?[^\W\d_]+|\d{1,3}| ?[^\s\w]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Tokens in the byte-to-letter alphabet of GPT-2 with the merges that make them; control tokens come last."""

    tokens: tuple[str, ...]
    merges: tuple[tuple[str, str], ...]
    control: int = len(CONTROL)

    @property
    def size(self) -> int:
        return len(self.tokens)

    @property
    def normal(self) -> int:
        """How many tokens stand for text."""
        return len(self.tokens) - self.control

    def id(self, token: str) -> int:
        return self.tokens.index(token)


def write(path: Path, *, f32: bool = False, embedding: bool = False) -> None:
    """Writes the tiny model to `path`: F16 matrices, or F32 with `f32`; `embedding` makes it pool for embeddings.

    ModelError when the file cannot be written.
    """
    vocabulary = train_vocabulary(TEXT, VOCABULARY)
    writer = Writer(path)
    describe(writer, NAME + ("-embedding" if embedding else ""), vocabulary, context=CONTEXT, placeholder=True)
    shape(writer, width=WIDTH, layers=LAYERS, heads=HEADS, kv_heads=KV_HEADS, head_width=HEAD_WIDTH, ffn=FEED_FORWARD)
    writer.uint32("general.file_type", 0 if f32 else 1)  # llama.cpp's numbers for "all F32" and "mostly F16"
    if embedding:
        writer.uint32("llama.pooling_type", 1)  # mean over the text
    for name, values in _weights(vocabulary):
        _put(writer, name, values, GgmlType.F32 if f32 or values.ndim == 1 else GgmlType.F16)
    writer.write()


def describe(writer: Writer, name: str, vocabulary: Vocabulary, *, context: int, placeholder: bool) -> None:
    """The metadata that name the model and let llama.cpp tokenise and render chats."""
    writer.string("general.architecture", "llama")
    writer.string("general.name", name)
    writer.string("general.license", "apache-2.0")
    writer.boolean(PLACEHOLDER_KEY, placeholder)
    writer.uint32("llama.context_length", context)
    writer.string("tokenizer.ggml.model", "gpt2")
    writer.string("tokenizer.ggml.pre", "llama-bpe")
    writer.strings("tokenizer.ggml.tokens", vocabulary.tokens)
    types = [NORMAL_TYPE] * vocabulary.normal + [CONTROL_TYPE] * vocabulary.control
    writer.int32s("tokenizer.ggml.token_type", types)
    writer.strings("tokenizer.ggml.merges", [f"{left} {right}" for left, right in vocabulary.merges])
    for role, token in (("bos", BOS), ("padding", BOS), ("eos", TURN_END), ("eot", TURN_END)):
        writer.uint32(f"tokenizer.ggml.{role}_token_id", vocabulary.id(token))
    writer.boolean("tokenizer.ggml.add_bos_token", False)
    writer.string("tokenizer.chat_template", CHAT_TEMPLATE)


def shape(
    writer: Writer,
    *,
    width: int,
    layers: int,
    heads: int,
    kv_heads: int,
    ffn: int,
    head_width: int,
    rope_base: float = 10_000.0,
) -> None:
    """The dimensions of a `llama` architecture."""
    writer.uint32("llama.embedding_length", width)
    writer.uint32("llama.block_count", layers)
    writer.uint32("llama.feed_forward_length", ffn)
    writer.uint32("llama.attention.head_count", heads)
    writer.uint32("llama.attention.head_count_kv", kv_heads)
    writer.uint32("llama.attention.key_length", head_width)
    writer.uint32("llama.attention.value_length", head_width)
    writer.uint32("llama.rope.dimension_count", head_width)
    writer.float32("llama.rope.freq_base", rope_base)
    writer.float32("llama.attention.layer_norm_rms_epsilon", 1e-5)


def byte_letters() -> list[str]:
    """GPT-2's letter for each of the 256 bytes: printable Latin-1 stands for itself, the rest moves above U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + rank) for rank, byte in enumerate(others)}
    return [letters[byte] for byte in range(256)]


def train_vocabulary(text: str, size: int) -> Vocabulary:
    """Byte-pair encoding of `text` until there are `size` tokens (fewer when every word is one token)."""
    words = Counter(_WORDS.findall(text))
    pairs = _Pairs(Counter({tuple(_letters(word)): count for word, count in words.items()}))
    tokens, merges = dict.fromkeys(byte_letters()), list[tuple[str, str]]()
    while len(tokens) < size - len(CONTROL) and (pair := pairs.commonest()) is not None:
        merges.append(pair)
        tokens["".join(pair)] = None
        pairs.merge(pair)
    return Vocabulary((*tokens, *CONTROL), tuple(merges))


class _Pairs:
    """How often neighbours occur in the words of a text, kept up to date while pairs are merged."""

    def __init__(self, words: Counter[tuple[str, ...]]) -> None:
        self._words = [(word, count) for word, count in words.items()]
        self._counts: Counter[tuple[str, str]] = Counter()
        self._where: defaultdict[tuple[str, str], set[int]] = defaultdict(set)
        for number in range(len(self._words)):
            self._count(number, 1)
        self._heap = [(-count, pair) for pair, count in self._counts.items()]
        heapq.heapify(self._heap)

    def commonest(self) -> tuple[str, str] | None:
        """The most frequent pair; ties by spelling, never by hash order."""
        while self._heap:
            count, pair = self._heap[0]
            if count and self._counts[pair] == -count:
                return pair
            heapq.heappop(self._heap)  # it has changed since
        return None

    def merge(self, pair: tuple[str, str]) -> None:
        for number in sorted(self._where[pair]):
            changed = self._count(number, -1)
            word, count = self._words[number]
            self._words[number] = (_merged(word, pair), count)
            for other in changed | self._count(number, 1):
                heapq.heappush(self._heap, (-self._counts[other], other))

    def _count(self, number: int, sign: int) -> set[tuple[str, str]]:
        """Adds the pairs of a word, or takes them away; which these are."""
        word, count = self._words[number]
        found = set(zip(word, word[1:], strict=False))
        for pair in zip(word, word[1:], strict=False):
            self._counts[pair] += sign * count
        for pair in found:
            (self._where[pair].add if sign > 0 else self._where[pair].discard)(number)
        return found


def encode(values: Floats, kind: GgmlType) -> bytes:
    """The bytes of `values` as F32, F16 or Q8_0 (rows of a multiple of 32)."""
    if kind == GgmlType.F32:
        return values.astype("<f4").tobytes()
    if kind == GgmlType.F16:
        return values.astype("<f2").tobytes()
    if kind != GgmlType.Q8_0:
        raise ValueError(f"no encoder for {kind.name}")
    blocks = values.reshape(-1, 32).astype(np.float32)
    scales = (np.abs(blocks).max(axis=1) / 127).astype("<f2")
    divisors = np.where(scales == 0, 1, scales).astype(np.float32)
    packed = np.empty(len(blocks), dtype=[("scale", "<f2"), ("quants", "i1", 32)])
    packed["scale"] = scales
    packed["quants"] = np.clip(np.rint(blocks / divisors[:, None]), -127, 127)
    return packed.tobytes()


def _letters(text: str) -> list[str]:
    alphabet = byte_letters()
    return [alphabet[byte] for byte in text.encode()]


def _merged(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    merged: list[str] = []
    for letter in word:
        if merged and (merged[-1], letter) == pair:
            merged[-1] += letter
        else:
            merged.append(letter)
    return tuple(merged)


def _tokenised(text: str, vocabulary: Vocabulary) -> list[int]:
    """Token ids of `text`; slow, and only for our own short text."""
    ids = {token: number for number, token in enumerate(vocabulary.tokens)}
    ranks = {pair: rank for rank, pair in enumerate(vocabulary.merges)}
    numbers: list[int] = []
    for spelling in _WORDS.findall(text):
        word = tuple(_letters(spelling))
        while pairs := [pair for pair in zip(word, word[1:], strict=False) if pair in ranks]:
            word = _merged(word, min(pairs, key=lambda pair: ranks[pair]))
        numbers.extend(ids[token] for token in word)
    return numbers


def _weights(vocabulary: Vocabulary) -> Iterable[tuple[str, Floats]]:
    """Names and values of all tensors; the first channel of the residual stream is kept constant (see `_output`)."""
    random = np.random.Generator(np.random.PCG64(SEED))
    embedding = _normal(random, vocabulary.size, WIDTH)
    embedding[:, 0] = _CONSTANT
    yield "token_embd.weight", embedding
    yield "output_norm.weight", np.ones(WIDTH, np.float32)
    yield "output.weight", _output(embedding, vocabulary)
    for layer in range(LAYERS):
        for name, values in _layer(random).items():
            yield f"blk.{layer}.{name}.weight", values


_CONSTANT = 6.0  # of the first channel; the other 127 have variance 1 at the input


def _layer(random: np.random.Generator) -> dict[str, Floats]:
    queries, keys = HEADS * HEAD_WIDTH, KV_HEADS * HEAD_WIDTH
    blind = np.ones(WIDTH, np.float32)
    blind[0] = 0.0  # layers do not see the constant channel
    layer = {
        "attn_norm": blind,
        # scores with a spread of about 1: attention prefers some cells, and yet none of them is without weight
        "attn_q": _normal(random, queries, WIDTH, 1.0),
        "attn_k": _normal(random, keys, WIDTH, 1.0),
        "attn_v": _normal(random, keys, WIDTH, 3.0),  # a mean over many cells is small
        "attn_output": _normal(random, WIDTH, queries, 1.0),
        "ffn_norm": blind,
        "ffn_gate": _normal(random, FEED_FORWARD, WIDTH, 1.0),
        "ffn_up": _normal(random, FEED_FORWARD, WIDTH, 1.0),
        "ffn_down": _normal(random, WIDTH, FEED_FORWARD, 0.5),
    }
    for name in ("attn_output", "ffn_down"):
        layer[name][0] = 0.0  # and do not write it
    return layer


def _normal(random: np.random.Generator, rows: int, columns: int, gain: float | None = None) -> Floats:
    """Normal values; with `gain`, a matrix that turns inputs of variance 1 into outputs of variance gain squared."""
    scale = 1.0 if gain is None else gain / math.sqrt(columns)
    return random.standard_normal((rows, columns), dtype=np.float32) * np.float32(scale)


def _output(embedding: Floats, vocabulary: Vocabulary) -> Floats:
    """Output rows: the sum of the embeddings of the tokens that each token follows in `TEXT`, and a bias.

    Embeddings of different tokens are nearly orthogonal, so that a hidden state close to token i's embedding scores
    high on what follows i. The bias sits on the constant channel: llama.cpp's `llama` has no bias vector of its own.
    """
    tokens = _tokenised(TEXT, vocabulary)
    rows = np.zeros((vocabulary.size, WIDTH), np.float64)
    for (before, after), count in sorted(Counter(zip(tokens, tokens[1:], strict=False)).items()):
        rows[after] += embedding[before] * ((1.0 + 0.25 * math.log(count)) * _FOLLOWS / WIDTH)
    rows[:, 0] = 0.0
    rows -= embedding * ((rows * embedding).sum(axis=1) / WIDTH)[:, None]  # no token follows itself
    norms = np.sqrt((rows * rows).sum(axis=1))
    rows *= np.minimum(1.0, _LOUDEST / np.maximum(norms, 1e-9))[:, None]
    rows[:, 0] = np.array(_biases(tokens, vocabulary)) / _CONSTANT
    return rows.astype(np.float32)


_FOLLOWS = 9.0  # logits by which a token that follows in the text stands out
_LOUDEST = 2.0  # longest row: what follows everything (a comma) would shout in every context


def _biases(tokens: Sequence[int], vocabulary: Vocabulary) -> list[float]:
    seen = set(tokens)
    text = [0.0 if token in seen else -9.0 for token in range(vocabulary.normal)]
    return text + [-30.0] * len(CONTROL)  # a control token would end the answer, often before its first word


def _put(writer: Writer, name: str, values: Floats, kind: GgmlType) -> None:
    writer.tensor(name, values.shape[::-1], kind, lambda: [encode(values, kind)])


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m appliance.tinymodel [OUT] [--f32] [--embedding]`"""
    parser = argparse.ArgumentParser(prog="make-tiny-model", description="Write the tiny placeholder model.")
    parser.add_argument("out", nargs="?", type=Path, default=DEFAULT_FILE)
    parser.add_argument("--f32", action="store_true", help="all weights in F32")
    parser.add_argument("--embedding", action="store_true", help="a model that pools for embeddings")
    options = parser.parse_args(arguments)
    try:
        write(options.out, f32=options.f32, embedding=options.embedding)
    except ModelError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(f"{options.out}: {options.out.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
