"""A model's chat template, rendered in Jinja's sandbox under a time cap and a budget of text.

Templates come with model files, which an administrator chose; the caps turn a broken or crude one into a sentence
instead of a dead server. Whatever repeats, joins or writes text pays for its length from the budget before it works,
because the time cap cannot stop a single operation in C. Knows texts, not tokens.
"""

from __future__ import annotations

import ctypes
import datetime
import functools
import json
import re
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from jinja2 import Environment, nodes
from jinja2.exceptions import SecurityError, TemplateRuntimeError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import EvalContext
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from appliance.errors import BadRequest, ModelError
from appliance.messages import Message

RENDER_SECONDS = 2.0
LARGEST_SOURCE = 1_000_000  # characters
TEXT_BUDGET = 64_000_000  # characters that one rendering may make, intermediate ones included
LARGEST_NUMBER = 4_096  # bits
WIDEST = 1_000  # columns of padding and indentation

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)

# No chat template needs these, and each of them makes much out of little.
DROPPED_FILTERS = {"batch", "center", "pprint", "random", "slice", "sum", "urlize", "wordwrap", "xmlattr"}
DROPPED_METHODS = {"encode", "maketrans", "translate"}
PADDING_METHODS = {"center", "expandtabs", "ljust", "rjust", "zfill"}
WRITING_FILTERS = {
    "capitalize", "e", "escape", "forceescape", "format", "indent", "join", "lower", "replace", "safe", "string",
    "striptags", "title", "tojson", "trim", "truncate", "upper", "urlencode",
}  # fmt: skip
LISTING_FILTERS = {"list", "reverse", "sort", "unique"}
_WIDE = re.compile(r"\d{4}|\*|\{[^{}]*\{")  # in a format string: a width over 999, or one that is an argument


class TokenTexts(Protocol):
    """What a template needs of a vocabulary."""

    @property
    def special_texts(self) -> tuple[str, ...]: ...
    @property
    def bos(self) -> int: ...
    @property
    def eos(self) -> int: ...
    def text(self, token: int) -> str: ...


class ChatTemplate:
    """A compiled template; thread-safe.

    A model without one is asked in ChatML where its vocabulary has `<|im_start|>`, else in plain `role: content` lines.
    Raises ModelError for a source that does not compile, or cannot render a single message.
    """

    def __init__(self, source: str | None, vocabulary: TokenTexts) -> None:
        fallback = CHATML if "<|im_start|>" in vocabulary.special_texts else PLAIN
        self.source = source or fallback
        self._names = {"bos_token": vocabulary.text(vocabulary.bos), "eos_token": vocabulary.text(vocabulary.eos)}
        self._environment = _Sandbox()
        if len(self.source) > LARGEST_SOURCE:
            raise ModelError(f"The model's chat template is longer than {LARGEST_SOURCE} characters.")
        try:
            with _time_cap(RENDER_SECONDS):
                self._template = self._environment.compiled(self.source)
                self._render([Message("user", "Hello")], add_generation_prompt=True)
        except _Refused:
            pass  # it wants another kind of conversation
        except _TimeUp as error:
            raise ModelError(f"The model's chat template takes longer than {RENDER_SECONDS:g} s.") from error
        except Exception as error:  # whatever Jinja, Python's compiler or the template raises
            raise ModelError(f"The model's chat template does not work: {_sentence(error)}") from error

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The prompt as text. Raises BadRequest where the template refuses the conversation or takes too much."""
        try:
            with _time_cap(RENDER_SECONDS):
                return self._render(messages, add_generation_prompt=add_generation_prompt)
        except _Refused as error:
            raise BadRequest(f"The model's chat template refuses this conversation: {_sentence(error)}") from error
        except _TimeUp as error:
            raise BadRequest(
                f"The model's chat template takes longer than {RENDER_SECONDS:g} s for this conversation."
            ) from error
        except Exception as error:  # whatever Jinja or the template raises
            raise BadRequest(
                f"The model's chat template cannot render this conversation: {_sentence(error)}"
            ) from error

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        self._environment.refill()
        rendered: str = self._template.render(
            messages=[{"role": m.role, "content": m.content} for m in messages],
            add_generation_prompt=add_generation_prompt,
            tools=None,  # templates for Transformers expect these two names
            documents=None,
            **self._names,
        )
        return rendered


class _Refused(Exception):
    """The template called `raise_exception`."""


class _TimeUp(BaseException):
    """Raised from outside in a thread that renders for too long; no `except Exception` may swallow it."""


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with what templates for Transformers expect; making text costs from a budget per thread."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation], finalize=self._written
        )
        self._budget = threading.local()
        del self.globals["lipsum"]
        self.globals |= {"raise_exception": _refuse, "strftime_now": _strftime_now}
        self.filters["tojson"] = _to_json
        self.filters = {n: self._paid(n, f) for n, f in self.filters.items() if n not in DROPPED_FILTERS}

    def compiled(self, source: str) -> Any:
        """The template, with the operations that Jinja does not let a sandbox intercept made into calls."""
        tree = _Interception().visit(self.parse(source))
        return self.template_class.from_code(self, self.compile(tree), self.make_globals(None))

    def refill(self) -> None:
        self._budget.left = TEXT_BUDGET

    def spend(self, characters: int) -> None:
        self._budget.left = getattr(self._budget, "left", TEXT_BUDGET) - characters
        if self._budget.left < 0:
            raise SecurityError(f"it makes more than {TEXT_BUDGET} characters of text.")

    def spend_on_writing(self, value: Any) -> None:
        """Pays for `str(value)`. Walks shared parts again and again, as writing them does; the time cap ends that."""
        stack = [value]
        while stack:
            value = stack.pop()
            if isinstance(value, str):
                self.spend(len(value))
            elif isinstance(value, Mapping):
                stack += [*value.keys(), *value.values()]
            elif isinstance(value, Collection):
                self.spend(len(value))
                stack += value
            elif isinstance(value, Namespace):
                raise SecurityError("a namespace cannot be written.")

    # ── what Jinja calls ─────────────────────────────────────────────────────────────────────────────────────────

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "+":
            self.spend(sum(len(side) for side in (left, right) if hasattr(side, "__len__")))
        elif operator == "%" and isinstance(left, str):
            self._spend_on_format(left, [right])
        elif operator == "**" or operator == "*":
            self._spend_on_product(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(obj, "__self__", None)
        if isinstance(owner, (int, float, bytes)):
            raise SecurityError("methods of numbers and bytes are not available.")
        if isinstance(owner, str):
            args = tuple(list(a) if isinstance(a, Iterator) else a for a in args)
            self._spend_on_method(owner, obj.__name__, [*args, *kwargs.values()])
        return super().call(context, obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        formatted = super().wrap_str_format(value)
        if formatted is None:
            return None

        def paid(*args: Any, **kwargs: Any) -> str:
            self._spend_on_format(value.__self__, [*args, *kwargs.values()])
            return formatted(*args, **kwargs)

        return paid

    def joined(self, *parts: Any) -> str:
        """The operator ~."""
        self.spend_on_writing(parts)
        return "".join(map(str, parts))

    def sliced(self, value: Any, start: Any, stop: Any, step: Any) -> Any:
        """value[start:stop:step]"""
        self.spend(len(value))
        return value[start:stop:step]

    def concat(self, parts: Iterable[str], /) -> str:
        """Puts a template's, macro's or block's pieces together."""
        pieces = []
        for part in parts:
            self.spend(len(part))
            pieces.append(part)
        return "".join(pieces)

    def _written(self, value: Any) -> Any:
        if not isinstance(value, str):
            self.spend_on_writing(value)
        return value

    # ── prices ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _spend_on_product(self, operator: str, left: Any, right: Any) -> None:
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > LARGEST_NUMBER:
                raise SecurityError("it calculates with huge numbers.")
        for repeated, times in ((left, right), (right, left)):
            if hasattr(repeated, "__len__") and isinstance(times, int):
                self.spend(len(repeated) * max(0, times))

    def _spend_on_format(self, form: str, values: Sequence[Any]) -> None:
        if _WIDE.search(form):
            raise SecurityError("it formats to a huge or variable width.")
        fields = form.count("%") + form.count("{")
        self.spend(len(form) + WIDEST * fields)
        for _ in range(fields):
            self.spend_on_writing(values)

    def _spend_on_method(self, text: str, name: str, args: Sequence[Any]) -> None:
        if name in DROPPED_METHODS:
            raise SecurityError(f"the method {name} is not available.")
        self.spend(len(text))
        if name in PADDING_METHODS:
            self.spend(sum(a for a in args if isinstance(a, int)) * (1 + text.count("\t")))
        elif name == "replace" and len(args) > 1:
            self.spend(text.count(str(args[0])) * len(str(args[1])))
        elif name == "join" and args and isinstance(args[0], Collection):
            self.spend(len(text) * len(args[0]))
            self.spend_on_writing(args[0])

    def _spend_on_filter(self, name: str, values: Sequence[Any]) -> None:
        if any(isinstance(v, int) and v > WIDEST for v in values[1:]):
            raise SecurityError(f"the filter {name} gets a huge number.")
        if name in LISTING_FILTERS:
            return self.spend(len(values[0]) if isinstance(values[0], Collection) else 0)
        self.spend_on_writing(values)
        if name == "replace" and len(values) > 2:
            self.spend(str(values[0]).count(str(values[1])) * len(str(values[2])))
        elif name == "join" and len(values) > 1:
            self.spend(len(values[0]) * len(str(values[1])))
        elif name == "indent":
            widths = (v if isinstance(v, int) else len(str(v)) for v in values[1:])
            self.spend(str(values[0]).count("\n") * max([4, *widths]))
        elif name == "format":
            self._spend_on_format(str(values[0]), values[1:])

    def _paid(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The filter, paying before it works; iterators become lists, which can be measured."""
        if name not in WRITING_FILTERS | LISTING_FILTERS:
            return function

        @functools.wraps(function)
        def paid(*args: Any, **kwargs: Any) -> Any:
            given = [list(a) if isinstance(a, Iterator) else a for a in args]
            values = [a for a in given if not isinstance(a, (EvalContext, Environment, Context))]
            self._spend_on_filter(name, [*values, *kwargs.values()])
            return function(*given, **kwargs)

        return paid


class _Interception(NodeTransformer):
    """Makes `a ~ b` and `a[b:c]` calls of the environment."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call("joined", node.nodes, node.lineno)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        edges = [edge or nodes.Const(None) for edge in (node.arg.start, node.arg.stop, node.arg.step)]
        return _call("sliced", [node.node, *edges], node.lineno)


class _Generation(Extension):
    """{% generation %}…{% endgeneration %}, with which training marks the assistant's part, is its content here."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _call(method: str, arguments: list[nodes.Expr], line: int) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(method, lineno=line), arguments, [], None, None, lineno=line)


def _refuse(message: Any = "") -> None:
    raise _Refused(str(message))


def _strftime_now(form: str) -> str:
    if len(form) > WIDEST or _WIDE.search(form):
        raise TemplateRuntimeError("the format of a date is too long.")
    return datetime.datetime.now().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As Transformers has it: no HTML escapes."""
    if isinstance(indent, int) and indent > 16:
        raise TemplateRuntimeError("JSON is indented by 16 at most.")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _sentence(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:300] or type(error).__name__


@contextmanager
def _time_cap(seconds: float) -> Iterator[None]:
    """Raises `_TimeUp` in this thread after `seconds`, as soon as it runs Python code again."""
    thread, lock, over = threading.get_ident(), threading.Lock(), False

    def interrupt() -> None:
        with lock:
            if not over:
                _raise_in(thread, _TimeUp)

    timer = threading.Timer(seconds, interrupt)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        with lock:
            over = True
            _raise_in(thread, None)  # one that was sent and has not arrived would hit whatever runs next
        timer.cancel()


def _raise_in(thread: int, exception: type[BaseException] | None) -> None:
    target = None if exception is None else ctypes.py_object(exception)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), target)
