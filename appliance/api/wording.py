"""Says in plain words what is wrong with a field of a body. msgspec finds the fault; the words come from the struct's
types and the value, so that no parser's jargon reaches a caller. Reads nothing, decides nothing."""

from __future__ import annotations

import difflib
import functools
import re
from typing import Any

import msgspec
from msgspec import inspect

LONGEST = 60  # characters of a caller's own text in a sentence

_AT = re.compile(r" - at (?:`key` in )?`\$(?P<path>[^`]*)`$")
_FIELD = re.compile(r"^Object (?:missing required|contains unknown) field `([^`]*)`")
_STEP = re.compile(r"\.(?P<name>[^.\[\]]+)|\[(?P<index>\d+|\.\.\.)\]")
_MISSING = object()  # a value that the path does not lead to


def sentence(problem: str, value: Any, struct: type[msgspec.Struct]) -> str:
    """msgspec's `problem` with the decoded `value` as a sentence that names the field."""
    match = _AT.search(problem)
    path = match["path"] if match else ""
    try:
        kind, found = _follow(path, _type(struct), value)
    except LookupError:  # a field's name that looks like the end of the message
        path, (kind, found) = "", (_type(struct), value)
    if problem.startswith("Object contains unknown field") and isinstance(found, dict):
        return _unknown(path, kind, found)
    if problem.startswith("Object missing required field") and isinstance(found, dict):
        return _absent(path, kind, found)
    return f"{_name(path) or 'The body'} must be {_words(kind)}{_instead(found)}."


def place(problem: str) -> str | None:
    """Where in the body msgspec found the `problem`, such as `messages[0].role`; None for the body itself."""
    match = _AT.search(problem)
    path = _name(match["path"]) if match else ""
    if field := _FIELD.search(problem):
        path = f"{path}.{field[1]}" if path else field[1]
    return path or None


def quoted(text: str) -> str:
    """A caller's own text, shortened and without control characters."""
    shown = "".join(c if c.isprintable() else "?" for c in text[:LONGEST])
    return f'"{shown}{"…" * (len(text) > LONGEST)}"'


@functools.cache
def _type(struct: type[msgspec.Struct]) -> inspect.Type:
    return inspect.type_info(struct)


def _follow(path: str, kind: inspect.Type, value: Any) -> tuple[inspect.Type, Any]:
    """The type and the value at msgspec's `path` such as `.messages[0].role`. Raises LookupError."""
    for step in _STEP.finditer(path):
        if name := step["name"]:
            fields = {f.encode_name: f.type for f in _one_of(kind, inspect.StructType).fields}
            kind, value = fields[name], value.get(name, _MISSING)
        elif step["index"] == "...":
            kind, value = _one_of(kind, inspect.DictType).value_type, _MISSING
        else:
            kind, value = _one_of(kind, inspect.ListType).item_type, value[int(step["index"])]
    return kind, value


def _one_of(kind: inspect.Type, wanted: type[inspect.Type]) -> Any:
    """`kind` itself or the member of the union that is `wanted`."""
    for member in _members(kind):
        if isinstance(member, wanted):
            return member
    raise LookupError


def _members(kind: inspect.Type) -> tuple[inspect.Type, ...]:
    """What a union allows besides null, which is the same as leaving the field out."""
    members = kind.types if isinstance(kind, inspect.UnionType) else (kind,)
    return tuple(m for m in members if not isinstance(m, inspect.NoneType)) or (kind,)


def _unknown(path: str, kind: inspect.Type, found: dict[str, Any]) -> str:
    known = [f.encode_name for f in _one_of(kind, inspect.StructType).fields]
    name = next(k for k in found if k not in known)
    [nearest] = difflib.get_close_matches(name[:LONGEST], known, 1, 0.0)
    near = difflib.SequenceMatcher(None, name[:LONGEST], nearest).ratio() >= 0.5
    hint = f"did you mean {quoted(nearest)}?" if near else f"the nearest name is {quoted(nearest)}."
    return f"Unknown field {quoted(name)}{_within(path)}; {hint}"


def _absent(path: str, kind: inspect.Type, found: dict[str, Any]) -> str:
    fields = _one_of(kind, inspect.StructType).fields
    name = next(f.encode_name for f in fields if f.required and f.encode_name not in found)
    return f"The field {quoted(name)} is missing{_within(path)}."


def _name(path: str) -> str:
    return path.removeprefix(".")


def _within(path: str) -> str:
    return f" in {_name(path)}" if path else ""


def _words(kind: inspect.Type) -> str:
    """What the type takes, e.g. `a whole number of at least 1`."""
    match kind:
        case inspect.UnionType():
            return " or ".join(_words(m) for m in _members(kind))
        case inspect.LiteralType():
            return ("one of " if len(kind.values) > 1 else "") + ", ".join(str(v) for v in kind.values)
        case inspect.IntType():
            return "a whole number" + _range(kind)
        case inspect.FloatType():
            return "a number" + _range(kind)
        case inspect.StrType():
            return "a text" + _length(kind, "characters")
        case inspect.ListType():
            return "a list" + _length(kind, "entries")
        case inspect.BoolType():
            return "true or false"
        case inspect.StructType() | inspect.DictType():
            return "an object"
    return "of another kind"


def _range(kind: inspect.IntType | inspect.FloatType) -> str:
    if kind.ge is not None and kind.le is not None:
        return f" from {kind.ge:,} to {kind.le:,}"
    bounds = (("above", kind.gt), ("of at least", kind.ge), ("below", kind.lt), ("of at most", kind.le))
    said = [f"{words} {bound:,}" for words, bound in bounds if bound is not None]
    return " " + " and ".join(said) if said else ""


def _length(kind: inspect.StrType | inspect.ListType, what: str) -> str:
    least, most = kind.min_length or 0, kind.max_length
    if most is not None:
        return f" of {least:,} to {most:,} {what}" if least else f" of at most {most:,} {what}"
    return f" of at least {least:,} {what}" if least else ""


def _instead(value: Any) -> str:
    """What came, e.g. `, not null`; nothing where that is not known."""
    match value:
        case None | True | False:
            return f", not {str(value).lower().replace('none', 'null')}"
        case int() | float():
            return f", not {value}"
        case str() if len(value) <= LONGEST:
            return f", not the text {quoted(value)}"
        case str():
            return f", not a text of {len(value):,} characters"
        case list():
            return f", not a list of {len(value):,}" if value else ", not an empty list"
        case dict():
            return ", not an object"
    return ""
