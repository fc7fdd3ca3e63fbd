"""Holds an answer to a JSON schema: which tokens may come next. Compiled by llguidance, behind caps of our own.

Clients give schemas, never grammars. The caps come before compiling, since the compiler takes minutes for some small
schemas (a dozen intersected patterns, a large `multipleOf`) and ends the process on others (a thousand references in a
row). What it costs is bounded by walking the schema as the compiler would, through its references. A token that the
mask does not allow is never accepted.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Protocol, cast
from urllib.parse import unquote

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask
from numpy.typing import NDArray

from appliance.errors import BadRequest, InternalError

LARGEST = 65_536  # bytes of the schema as JSON
DEEPEST = 32  # as written
DEEPEST_EXPANDED = 128  # with every reference followed once; the compiler's stack ends at about a thousand
MOST_ALTERNATIVES = 512  # of one anyOf, oneOf or enum
MOST_DISTINCT = 64  # of one oneOf, whose alternatives are compared pair by pair
MOST_COMBINATIONS = 256  # of alternatives that are combined with each other
MOST_PROPERTIES = 256  # of one object
MOST_PROPERTY_PATTERNS = 32  # of one object; compared pair by pair
MOST_REPETITIONS = 10_000
LONGEST_PATTERN = 500  # characters
LONGEST_FORCED = 256  # characters without choice that are tokenised at once; only the first token counts
MOST_INTERSECTED = 10  # patterns, formats and lengths that one string must satisfy at once; each doubles the work
LARGEST_MULTIPLE = 10_000  # of `multipleOf`, decimals scaled to an integer; the automaton has that many states
MULTIPLE_COST = 6  # in intersected patterns: two of them never meet

# Blanks after comma and colon are the model's choice; free ones would let it write blanks until its tokens are used up.
JSON_STYLE: Any = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
STEP_LIMITS = LLParserLimits(
    step_lexer_fuel=100_000,  # 14,000 per ms
    step_max_items=50_000,  # 20,000 per ms
    max_lexer_states=20_000,  # up to 2 kB each
    max_grammar_size=100_000,
    verbose_errors=False,
)

MAX_LENGTHS = {
    "anyOf": MOST_ALTERNATIVES,
    "oneOf": MOST_DISTINCT,
    "allOf": MOST_ALTERNATIVES,
    "enum": MOST_ALTERNATIVES,
    "type": MOST_ALTERNATIVES,
    "prefixItems": MOST_ALTERNATIVES,
    "items": MOST_ALTERNATIVES,
    "properties": MOST_PROPERTIES,
    "required": MOST_PROPERTIES,
    "patternProperties": MOST_PROPERTY_PATTERNS,
}
REPETITIONS = ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties")
COMPLAINTS = {
    "Unable to determine if regex is empty": "its patterns and lengths are too complex to be combined.",
    "lexer error: too many": "its patterns are too complex.",
    "initial lexer configuration": "its patterns and constants are too large.",
    "Parser Error: Current row has": "too many of its alternatives may begin at the same place.",
    "NoExtensionBias": "no JSON fits it.",
}
DATA = {"const", "enum", "default", "example", "examples"}  # values, not schemas
DEFINITIONS = {"$defs", "definitions"}  # schemas that count where they are referred to
MAPS = ("properties", "patternProperties")
UNSUPPORTED = ("$id", "$anchor", "$dynamicRef", "$dynamicAnchor", "$recursiveRef", "x-guidance")


class Vocabulary(Protocol):
    """What compiling needs of a model."""

    @property
    def n_tokens(self) -> int: ...
    @property
    def token_bytes(self) -> Sequence[bytes]: ...
    @property
    def end_tokens(self) -> NDArray[np.int64]: ...
    @property
    def bos(self) -> int: ...
    def text(self, token: int) -> str: ...
    def tokenize(self, text: bytes, *, add_special: bool, parse_special: bool) -> list[int]: ...


class SchemaCompiler:
    """Compiles schemas for one vocabulary, whose tables are built at the first use (0.3 s for 128,000 tokens)."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._tables: LLTokenizer | None = None
        self._building = threading.Lock()

    def compile(self, schema: Any) -> CompiledSchema:
        """Raises BadRequest for a schema that is invalid, unsupported or over a cap. Up to a second: use a thread."""
        check_caps(schema)
        if not len(self._vocabulary.end_tokens):
            raise BadRequest("This model has no end token and cannot be held to a JSON schema.")
        with self._building:
            if self._tables is None:
                tokens = cast(TokenizerWrapper, _Tokens(self._vocabulary))
                ends = self._vocabulary.end_tokens.tolist()
                self._tables = LLTokenizer(tokens, eos_token=ends, slices=LLTokenizer.json_slices())
        try:
            grammar = LLMatcher.grammar_from_json_schema(schema, overrides=JSON_STYLE)
            matcher = LLMatcher(self._tables, grammar, log_level=0, limits=STEP_LIMITS)
        except ValueError as error:
            raise _unusable(error) from error
        compiled = CompiledSchema(matcher, self._vocabulary.n_tokens)
        compiled.start().mask()  # some schemas, such as one that is nothing but itself, fail only here
        return compiled


class CompiledSchema:
    """A schema that is ready to hold answers; `start` begins one."""

    def __init__(self, matcher: LLMatcher, n_tokens: int) -> None:
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
        """Which tokens may come next, shape (n_tokens,). BadRequest where the schema grows too complex to follow."""
        self._check()
        fill_next_token_bitmask(self._matcher, self._bits)
        self._check()
        bits = np.unpackbits(self._bits.view(np.uint8)[0], bitorder="little")
        self._allowed = bits[: self._n_tokens].view(np.bool_)
        return self._allowed

    def accept(self, token: int) -> None:
        """Moves on. Raises InternalError for a token that the last mask did not allow, and changes nothing then."""
        if self._allowed is None or not 0 <= token < self._n_tokens or not self._allowed[token]:
            raise InternalError("A token outside the schema was drawn.")
        self._allowed = None
        self._matcher.consume_token(token)
        self._check()

    @property
    def is_finished(self) -> bool:
        """Nothing but the end may follow."""
        return bool(self._matcher.is_stopped())

    def clone(self) -> Constraint:
        """Another constraint in the same state, which goes its own way from here."""
        return Constraint(self._matcher.deep_copy(), self._n_tokens)

    def _check(self) -> None:
        if self._matcher.is_error():
            raise _unusable(self._matcher.get_error())


class _Tokens:
    """The vocabulary as llguidance wants it; control tokens carry its 0xFF mark and are never allowed as text."""

    is_tokenizer_wrapper = True

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        ends = set(vocabulary.end_tokens.tolist())
        self.tokens = [b"" if i in ends else _unmarked(piece) for i, piece in enumerate(vocabulary.token_bytes)]
        self.special_token_ids = [i for i, piece in enumerate(self.tokens) if not piece]
        self._ids = {piece: i for i, piece in enumerate(self.tokens) if piece}
        self._longest = max(map(len, self._ids), default=0)
        for i in self.special_token_ids:
            self.tokens[i] = b"\xff<%d>" % i  # not its own text, which may be empty or another's
        self.eos_token_id = min(ends)
        self.bos_token_id = vocabulary.bos if vocabulary.bos >= 0 else None

    def __call__(self, text: bytes | str) -> list[int]:
        """How `text`, about which a schema leaves no choice, begins in tokens: the model's own if they are just that.

        Called for every token, on the thread that draws them, which has a common stack: hence only the beginning.
        """
        if isinstance(text, bytes):
            text = text.decode("utf-8", "surrogateescape")
        data = text[:LONGEST_FORCED].encode("utf-8", "surrogateescape")
        try:
            data.decode()
        except UnicodeDecodeError:  # a character is cut
            return self._greedy(data)
        tokens = self._vocabulary.tokenize(data, add_special=False, parse_special=False)
        whole = b"".join(self._vocabulary.token_bytes[t] for t in tokens) == data
        return tokens if whole else self._greedy(data)  # some vocabularies begin every text with a space

    def _greedy(self, data: bytes) -> list[int]:
        """The longest token at each place, as far as there is one."""
        tokens: list[int] = []
        while data:
            size = next((n for n in range(min(self._longest, len(data)), 0, -1) if data[:n] in self._ids), 0)
            if not size:
                break
            tokens.append(self._ids[data[:size]])
            data = data[size:]
        return tokens


def _unmarked(piece: bytes) -> bytes:
    """Nothing for what begins with the mark: no UTF-8 text holds that byte, so no answer loses anything."""
    return b"" if piece.startswith(b"\xff") else piece


def check_caps(schema: Any) -> None:
    """Raises BadRequest, naming the place, for a schema that may cost more than is given here."""
    if not isinstance(schema, dict):
        raise BadRequest("The JSON schema must be an object.")
    _check_depth(schema)
    try:
        size = len(json.dumps(schema, ensure_ascii=False, allow_nan=False).encode())
    except (TypeError, ValueError) as error:
        raise BadRequest("The JSON schema holds a value that is no JSON, or a lone surrogate.") from error
    if size > LARGEST:
        raise BadRequest(f"The JSON schema has {size} bytes; at most {LARGEST} are taken.")
    if "draft-03" in str(schema.get("$schema")) or "draft-04" in str(schema.get("$schema")):
        raise BadRequest("schema.$schema: drafts before 6 are not supported.")
    _Costs(schema).of(schema, "schema", 0)


def _check_depth(schema: Any) -> None:
    """Without recursion: what comes here may be nested as deep as a body allows."""
    level: list[Any] = [schema]
    for _ in range(DEEPEST + 1):
        children = (node.values() if isinstance(node, dict) else node for node in level)
        level = [value for group in children for value in group if isinstance(value, (dict, list))]
        if not level:
            return
    raise BadRequest(f"The JSON schema is nested deeper than {DEEPEST} levels.")


@dataclass(frozen=True, slots=True)
class _Cost:
    """What compiling a schema costs at most when it is combined with others."""

    intersected: int = 0  # lexical constraints that may meet at one place
    branches: int = 1  # alternatives
    height: int = 0  # levels below, references followed


class _Costs:
    """Walks a schema through its references, counting each reference's target once."""

    def __init__(self, root: dict[str, Any]) -> None:
        self._root = root
        self._targets: dict[str, _Cost] = {}

    def of(self, node: Any, path: str, depth: int) -> _Cost:
        """The cost of `node`. Raises BadRequest where a cap is exceeded."""
        if depth > DEEPEST_EXPANDED:
            raise BadRequest(
                f"The JSON schema's references nest deeper than {DEEPEST_EXPANDED} levels at {_short(path)}."
            )
        if not isinstance(node, dict):
            return _Cost()
        _check_node(node, path, is_root=node is self._root)
        together = [self.of(n, p, depth + 1) for p, n in _listed(node, path, ("allOf",))]
        if "$ref" in node:
            together.append(self._referred(node["$ref"], path, depth + 1))
        for key in ("anyOf", "oneOf"):
            together += self._either(_listed(node, path, (key,)), depth)
        for key in MAPS:
            together += self._either_place(_mapped(node, path, key), depth)
        together += self._either_place(_others(node, path), depth)
        return _combined(together, _own_intersections(node), path)

    def _either(self, nodes: Iterable[tuple[str, Any]], depth: int) -> list[_Cost]:
        """One of several alternatives holds."""
        costs = [self.of(n, p, depth + 1) for p, n in nodes]
        if not costs:
            return []
        tallest, most = max(c.height for c in costs), max(c.intersected for c in costs)
        return [_Cost(most, sum(c.branches for c in costs), tallest)]

    def _either_place(self, nodes: Iterable[tuple[str, Any]], depth: int) -> list[_Cost]:
        """Schemas of different places, which do not meet each other."""
        costs = [self.of(n, p, depth + 1) for p, n in nodes]
        if not costs:
            return []
        return [
            _Cost(
                *(max(values) for values in zip(*((c.intersected, c.branches, c.height) for c in costs), strict=True))
            )
        ]

    def _referred(self, reference: Any, path: str, depth: int) -> _Cost:
        if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
            raise BadRequest(
                f"{_short(path)}.$ref is {_short(repr(reference))}; only references such as #/$defs/name are followed."
            )
        if reference not in self._targets:
            self._targets[reference] = _Cost()  # within itself, a reference adds nothing new
            self._targets[reference] = self.of(self._target(reference, path), reference, depth)
        cost = self._targets[reference]
        if depth + cost.height > DEEPEST_EXPANDED:
            raise BadRequest(
                f"The JSON schema's references nest deeper than {DEEPEST_EXPANDED} levels at {_short(path)}."
            )
        return cost

    def _target(self, reference: str, path: str) -> Any:
        node: Any = self._root
        for step in reference.split("/")[1:]:
            name = unquote(step).replace("~1", "/").replace("~0", "~")
            try:
                node = node[int(name)] if isinstance(node, list) else node[name]
            except (KeyError, IndexError, ValueError, TypeError) as error:
                raise BadRequest(f"{_short(path)}.$ref points to {_short(reference)}, which is not there.") from error
        return node


def _combined(together: list[_Cost], own: int, path: str) -> _Cost:
    """The cost of a node whose parts all hold at once."""
    branches = math.prod(c.branches for c in together)
    if branches > MOST_COMBINATIONS and sum(c.branches > 1 for c in together) > 1:
        raise BadRequest(
            f"{_short(path)} combines {_about(branches)} alternatives; at most {MOST_COMBINATIONS} are taken."
        )
    intersected = own + sum(c.intersected for c in together)
    if intersected > MOST_INTERSECTED:
        raise BadRequest(
            f"{_short(path)} combines too many of pattern, format, minLength, maxLength and multipleOf: "
            f"{_about(intersected)}, where {MOST_INTERSECTED} are taken and a multipleOf counts as {MULTIPLE_COST}."
        )
    return _Cost(intersected, branches, 1 + max((c.height for c in together), default=0))


def _own_intersections(node: Mapping[str, Any]) -> int:
    lengths = "minLength" in node or "maxLength" in node
    return ("pattern" in node) + ("format" in node) + lengths + MULTIPLE_COST * ("multipleOf" in node)


def _listed(node: Mapping[str, Any], path: str, keys: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """The schemas in a list, with their paths; one that is not in a list counts as one."""
    for key in keys:
        value = node.get(key)
        if isinstance(value, list):
            yield from ((f"{path}.{key}[{i}]", item) for i, item in enumerate(value))
        elif isinstance(value, dict):
            yield f"{path}.{key}", value


def _mapped(node: Mapping[str, Any], path: str, key: str) -> Iterator[tuple[str, Any]]:
    value = node.get(key)
    if isinstance(value, dict):
        yield from ((f"{path}.{key}.{name}", item) for name, item in value.items())


def _others(node: Mapping[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    """Everything else that may be a schema, whether or not the compiler knows the keyword."""
    known = DATA | DEFINITIONS | {"allOf", "anyOf", "oneOf", "$ref", *MAPS}
    return _listed(node, path, (key for key in node if key not in known))


def _check_node(node: Mapping[str, Any], path: str, *, is_root: bool) -> None:
    for key in UNSUPPORTED:
        if isinstance(node.get(key), (str, dict)) and not (is_root and key == "$id"):
            raise BadRequest(f"{_short(path)}.{key} is not supported.")
    for key, most in MAX_LENGTHS.items():
        value = node.get(key)
        if isinstance(value, (list, dict)) and (key != "items" or isinstance(value, list)) and len(value) > most:
            raise BadRequest(f"{_short(path)}.{key} has {len(value)} entries; at most {most} are taken.")
    for key in REPETITIONS:
        value = node.get(key)
        if isinstance(value, (int, float)) and value > MOST_REPETITIONS:
            raise BadRequest(f"{_short(path)}.{key} is over {MOST_REPETITIONS}.")
    named = node.get("patternProperties")
    for pattern in (node.get("pattern"), *(named if isinstance(named, dict) else ())):
        if isinstance(pattern, str) and len(pattern) > LONGEST_PATTERN:
            raise BadRequest(
                f"{_short(path)} has a pattern of {len(pattern)} characters; at most {LONGEST_PATTERN} are taken."
            )
    multiple = node.get("multipleOf")
    if isinstance(multiple, (int, float)) and not isinstance(multiple, bool) and _scaled(multiple) > LARGEST_MULTIPLE:
        raise BadRequest(f"{_short(path)}.multipleOf is over {LARGEST_MULTIPLE}, or has too many digits.")


def _scaled(number: float) -> int:
    """The digits of `number` without its decimal point: 750 for 7.5e2, 73 for 0.00073."""
    value = abs(Decimal(str(number)))
    exponent = value.as_tuple().exponent
    return int(value.scaleb(-exponent)) if isinstance(exponent, int) and exponent < 0 else int(value)


def _short(path: str) -> str:
    return path if len(path) <= 100 else f"{path[:60]}…{path[-30:]}"


def _about(number: int) -> str:
    return str(number) if number < 10**6 else "over a million"


def _unusable(problem: object) -> BadRequest:
    """The compiler's complaint as a sentence; some of them print the whole expression."""
    lines = [line.strip() for line in str(problem).replace("<non-verbose/>", "").strip().split("\n")]
    said = next((ours for theirs, ours in COMPLAINTS.items() if lines[0].startswith(theirs)), lines[0])
    if said.endswith(":") and len(lines) > 1:
        said = f"{said} {lines[-1].removeprefix('error: ')}"
    return BadRequest(f"The JSON schema cannot be used: {said[:200]}")
