"""The guide's vocabulary and its token ids, which are llama.cpp's own: texts are tokenised by the file that will serve.

Beside the tokens of text there is a control token per answer. An answer begins with its own, which is no text: so the
first token that is drawn settles which answer it is, and not how many answers begin with the same word.

The vocabulary is learnt by the tiny model's trainer. To have llama.cpp tokenise before anything is trained, a file
with that vocabulary and next to no weights is written and loaded.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from appliance import tinymodel
from appliance.config import EngineSettings
from appliance.engine.model import Model
from appliance.gguf import GgmlType, Writer
from appliance.tinymodel import TURN_END, Vocabulary

VOCABULARY = 12_288  # most words are one token: the network need not put them together
NAME = "appliance-guide"


def learnt(texts: Iterable[str], answers: int, size: int = VOCABULARY) -> Vocabulary:
    """Byte-pair encoding of `texts`, `size` tokens beside those of the `answers`; every UTF-8 text can be encoded, if
    need be byte by byte."""
    found = tinymodel.train_vocabulary("\n".join(texts), size)
    names = tuple(f"<|answer_{n}|>" for n in range(answers))
    return Vocabulary(found.tokens + names, found.merges, found.control + answers)


class Tokens:
    """Conversations as token ids."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "vocabulary.gguf"
            _write_empty(path, vocabulary)
            self._model = Model(path, EngineSettings())
        self.size = vocabulary.size
        self.first_answer = vocabulary.id("<|answer_0|>")  # the others' names follow

    def prompt(self, turns: list[tuple[str, str]]) -> list[int]:
        """The ids of a conversation up to where the assistant speaks."""
        ids: list[int] = []
        for role, text in turns:
            ids += self._ids(f"<|im_start|>{role}\n") + self._text(text) + self._ids(f"{TURN_END}\n")
        return ids + self._ids("<|im_start|>assistant\n")

    def answer(self, number: int, text: str) -> list[int]:
        """The ids of an answer: its name, its text and its end."""
        return [self.first_answer + number, *self._text(text), *self._ids(TURN_END)]

    def _text(self, text: str) -> list[int]:
        return self._model.tokenize(text.encode(), add_special=False, parse_special=False)

    def _ids(self, text: str) -> list[int]:
        return self._model.tokenize(text.encode(), add_special=False, parse_special=True)


def _write_empty(path: Path, vocabulary: Vocabulary) -> None:
    """The least that llama.cpp loads: one layer of width 32."""
    writer = Writer(path)
    tinymodel.describe(writer, NAME, vocabulary, context=64, placeholder=True)
    tinymodel.shape(writer, width=32, layers=1, heads=1, kv_heads=1, head_width=32, ffn=32)
    writer.uint32("general.file_type", 0)
    for name, extents in _empty_tensors(vocabulary.size):
        data = np.ones(extents, np.float32).tobytes()
        writer.tensor(name, extents, GgmlType.F32, lambda data=data: [data])  # type: ignore[misc]
    writer.write()


def _empty_tensors(vocabulary: int) -> Iterable[tuple[str, tuple[int, ...]]]:
    yield "token_embd.weight", (32, vocabulary)
    yield "output_norm.weight", (32,)
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        yield f"blk.0.{name}.weight", (32, 32)
    for name in ("attn_norm", "ffn_norm"):
        yield f"blk.0.{name}.weight", (32,)
