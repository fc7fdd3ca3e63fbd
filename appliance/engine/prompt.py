"""From messages to prompt tokens: the model's chat template in a sandbox, and control tokens that stay the template's own.

A user's text may spell a control token. Such a text is cut, inside the spelling, by a mark that occurs nowhere else; the
rendered prompt is tokenised piece by piece between the marks, so that no piece spells a control token of the user's. A
conversation without such spellings is tokenised whole, as the model was trained. Owns the threads on which all of this
runs; knows no requests, limits of accounts or cells.
"""

from __future__ import annotations

import ctypes
import datetime
import json
import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import jinja2
import numpy as np
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from numpy.typing import NDArray

from appliance.engine.prefixes import common_prefix
from appliance.errors import BadRequest, ModelError, PromptTooLong
from appliance.messages import Message

STACK_BYTES = 512 * 2**20  # some vocabularies recurse once per character of a long run (address space, not memory)
THREADS = 4
RENDER_SECONDS = 2.0
LARGEST_REPEAT = 1_000_000  # characters that one multiplication in a template may make
MARKS = range(0xF0000, 0xFFFFE)  # private-use characters

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"


class Vocabulary(Protocol):
    """What encoding needs of a model."""

    @property
    def special_texts(self) -> tuple[str, ...]: ...
    @property
    def bos(self) -> int: ...
    @property
    def eos(self) -> int: ...
    @property
    def longest_piece(self) -> int: ...
    def text(self, token: int) -> str: ...
    def tokenize(self, text: bytes, *, add_special: bool, parse_special: bool) -> list[int]: ...


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """Token ids, int32 of shape (n,); the first `own_prefix_tokens` come of the appliance's own messages."""

    tokens: NDArray[np.int32]
    own_prefix_tokens: int = 0


class ChatTemplate:
    """A model's Jinja template, rendered in a sandbox under a time cap."""

    def __init__(self, source: str | None, vocabulary: Vocabulary) -> None:
        fallback = CHATML if "<|im_start|>" in vocabulary.special_texts else PLAIN
        self.source = source or fallback
        self._globals = {
            "bos_token": vocabulary.text(vocabulary.bos),
            "eos_token": vocabulary.text(vocabulary.eos),
            "raise_exception": _refuse,
            "strftime_now": lambda form: datetime.datetime.now().strftime(form),
        }
        environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _to_json
        try:
            self._template = environment.from_string(self.source)
        except jinja2.TemplateError as error:
            raise ModelError(f"The model's chat template is broken: {error}") from error

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The prompt as text. Raises BadRequest where the template refuses the conversation or takes too long."""
        turns = [{"role": m.role, "content": m.content} for m in messages]
        try:
            with _time_cap(RENDER_SECONDS):
                return self._template.render(
                    messages=turns, add_generation_prompt=add_generation_prompt, tools=None, **self._globals
                )
        except _Refused as error:
            raise BadRequest(f"The model's chat template refuses this conversation: {error}") from error
        except _TimeUp as error:
            raise BadRequest("The model's chat template took too long for this conversation.") from error
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError) as error:  # fmt: skip
            raise BadRequest(f"The model's chat template cannot render this conversation: {error}") from error


class PromptEncoder:
    """Encodes conversations on threads of its own, which have the stack that long runs of one character need."""

    def __init__(self, template: ChatTemplate, vocabulary: Vocabulary) -> None:
        self._template = template
        self._vocabulary = vocabulary
        self._specials = tuple(s for s in vocabulary.special_texts if len(s) > 1)
        self._finder = re.compile("|".join(f"(?={re.escape(s)})" for s in self._specials)) if self._specials else None
        self._starts = {s[:i] for s in self._specials for i in range(1, len(s))}
        self._ends = {s[i:] for s in self._specials for i in range(1, len(s))}
        self._longest_special = max(map(len, self._specials), default=0)
        self._pool = _large_stack_pool()

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def encode(self, messages: Sequence[Message], *, context_tokens: int, longest_run: int, own_prefix: int = 0) -> Future[EncodedPrompt]:  # fmt: skip
        """The prompt of `messages`; fails with BadRequest, or PromptTooLong beyond `context_tokens`."""
        return self._pool.submit(self._encode, tuple(messages), context_tokens, longest_run, own_prefix)

    def _encode(self, messages: tuple[Message, ...], context: int, longest_run: int, own_prefix: int) -> EncodedPrompt:
        contents = [m.content for m in messages]
        _check_runs(contents, longest_run)
        at_least = -(-sum(map(len, contents)) // self._vocabulary.longest_piece)
        if at_least > context:
            raise PromptTooLong(at_least, context, at_least=True)
        tokens = self._tokens(messages, add_generation_prompt=True)
        if len(tokens) > context:
            raise PromptTooLong(len(tokens), context)
        own = 0
        if own_prefix:
            own = common_prefix(self._tokens(messages[:own_prefix], add_generation_prompt=False), tokens)
        return EncodedPrompt(tokens, own)

    def _tokens(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> NDArray[np.int32]:
        mark = self._unused_mark(m.content for m in messages)
        marked = [Message(m.role, self._guard(m.content, mark)) for m in messages]
        rendered = self._template.render(marked, add_generation_prompt=add_generation_prompt)
        bos = self._vocabulary.text(self._vocabulary.bos)
        tokens: list[int] = []
        for i, piece in enumerate(rendered.split(mark)):
            add_special = not i and not (bos and piece.startswith(bos))
            tokens += self._vocabulary.tokenize(_utf8(piece), add_special=add_special, parse_special=True)
        return np.array(tokens, np.int32)

    def _guard(self, content: str, mark: str) -> str:
        """`content` with a mark inside every control token that it spells, or may spell with its neighbours."""
        if self._finder is None:
            return content
        cuts = {m.start() + 1 for m in self._finder.finditer(content)}
        lengths = range(1, min(len(content), self._longest_special) + 1)
        if any(content[-i:] in self._starts for i in lengths):
            cuts.add(len(content))
        if any(content[:i] in self._ends for i in lengths):
            cuts.add(0)
        edges = [0, *sorted(cuts), len(content)]
        return mark.join(content[a:b] for a, b in pairwise(edges))

    def _unused_mark(self, contents: Iterable[str]) -> str:
        taken = set("".join(contents)) | set(self._template.source)
        return next(c for c in map(chr, MARKS) if c not in taken)


class _Refused(Exception):
    """The template called `raise_exception`."""


class _TimeUp(Exception):
    """Raised from outside in a thread that renders for too long."""


class _Sandbox(ImmutableSandboxedEnvironment):
    """The sandbox, which also refuses to multiply texts into huge ones."""

    intercepted_binops = frozenset(["*", "**"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" or _product_size(left, right) > LARGEST_REPEAT:
            raise jinja2.exceptions.SecurityError(f"{operator} is not allowed on these values")
        return super().call_binop(context, operator, left, right)


def _product_size(left: Any, right: Any) -> int:
    """How long `left * right` is, if it repeats a text or list."""
    for repeated, times in ((left, right), (right, left)):
        if hasattr(repeated, "__len__") and isinstance(times, int):
            return len(repeated) * max(0, times)
    return 0


def _refuse(message: str) -> None:
    raise _Refused(str(message)[:300])


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **_: Any) -> str:
    """As model authors expect it: no HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


@contextmanager
def _time_cap(seconds: float) -> Iterator[None]:
    """Raises `_TimeUp` in this thread after `seconds` of Python code."""
    thread, lock, over = threading.get_ident(), threading.Lock(), False

    def interrupt() -> None:
        with lock:
            if not over:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(_TimeUp))

    timer = threading.Timer(seconds, interrupt)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        with lock:
            over = True
            timer.cancel()


def _check_runs(contents: Iterable[str], longest: int) -> None:
    for content in contents:
        if len(content) > longest:
            run = max(map(len, content.split()), default=0)
            if run > longest:
                raise BadRequest(f"A message has {run} characters without white space; at most {longest} are taken.")


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise BadRequest("A message holds a lone surrogate, which is no character.") from error


def _large_stack_pool() -> ThreadPoolExecutor:
    """All threads are started at once, while new threads get the large stack."""
    pool = ThreadPoolExecutor(THREADS, "encode")
    barrier = threading.Barrier(THREADS)
    before = threading.stack_size(STACK_BYTES)
    try:
        for started in [pool.submit(barrier.wait) for _ in range(THREADS)]:
            started.result()
    finally:
        threading.stack_size(before)
    return pool
