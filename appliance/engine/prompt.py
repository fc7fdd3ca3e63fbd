"""From messages to prompt tokens: control tokens stay the template's own, whatever a user's text spells.

Where a message spells a control token, a mark (a character that occurs nowhere else) is put one character into the
spelling. The rendered prompt is tokenised piece by piece between the marks, so that no piece holds a spelling of the
user's. A conversation without such spellings is tokenised whole, as the model was trained. Owns the threads on which
all of this runs; rendering is `template.py`. Knows no requests, limits of accounts or cells.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, pairwise
from os.path import commonprefix
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from appliance.engine.prefixes import common_prefix
from appliance.engine.template import ChatTemplate as ChatTemplate
from appliance.engine.template import TokenTexts
from appliance.errors import ApplianceError, BadRequest, Draining, InternalError, OperatorError, PromptTooLong
from appliance.messages import Message

STACK_BYTES = 512 * 2**20  # some vocabularies recurse once per character of a long run (address space, not memory)
THREADS = 4
# llama.cpp's time grows with the square of the control tokens in a text, and with some vocabularies its stack with its
# characters: longer texts are tokenised in parts. A part ends with a word, or, where none ends for long, anywhere.
LONG_PART, LONGEST_PART = 8_192, 16_384  # characters
WORD_END = re.compile(r"(?<=[^\W\d_])(?=\s)")
MARKS = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))  # private use

T = TypeVar("T")
_stack_size_lock = threading.Lock()  # threading.stack_size is the process's


class Vocabulary(TokenTexts, Protocol):
    """What encoding needs of a model; `token_bytes` are those of generated text, empty for control tokens."""

    @property
    def token_bytes(self) -> Sequence[bytes]: ...
    @property
    def add_bos(self) -> bool: ...
    @property
    def longest_piece(self) -> int: ...
    def tokenize(self, text: bytes, *, add_special: bool, parse_special: bool) -> list[int]: ...


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """Token ids, int32 of shape (n,); the first `own_prefix_tokens` come of the appliance's own messages."""

    tokens: NDArray[np.int32]
    own_prefix_tokens: int = 0


@dataclass(frozen=True, slots=True)
class _Limits:
    """What is refused before tokenising, which costs time and stack."""

    context: int  # tokens
    longest_run: int  # characters

    def check_least(self, tokens: int) -> None:
        """`tokens` is a lower bound."""
        if tokens > self.context:
            raise PromptTooLong(tokens, self.context, at_least=True)

    def check_run(self, name: str, text: str) -> None:
        run = longest_run(text) if len(text) > self.longest_run else 0
        if run > self.longest_run:
            raise BadRequest(
                f"{name} has {run} characters in a row without white space, or of nothing else; "
                f"at most {self.longest_run} are taken."
            )


class PromptEncoder:
    """Encodes conversations on threads of its own, which have the stack that long runs of one character need."""

    def __init__(self, template: ChatTemplate, vocabulary: Vocabulary) -> None:
        self._template = template
        self._vocabulary = vocabulary
        self._spellings = Spellings(vocabulary.special_texts)
        self._bos_text = vocabulary.text(vocabulary.bos)
        self._pool = _large_stack_pool()
        self._adds_space = self._pool.submit(self._finds_added_space).result()

    def close(self) -> None:
        """Drops what waits and ends the threads; safe to call twice."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def encode(
        self, messages: Sequence[Message], *, context_tokens: int, longest_run: int, own_prefix: int = 0
    ) -> Future[EncodedPrompt]:
        """The prompt of `messages`; fails with BadRequest, or PromptTooLong beyond `context_tokens`.

        `longest_run` is in characters; `own_prefix` leading messages are the appliance's own. Draining after `close`.
        """
        return self._submit(self._encode, tuple(messages), _Limits(context_tokens, longest_run), own_prefix)

    def encode_plain(
        self, prompt: str | Sequence[int], *, context_tokens: int, longest_run: int
    ) -> Future[EncodedPrompt]:
        """A text or tokens to be continued as they are; fails as `encode`."""
        return self._submit(self._encode_plain, prompt, _Limits(context_tokens, longest_run))

    def _submit(self, encode: Callable[..., EncodedPrompt], *about: Any) -> Future[EncodedPrompt]:
        try:
            return self._pool.submit(encode, *about)
        except RuntimeError as error:
            raise Draining("The model is being unloaded and takes no new requests.", retry_after=5) from error

    def _encode_plain(self, prompt: str | Sequence[int], limits: _Limits) -> EncodedPrompt:
        tokens = self._plain(prompt, limits) if isinstance(prompt, str) else self._checked(prompt)
        if not tokens:
            raise BadRequest("The prompt is empty, and this model begins no text by itself.", param="prompt")
        if len(tokens) > limits.context:
            raise PromptTooLong(len(tokens), limits.context)
        return EncodedPrompt(np.array(tokens, np.int32))

    def _plain(self, text: str, limits: _Limits) -> list[int]:
        """Control tokens that the text spells are text here, too."""
        try:
            limits.check_least(-(-len(text.encode()) // self._vocabulary.longest_piece))
        except UnicodeEncodeError as error:
            raise BadRequest("prompt holds a lone surrogate, which is no character.", param="prompt") from error
        limits.check_run("prompt", text)
        tokens = [self._vocabulary.bos] if self._vocabulary.add_bos else []
        for part in self._parts(text) if text else ():
            tokens += self._vocabulary.tokenize(part.encode(), add_special=False, parse_special=False)
        return tokens

    def _checked(self, tokens: Sequence[int]) -> Sequence[int]:
        known = len(self._vocabulary.token_bytes)
        if any(not 0 <= token < known for token in tokens):
            raise BadRequest(
                f"prompt holds a number that is no token: this model has 0 to {known - 1}.", param="prompt"
            )
        return tokens

    def _encode(self, messages: tuple[Message, ...], limits: _Limits, own_prefix: int) -> EncodedPrompt:
        limits.check_least(-(-_count_bytes(messages) // self._vocabulary.longest_piece))
        for i, message in enumerate(messages):
            limits.check_run(f"messages[{i}].content", message.content)
        try:
            tokens = self._tokens(messages, limits)
            if len(tokens) > limits.context:
                raise PromptTooLong(len(tokens), limits.context)
            return EncodedPrompt(tokens, self._own_prefix(messages[:own_prefix], tokens, limits))
        except ApplianceError:
            raise
        except Exception as error:
            raise InternalError("The prompt could not be encoded.") from error

    def _own_prefix(self, own: tuple[Message, ...], tokens: NDArray[np.int32], limits: _Limits) -> int:
        """How many leading `tokens` the appliance's own messages alone would have, too."""
        if not own:
            return 0
        try:
            return common_prefix(self._tokens(own, limits, add_generation_prompt=False), tokens)
        except BadRequest:  # the template takes no conversation that ends here: nothing is shared
            return 0

    def _tokens(
        self, messages: Sequence[Message], limits: _Limits, *, add_generation_prompt: bool = True
    ) -> NDArray[np.int32]:
        pieces = self._pieces(messages, add_generation_prompt)
        limits.check_least(len(pieces))
        own_bos = bool(self._bos_text) and pieces[0].startswith(self._bos_text)
        tokens = [self._vocabulary.bos] if self._vocabulary.add_bos and not own_bos else []
        for i, part in enumerate(part for piece in pieces for part in self._parts(piece)):
            tokens += self._tokenize_rest(part) if i and self._adds_space else self._tokenize(part)
        return np.array(tokens, np.int32)

    def _pieces(self, messages: Sequence[Message], add_generation_prompt: bool) -> list[str]:
        """The rendered prompt, cut inside every control token that a message spells."""
        render = self._template.render
        cuts = [self._spellings.cuts(m.content) for m in messages]
        if not any(inner or edges for inner, edges in cuts):
            return [render(messages, add_generation_prompt=add_generation_prompt)]
        inner_mark, edge_mark = _unused_marks([*(m.content for m in messages), self._template.source])
        marked = [
            Message(m.role, _insert(m.content, dict.fromkeys(edges, edge_mark) | dict.fromkeys(inner, inner_mark)))
            for m, (inner, edges) in zip(messages, cuts, strict=True)
        ]
        rendered = render(marked, add_generation_prompt=add_generation_prompt)
        return self._cut(rendered, inner_mark, edge_mark)

    def _cut(self, rendered: str, inner_mark: str, edge_mark: str) -> list[str]:
        text = rendered.replace(inner_mark, "").replace(edge_mark, "")
        places = {0, len(text)}
        for passed, mark in enumerate(re.finditer(f"[{inner_mark}{edge_mark}]", rendered)):
            place = mark.start() - passed
            if mark[0] == inner_mark or self._spellings.crosses(text, place):
                places.add(place)
        return [text[a:b] for a, b in pairwise(sorted(places))] or [""]

    def _parts(self, piece: str) -> Iterator[str]:
        """`piece` in parts that cost little time and stack each, cut where every tokeniser would, too."""
        begin = 0
        while len(piece) - begin > LONG_PART:
            places = (m.start() for m in WORD_END.finditer(piece, begin + LONG_PART, begin + LONGEST_PART))
            anywhere = range(begin + LONGEST_PART, begin + LONG_PART, -1)
            end = next(p for p in chain(places, anywhere) if not self._spellings.crosses(piece, p))
            yield piece[begin:end]
            begin = end
        yield piece[begin:]

    def _tokenize(self, piece: str) -> list[int]:
        special = piece not in self._spellings.single
        return self._vocabulary.tokenize(piece.encode(), add_special=False, parse_special=special)

    def _tokenize_rest(self, piece: str) -> list[int]:
        """A piece that continues a text, for a vocabulary that begins every text with a space."""
        for before in ("\n", "\t", "|"):
            lead, both = self._tokenize(before), self._tokenize(before + piece)
            if both[: len(lead)] == lead:
                return both[len(lead) :]
        return self._tokenize(piece)

    def _finds_added_space(self) -> bool:
        tokens = self._vocabulary.tokenize(b"a", add_special=False, parse_special=False)
        return b"".join(self._vocabulary.token_bytes[t] for t in tokens).startswith(b" ")


class Spellings:
    """Finds control tokens' texts, and their beginnings and ends, in other texts."""

    def __init__(self, special_texts: Iterable[str]) -> None:
        texts = {t for t in special_texts if t}
        self.single = {t for t in texts if len(t) == 1}
        self._texts = tuple(sorted(texts - self.single))
        self._starts = {t[:i] for t in self._texts for i in range(1, len(t))}
        self._ends = {t[i:] for t in self._texts for i in range(1, len(t))}
        self._longest = max(map(len, self._texts), default=1)
        self._finder = re.compile(f"(?={_any_of(texts)})", re.DOTALL) if texts else None

    def cuts(self, content: str) -> tuple[set[int], set[int]]:
        """Where to cut `content`: inside control tokens that it spells, and where it may complete a neighbour's.

        The edges are those of the content without white space around it, which templates like to strip.
        """
        inner: set[int] = set()
        for match in self._finder.finditer(content) if self._finder else ():
            inner.add(match.start() + 1)
            if content[match.start()] in self.single:
                inner.add(match.start())
        edges = set()
        begin, end = len(content) - len(content.lstrip()), len(content.rstrip())
        if any(content[begin : begin + i] in self._ends for i in range(1, self._longest)):
            edges.add(begin)
        if any(content[max(0, end - i) : end] in self._starts for i in range(1, self._longest)):
            edges.add(end)
        if 0 < end - begin < self._longest and any(content[begin:end] in t for t in self._texts):
            edges |= {begin, end}
        return inner, edges - inner

    def crosses(self, text: str, place: int) -> bool:
        """Whether a control token's text begins before `place` and ends after it."""
        for begin in range(max(0, place - self._longest + 1), place):
            head = text[begin:place]
            if head in self._starts and any(t.startswith(head) and text.startswith(t, begin) for t in self._texts):
                return True
        return False


def _any_of(texts: set[str]) -> str:
    """A pattern that matches where one of `texts` begins: a tree, since hundreds would be tried one after the other."""
    common = commonprefix(sorted(texts))
    if common in texts:
        return re.escape(common)  # longer ones begin at the same place
    tails: dict[str, set[str]] = {}
    for text in texts:
        tails.setdefault(text[len(common)], set()).add(text[len(common) :])
    return f"{re.escape(common)}(?:{'|'.join(_any_of(group) for _, group in sorted(tails.items()))})"


def _insert(content: str, marks: dict[int, str]) -> str:
    places = sorted(marks)
    parts = (content[a:b] for a, b in pairwise([0, *places, len(content)]))
    return "".join(part + mark for part, mark in zip(parts, [*(marks[p] for p in places), ""], strict=True))


def _unused_marks(texts: Sequence[str]) -> tuple[str, str]:
    """Two private-use characters that occur in none of `texts`."""
    taken = set().union(*texts)
    free = (c for block in MARKS for c in map(chr, block) if c not in taken)
    try:
        return next(free), next(free)
    except StopIteration:
        raise BadRequest("The messages use every private-use character, and spell control tokens too.") from None


def _count_bytes(messages: Sequence[Message]) -> int:
    total = 0
    for i, message in enumerate(messages):
        try:
            total += len(message.content.encode())
        except UnicodeEncodeError as error:
            raise BadRequest(f"messages[{i}].content holds a lone surrogate, which is no character.") from error
    return total


def longest_run(text: str) -> int:
    """Characters of the longest stretch without white space, or of white space."""
    words = max(map(len, text.split()), default=0)
    return max(words, max((m.end() - m.start() for m in re.finditer(r"\s{2,}", text)), default=0))


def _large_stack_pool() -> ThreadPoolExecutor:
    """All threads are started at once, while new threads get the large stack."""
    pool = ThreadPoolExecutor(THREADS, "encode")
    barrier = threading.Barrier(THREADS)
    with _large_stacks():
        try:
            for started in [pool.submit(barrier.wait) for _ in range(THREADS)]:
                started.result()
        except RuntimeError:
            barrier.abort()
            raise
    return pool


@contextmanager
def _large_stacks() -> Iterator[None]:
    """Threads that start meanwhile get the large stack. (Others that start by chance: address space, not memory.)"""
    with _stack_size_lock:
        before = threading.stack_size(STACK_BYTES)
        try:
            yield
        except RuntimeError as error:
            raise OperatorError(
                f"A thread with a stack of {STACK_BYTES >> 20} MB cannot be started: {error}. Is address space limited?"
            ) from error
        finally:
            threading.stack_size(before)
