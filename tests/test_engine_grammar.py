"""Whatever a sampler draws under a constraint is JSON of the schema; hostile schemas get a sentence, and fast."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from appliance.config import EngineSettings
from appliance.engine import grammar
from appliance.engine.grammar import Constraint, SchemaCompiler
from appliance.engine.model import Model
from appliance.errors import BadRequest, InternalError

Schema = dict[str, Any]
CLOSERS = [b'"', b"x", b"}", b"]", b",", b"0"]


@pytest.fixture(scope="module")
def tiny(tiny_gguf: Path) -> Iterator[Model]:
    model = Model(tiny_gguf, EngineSettings())
    yield model
    model.close()


@pytest.fixture(scope="module")
def compiler(tiny: Model) -> SchemaCompiler:
    return SchemaCompiler(tiny)


# ── a random sampler always writes JSON of the schema ────────────────────────────────────────────────────────────


def drawn(constraint: Constraint, model: Model, seed: int, wild: int = 60) -> bytes:
    """What a random sampler writes: anything allowed for `wild` tokens, then what brings the end nearest."""
    chance, ends, written = random.Random(seed), set(model.end_tokens.tolist()), b""
    for step in range(3_000):
        if constraint.is_finished:
            return written
        allowed = np.flatnonzero(constraint.mask())
        assert len(allowed)
        token = int(chance.choice(allowed)) if step < wild else closing(allowed.tolist(), ends, model, chance)
        constraint.accept(token)
        if token in ends:
            return written
        assert model.token_bytes[token], "a control token was allowed"
        written += model.token_bytes[token]
    raise AssertionError(f"no end after {written[-200:]!r}")


def closing(allowed: list[int], ends: set[int], model: Model, chance: random.Random) -> int:
    if ending := ends & set(allowed):
        return min(ending)
    for closer in CLOSERS:
        if found := [t for t in allowed if model.token_bytes[t] == closer]:
            return found[0]
    return chance.choice(allowed)


def fits(value: Any, schema: Schema, root: Schema) -> bool:
    """Whether `value` is valid; knows the keywords that the schemas below use, and fails on others."""
    if "$ref" in schema:
        return fits(value, root["$defs"][schema["$ref"].rsplit("/", 1)[1]], root)
    if "anyOf" in schema:
        return any(fits(value, s, root) for s in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        options = schema.get("enum", [schema.get("const")])
        return any(json.dumps(value) == json.dumps(o) for o in options)
    return bool(CHECKS[schema["type"]](value, schema, root))


def fits_object(value: Any, schema: Schema, root: Schema) -> bool:
    names: Schema = schema["properties"]
    return (
        isinstance(value, dict)
        and set(schema.get("required", ())) <= set(value) <= set(names)
        and all(fits(v, names[k], root) for k, v in value.items())
    )


CHECKS = {
    "null": lambda v, s, r: v is None,
    "boolean": lambda v, s, r: isinstance(v, bool),
    "integer": lambda v, s, r: type(v) is int and s.get("minimum", v) <= v <= s.get("maximum", v),
    "number": lambda v, s, r: type(v) in (int, float) and s.get("minimum", v) <= v <= s.get("maximum", v),
    "string": lambda v, s, r: (
        isinstance(v, str)
        and s.get("minLength", 0) <= len(v) <= s.get("maxLength", 10**9)
        and re.search(s.get("pattern", ""), v) is not None
    ),
    "array": lambda v, s, r: (
        isinstance(v, list)
        and s.get("minItems", 0) <= len(v) <= s.get("maxItems", 10**9)
        and all(fits(i, s["items"], r) for i in v)
    ),
    "object": fits_object,
}

NAMES = st.sampled_from(["name", "größe", 'a "quoted" one', "x", ""])
RANGES = st.tuples(st.integers(-500, 500), st.integers(0, 500)).map(lambda r: {"minimum": r[0], "maximum": r[0] + r[1]})
LENGTHS = st.tuples(st.integers(0, 4), st.integers(0, 9)).map(lambda r: (r[0], r[0] + r[1]))
LEAVES = st.one_of(
    st.sampled_from([{"type": "null"}, {"type": "boolean"}, {"type": "integer"}, {"type": "number"}]),
    RANGES.map(lambda r: {"type": "integer"} | r),
    RANGES.map(lambda r: {"type": "number"} | r),
    LENGTHS.map(lambda r: {"type": "string", "minLength": r[0], "maxLength": r[1]}),
    st.sampled_from(["^[a-z]+$", "^(ja|nein)$", "x", r"^\d{4}-\d{2}$"]).map(lambda p: {"type": "string", "pattern": p}),
    st.lists(st.sampled_from(["a", "b\n", "🙂", 1, 2.5, None, True, {"k": [1]}]), min_size=1, unique_by=json.dumps).map(
        lambda options: {"enum": options}
    ),
    st.just({"const": {"a": ["ä", None]}}),
    st.just({"$ref": "#/$defs/tree"}),
)
TREE: Schema = {
    "type": "object",
    "properties": {"v": {"type": "integer"}, "c": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2}},
    "required": ["v"],
    "additionalProperties": False,
}


def containers(inner: st.SearchStrategy[Schema]) -> st.SearchStrategy[Schema]:
    def as_object(parts: dict[str, Schema], mandatory: int) -> Schema:
        required = list(parts)[:mandatory]
        return {"type": "object", "properties": parts, "required": required, "additionalProperties": False}

    return st.one_of(
        st.builds(as_object, st.dictionaries(NAMES, inner, max_size=4), st.integers(0, 4)),
        st.builds(
            lambda i, r: {"type": "array", "items": i, "minItems": r[0], "maxItems": r[1]},
            inner,
            LENGTHS,
        ),
        st.lists(inner, min_size=1, max_size=3).map(lambda options: {"anyOf": options}),
    )


SCHEMAS = st.recursive(LEAVES, containers, max_leaves=6)


@settings(deadline=None, max_examples=150)
@given(SCHEMAS, st.integers(0, 2**32))
def test_a_random_sampler_writes_json_of_the_schema(
    tiny: Model, compiler: SchemaCompiler, schema: Schema, seed: int
) -> None:
    root = schema | {"$defs": {"tree": TREE}}
    text = drawn(compiler.compile(root).start(), tiny, seed).decode()
    assert fits(json.loads(text), schema, root), text


def test_without_a_constraint_the_same_sampler_writes_no_json(tiny: Model) -> None:
    chance = random.Random(1)
    text = b"".join(tiny.token_bytes[chance.randrange(tiny.n_tokens)] for _ in range(50))
    with pytest.raises(ValueError):
        json.loads(text)


def test_blanks_are_allowed_after_comma_and_colon_and_nowhere_else() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "integer"}}}, "required": ["a"]}
    compiled = SchemaCompiler(pieces()).compile(schema | {"additionalProperties": False})
    assert all(takes(compiled.start(), t) for t in (b'{"a":[1,2]}', b'{"a": [1, 2]}'))
    assert not any(takes(compiled.start(), t) for t in (b'{ "a":[1]}', b'{"a":  [1]}', b'{"a":[1] }', b"\n{"))


def takes(constraint: Constraint, tokens: Iterable[int]) -> bool:
    """Whether `tokens` are allowed one after the other; bytes are tokens of a vocabulary of bytes."""
    for token in tokens:
        if not constraint.mask()[token]:
            return False
        constraint.accept(token)
    return True


# ── a constraint's life ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_token_that_is_not_allowed_is_never_accepted(tiny: Model, compiler: SchemaCompiler) -> None:
    constraint = compiler.compile({"const": "ab"}).start()
    quote, wrong = tiny.token_bytes.index(b'"'), tiny.token_bytes.index(b"x")
    with pytest.raises(InternalError):
        constraint.accept(quote)  # before any mask
    before = constraint.mask().copy()
    for token in (wrong, -1, tiny.n_tokens, int(tiny.end_tokens[0])):
        with pytest.raises(InternalError):
            constraint.accept(token)
    assert (constraint.mask() == before).all()
    constraint.accept(quote)
    with pytest.raises(InternalError):
        constraint.accept(quote)  # a mask is good for one token


def test_the_end_is_allowed_only_where_the_json_is_complete(tiny: Model, compiler: SchemaCompiler) -> None:
    constraint = compiler.compile({"type": "integer"}).start()
    ends = tiny.end_tokens
    assert not constraint.mask()[ends].any()
    constraint.accept(tiny.token_bytes.index(b"7"))
    assert constraint.mask()[ends].all() and not constraint.is_finished  # more digits may come
    constraint.accept(int(ends[-1]))
    finished = compiler.compile({"enum": [True]}).start()
    assert takes(finished, tiny.tokenize(b"true", add_special=False, parse_special=False)) and finished.is_finished
    assert np.flatnonzero(finished.mask()).tolist() == sorted(ends.tolist())


def test_a_clone_goes_its_own_way() -> None:
    compiled = SchemaCompiler(pieces()).compile({"enum": ["ab", "ac"]})
    one = compiled.start()
    assert takes(one, b'"a')
    other = one.clone()
    assert takes(one, b'b"') and one.is_finished
    assert takes(other, b'c"') and not takes(compiled.start(), b"a")


@dataclass
class Pieces:
    """A vocabulary from a list of byte strings; its last tokens are control tokens, the very last one ends."""

    token_bytes: list[bytes]
    end_tokens: NDArray[np.int64]
    bos: int = -1
    adds_space: bool = False

    @property
    def n_tokens(self) -> int:
        return len(self.token_bytes)

    def text(self, token: int) -> str:
        return "<same>"

    def tokenize(self, text: bytes, *, add_special: bool, parse_special: bool) -> list[int]:
        assert len(text.decode()) <= grammar.LONGEST_FORCED  # llama.cpp may recurse once per character
        return [32, *text] if self.adds_space else list(text)


def pieces(*more: bytes, ends: int = 1) -> Pieces:
    tokens = [*(bytes([b]) for b in range(256)), *more, *[b""] * ends]
    return Pieces(tokens, np.arange(len(tokens) - ends, len(tokens)))


def test_odd_vocabularies_are_held_too() -> None:
    """Tokens that share their bytes, hold half a character, are an end that has bytes, or begin with 0xFF."""
    odd = pieces(b"12", b"12", b"\xc3", b"\xff<1>", b"", b"</s>", ends=2)
    odd.end_tokens = np.append(odd.end_tokens, odd.token_bytes.index(b"</s>"))
    allowed = np.flatnonzero(SchemaCompiler(odd).compile({"type": "integer"}).start().mask())
    assert {odd.token_bytes[t] for t in allowed} >= {b"1", b"-", b"12"}
    assert not {odd.token_bytes[t] for t in allowed} & {b"", b"</s>", b"\xff<1>", b"a"}
    strings = SchemaCompiler(odd).compile({"type": "string", "maxLength": 9}).start()
    strings.mask()
    strings.accept(34)
    text = {odd.token_bytes[t] for t in np.flatnonzero(strings.mask())}
    assert b"\xc3" in text and not text & {b"</s>", b"\xff", b"\xff<1>", b""}


@pytest.mark.parametrize("adds_space", [False, True])
def test_what_a_schema_forces_is_tokenised_in_the_models_way_or_at_least_rightly(adds_space: bool) -> None:
    vocabulary = pieces(b"true", "é".encode())
    vocabulary.adds_space = adds_space
    long = "A" * 5_000 + "é" * 500
    compiler = SchemaCompiler(vocabulary)
    text, forced = b"", compiler.compile({"enum": [long]}).start()
    while not forced.is_finished:
        (token,) = np.flatnonzero(forced.mask())
        forced.accept(int(token))
        text += vocabulary.token_bytes[token]
    assert json.loads(text) == long
    (only,) = np.flatnonzero(compiler.compile({"const": True}).start().mask())
    assert vocabulary.token_bytes[only] == (b"true" if adds_space else b"t")


def test_a_vocabulary_without_a_letter_ends_no_request_of_others() -> None:
    poor = Pieces([b'"', b"a", b"b", b""], np.array([3]))
    with pytest.raises(BadRequest):
        constraint = SchemaCompiler(poor).compile({"const": "abc"}).start()
        while True:
            constraint.accept(int(np.flatnonzero(constraint.mask())[0]))


def test_a_model_without_an_end_token_is_refused() -> None:
    with pytest.raises(BadRequest, match="no end token"):
        SchemaCompiler(pieces(ends=0)).compile({"type": "integer"})


# ── hostile, invalid and unsupported schemas ─────────────────────────────────────────────────────────────────────


def nested(levels: int, inner: Any) -> Any:
    for _ in range(levels):
        inner = {"items": inner}
    return inner


def chain(length: int, link: Any, last: Schema) -> Schema:
    """Definitions of which each holds the next: `link` makes one from its number and the reference."""
    defs = {f"d{i}": link(i, {"$ref": f"#/$defs/d{i + 1}"}) for i in range(length)}
    return {"$defs": defs | {f"d{length}": last}, "$ref": "#/$defs/d0"}


def patterns(count: int) -> list[Schema]:
    return [{"type": "string", "pattern": f"a.*b{{{i}}}"} for i in range(1, count + 1)]


INT = {"type": "integer"}
REFUSED: dict[str, tuple[Any, str]] = {
    "no object": ([1], "must be an object"),
    "parentheses": ({"pattern": "(" * 200_000 + ")" * 200_000}, "bytes; at most"),
    "fewer parentheses": ({"pattern": "(" * 300 + ")" * 300}, "a pattern of 600 characters"),
    "unclosed group": ({"type": "string", "pattern": "a(b"}, "regex parse error: unclosed group"),
    "look-ahead": ({"type": "string", "pattern": "(?=a)b"}, "look-ahead"),
    "depth": (nested(100_000, {}), "nested deeper than 32 levels"),
    "depth of a constant": ({"const": nested(33, [])}, "nested deeper than 32 levels"),
    "depth by references": (chain(1_400, lambda i, r: {"items": r}, INT), "nest deeper than 128 levels"),
    "depth by plain references": (chain(1_400, lambda i, r: r, INT), "nest deeper than 128 levels"),
    "depth met again": (
        chain(55, lambda i, r: {"items": r}, INT)
        | {"properties": {"a": {"$ref": "#/$defs/d0"}, "b": nested(20, {"$ref": "#/$defs/d0"})}},
        "nest deeper than 128 levels",
    ),
    "large enum": ({"enum": list(range(513))}, r"schema\.enum has 513 entries"),
    "giant enum": ({"enum": [f"v{i}" for i in range(200_000)]}, "bytes; at most"),
    "properties": ({"properties": {f"k{i}": {} for i in range(257)}}, r"schema\.properties has 257 entries"),
    "giant properties": ({"properties": {f"k{i}": INT for i in range(100_000)}}, "bytes; at most"),
    "required": ({"required": [f"k{i}" for i in range(5_000)]}, r"schema\.required has 5000 entries"),
    "minItems": ({"type": "array", "minItems": 10**9}, r"schema\.minItems is over 10000"),
    "maxLength": ({"items": {"type": "string", "maxLength": 1e9}}, r"schema\.items\.maxLength is over"),
    "alternatives": ({"anyOf": [INT] * 513}, r"schema\.anyOf has 513 entries"),
    "combined alternatives": ({"allOf": [{"anyOf": [INT] * 20}] * 20}, "combines over a million alternatives"),
    "combined patterns": ({"allOf": patterns(30)}, "combines too many of pattern"),
    "patterns by references": (
        chain(30, lambda i, r: r | {"pattern": f"a.*b{{{i + 1}}}"}, {"type": "string"}),
        "combines too many of pattern",
    ),
    "patterns too hard to combine": ({"allOf": patterns(9)}, "too complex to be combined"),
    "property patterns": ({"patternProperties": {f"^{i}": INT for i in range(33)}}, "patternProperties has 33"),
    "long property pattern": ({"patternProperties": {"a" * 501: INT}}, "a pattern of 501 characters"),
    "multipleOf": (INT | {"multipleOf": 999_983}, r"schema\.multipleOf is over 10000"),
    "decimals of multipleOf": ({"type": "number", "multipleOf": 0.123456}, r"schema\.multipleOf"),
    "combined multipleOf": ({"allOf": [INT | {"multipleOf": m} for m in (9_973, 9_967)]}, "combines too many of"),
    "remote reference": ({"$ref": "https://example.com/s.json"}, r"schema\.\$ref is .*only references such as"),
    "file reference": ({"items": {"$ref": "file:///etc/passwd"}}, r"schema\.items\.\$ref is"),
    "reference to nowhere": ({"$ref": "#/$defs/none"}, "points to #/.defs/none, which is not there"),
    "reference that is no text": ({"$ref": 5}, r"schema\.\$ref is 5"),
    "reference to itself": ({"$ref": "#"}, "no JSON fits it"),
    "references in a circle": ({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
                               "no JSON fits it"),
    "another base": ({"items": {"$id": "x", "$ref": "#/$defs/a"}}, r"schema\.items\.\$id is not supported"),
    "anchor": ({"items": {"$anchor": "x"}}, r"schema\.items\.\$anchor is not supported"),
    "options of the compiler": ({"x-guidance": {"lenient": True}, "not": {}}, "x-guidance is not supported"),
    "old draft": ({"$schema": "http://json-schema.org/draft-04/schema#"}, r"\$schema: drafts before 6"),
    "unknown type": ({"type": "text"}, "Invalid type: text"),
    "type of a type": ({"type": 5}, "type must be"),
    "properties as list": ({"properties": []}, "properties must be an object"),
    "patternProperties as number": ({"patternProperties": 5}, "Expected object for 'patternProperties'"),
    "unsupported keyword": ({"not": INT}, 'Unimplemented keys: \\["not"\\]'),
    "unknown format": ({"type": "string", "format": "haiku"}, "Unknown format: haiku"),
    "empty enum": ({"enum": []}, "Unsatisfiable"),
    "empty range": (INT | {"minimum": 5, "maximum": 1}, "Unsatisfiable"),
    "impossible property": ({"type": "object", "properties": {"a": False}, "required": ["a"]}, "Unsatisfiable"),
    "huge number": ({"const": 10**300}, "not JSON serializable"),
    "not a number": ({"const": float("nan")}, "no JSON"),
    "surrogate": ({"const": "\ud800"}, "lone surrogate"),
    "no JSON": ({"const": b"x"}, "no JSON"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_hostile_or_invalid_schema_is_refused_fast(compiler: SchemaCompiler, name: str) -> None:
    schema, sentence = REFUSED[name]
    started = time.perf_counter()
    with pytest.raises(BadRequest, match=sentence) as refused:
        compiler.compile(schema)
    assert time.perf_counter() - started < 2
    assert len(refused.value.message) < 400 and "\n" not in refused.value.message


TAKEN: dict[str, Schema] = {
    "anything": {},
    "recursion": {"type": "object", "properties": {"a": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}},
    "keywords as names": {"properties": {"$id": INT, "pattern": INT, "$ref": INT, "enum": INT, "allOf": INT}},
    "keywords in data": {"enum": [{"$ref": "https://example.com", "minItems": 10**9, "$id": "x"}]},
    "annotations": {"$schema": "http://json-schema.org/draft-07/schema#", "$id": "https://example.com/s", "title": "T",
                    "description": "D", "default": None, "examples": [1], **INT},
    "escaped reference": {"$defs": {"a/b~ ä": INT}, "$ref": "#/$defs/a~1b~0%20%C3%A4"},
    "reference into a list": {"prefixItems": [INT, {"$ref": "#/prefixItems/0"}], "type": "array"},
    "definitions that nothing refers to": {"$defs": {"a": {"allOf": patterns(30)}}, **INT},
    "many formats": {"properties": {f"k{i}": {"type": "string", "format": "date"} for i in range(200)}},
    "many patterns side by side": {"properties": {f"k{i}": p for i, p in enumerate(patterns(60))}},
    "nested repetition": {"type": "string", "pattern": "((a{100}){100}){100}"},
    "exponential automaton": {"type": "string", "pattern": "(a|b)*a(a|b){20}"},
    "doubled references": chain(30, lambda i, r: {"anyOf": [r, {"type": "array", "items": r}]}, INT),
    "long arrays": {"type": "array", "minItems": 10_000, "items": {"type": "array", "minItems": 10_000}},
    "multiples": INT | {"multipleOf": 7, "minimum": 3, "maximum": 10**9},
    "tagged union": {"oneOf": [
        {"type": "object", "properties": {"k": {"const": f"v{i}"}}, "required": ["k"]} for i in range(60)]},
}  # fmt: skip


@pytest.mark.parametrize("name", TAKEN)
def test_a_useful_schema_is_taken_and_followed_fast(compiler: SchemaCompiler, name: str) -> None:
    started = time.perf_counter()
    constraint = compiler.compile(TAKEN[name]).start()
    chance = random.Random(1)
    for _ in range(50):
        if constraint.is_finished:
            break
        constraint.accept(int(chance.choice(np.flatnonzero(constraint.mask()))))
    assert time.perf_counter() - started < 2


KEYWORDS = [
    "type", "properties", "items", "enum", "const", "anyOf", "allOf", "oneOf", "$ref", "$defs", "pattern", "format",
    "minLength", "maxItems", "minimum", "multipleOf", "required", "additionalProperties", "patternProperties",
    "prefixItems", "$schema", "$id", "x", "not", "if", "minProperties", "exclusiveMinimum", "dependentSchemas",
]  # fmt: skip
ATOMS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
JSON = st.recursive(
    ATOMS | st.sampled_from(["#", "string", "integer", "^a"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYWORDS), inner, max_size=4),
    max_leaves=12,
)


@settings(deadline=2_000, max_examples=300)
@given(JSON)
def test_any_json_as_a_schema_is_taken_or_refused(compiler: SchemaCompiler, schema: Any) -> None:
    try:
        compiler.compile(schema).start().mask()
    except BadRequest as error:
        assert error.message  # nothing else is raised


def test_masks_of_a_large_vocabulary_are_cheap() -> None:
    chance = random.Random(1)
    words = {bytes(chance.choices(b'abcdefghij {}[]":,0123456789', k=chance.randint(2, 8))) for _ in range(140_000)}
    large = pieces(*sorted(words)[:128_000])
    compiler = SchemaCompiler(large)
    compiled = compiler.compile(
        {"type": "object", "properties": {"a": {"type": "string"}, "b": INT}, "required": ["a"]}
    )
    constraint, steps, started = compiled.start(), 0, time.perf_counter()
    while steps < 200 and not constraint.is_finished:
        constraint.accept(int(chance.choice(np.flatnonzero(constraint.mask()))))
        steps += 1
    assert (time.perf_counter() - started) / max(steps, 20) < 5e-3


def test_the_caps_look_at_every_reference_once() -> None:
    """Two references per level would be 2**30 visits."""
    started = time.perf_counter()
    grammar.check_caps(chain(30, lambda i, r: {"allOf": [r], "properties": {"x": r}}, INT))
    assert time.perf_counter() - started < 1
