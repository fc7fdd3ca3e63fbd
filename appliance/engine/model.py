"""llama.cpp: the model file, its vocabulary, and one context. The only module that imports llama_cpp.

Owns every foreign call and pointer; all arguments are checked before they get there, since llama.cpp aborts the
process on what it takes for a programming error. Everything on `Context` belongs to the decode thread.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import re
import threading
from array import array
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
from llama_cpp import __version__ as binding_version
from llama_cpp import llama_cpp as lib
from numpy.typing import NDArray

from appliance.config import EngineSettings
from appliance.errors import ModelError
from appliance.messages import Sampling

log = logging.getLogger("appliance.llama")

KV_TYPES = {
    "f32": lib.GGML_TYPE_F32, "f16": lib.GGML_TYPE_F16, "bf16": 30, "q8_0": lib.GGML_TYPE_Q8_0,
    "q5_1": lib.GGML_TYPE_Q5_1, "q5_0": lib.GGML_TYPE_Q5_0, "q4_1": lib.GGML_TYPE_Q4_1, "q4_0": lib.GGML_TYPE_Q4_0,
}  # fmt: skip
SPLIT_MODES = {"none": 0, "layer": 1, "row": 2, "tensor": 3}
FLASH_ATTENTION = {"auto": -1, "off": 0, "on": 1}
LOAD_MMAP, LOAD_MMAP_MLOCK = 1, 3
MOST_DEVICES = 128
MAX_SEQUENCES = 256  # LLAMA_MAX_SEQ
DEFAULT_CONTEXT = 32_768  # tokens, where the model was trained on more
SPECIAL = lib.LLAMA_TOKEN_ATTR_CONTROL | lib.LLAMA_TOKEN_ATTR_UNKNOWN

DECODED, NO_CELLS, ABORTED, INVALID = 0, 1, 2, -1  # what llama_decode returns; below -1 the computation failed

_BYTES = ctypes.POINTER(ctypes.c_uint8)
_BUFFER = re.compile(rb"(\S+) (model|KV|compute|output) buffer size =\s*([\d.]+) MiB")
_LEVELS = {2: logging.DEBUG, 3: logging.WARNING, 4: logging.ERROR}


class _Log:
    """Sends llama.cpp's log to ours, and notes the sizes of its buffers, which no function reports."""

    def __init__(self) -> None:
        self.buffers: dict[str, int] = {}
        self._last = logging.DEBUG
        self._callback = lib.llama_log_callback(self._write)
        self._lock = threading.Lock()

    def install(self) -> None:
        with self._lock:
            lib.llama_log_set(self._callback, ctypes.c_void_p(0))

    def _write(self, level: int, text: bytes, _: Any) -> None:
        self._last = _LEVELS.get(level, self._last if level == 5 else logging.DEBUG)
        log.log(self._last, "%s", text.decode("utf-8", "replace").rstrip())
        if match := _BUFFER.search(text):
            kind = match[2].decode().lower()
            self.buffers[kind] = self.buffers.get(kind, 0) + int(float(match[3]) * 2**20)


_log = _Log()


def physical_cores() -> int:
    """Physical cores this process may use; hyper-threads do not help matrix products."""
    usable = os.sched_getaffinity(0)
    cores = set()
    for cpu in usable:
        topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
        try:
            cores.add(((topology / "physical_package_id").read_text(), (topology / "core_id").read_text()))
        except OSError:
            return len(usable)
    return len(cores)


def _anonymous_bytes() -> int:
    """Resident memory of this process that no file backs; 0 where the system does not say."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    found = re.search(r"^RssAnon:\s+(\d+) kB", status, re.MULTILINE)
    return int(found[1]) * 1_024 if found else 0


def describe_backend() -> dict[str, str | bool]:
    """Versions and abilities of the llama.cpp build."""
    return {
        "llama_cpp_python": binding_version,
        "gpu_offload": bool(lib.llama_supports_gpu_offload()),
        "system": lib.llama_print_system_info().decode("utf-8", "replace").strip(),
    }


class Pieces(Sequence[bytes]):
    """Short texts by number, end to end in one: 128,000 objects of their own would take ten times the memory."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._ends = array("I", [0])
        text = bytearray()
        for piece in pieces:
            text += piece
            self._ends.append(len(text))
        self._text = bytes(text)

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, number: int) -> bytes: ...
    @overload
    def __getitem__(self, number: slice) -> list[bytes]: ...
    def __getitem__(self, number: int | slice) -> bytes | list[bytes]:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        if not 0 <= number < len(self):
            raise IndexError(number)
        return self._text[self._ends[number] : self._ends[number + 1]]


# key after `general.sampling.` → (our setting, its type, smallest, largest)
_SAMPLING: dict[str, tuple[str, type, float, float]] = {
    "temp": ("temperature", float, 0.0, 2.0),
    "top_k": ("top_k", int, 0, 1_000),
    "top_p": ("top_p", float, 0.01, 1.0),
    "min_p": ("min_p", float, 0.0, 1.0),
    "penalty_repeat": ("repeat_penalty", float, 0.5, 2.0),
    "penalty_last_n": ("penalty_last_n", int, 0, 4_096),
}


class Model:
    """A loaded GGUF file with its vocabulary (implements `prompt.Vocabulary`). Thread-safe: reads only."""

    def __init__(self, path: Path, settings: EngineSettings) -> None:
        self.path = path
        _log.install()
        _log.buffers.clear()
        lib.llama_backend_init()
        params = lib.llama_model_default_params()
        params.n_gpu_layers = settings.gpu_layers
        params.split_mode = SPLIT_MODES[settings.split_mode]
        params.load_mode = LOAD_MMAP_MLOCK if settings.mlock else LOAD_MMAP
        if len(settings.tensor_split) > MOST_DEVICES:
            raise ModelError(f"[engine] tensor_split has more than {MOST_DEVICES} shares.")
        if settings.tensor_split:
            shares = (ctypes.c_float * MOST_DEVICES)(*settings.tensor_split)  # llama.cpp reads one per device
            params.tensor_split = ctypes.cast(shares, ctypes.POINTER(ctypes.c_float))
        before = _anonymous_bytes()
        handle = lib.llama_model_load_from_file(os.fsencode(path), params)
        self.loaded_bytes = max(0, _anonymous_bytes() - before)
        """Main memory that llama.cpp took for it beside the mapped file: repacked weights, tables of the vocabulary."""
        if not handle:
            raise ModelError(f"llama.cpp cannot load {path}: the file is damaged or its architecture is not supported.")
        self.handle: Any = handle
        self._vocab = lib.llama_model_get_vocab(handle)
        if not lib.llama_model_has_decoder(handle) or lib.llama_model_has_encoder(handle) or self._pools():
            self.close()
            raise ModelError(f"{path} is not a text-generating decoder model.")
        self.n_tokens = int(lib.llama_vocab_n_tokens(self._vocab))
        self.bos = int(lib.llama_vocab_bos(self._vocab))
        self.eos = int(lib.llama_vocab_eos(self._vocab))
        self.add_bos = bool(lib.llama_vocab_get_add_bos(self._vocab))
        self.n_ctx_train = int(lib.llama_model_n_ctx_train(handle))
        self.can_share = not (lib.llama_model_is_recurrent(handle) or lib.llama_model_is_hybrid(handle))
        self.window = int(lib.llama_model_n_swa(handle))  # of sliding-window attention; 0 without
        self.token_bytes = Pieces(map(self._piece, range(self.n_tokens)))
        self.longest_piece = max(map(len, self.token_bytes))

    def _pools(self) -> bool:
        """Whether it was made for embeddings: llama.cpp would draw noise from it, or abort on a long prompt."""
        architecture = self.metadata("general.architecture")
        pooling, causal = (self.metadata(f"{architecture}.{key}") for key in ("pooling_type", "attention.causal"))
        return pooling not in (None, "0") or causal == "false"

    def close(self) -> None:
        """Frees the model; safe to call twice. Every context must be closed before."""
        if self.handle:
            lib.llama_model_free(self.handle)
            self.handle = None

    @property
    def name(self) -> str:
        return self.metadata("general.name") or self.path.stem

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return int(lib.llama_model_size(self.handle))

    @cached_property
    def end_tokens(self) -> NDArray[np.int64]:
        """Ids that end a generation."""
        return np.array([t for t in range(self.n_tokens) if self.is_eog(t)], np.int64)

    @cached_property
    def special_texts(self) -> tuple[str, ...]:
        """How control tokens are written in templates, and must not be read in a user's text."""
        special = (t for t in range(self.n_tokens) if lib.llama_vocab_get_attr(self._vocab, t) & SPECIAL)
        return tuple(filter(None, (self.text(t) for t in special)))

    @property
    def chat_template(self) -> str | None:
        template = lib.llama_model_chat_template(self.handle, None)
        return template.decode("utf-8", "replace") if template else None

    def own_sampling(self) -> Sampling:
        """Our defaults with what the file recommends (`general.sampling.*`, as llama.cpp reads them); what lies out of
        range is passed over."""
        found: dict[str, Any] = {}
        for key, (name, kind, low, high) in _SAMPLING.items():
            try:
                value = kind(float(self.metadata(f"general.sampling.{key}") or "nan"))
            except ValueError:
                continue
            if low <= value <= high:
                found[name] = value
        return Sampling(**found)

    def metadata(self, key: str) -> str | None:
        """A value of the GGUF header as text."""
        size = lib.llama_model_meta_val_str(self.handle, key.encode(), None, 0)
        if size < 0:
            return None
        buffer = ctypes.create_string_buffer(size + 1)
        lib.llama_model_meta_val_str(self.handle, key.encode(), buffer, size + 1)
        return buffer.value.decode("utf-8", "replace")

    def text(self, token: int) -> str:
        """How the vocabulary writes `token` (control tokens too)."""
        return (lib.llama_vocab_get_text(self._vocab, token) or b"").decode("utf-8", "replace") if token >= 0 else ""

    def ends(self, token: int) -> bool:
        """Like `is_eog`, from a table."""
        return token in self._ends

    @cached_property
    def _ends(self) -> frozenset[int]:
        return frozenset(self.end_tokens.tolist())

    def is_eog(self, token: int) -> bool:
        return bool(lib.llama_vocab_is_eog(self._vocab, token))

    def tokenize(self, text: bytes, *, add_special: bool, parse_special: bool) -> list[int]:
        """Token ids of `text`. Run it on a thread with a large stack: some vocabularies recurse per character."""
        size = len(text) + 16
        tokens = (lib.llama_token * size)()
        n = lib.llama_tokenize(self._vocab, text, len(text), tokens, size, add_special, parse_special)
        if n < 0:  # more tokens than bytes: a vocabulary without byte tokens
            tokens = (lib.llama_token * -n)()
            n = lib.llama_tokenize(self._vocab, text, len(text), tokens, -n, add_special, parse_special)
        return list(tokens[:n])

    def _piece(self, token: int) -> bytes:
        buffer = ctypes.create_string_buffer(256)
        n = lib.llama_token_to_piece(self._vocab, token, buffer, 256, 0, False)
        if n < 0:
            buffer = ctypes.create_string_buffer(-n)
            n = lib.llama_token_to_piece(self._vocab, token, buffer, -n, 0, False)
        return buffer.raw[:n]


class Context:
    """The KV cache and the computation. Only the decode thread may touch it."""

    def __init__(self, model: Model, settings: EngineSettings, *, ids: int, unified: bool) -> None:
        trained = model.n_ctx_train or DEFAULT_CONTEXT
        params = lib.llama_context_default_params()
        params.n_ctx = settings.context or min(trained, DEFAULT_CONTEXT)
        params.n_batch = min(max(settings.batch, ids), max(params.n_ctx, ids))
        params.n_ubatch = min(settings.ubatch, params.n_batch)
        params.n_seq_max = ids
        params.n_outputs_max = ids
        params.n_threads = params.n_threads_batch = settings.threads or physical_cores()
        params.flash_attn_type = FLASH_ATTENTION[settings.flash_attention]
        params.type_k = params.type_v = KV_TYPES[settings.kv_type]
        params.kv_unified = unified
        params.swa_full = True  # else a windowed cache keeps nothing beyond its window; see also `Limits.window`
        for kind in ("kv", "compute", "output"):
            _log.buffers.pop(kind, None)  # of a context before this one
        handle = lib.llama_init_from_model(model.handle, params)
        if not handle:
            raise ModelError(
                f"llama.cpp cannot make a context of {params.n_ctx} tokens with {settings.kv_type} cells "
                f"for {model.path}: too little memory, or flash attention is off for a quantised cache. "
                "Lower [engine] context or slots."
            )
        self.handle: Any = handle
        self._memory = lib.llama_get_memory(handle)
        self.n_vocab = model.n_tokens
        self._most_outputs = ids
        self._logits = np.empty((0, 0), np.float32)  # llama.cpp's rows, and where they lay when it was made
        self._logits_address = 0
        self.unified = unified
        self.n_ctx = int(lib.llama_n_ctx(handle))
        self.n_ctx_seq = int(lib.llama_n_ctx_seq(handle))
        self.n_batch = int(lib.llama_n_batch(handle))
        self.n_ubatch = int(lib.llama_n_ubatch(handle))
        self.buffers = dict(_log.buffers)  # bytes by kind: model, kv, compute, output
        self._make_batch()

    def close(self) -> None:
        if self.handle:
            pointers = ctypes.cast(self._batch.seq_id, ctypes.POINTER(ctypes.c_void_p))
            for i, cell in enumerate(self._row_ids):
                pointers[i] = cell
            lib.llama_batch_free(self._batch)
            lib.llama_free(self.handle)
            self.handle = None

    def _make_batch(self) -> None:
        """One llama_batch for good, its C arrays seen as NumPy arrays, every row's id pointing into one flat array."""
        n = self.n_batch
        self._batch = lib.llama_batch_init(n, 0, 1)
        self.tokens = np.ctypeslib.as_array(self._batch.token, (n,))
        self.positions = np.ctypeslib.as_array(self._batch.pos, (n,))
        self.outputs = np.ctypeslib.as_array(self._batch.logits, (n,))
        np.ctypeslib.as_array(self._batch.n_seq_id, (n,))[:] = 1
        pointers = ctypes.cast(self._batch.seq_id, ctypes.POINTER(ctypes.c_void_p))
        self.sequence_ids = np.zeros(n, np.int32)
        self._row_ids = [pointers[i] for i in range(n)]  # llama.cpp's own cells, put back before it frees them
        base = self.sequence_ids.ctypes.data
        for i in range(n):
            pointers[i] = base + 4 * i

    def decode(self, n: int) -> int:
        """Computes the first `n` rows of the batch arrays; llama.cpp's return code."""
        if not 0 < n <= self.n_batch:
            raise ValueError(f"a batch of {n} rows, where 1 to {self.n_batch} fit")
        self._batch.n_tokens = n
        return int(lib.llama_decode(self.handle, self._batch))

    def logits(self, n_outputs: int) -> NDArray[np.float32]:
        """The rows that asked for output, in batch order, shape (n_outputs, n_vocab); valid until the next decode."""
        pointer = lib.llama_get_logits(self.handle)
        address = ctypes.addressof(pointer.contents)
        if address != self._logits_address:  # making the array anew costs as much as a tenth of a row's sampling
            self._logits = np.ctypeslib.as_array(pointer, (self._most_outputs, self.n_vocab))
            self._logits_address = address
        return self._logits[:n_outputs]

    def copy(self, source: int, target: int, count: int) -> None:
        """The empty `target` gets the first `count` tokens of `source`; in a split cache the whole stream travels."""
        if self.unified:
            lib.llama_memory_seq_cp(self._memory, source, target, 0, count)
        else:
            lib.llama_memory_seq_cp(self._memory, source, target, -1, -1)
            lib.llama_memory_seq_rm(self._memory, target, count, -1)

    def truncate(self, sequence: int, count: int) -> bool:
        """`sequence` keeps its first `count` tokens; False where the model cannot forget a part."""
        return bool(lib.llama_memory_seq_rm(self._memory, sequence, count, -1))

    def save(self, sequence: int) -> NDArray[np.uint8]:
        """The cells of `sequence` as bytes, for `load` into this context."""
        size = int(lib.llama_state_seq_get_size(self.handle, sequence))
        state = np.frombuffer(mmap.mmap(-1, size), np.uint8)  # so that what is forgotten goes back to the system
        written = lib.llama_state_seq_get_data(self.handle, state.ctypes.data_as(_BYTES), size, sequence)
        return state[:written]

    def load(self, sequence: int, state: NDArray[np.uint8]) -> bool:
        """The empty `sequence` gets what `save` returned; False where there are no cells for it."""
        return bool(lib.llama_state_seq_set_data(self.handle, state.ctypes.data_as(_BYTES), state.size, sequence))

    def clear(self) -> None:
        """Forgets everything."""
        lib.llama_memory_clear(self._memory, True)

    def length(self, sequence: int) -> int:
        """Tokens that the cache holds of `sequence`."""
        return int(lib.llama_memory_seq_pos_max(self._memory, sequence)) + 1


ContextFactory = Callable[[Model, EngineSettings, int, bool], Context]


def make_context(model: Model, settings: EngineSettings, ids: int, unified: bool) -> Context:
    """The default `ContextFactory`."""
    return Context(model, settings, ids=ids, unified=unified)
