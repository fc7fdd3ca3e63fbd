"""The guide's vocabulary and its token ids, which are llama.cpp's own: texts are tokenised by the file that will serve.

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

VOCABULARY = 4_096
NAME = "appliance-guide"


def learnt(texts: Iterable[str], size: int = VOCABULARY) -> Vocabulary:
    """Byte-pair encoding of `texts`; every UTF-8 text can be encoded, byte by byte if need be."""
    return tinymodel.train_vocabulary("\n".join(texts), size)


class Tokens:
    """Conversations as token ids."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "vocabulary.gguf"
            _write_empty(path, vocabulary)
            self._model = Model(path, EngineSettings())
        self.size = vocabulary.size

    def conversation(self, turns: list[tuple[str, str]]) -> tuple[list[int], list[bool]]:
        """The ids of a whole conversation, and which of them the model has to say (the answers with their ends)."""
        ids: list[int] = []
        said: list[bool] = []
        for role, text in turns:
            head = self._ids(f"<|im_start|>{role}\n")
            body = self._model.tokenize(text.encode(), add_special=False, parse_special=False) + self._ids(TURN_END)
            own = role == "assistant"
            ids += [*head, *body, *self._ids("\n")]
            said += [False] * len(head) + [own] * len(body) + [False]
        return ids, said

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
