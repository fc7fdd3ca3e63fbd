"""Models for speed tests: any shape, loadable by llama.cpp, the same bytes each time."""

from __future__ import annotations

import hashlib
import math
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from appliance import benchmodel
from appliance.benchmodel import PRESETS, Shape, synthetic_vocabulary
from appliance.config import EngineSettings
from appliance.engine.model import Context, Model
from appliance.errors import ModelError, UsageError
from appliance.gguf import GgmlType, read_header

SMALL = Shape(64, 2, 4, 2, 96, vocab=2_000, context=512)


@pytest.mark.parametrize("kind", [GgmlType.Q8_0, GgmlType.Q4_0, GgmlType.F16])
@pytest.mark.parametrize("tied", [True, False])
def test_llama_cpp_loads_and_computes_it(tmp_path: Path, kind: GgmlType, tied: bool) -> None:
    path = tmp_path / "bench.gguf"
    benchmodel.write(path, replace(SMALL, tied=tied), kind)
    settings = EngineSettings(slots=1, context=256, threads=1)
    model = Model(path, settings)
    context = Context(model, settings, ids=1, unified=True)
    try:
        assert model.n_tokens == SMALL.vocab and model.n_ctx_train == SMALL.context
        tokens = model.tokenize(b"the river runs to the sea", add_special=False, parse_special=False)
        assert len(tokens) < 25 / 1.5, "words are merged"
        assert b"".join(model.token_bytes[t] for t in tokens) == b"the river runs to the sea"
        context.tokens[: len(tokens)], context.positions[: len(tokens)] = tokens, np.arange(len(tokens))
        context.sequence_ids[: len(tokens)], context.outputs[: len(tokens)] = 0, 0
        context.outputs[len(tokens) - 1] = 1
        assert context.decode(len(tokens)) == 0
        row = context.logits(1)[0]
        assert np.isfinite(row).all() and row.std() > 0.1
    finally:
        context.close()
        model.close()


def test_the_same_arguments_give_the_same_bytes(tmp_path: Path) -> None:
    digests = set()
    for name in ("a", "b"):
        benchmodel.write(tmp_path / name, SMALL)
        digests.add(hashlib.sha256((tmp_path / name).read_bytes()).hexdigest())
    assert len(digests) == 1
    benchmodel.write(tmp_path / "c", replace(SMALL, layers=3))
    assert hashlib.sha256((tmp_path / "c").read_bytes()).hexdigest() not in digests


def test_it_calls_itself_a_placeholder(tmp_path: Path) -> None:
    benchmodel.write(tmp_path / "m.gguf", SMALL)
    assert read_header(tmp_path / "m.gguf").metadata["appliance.placeholder"] is True


@pytest.mark.parametrize(("preset", "billions"), [("smol", 0.18), ("1b", 1.24), ("8b", 8.03), ("70b", 70.6)])
def test_the_presets_have_the_size_they_say(preset: str, billions: float) -> None:
    shape = PRESETS[preset]
    shape.check()
    weights = sum(math.prod(extents) for _, extents, _ in benchmodel._tensors(shape))
    assert weights / 1e9 == pytest.approx(billions, rel=0.02)


@pytest.mark.parametrize("size", [300, 2_000, 32_000, 128_256])
def test_a_vocabulary_has_exactly_the_size(size: int) -> None:
    vocabulary = synthetic_vocabulary(size)
    assert len(vocabulary.tokens) == len(set(vocabulary.tokens)) == size
    known = set(vocabulary.tokens)
    assert all(a in known and b in known and a + b in known for a, b in vocabulary.merges)


@pytest.mark.parametrize(
    "wrong",
    [{"vocab": 10}, {"vocab": 10**7}, {"layers": 0}, {"heads": 3}, {"kv_heads": 3}, {"ffn": 100}, {"context": 2**31}],
)
def test_an_impossible_shape_is_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        benchmodel.write(tmp_path / "m.gguf", replace(SMALL, **wrong))
    assert not (tmp_path / "m.gguf").exists()


def test_a_disk_that_is_too_small_is_seen_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage(10**12, 0, 39 * 10**9))
    with pytest.raises(ModelError, match=r"needs 39\.7 GB"):
        benchmodel.write(tmp_path / "m.gguf", PRESETS["70b"], GgmlType.Q4_0)
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_and_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--embedding", "64", "--layers", "1", "--heads", "2", "--kv-heads", "1", "--ffn", "64", "--vocab", "600"]
    assert benchmodel.main([str(tmp_path / "m.gguf"), *small, "--type", "q4_0"]) == 0
    assert "bytes" in capsys.readouterr().out
    assert benchmodel.main([str(tmp_path / "n.gguf"), *small, "--heads", "5"]) == UsageError.exit_code
    assert "--heads divides" in capsys.readouterr().err
