"""Holds an answer to a JSON schema: which tokens may come next. Compiled by llguidance, behind caps of our own.

Clients give schemas, never grammars. The caps (size, depth, alternatives, repetitions, patterns) come before compiling,
since a compiler's own limits end in seconds of work or in a crash. A token that the mask does not allow is never accepted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Protocol, cast

import numpy as np
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask
from numpy.typing import NDArray

from appliance.errors import BadRequest, InternalError

LARGEST = 65_536  # bytes of the schema as JSON
DEEPEST = 32
MOST_NODES = 5_000
MOST_ALTERNATIVES = 512  # of one anyOf, oneOf or enum
MOST_PROPERTIES = 256  # of one object
MOST_REPETITIONS = 10_000
LONGEST_PATTERN = 500
REPETITIONS = ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties")
ALTERNATIVES = ("anyOf", "oneOf", "allOf", "enum", "prefixItems")


class Vocabulary(Protocol):
    """What compiling needs of a model."""

    @property
    def n_tokens(self) -> int: ...
    @property
    def token_bytes(self) -> list[bytes]: ...
    @property
    def end_tokens(self) -> NDArray[np.int64]: ...
    @property
    def bos(self) -> int: ...
    def text(self, token: int) -> str: ...
    def tokenize(self, text: bytes, *, add_special: bool, parse_special: bool) -> list[int]: ...


class SchemaCompiler:
    """Compiles schemas for one vocabulary; the vocabulary's tables are built at the first use (about 1 s for 128,000 tokens)."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._tokenizer: LLTokenizer | None = None

    def compile(self, schema: dict[str, Any]) -> CompiledSchema:
        """Raises BadRequest for a schema that is invalid, unsupported or over a cap. Takes up to a second: use a thread."""
        check_caps(schema)
        if self._tokenizer is None:
            self._tokenizer = LLTokenizer(
                cast(TokenizerWrapper, _Tokens(self._vocabulary)), eos_token=self._vocabulary.end_tokens.tolist()
            )
        try:
            # Free white space would let a model write blanks until its tokens are used up.
            grammar = LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False})
        except ValueError as error:
            raise BadRequest(f"The JSON schema cannot be used: {_first_line(error)}") from error
        if problem := LLMatcher.validate_grammar(grammar, self._tokenizer):
            raise BadRequest(f"The JSON schema cannot be used: {_first_line(problem)}")
        return CompiledSchema(LLMatcher(self._tokenizer, grammar), self._vocabulary.n_tokens)


class CompiledSchema:
    """A schema that is ready to hold answers; `start` begins one."""

    def __init__(self, matcher: LLMatcher, n_tokens: int) -> None:
        if matcher.is_error():
            raise BadRequest(f"The JSON schema cannot be used: {_first_line(matcher.get_error())}")
        self._matcher = matcher
        self._n_tokens = n_tokens

    def start(self) -> Constraint:
        return Constraint(self._matcher.deep_copy(), self._n_tokens)


class Constraint:
    """The state of one choice: `mask` for the next token, then `accept` of the token that was drawn."""

    def __init__(self, matcher: LLMatcher, n_tokens: int) -> None:
        self._matcher = matcher
        self._n_tokens = n_tokens
        self._bits = allocate_token_bitmask(1, n_tokens)
        self._allowed: NDArray[np.bool_] | None = None

    def mask(self) -> NDArray[np.bool_]:
        """Which tokens may come next, shape (n_tokens,). Raises BadRequest when the schema got too complex to follow."""
        fill_next_token_bitmask(self._matcher, self._bits)
        self._check()
        bits = np.unpackbits(self._bits.view(np.uint8)[0], bitorder="little")
        self._allowed = bits[: self._n_tokens].view(np.bool_)
        return self._allowed

    def accept(self, token: int) -> None:
        """Moves on. Raises InternalError for a token that the last mask did not allow."""
        if self._allowed is None or not self._allowed[token]:
            raise InternalError("A token outside the schema was drawn.")
        self._allowed = None
        self._matcher.consume_token(token)
        self._check()

    @property
    def is_finished(self) -> bool:
        """Nothing but the end may follow."""
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise BadRequest(f"The JSON schema became too complex to follow: {_first_line(self._matcher.get_error())}")


class _Tokens:
    """The vocabulary as llguidance wants it; control tokens carry its 0xFF mark and are never allowed as text."""

    is_tokenizer_wrapper = True

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        pieces = vocabulary.token_bytes
        self.special_token_ids = [i for i, piece in enumerate(pieces) if not piece]
        self.tokens = [p or b"\xff" + vocabulary.text(i).encode() for i, p in enumerate(pieces)]
        self.eos_token_id = int(vocabulary.end_tokens[0])
        self.bos_token_id = vocabulary.bos if vocabulary.bos >= 0 else None

    def __call__(self, text: bytes | str) -> list[int]:
        data = text.encode() if isinstance(text, str) else text
        return self._vocabulary.tokenize(data, add_special=False, parse_special=False)


def check_caps(schema: Any) -> None:
    """Raises BadRequest, naming the place, for a schema that is larger than what is compiled here."""
    try:
        size = len(json.dumps(schema))
    except (ValueError, RecursionError) as error:
        raise BadRequest("The JSON schema is nested too deeply.") from error
    if size > LARGEST:
        raise BadRequest(f"The JSON schema has {size} bytes; at most {LARGEST} are taken.")
    for count, (path, depth, node) in enumerate(_nodes(schema)):
        if count >= MOST_NODES:
            raise BadRequest(f"The JSON schema has more than {MOST_NODES} parts.")
        if depth > DEEPEST:
            raise BadRequest(f"The JSON schema is nested deeper than {DEEPEST} levels at {path[:100]}.")
        if isinstance(node, dict):
            _check_node(path, node)


def _check_node(path: str, node: dict[str, Any]) -> None:
    for key in ALTERNATIVES:
        if isinstance(node.get(key), list) and len(node[key]) > MOST_ALTERNATIVES:
            raise BadRequest(f"{path}.{key} has {len(node[key])} entries; at most {MOST_ALTERNATIVES} are taken.")
    for key in REPETITIONS:
        value = node.get(key)
        if isinstance(value, (int, float)) and value > MOST_REPETITIONS:
            raise BadRequest(f"{path}.{key} is over {MOST_REPETITIONS}.")
    if isinstance(node.get("properties"), dict) and len(node["properties"]) > MOST_PROPERTIES:
        raise BadRequest(f"{path}.properties has {len(node['properties'])} names; at most {MOST_PROPERTIES} are taken.")
    if isinstance(node.get("pattern"), str) and len(node["pattern"]) > LONGEST_PATTERN:
        raise BadRequest(f"{path}.pattern is longer than {LONGEST_PATTERN} characters.")
    if isinstance(node.get("$ref"), str) and not node["$ref"].startswith("#"):
        raise BadRequest(f"{path}.$ref points outside the schema; only references that begin with # are followed.")


def _nodes(schema: Any) -> Iterator[tuple[str, int, Any]]:
    """Every object and list of the schema with its path and depth, without recursion."""
    stack = [("schema", 0, schema)]
    while stack:
        path, depth, node = stack.pop()
        yield path, depth, node
        if isinstance(node, dict):
            stack += [(f"{path}.{key}", depth + 1, v) for key, v in node.items() if isinstance(v, (dict, list))]
        elif isinstance(node, list):
            stack += [(f"{path}[{i}]", depth + 1, v) for i, v in enumerate(node) if isinstance(v, (dict, list))]


def _first_line(problem: object) -> str:
    return str(problem).strip().split("\n")[0][:300]
