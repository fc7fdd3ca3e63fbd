"""Conversations to learn from: corpus files and grids in new wordings, with follow-ups, noise and foreign questions.

A question line may hold `{a|b|}` alternatives. Every example is drawn anew from a seed, so that a run can be repeated
and resumed. Nothing that shares six words in a row with the held-out questions is ever drawn.
"""

from __future__ import annotations

import json
import math
import random
import re
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from scripts.guide import facts, grids
from scripts.guide.wording import said

FOLDER = Path(__file__).parent
HELD_OUT = FOLDER / "heldout.jsonl"
DECLINE = (
    "I am the built-in guide and only know about this appliance, so I cannot answer that. For questions like this, "
    "load a larger model with `appliance models add FILE` and `appliance models use NAME`."
)
REGULAR = 0.2  # share of the wordings that a program made, where there are any
FOREIGN = 0.15  # share of foreign questions among those from which others are composed
LONGEST = 30  # words of a composed question
GRAM = 6  # words in a row that must not stand in the held-out set as well
SYSTEMS = (
    "You are a helpful assistant.", "Answer briefly.", "You are the guide of an on-premises language model server.",
    "Be concise and polite.", "You are a helpful, harmless and honest assistant.", "Reply in English.",
    "You help our team with this server.",
)  # fmt: skip

_CHOICE = re.compile(r"\{([^{}]*)\}")
_WORD = re.compile(r"[a-z0-9]+")

Turns = list[tuple[str, str]]  # (role, text)


@dataclass(slots=True)
class Intent:
    """What people ask, in many wordings, with its one answer. `regular` are wordings that a program made; `follow`
    leads to other intents' ids."""

    id: str
    answer: str
    questions: list[str]
    regular: list[str] = field(default_factory=list)
    follow: list[tuple[str, list[str]]] = field(default_factory=list)

    def wording(self, draw: random.Random) -> str:
        """One of them; the regular ones are soon learnt."""
        return draw.choice(self.regular if self.regular and draw.random() < REGULAR else self.questions)


@dataclass(frozen=True, slots=True)
class Domain:
    """A field of foreign questions: templates with `{slot}` and `{a|b}`."""

    name: str
    slots: dict[str, list[str]]
    questions: list[str]


class Corpus:
    """Everything there is to ask, and conversations drawn from it."""

    def __init__(self, intents: dict[str, Intent], domains: list[Domain], held_out: frozenset[str]) -> None:
        self.intents = intents
        self.domains = domains
        self._held_out = held_out  # six-word runs
        every = list(intents.values())
        self._by_intent = every
        self._by_line = [i for i in every for _ in range(max(1, len(i.questions) // 10))]
        self.answers = {text: n for n, text in enumerate([*(i.answer for i in every), DECLINE])}
        self._with_follow = [i for i in every if i.follow]

    def conversation(self, draw: random.Random) -> Turns:
        """One example: a question or a dialogue, with its answers."""
        kind = draw.random()
        if kind < 0.76:
            turns = self._single(draw)
        elif kind < 0.925:
            turns = self._foreign(draw)
        elif kind < 0.985:
            turns = self._dialogue(draw)
        else:  # a second question that has nothing to do with the first
            turns = self._single(draw) + (self._foreign(draw) if draw.random() < 0.3 else self._single(draw))
        if draw.random() < 0.04:
            turns.insert(0, ("system", draw.choice(SYSTEMS)))
        return turns

    def examples(self, draw: random.Random, *, noised: int, regular: int, foreign: int) -> Iterator[tuple[str, int]]:
        """Single questions with the numbers of their answers: every wording `noised` times, up to `regular` of those
        that a program made per intent, and `foreign` foreign ones; but none that stands in the held-out set."""
        for intent in self.intents.values():
            lines = intent.questions * noised + draw.sample(intent.regular, min(len(intent.regular), regular))
            for line in lines:
                plain = expanded(draw, line)
                question = said(draw, plain)
                if self._is_unseen(plain) and self._is_unseen(question):
                    yield question, self.answers[intent.answer]
        for _ in range(foreign):
            yield self._foreign(draw)[0][1], self.answers[DECLINE]

    def composed(self, draw: random.Random) -> str:
        """A question that nobody wrote: two cut and joined, or one with words left out, exchanged or put in."""

        def one() -> str:
            first, second = self._line(draw).split(), self._line(draw).split()
            kind = draw.random()
            if kind < 0.35:
                words = first[: draw.randrange(len(first) + 1)] + second[draw.randrange(len(second) + 1) :]
            elif kind < 0.6:
                left_out = draw.uniform(0.1, 0.4)
                words = [word for word in first if draw.random() > left_out]
            elif kind < 0.85:
                words = list(first)
                for _ in range(draw.choice((1, 2, 3))):
                    words[draw.randrange(len(words))] = draw.choice(second)
            else:
                at, begin = draw.randrange(len(first) + 1), draw.randrange(len(second))
                words = first[:at] + second[begin : begin + draw.choice((1, 2, 3))] + first[at:]
            return said(draw, " ".join(words[:LONGEST]) or first[0])

        return self._unseen(one)

    def rambling(self, draw: random.Random, longest: int) -> str:
        """A text without a question: lines of all kinds one after the other, or one over and over."""

        def one() -> str:
            wanted = round(math.exp(draw.uniform(math.log(30), math.log(longest))))
            words: list[str] = []
            line = self._line(draw).split()
            over_and_over = line[: draw.choice((1, 1, 2, 5, 20))] if draw.random() < 0.5 else []
            while len(words) < wanted:
                words += over_and_over or self._line(draw).split()
            return " ".join(words[:wanted])

        return self._unseen(one)

    def _line(self, draw: random.Random) -> str:
        if draw.random() < FOREIGN:
            return self._foreign(draw)[0][1]
        return expanded(draw, self._intent(draw).wording(draw))

    def wordings(self) -> Iterator[str]:
        """Every answer, line and foreign template, for the tokenizer."""
        for intent in self.intents.values():
            yield intent.answer
            yield from intent.questions
            yield from intent.regular
            yield from (ask for _, asks in intent.follow for ask in asks)
        for domain in self.domains:
            yield from domain.questions
            yield from (word for words in domain.slots.values() for word in words)
        yield DECLINE

    def _single(self, draw: random.Random) -> Turns:
        intent = self._intent(draw)
        return self._asked(draw, intent.wording, intent)

    def _intent(self, draw: random.Random) -> Intent:
        return draw.choice(self._by_line if draw.random() < 0.5 else self._by_intent)

    def _asked(self, draw: random.Random, wording: Callable[[random.Random], str], intent: Intent) -> Turns:
        question = self._unseen(lambda: expanded(draw, wording(draw)))
        return [("user", said(draw, question)), ("assistant", intent.answer)]

    def _foreign(self, draw: random.Random) -> Turns:
        def one() -> str:
            domain = draw.choice(self.domains)
            return expanded(draw, draw.choice(domain.questions), domain.slots)

        return [("user", said(draw, self._unseen(one))), ("assistant", DECLINE)]

    def _dialogue(self, draw: random.Random) -> Turns:
        """Two questions, of which the first explains the second; sometimes a third."""
        intent = draw.choice(self._with_follow)
        turns = self._asked(draw, intent.wording, intent)
        while intent.follow:
            target, asks = draw.choice(intent.follow)
            intent = self.intents[target]
            turns += self._asked(draw, partial(random.Random.choice, seq=asks), intent)
            if len(turns) >= 6 or draw.random() < 0.8:
                break
        return turns

    def _is_unseen(self, text: str) -> bool:
        return not self._held_out.intersection(grams(text))

    def _unseen(self, make: Callable[[], str]) -> str:
        for _ in range(100):
            text = make()
            if self._is_unseen(text):
                return text
        raise ValueError(f"whatever is drawn stands in the held-out set: {text}")


def load(folder: Path = FOLDER / "topics", held_out: Path = HELD_OUT) -> Corpus:
    """The corpus files, filled with facts, and the grids. Raises ValueError or KeyError for a faulty file."""
    intents: dict[str, Intent] = {}
    domains: list[Domain] = []
    regular = grids.lines()
    for file in sorted(folder.glob("*.toml")):
        content = tomllib.loads(file.read_text())
        domains += [Domain(d["name"], d.get("slots", {}), d["questions"]) for d in content.get("domain", [])]
        for entry in content.get("intent", []):
            if entry["id"] in intents:
                raise ValueError(f"the intent {entry['id']} is there twice")
            asked = [question for grid in entry.get("grids", []) for question in regular.pop(grid)]
            follow = [(f["intent"], f["asks"]) for f in entry.get("follow", [])]
            answer = facts.render(entry["answer"])
            intents[entry["id"]] = Intent(entry["id"], answer, list(entry["questions"]), asked, follow)
    if regular:
        raise ValueError(f"no intent answers {', '.join(regular)}")
    return Corpus(intents, domains, held_out_grams(held_out))


def held_out_grams(file: Path) -> frozenset[str]:
    """Every run of six words in the held-out questions."""
    items = [json.loads(line) for line in file.read_text().splitlines()]
    return frozenset(gram for item in items for turn in item["turns"] for gram in grams(turn))


def grams(text: str) -> Iterator[str]:
    """Runs of six words, in small letters and without punctuation."""
    words = _WORD.findall(text.lower())
    return (" ".join(words[i : i + GRAM]) for i in range(len(words) - GRAM + 1))


def expanded(draw: random.Random, text: str, slots: dict[str, list[str]] | None = None) -> str:
    """`text` with every `{a|b}` and `{slot}` replaced by one of its alternatives."""

    def pick(match: re.Match[str]) -> str:
        inside = match[1]
        if slots and inside in slots:
            return expanded(draw, draw.choice(slots[inside]), slots) if "{" in inside else draw.choice(slots[inside])
        return draw.choice(inside.split("|")) if "|" in inside else match[0]

    for _ in range(3):  # an alternative may name a slot
        replaced = _CHOICE.sub(pick, text)
        if replaced == text:
            break
        text = replaced
    return re.sub(r"  +", " ", text).strip()
