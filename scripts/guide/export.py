"""The trained network as a GGUF file that llama.cpp loads unchanged: matrices in Q8_0, norms in F32."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from torch import Tensor

from appliance import tinymodel
from appliance.gguf import GUIDE_KEY, GgmlType, Writer
from appliance.tinymodel import Vocabulary
from scripts.guide.network import ROPE_BASE, Shape
from scripts.guide.tokens import NAME

Q8_0_FILE = 7  # llama.cpp's number for "mostly Q8_0"


def write(path: Path, weights: dict[str, Tensor], shape: Shape, vocabulary: Vocabulary) -> None:
    """Raises ModelError when the file cannot be written."""
    writer = Writer(path)
    tinymodel.describe(writer, NAME, vocabulary, context=shape.context, placeholder=False)
    writer.boolean(GUIDE_KEY, True)
    writer.float32("general.sampling.temp", 0.0)  # it recites: chance only makes it say what was not asked
    writer.string("general.description", "The appliance's built-in guide: answers questions about the appliance only.")
    tinymodel.shape(
        writer,
        width=shape.width,
        layers=shape.layers,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_width=shape.head_width,
        ffn=shape.feed_forward,
        rope_base=ROPE_BASE,
    )
    writer.uint32("general.file_type", Q8_0_FILE)
    for ours, theirs in _names(shape):
        values = weights[ours].float().numpy().astype(np.float32)
        kind = GgmlType.F32 if values.ndim == 1 else GgmlType.Q8_0
        data = tinymodel.encode(values, kind)
        writer.tensor(theirs, values.shape[::-1], kind, lambda data=data: [data])  # type: ignore[misc]
    writer.write()


def _names(shape: Shape) -> Iterator[tuple[str, str]]:
    """(ours, llama.cpp's) of every tensor."""
    yield "embedding.weight", "token_embd.weight"
    yield "norm.weight", "output_norm.weight"
    parts = {
        "attn_norm": "attn_norm",
        "attn.q": "attn_q",
        "attn.k": "attn_k",
        "attn.v": "attn_v",
        "attn.output": "attn_output",
        "ffn_norm": "ffn_norm",
        "ffn.gate": "ffn_gate",
        "ffn.up": "ffn_up",
        "ffn.down": "ffn_down",
    }
    for layer in range(shape.layers):
        for ours, theirs in parts.items():
            yield f"layers.{layer}.{ours}.weight", f"blk.{layer}.{theirs}.weight"
