"""Chat templates render as Transformers renders them, and no template takes the server's time, memory or files."""

from __future__ import annotations

import datetime
import resource
import threading
import time
from dataclasses import dataclass

import pytest

from appliance.engine import template
from appliance.engine.template import CHATML, PLAIN, ChatTemplate
from appliance.errors import BadRequest, ModelError
from appliance.messages import Message


@dataclass
class Names:
    """The part of a vocabulary that a template sees."""

    special_texts: tuple[str, ...] = ("<s>", "</s>")
    bos: int = 0
    eos: int = 1

    def text(self, token: int) -> str:
        return self.special_texts[token] if token >= 0 else ""


CONVERSATION = [Message("system", "Be brief."), Message("user", "Hi")]


def render(source: str | None, *messages: Message, names: Names | None = None) -> str:
    return ChatTemplate(source, names or Names()).render(messages or CONVERSATION)


def only_for_two(body: str) -> str:
    """A template whose body works only on conversations of two messages, so that loading it does nothing bad."""
    return "{% if messages|length == 2 %}" + body + "{% endif %}"


def test_renders_messages_and_the_names_that_templates_expect() -> None:
    source = (
        "{{ bos_token }}{%- for m in messages %}\n    [{{ m['role'] }}] {{ m.content }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}A:{% endif %}{{ tools is none and documents is none }}"
    )
    assert render(source) == "<s>    [system] Be brief.</s>\n    [user] Hi</s>\nA:True"
    assert ChatTemplate("{{ add_generation_prompt }}", Names()).render([], add_generation_prompt=False) == "False"


def test_extensions_of_transformers_work() -> None:
    source = (
        "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}"
        "{% generation %}{{ {'b': 'é<', 'a': [1]} | tojson }}{% endgeneration %}{% break %}{% endfor %}"
        "{{ strftime_now('%Y') }} {{ '%s-%02d' % ('x', 3) }} {{ '{}!'.format(messages[-1].content) }}"
        " {{ 'a' ~ 1 ~ [2] }} {{ 'abcdef'[1:4] }}{{ messages[::-1][0].content }} {{ ['p', 'q'] | join('-') | upper }}"
        "{% macro twice(x) %}{{ x }}{{ x }}{% endmacro %} {{ twice('ab') }} {{ 'a b'.split(' ') | last | indent(2) }}"
    )
    year = datetime.datetime.now().year
    assert render(source) == f'{{"b": "é<", "a": [1]}}{year} x-03 Hi! a1[2] bcdHi P-Q abab b'


def test_a_model_without_a_template_gets_chatml_or_plain_lines() -> None:
    assert ChatTemplate(None, Names(("<|im_start|>", "<|im_end|>"))).source == CHATML
    assert ChatTemplate("", Names()).source == PLAIN
    assert render(None) == "system: Be brief.\nuser: Hi\nassistant:"
    chatml = render(None, names=Names(("<|im_start|>", "<|im_end|>")))
    assert chatml.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_a_template_without_tokens_of_beginning_and_end_renders() -> None:
    assert render("[{{ bos_token }}{{ eos_token }}]", names=Names(bos=-1, eos=-1)) == "[]"


def test_what_a_template_refuses_is_the_callers_mistake_in_the_templates_words() -> None:
    source = only_for_two("{{ raise_exception('Roles must alternate.') }}")
    with pytest.raises(BadRequest, match=r"refuses this conversation: Roles must alternate\.$"):
        render(source)
    assert render(source, Message("user", "fine")) == ""


@pytest.mark.parametrize(
    "source",
    ["{% if %}", "{{ a.b.c }}", "{{ 1 / 0 }}", "{% include 'x' %}", "{{ x | y }}", "{{" + "(" * 5_000, "a" * 1_000_001],
    ids=["syntax", "undefined", "arithmetic", "include", "filter", "nested", "long"],
)
def test_a_broken_template_is_found_when_the_model_is_loaded(source: str) -> None:
    with pytest.raises(ModelError, match="chat template"):
        ChatTemplate(source, Names())


def test_a_template_that_only_refuses_the_trial_conversation_loads() -> None:
    source = "{% if messages[0].role != 'system' %}{{ raise_exception('System first.') }}{% endif %}ok"
    assert render(source) == "ok"


@pytest.mark.parametrize(
    "body",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__ }}",
        "{{ self.__init__.__globals__ }}",
        "{{ ().__class__.__base__.__subclasses__() }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ ['a'] | map(attribute='__class__') | list }}",
    ],
)
def test_a_template_reaches_nothing_outside_the_sandbox(body: str) -> None:
    reaching = ChatTemplate(only_for_two(body), Names())
    try:
        text = reaching.render(CONVERSATION)
    except BadRequest:
        return
    assert "class" not in text


NESTED = "{% for a in range(9999) %}{% for b in range(9999) %}"
DOUBLING = "{% set ns = namespace(x='ab' * 1000) %}{% for i in range(60) %}{% set ns.x = "
BOMBS = {
    "loops": NESTED + "{% endfor %}{% endfor %}",
    "output": NESTED + "{{ 'a' * 9999 }}{% endfor %}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(100) }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "repetition": "{{ 'a' * 10**9 }}",
    "long repetition": "{{ 'a' * 1000000000 }}",
    "list repetition": "{{ ([0] * 1000000000) | length }}",
    "power": "{{ 9 ** 999999999 }}",
    "plus": DOUBLING + "ns.x + ns.x %}{% endfor %}{{ ns.x }}",
    "tilde": DOUBLING + "ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "replace": DOUBLING + "ns.x | replace('a', ns.x) %}{% endfor %}{{ ns.x }}",
    "replace method": DOUBLING + "ns.x.replace('a', ns.x) %}{% endfor %}{{ ns.x }}",
    "join": DOUBLING + "[ns.x, ns.x] | join(ns.x) %}{% endfor %}{{ ns.x }}",
    "join method": DOUBLING + "ns.x.join([ns.x, ns.x]) %}{% endfor %}{{ ns.x }}",
    "format": DOUBLING + "'%s%s' % (ns.x, ns.x) %}{% endfor %}{{ ns.x }}",
    "format method": DOUBLING + "'{0}{0}'.format(ns.x) %}{% endfor %}{{ ns.x }}",
    "format filter": DOUBLING + "'%s%s' | format(ns.x, ns.x) %}{% endfor %}{{ ns.x }}",
    "numbers": DOUBLING.replace("'ab' * 1000", "99") + "ns.x * ns.x %}{% endfor %}{{ ns.x }}",
    "nested lists": DOUBLING + "[ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "nested lists as text": DOUBLING + "[ns.x, ns.x] %}{% endfor %}{{ ns.x | string | length }}",
    "nested lists as JSON": DOUBLING + "[ns.x, ns.x] %}{% endfor %}{{ ns.x | tojson | length }}",
    "lists": DOUBLING + "[ns.x] %}{% endfor %}" + DOUBLING + "(ns.x | list) + (ns.x | list) %}{% endfor %}",
    "slices": "{% set a = 'a' * 9999999 %}{% set ns = namespace(x=[]) %}"
    "{% for i in range(9999) %}{% set ns.x = ns.x + [a[1:]] %}{% endfor %}",
    "block": "{% set ns = namespace(x='aa') %}{% for i in range(60) %}{% set b %}{{ ns.x }}{{ ns.x }}{% endset %}"
    "{% set ns.x = b %}{% endfor %}",
    "width": "{{ '%1000000000d' % 1 }}",
    "width as argument": "{{ '%*d' % (1000000000, 1) }}",
    "width of a method": "{{ '{:>1000000000}'.format(1) }}",
    "inner width": "{{ '{:>{w}}'.format(1, w=1000000000) }}",
    "padding": "{{ 'a'.ljust(1000000000) }}",
    "tabs": "{{ '\t'.expandtabs(1000000000) }}",
    "centre": "{{ 'a' | center(1000000000) }}",
    "indent": "{{ ('\n' * 1000000) | indent(1000) }}",
    "indented JSON": "{{ [1] | tojson(indent=1000000000) }}",
    "bytes": "{{ (1).to_bytes(1000000000, 'big') }}",
    "encoded": "{{ ('a'.encode() * 1000000000) | length }}",
    "lorem": "{{ lipsum(n=1000000) }}",
    "batch": "{{ [1] | batch(1000000000, 'x') | list }}",
    "date": "{{ strftime_now('%1000000000Y') }}",
    "namespace": "{% set ns = namespace(x=1) %}{{ ns }}",
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_in_a_template_ends_as_a_sentence(bomb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template, "RENDER_SECONDS", 0.5)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    with pytest.raises((BadRequest, ModelError), match="chat template"):
        ChatTemplate(only_for_two(BOMBS[bomb]), Names()).render(CONVERSATION)
    assert time.perf_counter() - started < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 1_000_000  # kilobytes


def test_a_thread_goes_on_after_its_rendering_was_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template, "RENDER_SECONDS", 0.2)
    slow = ChatTemplate(only_for_two(BOMBS["loops"]), Names())
    for _ in range(5):
        with pytest.raises(BadRequest, match="takes longer than 0.2 s"):
            slow.render(CONVERSATION)
    assert slow.render([Message("user", "short")]) == ""


def test_only_the_thread_that_takes_too_long_is_stopped() -> None:
    slow, refused = ChatTemplate(only_for_two(BOMBS["loops"]), Names()), []

    def render_slowly() -> None:
        try:
            slow.render(CONVERSATION)
        except BadRequest as error:
            refused.append(error)

    other = threading.Thread(target=render_slowly)
    other.start()
    fast = ChatTemplate(PLAIN, Names())
    while other.is_alive():
        assert fast.render(CONVERSATION) == "system: Be brief.\nuser: Hi\nassistant:"
    assert len(refused) == 1


def test_a_long_conversation_is_no_bomb() -> None:
    source = "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] | trim + '</s>' }}{% endfor %}"
    turns = [Message("user", "word " * 100)] * 4_000
    started = time.perf_counter()
    assert len(ChatTemplate(source, Names()).render(turns)) == 4_000 * (6 + 499 + 4)
    assert time.perf_counter() - started < 2
