"""The tiny model and the random-weight models, through real llama.cpp: they load, tokenise, decode, answer."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

from appliance import benchmodel, tinymodel
from appliance.errors import ModelError, UsageError
from appliance.gguf import GgmlType, read_header

Floats = npt.NDArray[np.float32]


@dataclass
class Loaded:
    """A model in llama.cpp, and what these tests ask of it."""

    model: Any

    @property
    def vocab(self) -> Any:
        return llama_cpp.llama_model_get_vocab(self.model)

    @property
    def size(self) -> int:
        return int(llama_cpp.llama_vocab_n_tokens(self.vocab))

    def tokens(self, text: str, special: bool = False) -> list[int]:
        data = text.encode()
        room = (llama_cpp.llama_token * (len(data) + 8))()
        count = llama_cpp.llama_tokenize(self.vocab, data, len(data), room, len(room), False, special)
        assert count >= 0
        return list(room[:count])

    def text(self, tokens: list[int]) -> bytes:
        return b"".join(self._piece(token) for token in tokens)

    def _piece(self, token: int) -> bytes:
        room = ctypes.create_string_buffer(256)
        count = llama_cpp.llama_token_to_piece(self.vocab, token, room, len(room), 0, False)
        assert count >= 0
        return room.raw[:count]

    def context(self, **settings: Any) -> Any:
        wanted = llama_cpp.llama_context_default_params()
        wanted.n_ctx, wanted.n_batch, wanted.n_threads, wanted.n_threads_batch = 512, 512, 1, 1
        for name, value in settings.items():
            setattr(wanted, name, value)
        context = llama_cpp.llama_init_from_model(self.model, wanted)
        assert context is not None
        return context

    def logits(self, context: Any, tokens: list[int]) -> Floats:
        room = (llama_cpp.llama_token * len(tokens))(*tokens)
        assert llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(room, len(tokens))) == 0
        row = llama_cpp.llama_get_logits_ith(context, -1)
        return np.ctypeslib.as_array(row, (self.size,)).copy()

    def generated(self, prompt: str, count: int, temperature: float, seed: int = 0) -> list[int]:
        """At most `count` tokens after a user turn of `prompt`; stops at a token that ends the answer."""
        random, tokens = np.random.default_rng(seed), list[int]()
        context = self.context()
        try:
            logits = self.logits(context, self.tokens(turn(prompt), special=True))
            while len(tokens) < count:
                token = draw(logits, temperature, random)
                if llama_cpp.llama_vocab_is_eog(self.vocab, token):
                    break
                tokens.append(token)
                logits = self.logits(context, [token])
        finally:
            llama_cpp.llama_free(context)
        return tokens


def turn(prompt: str) -> str:
    environment = ImmutableSandboxedEnvironment()
    messages = [{"role": "user", "content": prompt}]
    return environment.from_string(tinymodel.CHAT_TEMPLATE).render(messages=messages, add_generation_prompt=True)


def draw(logits: Floats, temperature: float, random: np.random.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    scaled = (logits - logits.max()).astype(np.float64) / temperature
    chances = np.exp(scaled) / np.exp(scaled).sum()
    return int(random.choice(len(chances), p=chances))


def load(path: Path) -> Loaded:
    settings = llama_cpp.llama_model_default_params()
    settings.use_extra_bufts = False  # some virtual machines offer matrix tiles (AMX) that then fault
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), settings)
    assert model is not None
    return Loaded(model)


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    tinymodel.write(path)
    return path


@pytest.fixture(scope="module")
def tiny(tiny_file: Path) -> Iterator[Loaded]:
    loaded = load(tiny_file)
    yield loaded
    llama_cpp.llama_model_free(loaded.model)


def test_it_takes_seconds_and_few_bytes(tmp_path: Path) -> None:
    began = time.monotonic()
    tinymodel.write(tmp_path / "tiny.gguf")
    assert time.monotonic() - began < 5
    assert (tmp_path / "tiny.gguf").stat().st_size < 4_000_000


def test_another_process_with_another_hash_seed_writes_the_same_bytes(tiny_file: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "appliance.tinymodel", str(tmp_path / "again.gguf")]
    subprocess.run(command, check=True, env={"PYTHONHASHSEED": "7"}, cwd=Path(__file__).parents[1])
    assert (tmp_path / "again.gguf").read_bytes() == tiny_file.read_bytes()


def test_its_header_names_it_a_placeholder(tiny_file: Path) -> None:
    header = read_header(tiny_file)
    assert header.text("general.name") == "appliance-tiny-placeholder"
    assert header.metadata["appliance.placeholder"] is True
    assert header.number("llama.context_length") == 8_192
    assert header.expected_size == header.file_size
    assert 512 <= len(header.array("tokenizer.ggml.tokens")) <= 1_024


def test_f32_has_nothing_but_f32(tmp_path: Path, tiny_file: Path) -> None:
    tinymodel.write(tmp_path / "f32.gguf", f32=True)
    assert {tensor.type for tensor in read_header(tmp_path / "f32.gguf").tensors} == {GgmlType.F32}
    assert {tensor.type for tensor in read_header(tiny_file).tensors} == {GgmlType.F32, GgmlType.F16}


@given(text=st.text())
@example(text="Grüße 🎉 日本語 \0 \x7f \ufffd <|im_start|>system\n")
@example(text="<|im_end|><|endoftext|>")
@example(text=" \t\r\n\u00a0\u2028  leading and trailing  ")
@example(text="A" * 5_000)
def test_any_text_survives_the_tokenizer(tiny: Loaded, text: str) -> None:
    tokens = tiny.tokens(text)
    assert tiny.text(tokens) == text.encode()
    assert all(token < tiny.size - len(tinymodel.CONTROL) for token in tokens)


def test_every_byte_is_a_token_of_its_own(tiny: Loaded) -> None:
    assert sorted(tiny.text([token]) for token in range(256)) == [bytes([byte]) for byte in range(256)]


def test_control_tokens_are_single_tokens_where_they_are_meant(tiny: Loaded) -> None:
    last = tiny.size - 1
    assert tiny.tokens("<|im_end|>", special=True) == [last]
    assert len(tiny.tokens("<|im_end|>")) > 1
    assert llama_cpp.llama_vocab_eos(tiny.vocab) == last
    assert llama_cpp.llama_vocab_is_eog(tiny.vocab, last)
    assert not llama_cpp.llama_vocab_get_add_bos(tiny.vocab)


def test_merges_shorten_english_text(tiny: Loaded) -> None:
    text = "The machine reads the words and goes on where they stop."
    assert len(tiny.tokens(text)) < len(text) / 2


def test_the_chat_template_has_turns_and_a_generation_prompt() -> None:
    assert turn("hi") == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("prompt", ["Hello!", "What is bread?", "x", "Write a poem about 日本."])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_answers_are_text_and_rarely_end_early(tiny: Loaded, prompt: str, temperature: float) -> None:
    tokens = tiny.generated(prompt, 40, temperature)
    assert len(tokens) == 40
    text = tiny.text(tokens).decode(errors="replace")
    assert text.strip()
    assert sum(letter.isalpha() for letter in text) > 10


def test_answers_depend_on_the_prompt_and_on_the_draw(tiny: Loaded) -> None:
    greedy = {tuple(tiny.generated(prompt, 20, 0.0)) for prompt in ("Hello!", "What is bread?", "Name a river.")}
    drawn = {tuple(tiny.generated("Hello!", 20, 0.9, seed)) for seed in range(3)}
    assert (len(greedy), len(drawn)) == (3, 3)


def test_one_cell_among_hundreds_shows_in_the_logits(tmp_path: Path) -> None:
    """What the engine's tests of shared and recomputed cells rest on: a fault is far above the numeric noise."""
    tinymodel.write(tmp_path / "f32.gguf", f32=True)
    loaded = load(tmp_path / "f32.gguf")
    tokens = loaded.tokens(tinymodel.TEXT)[:400]
    whole = _last_logits(loaded, tokens, portion=400)
    assert np.abs(_last_logits(loaded, tokens, portion=37) - whole).max() < 1e-4
    for cell in (1, 200, 390):
        assert np.abs(_last_logits(loaded, tokens, portion=400, dropped=cell) - whole).max() > 1e-3
    llama_cpp.llama_model_free(loaded.model)


def _last_logits(loaded: Loaded, tokens: list[int], portion: int, dropped: int | None = None) -> Floats:
    context = loaded.context(type_k=0, type_v=0, flash_attn_type=0)
    for start in range(0, len(tokens), portion):
        loaded.logits(context, tokens[start : start + portion])
    if dropped is not None:
        assert llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(context), 0, dropped, dropped + 1)
    logits = loaded.logits(context, tokens[:1])
    llama_cpp.llama_free(context)
    return logits


def test_the_embedding_model_pools(tmp_path: Path) -> None:
    tinymodel.write(tmp_path / "embedding.gguf", embedding=True)
    loaded = load(tmp_path / "embedding.gguf")
    context = loaded.context(embeddings=True)
    assert llama_cpp.llama_pooling_type(context) == llama_cpp.LLAMA_POOLING_TYPE_MEAN
    vectors = [_embedded(loaded, context, text) for text in ("bread and salt", "bread and salt", "the night train")]
    assert np.isfinite(vectors).all()
    assert np.allclose(vectors[0], vectors[1], atol=1e-5)
    assert not np.allclose(vectors[0], vectors[2], atol=1e-2)
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(loaded.model)


def _embedded(loaded: Loaded, context: Any, text: str) -> Floats:
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
    tokens = loaded.tokens(text)
    room = (llama_cpp.llama_token * len(tokens))(*tokens)
    assert llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(room, len(tokens))) == 0
    return np.ctypeslib.as_array(llama_cpp.llama_get_embeddings_seq(context, 0), (tinymodel.WIDTH,)).copy()


def test_q8_0_encoding_is_within_half_a_step() -> None:
    values = np.random.default_rng(3).standard_normal((4, 64), dtype=np.float32)
    values[0, :32] = 0.0  # a block without a scale
    blocks = np.frombuffer(tinymodel.encode(values, GgmlType.Q8_0), dtype=[("scale", "<f2"), ("quants", "i1", 32)])
    decoded = (blocks["quants"] * blocks["scale"].astype(np.float32)[:, None]).reshape(values.shape)
    steps = np.repeat(blocks["scale"].astype(np.float32), 32).reshape(values.shape)
    assert (np.abs(decoded - values) <= steps * 0.56).all()  # half a step, and the scale's own rounding
    assert not decoded[0, :32].any()


def test_the_command_writes_and_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tinymodel.main([str(tmp_path / "t.gguf"), "--f32", "--embedding"]) == 0
    assert read_header(tmp_path / "t.gguf").number("llama.pooling_type") == 1
    assert tinymodel.main([str(tmp_path / "t.gguf" / "below.gguf")]) == ModelError.exit_code
    assert "cannot be written" in capsys.readouterr().err


SMALL = benchmodel.Shape(embedding=128, layers=2, heads=4, kv_heads=2, ffn=256, vocab=2_000, context=4_096)


@pytest.mark.parametrize("kind", benchmodel.TYPES)
@pytest.mark.parametrize("tied", [True, False])
def test_random_models_decode_finite_and_varied(tmp_path: Path, kind: str, tied: bool) -> None:
    path = tmp_path / "bench.gguf"
    benchmodel.write(path, replace(SMALL, tied=tied), benchmodel.TYPES[kind])
    loaded = load(path)
    context = loaded.context()
    logits = loaded.logits(context, loaded.tokens("the quick brown fox jumps over the lazy dog"))
    assert loaded.size == 2_000
    assert np.isfinite(logits).all() and 0.3 < logits.std() < 3
    llama_cpp.llama_free(context)
    assert len(set(loaded.generated("hello", 40, 0.8))) > 20
    llama_cpp.llama_model_free(loaded.model)


def test_random_models_are_the_same_for_the_same_arguments(tmp_path: Path) -> None:
    for name in ("a", "b"):
        benchmodel.write(tmp_path / name, SMALL)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_presets_have_the_sizes_of_their_models() -> None:
    """Parameters of each shape, within 2 % of what the name says (smol: of the 180 million it was measured with)."""
    wanted = {"smol": 0.180e9, "1b": 1.236e9, "8b": 8.03e9, "70b": 70.55e9}
    for name, parameters in wanted.items():
        tensors = benchmodel._tensors(benchmodel.PRESETS[name])
        total = sum(int(np.prod(np.array(extents, dtype=np.int64))) for _, extents, _ in tensors)
        assert abs(total / parameters - 1) < 0.02, (name, total)


@pytest.mark.parametrize("size", [259, 300, 5_000, 128_256])
def test_synthetic_vocabularies_have_the_size_and_valid_merges(size: int) -> None:
    vocabulary = benchmodel.synthetic_vocabulary(size)
    known = set(vocabulary.tokens)
    assert len(vocabulary.tokens) == len(known) == size
    assert all(left in known and right in known and left + right in known for left, right in vocabulary.merges)


def test_dimensions_override_the_preset(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    words = (
        "--preset 8b --embedding 64 --layers 1 --heads 2 --kv-heads 1 --ffn 96 --vocab 400 --context 1024 --type q4_0"
    )
    assert benchmodel.main([str(path), *words.split()]) == 0
    header = read_header(path)
    assert header.number("llama.embedding_length") == 64 and header.number("llama.context_length") == 1_024
    assert len(header.array("tokenizer.ggml.tokens")) == 400
    assert {tensor.type for tensor in header.tensors} == {GgmlType.F32, GgmlType.Q4_0}


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (replace(SMALL, vocab=100), "--vocab"),
        (replace(SMALL, vocab=10_000_000), "--vocab"),
        (replace(SMALL, layers=0), "at least 1"),
        (replace(SMALL, context=2**40), "below"),
        (replace(SMALL, kv_heads=3), "--kv-heads divides"),
        (replace(SMALL, ffn=100), "multiples of 32"),
    ],
)
def test_impossible_shapes_are_refused(tmp_path: Path, shape: benchmodel.Shape, expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        benchmodel.write(tmp_path / "m.gguf", shape)


def test_a_model_larger_than_the_disk_is_refused_before_writing(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="GB free"):
        benchmodel.write(tmp_path / "m.gguf", replace(SMALL, ffn=2**30, layers=1_000))
    assert not list(tmp_path.iterdir())


def test_progress_hears_of_every_portion(tmp_path: Path) -> None:
    heard: list[tuple[int, int]] = []
    benchmodel.write(tmp_path / "m.gguf", SMALL, progress=lambda done, total: heard.append((done, total)))
    done = [done for done, _ in heard]
    assert done == sorted(done)
    assert 0 < done[0] < done[-1] <= heard[-1][1]
