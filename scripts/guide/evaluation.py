"""Examines the built-in guide: `scripts/eval-builtin-model`. Asks the frozen held-out questions, by the real engine.

An answer passes when it holds every required fact, claims no command, setting, path or number that the product does
not know, and ends by itself. Questions about anything else pass when they are declined. Every question is asked a
second time with typing errors.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import random
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from appliance.config import EngineSettings
from appliance.messages import Chunk, CompletionRequest, Message, Sampling
from appliance.providers.local import LocalProvider
from scripts.guide import facts
from scripts.guide.corpus import HELD_OUT, Corpus, load
from scripts.guide.wording import mistyped

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "appliance-guide.gguf"
FROZEN = "b319b2ec825f5f35a416dcf505725d0f979ea0f7333914c8fed119b78fcfaa8f"
DEVELOPMENT = HELD_OUT.with_name("development.jsonl")
DECLINES = "cannot answer that"
TYPO_SEED = 7
AT_ONCE = 8
MAX_TOKENS = 300


@dataclass(frozen=True, slots=True)
class Item:
    """One held-out question or dialogue; `must` applies to the last answer: a group is met by any of its texts."""

    id: str
    topic: str
    kind: str
    turns: tuple[str, ...]
    must: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Verdict:
    """One examined item; `problem` is empty when it passed."""

    item: Item
    variant: str  # plain or typos
    said: tuple[str, ...]
    answer: str
    finish: str
    problem: str


def read(file: Path = HELD_OUT) -> list[Item]:
    """The frozen questions. Raises ValueError when the file is not the frozen one."""
    data = file.read_bytes()
    if hashlib.sha256(data).hexdigest() != FROZEN:
        raise ValueError(f"{file} is not the frozen held-out set.")
    return parsed(data)


def parsed(data: bytes) -> list[Item]:
    """The items of a file in the held-out set's form, a JSON object per line."""
    rows = [json.loads(line) for line in data.decode().splitlines()]
    return [
        Item(r["id"], r["topic"], r["kind"], tuple(r["turns"]), tuple(tuple(group) for group in r["must"]))
        for r in rows
    ]


def development(corpus: Corpus, file: Path = DEVELOPMENT) -> list[Item]:
    """Questions to tune on, so that the frozen ones stay unseen: each wants one intent's whole answer."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [
        Item(
            f"d{number}",
            row["intent"].split(".")[0],
            _kind(row["intent"], row["turns"]),
            tuple(row["turns"]),
            ((corpus.intents[row["intent"]].answer,),),
        )
        for number, row in enumerate(rows)
    ]


def _kind(intent: str, turns: Sequence[str]) -> str:
    if len(turns) > 1:
        return "dialogue"
    return {"foreign": "decline", "smalltalk": "smalltalk"}.get(intent.split(".")[0], "answer")


def judged(item: Item, said: Sequence[str], answer: str, finish: str) -> str:
    """What is wrong with an answer; empty when nothing is."""
    if finish != "stop":
        return "does not end"
    if loops(answer):
        return "repeats itself"
    declined = DECLINES in answer
    foreign = item.kind == "decline" or item.topic == "foreign"
    if declined != foreign:
        return "declined" if declined else "not declined"
    text = f" {answer.lower()} "
    missing = [group for group in item.must if not any(option.lower() in text for option in group)]
    if missing:
        return f"lacks {' / '.join(missing[0])}"
    if unknown := facts.unknown_claims(answer, said=" ".join(said)):
        return f"claims {unknown[0]}"
    return ""


def loops(text: str) -> bool:
    """Whether a run of eight words comes three times."""
    words = text.split()
    runs: dict[str, int] = defaultdict(int)
    for i in range(len(words) - 7):
        runs[" ".join(words[i : i + 8])] += 1
    return max(runs.values(), default=0) >= 3


class Examination:
    """Asks a loaded model."""

    def __init__(self, model: Path, temperature: float) -> None:
        self._local = LocalProvider(EngineSettings(slots=AT_ONCE, context=16_384, queue_seconds=3_600))
        self._model = model
        self._sampling = Sampling(temperature=temperature, seed=1)
        self._places = asyncio.Semaphore(AT_ONCE)

    async def run(self, items: Sequence[Item]) -> list[Verdict]:
        self._local.attach(asyncio.get_running_loop())
        self._local.load("guide", self._model)
        try:
            asked = [self._examined(item, variant) for item in items for variant in ("plain", "typos")]
            return await asyncio.gather(*asked)
        finally:
            self._local.close()

    async def _examined(self, item: Item, variant: str) -> Verdict:
        draw = random.Random(f"{TYPO_SEED} {item.id}")
        said = item.turns if variant == "plain" else tuple(mistyped(draw, turn, 1.0) for turn in item.turns)
        messages: list[Message] = []
        answer = finish = ""
        async with self._places:
            for turn in said:
                messages.append(Message("user", turn))
                answer, finish = await self._answer(messages)
                messages.append(Message("assistant", answer))
        return Verdict(item, variant, said, answer, finish, judged(item, said, answer, finish))

    async def _answer(self, messages: list[Message]) -> tuple[str, str]:
        request = CompletionRequest(tuple(messages), "exam", sampling=self._sampling, max_tokens=MAX_TOKENS)
        chunks: list[Chunk] = [chunk async for chunk in self._local.complete(request)]
        return "".join(c.text for c in chunks), chunks[-1].finish_reason or ""


def table(verdicts: Sequence[Verdict]) -> str:
    """Scores per topic, plain and with typing errors, in Markdown."""
    rows = ["| topic | questions | plain | with typing errors |", "|---|--:|--:|--:|"]
    for name, chosen in groups(verdicts).items():
        plain, typos = ([v for v in chosen if v.variant == variant] for variant in ("plain", "typos"))
        rows.append(f"| {name} | {len(plain)} | {share(plain)} | {share(typos)} |")
    return "\n".join(rows)


def groups(verdicts: Sequence[Verdict]) -> dict[str, list[Verdict]]:
    """By what they count for: the kinds in all, then the topics."""
    found = {
        "**answers**": [v for v in verdicts if v.item.kind == "answer"],
        "**declined**": [v for v in verdicts if v.item.kind == "decline"],
        "**small talk**": [v for v in verdicts if v.item.kind == "smalltalk"],
        "**dialogues**": [v for v in verdicts if v.item.kind == "dialogue"],
    }
    for topic in sorted({v.item.topic for v in verdicts}):
        found[topic] = [v for v in verdicts if v.item.topic == topic and v.item.kind in ("answer", "dialogue")]
    return {name: chosen for name, chosen in found.items() if chosen}


def share(verdicts: Sequence[Verdict]) -> str:
    good = sum(not v.problem for v in verdicts)
    return f"{100 * good / len(verdicts):.1f} %" if verdicts else "-"


def summary(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """The shares that the issue of this model asked for, from 0 to 1, of plainly written questions."""
    plain = [v for v in verdicts if v.variant == "plain"]

    def of(kind: str) -> float:
        chosen = [v for v in plain if v.item.kind == kind]
        return round(sum(not v.problem for v in chosen) / max(1, len(chosen)), 4)

    return {
        "answers": of("answer"),
        "declined": of("decline"),
        "smalltalk": of("smalltalk"),
        "dialogues": of("dialogue"),
        "ended": round(sum(v.finish == "stop" for v in verdicts) / max(1, len(verdicts)), 4),
        "loops": sum(v.problem == "repeats itself" for v in verdicts),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when the examination was held, whatever its result."""
    parser = argparse.ArgumentParser(prog="eval-builtin-model", description="Examine the built-in guide.")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--development", action="store_true", help="the questions to tune on, not the frozen ones")
    parser.add_argument("--items", type=Path, help="other questions than the frozen ones, in the same form")
    parser.add_argument("--failures", type=Path, metavar="FILE", help="writes every failed item as a JSON line")
    parser.add_argument("--json", action="store_true", help="only the summary, as JSON")
    options = parser.parse_args(arguments)
    if options.development:
        items = development(load())
    else:
        items = read() if options.items is None else parsed(options.items.read_bytes())
    verdicts = asyncio.run(Examination(options.model, options.temperature).run(items))
    if options.failures:
        lines = [json.dumps(asdict(v)) for v in verdicts if v.problem]
        options.failures.write_text("".join(f"{line}\n" for line in lines))
    if not options.json:
        print(table(verdicts))
        print()
    print(json.dumps(summary(verdicts)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
