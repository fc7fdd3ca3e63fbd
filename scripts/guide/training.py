"""Trains the built-in guide: `scripts/train-builtin-model`. One fixed seed, no network, resumable, with progress.

Every step draws its examples from the seed and its own number, so that an interrupted run goes on as if nothing had
been. What is hard to learn is which answer a question means; to recite it is easy. So an answer begins with a token
that names it, and most examples end soon after. A linear teacher says how much each answer is meant, also of questions
that nobody wrote. The matrices of the layers are trained by Muon (K. Jordan et al., 2024), which needs several times
fewer steps here than AdamW; the rest by AdamW.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from appliance.tinymodel import Vocabulary
from scripts.guide import corpus as corpora
from scripts.guide import export
from scripts.guide.corpus import DECLINE, Turns
from scripts.guide.network import Network, Shape
from scripts.guide.teacher import Teacher, taught
from scripts.guide.tokens import VOCABULARY, Tokens, learnt

ROOT = Path(__file__).parents[2]
OUT = ROOT / "models" / "appliance-guide.gguf"
SEED = 20_261_124
STEPS = 5_000
EXAMPLES = 128  # of a step
RATE = 8e-3  # of embeddings and norms
MATRIX_RATE = 0.02
WARM_UP = 43  # steps
FLAT = 2_200  # steps before the rate goes down
DECAY = 0.1
DROPOUT = 0.1  # of embeddings
SMOOTHING = 0.05  # of labels
TEACHER = 0.7  # how much of what is to be learnt of a single question comes from the teacher
COMPOSED = 0.25  # share of the questions that nobody wrote
RECITING = 0.5  # weight of an answer's text beside its name
LAST = 0.028  # share of further steps, in which most answers are recited to their end, at a rate of their own
LAST_RATE, LAST_CUT = 0.3, 0.4
RAMBLING, LONGEST = 8, 1_500  # examples of a last step that are long texts without a question; words
PAGE = 150  # characters
CUT = 0.97  # share of the examples that end with the first words of their answer
FIRST_WORDS = 2  # tokens, the name among them
ENOUGH, MOST = 1_024, 8_192  # tokens computed at once
SAVE_EVERY = 200
SAY_SECONDS = 10.0


@dataclass(slots=True)
class Progress:
    """What is kept between runs, and reported at the end."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loss: float = float("nan")  # smoothed


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids of a conversation and its answer; `said` is how many of them are the answer's, its name the first."""

    ids: list[int]
    said: int
    shares: Tensor  # how much each answer is meant, (answers,)


class Run:
    """One training run in `folder`, which holds what a later run resumes from."""

    def __init__(self, folder: Path, *, steps: int, examples: int, layers: int, vocabulary: int) -> None:
        self.folder = folder
        self.steps = steps
        self.last = round(LAST * steps)
        self._examples = examples
        folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(SEED)
        torch.use_deterministic_algorithms(True, warn_only=True)
        self.corpus = corpora.load()
        self.answers = 1 + max(self.corpus.answers.values())
        self.vocabulary = self._vocabulary(vocabulary)
        self.tokens = Tokens(self.vocabulary)
        self.teacher = self._teacher()
        self.shape = Shape(self.tokens.size, layers=layers)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.network = Network(self.shape, DROPOUT).to(self.device)
        self.optimizers = self._optimizers()
        self.progress = Progress()
        self.stopping = False
        self._resume()

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        matrices = [p for p in self.network.layers.parameters() if p.dim() == 2]
        taken = set(map(id, matrices))
        others = [p for p in self.network.parameters() if id(p) not in taken]
        return [
            torch.optim.Muon(matrices, lr=MATRIX_RATE, momentum=0.95, weight_decay=DECAY),
            torch.optim.AdamW(others, lr=RATE, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
        ]

    def _vocabulary(self, size: int) -> Vocabulary:
        """Learnt once per folder: the network's numbers mean these tokens, whatever the corpus says later."""
        kept = self.folder / "vocabulary.json"
        if kept.exists():
            found = json.loads(kept.read_text())
            merges = tuple((a, b) for a, b in found["merges"])
            return Vocabulary(tuple(found["tokens"]), merges, found["control"])
        say("learning the vocabulary ...")
        made = learnt(sorted(set(self.corpus.wordings())), self.answers, size)
        kept.write_text(json.dumps(asdict(made)))
        return made

    def _teacher(self) -> Teacher:
        """Taught once per folder, too."""
        kept, teacher = self.folder / "teacher.pt", Teacher(self.answers)
        if kept.exists():
            teacher.load_state_dict(torch.load(kept, weights_only=True))
            return teacher
        say("teaching the teacher ...")
        started = time.monotonic()
        teacher = taught(self.corpus, self.answers, SEED)
        say(f"the teacher learnt for {time.monotonic() - started:.0f} s")
        torch.save(teacher.state_dict(), kept)
        return teacher

    # ── a run ────────────────────────────────────────────────────────────────────────────────────────────────────

    def train(self) -> bool:
        """Goes on to the last step; False when it was told to stop before."""
        said = time.monotonic()
        self.network.train()
        while self.progress.step < self.steps + self.last and not self.stopping:
            started = time.monotonic()
            tokens, loss = self.step()
            p = self.progress
            p.step += 1
            p.tokens += tokens
            p.seconds += time.monotonic() - started
            p.loss = loss if math.isnan(p.loss) else 0.98 * p.loss + 0.02 * loss
            if time.monotonic() - said > SAY_SECONDS:
                said = time.monotonic()
                left = p.seconds / p.step * (self.steps + self.last - p.step)
                pace = f"{p.tokens / p.seconds:,.0f} tokens/s, {left / 60:.0f} min left"
                say(f"step {p.step:,} of {self.steps + self.last:,}, loss {p.loss:.3f}, {pace}")
            if p.step % SAVE_EVERY == 0:
                self.save()
        self.save()
        return self.progress.step >= self.steps + self.last

    def step(self) -> tuple[int, float]:
        """One step: (tokens computed, loss)."""
        share = rate(self.progress.step, self.steps, self.last)
        for optimizer, full in zip(self.optimizers, (MATRIX_RATE, RATE), strict=True):
            optimizer.zero_grad(set_to_none=True)
            for group in optimizer.param_groups:
                group["lr"] = full * share
        draw = random.Random(f"{SEED} {self.progress.step}")
        rows = self.examples(draw)
        words = sum(row.said - 1 for row in rows)
        loss_in_all, tokens = 0.0, 0
        for part in parts(rows):
            ids, targets, said, names = padded(part, self.device)
            with torch.autocast(self.device, dtype=torch.bfloat16):
                logits = self.network.logits(self.network(ids, said)).float()
            named, recited = names[said], ~names[said]
            first = self.tokens.first_answer
            shares = torch.stack([row.shares for row in part]).to(self.device)
            which = -(shares * F.log_softmax(logits[named], 1)[:, first : first + self.answers]).sum() / len(rows)
            text = F.cross_entropy(logits[recited], targets[said][recited], reduction="sum", label_smoothing=SMOOTHING)
            loss = which + RECITING * text / words
            loss.backward()  # type: ignore[no-untyped-call]
            loss_in_all += loss.item()
            tokens += ids.numel()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        return tokens, loss_in_all

    def examples(self, draw: random.Random) -> list[Example]:
        """Those of one step."""
        composed = round(COMPOSED * self._examples)
        written = [self.corpus.conversation(draw) for _ in range(self._examples - composed)]
        if self.progress.step >= self.steps:
            written[:RAMBLING] = [
                [("user", self.corpus.rambling(draw, LONGEST)), ("assistant", DECLINE)] for _ in range(RAMBLING)
            ]
        questions = [self.corpus.composed(draw) for _ in range(composed)]
        singles = [turns[0][1] for turns in written if self._is_single(turns)]
        meant = iter(self.teacher.shares(singles + questions))
        rows = [self.example(draw, turns, next(meant) if self._is_single(turns) else None) for turns in written]
        for question, shares in zip(questions, meant, strict=True):
            rows.append(Example([*self.tokens.prompt([("user", question)]), self.tokens.first_answer], 1, shares))
        return rows

    def _is_single(self, turns: Turns) -> bool:
        """Whether the teacher understands it: one question, and not a whole page."""
        return len(turns) == 2 and len(turns[0][1]) < PAGE

    def example(self, draw: random.Random, turns: Turns, meant: Tensor | None) -> Example:
        """A conversation as it is written; earlier answers in it are without their names, as clients send them back.
        `meant` is what the teacher makes of it."""
        *before, (_, text) = turns
        number = self.corpus.answers[text]
        answer = self.tokens.answer(number, text)
        if draw.random() < (CUT if self.progress.step < self.steps else LAST_CUT):
            answer = answer[:FIRST_WORDS]
        shares = torch.full((self.answers,), SMOOTHING / self.answers)
        shares[number] += 1 - SMOOTHING
        if meant is not None:
            shares = (1 - TEACHER) * shares + TEACHER * meant
        return Example(self.tokens.prompt(before) + answer, len(answer), shares)

    # ── between runs ─────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def _checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    def _key(self) -> dict[str, Any]:
        return {"shape": asdict(self.shape), "examples": self._examples, "seed": SEED, "answers": self.answers}

    def save(self) -> None:
        partial = self._checkpoint.with_suffix(".partial")
        torch.save(
            {
                "key": self._key(),
                "network": self.network.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "progress": asdict(self.progress),
                "random": torch.get_rng_state(),
            },
            partial,
        )
        partial.replace(self._checkpoint)

    def _resume(self) -> None:
        if not self._checkpoint.exists():
            return
        kept = torch.load(self._checkpoint, map_location=self.device, weights_only=True)
        if kept["key"] != self._key():
            say("the checkpoint is of another run; beginning anew")
            return
        self.network.load_state_dict(kept["network"])
        for optimizer, state in zip(self.optimizers, kept["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.progress = Progress(**kept["progress"])
        torch.set_rng_state(kept["random"].cpu())
        say(f"resuming at step {self.progress.step:,}")

    def stop(self, number: int, frame: FrameType | None) -> None:
        say("stopping after this step; the same command goes on from here")
        self.stopping = True

    def write(self, path: Path) -> None:
        weights = {name: value.detach().cpu() for name, value in self.network.state_dict().items()}
        export.write(path, weights, self.shape, self.vocabulary)


def rate(step: int, steps: int, last: int) -> float:
    """Share of the learning rate: a short way up, a flat part, then straight down to a fiftieth; the last steps have
    their own."""
    if step >= steps:
        return LAST_RATE * (1 - (step - steps) / (last + 1))
    flat = min(FLAT, steps // 2)
    return min(1.0, (step + 1) / WARM_UP) * (0.02 + 0.98 * min(1.0, (steps - step) / (steps - flat)))


def parts(rows: Sequence[Example]) -> Iterator[list[Example]]:
    """Rows of like length together, so that little is padding."""
    part: list[Example] = []
    for row in sorted(rows, key=lambda row: len(row.ids)):
        places = (len(part) + 1) * len(row.ids)
        if part and (places > MOST or (places > ENOUGH and len(row.ids) > 1.3 * len(part[0].ids))):
            yield part
            part = []
        part.append(row)
    if part:
        yield part


def padded(rows: Sequence[Example], device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs, the token that follows each, where that one is the answer's, and where its name; padding comes last, so
    that causal attention never sees it. All (rows, longest - 1)."""
    longest = max(len(row.ids) for row in rows)
    table = torch.zeros(len(rows), longest, dtype=torch.long)
    said, names = torch.zeros_like(table, dtype=torch.bool), torch.zeros_like(table, dtype=torch.bool)
    for i, row in enumerate(rows):
        begin, end = len(row.ids) - row.said, len(row.ids)
        table[i, :end] = torch.tensor(row.ids)
        said[i, begin:end] = True
        names[i, begin] = True
    return table[:, :-1].to(device), table[:, 1:].to(device), said[:, 1:].to(device), names[:, 1:].to(device)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def report(run: Run, out: Path) -> dict[str, Any]:
    """What the models page says of the training."""
    p = run.progress
    return {
        "parameters": run.network.parameters_in_all,
        "steps": p.step,
        "tokens": p.tokens,
        "loss": round(p.loss, 4),
        "minutes": round(p.seconds / 60, 1),
        "tokens_per_second": round(p.tokens / p.seconds),
        "device": run.device,
        "threads": torch.get_num_threads(),
        "intents": len(run.corpus.intents),
        "wordings": sum(1 for _ in run.corpus.wordings()),
        "bytes": out.stat().st_size,
        "sha256": hashlib.sha256(out.read_bytes()).hexdigest(),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when the model is written; 130 when it was interrupted and can be resumed."""
    parser = argparse.ArgumentParser(prog="train-builtin-model", description="Train the built-in guide from scratch.")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--work", type=Path, default=ROOT / ".guide", help="where an interrupted run is kept")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--examples", type=int, default=EXAMPLES, help="of a step")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--layers", type=int, default=Shape(0).layers, help="fewer for trying things")
    options = parser.parse_args(arguments)
    run = Run(
        options.work,
        steps=options.steps,
        examples=options.examples,
        layers=options.layers,
        vocabulary=options.vocabulary,
    )
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, run.stop)
    say(f"{run.network.parameters_in_all:,} parameters, {len(run.corpus.intents)} intents, on {run.device}")
    if not run.train():
        return 130
    run.write(options.out)
    print(json.dumps(report(run, options.out), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
