"""Trains the built-in guide: `scripts/train-builtin-model`. One fixed seed, no network, resumable, with progress.

Every step draws its examples from the seed and its own number, so that an interrupted run goes on as if nothing had
been. What is hard to learn is which answer a question means; to recite it is easy. So most examples end with the first
words of their last answer, and a second head, which only the training has, names the answer where it begins. The
matrices of the layers are trained by Muon (K. Jordan et al., 2024), which needs several times fewer steps here than
AdamW; the rest by AdamW.
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
from scripts.guide.network import Network, Shape
from scripts.guide.tokens import VOCABULARY, Tokens, learnt

ROOT = Path(__file__).parents[2]
OUT = ROOT / "models" / "appliance-guide.gguf"
SEED = 20_261_124
STEPS = 5_000
EXAMPLES = 128  # of a step
RATE = 8e-3  # of embeddings, norms and the second head
MATRIX_RATE = 0.02
WARM_UP = 43  # steps
FLAT = 2_200  # steps before the rate goes down
DECAY = 0.1
DROPOUT = 0.1  # of embeddings
SMOOTHING = 0.05  # of labels
WHICH = 0.5  # weight of naming the answer
CUT = 0.96  # share of the examples that end with the first words of their last answer
FIRST_WORDS = 8  # tokens
ENOUGH, MOST = 1_024, 8_192  # tokens computed at once
SAVE_EVERY = 100
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
    """Token ids of a conversation, which of them are learnt, and the numbers of its answers."""

    ids: list[int]
    learnt: list[bool]
    answers: list[int]


class Run:
    """One training run in `folder`, which holds what a later run resumes from."""

    def __init__(self, folder: Path, *, steps: int, examples: int, layers: int, vocabulary: int) -> None:
        self.folder = folder
        self.steps = steps
        self.examples = examples
        folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(SEED)
        torch.use_deterministic_algorithms(True, warn_only=True)
        self.corpus = corpora.load()
        self.vocabulary = self._vocabulary(vocabulary)
        self.tokens = Tokens(self.vocabulary)
        self.shape = Shape(self.tokens.size, layers=layers)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.network = Network(self.shape, DROPOUT).to(self.device)
        self.which = torch.nn.Linear(self.shape.width, 1 + max(self.corpus.answers.values())).to(self.device)
        self.optimizers = self._optimizers()
        self.progress = Progress()
        self.stopping = False
        self._resume()

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        matrices = [p for p in self.network.layers.parameters() if p.dim() == 2]
        taken = set(map(id, matrices))
        others = [p for p in [*self.network.parameters(), *self.which.parameters()] if id(p) not in taken]
        return [
            torch.optim.Muon(matrices, lr=MATRIX_RATE, momentum=0.95, weight_decay=DECAY),
            torch.optim.AdamW(others, lr=RATE, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
        ]

    def _vocabulary(self, size: int) -> Vocabulary:
        """Learnt once per folder: the network's numbers mean these tokens, whatever the corpus says later."""
        kept = self.folder / "vocabulary.json"
        if kept.exists():
            found = json.loads(kept.read_text())
            return Vocabulary(tuple(found["tokens"]), tuple((a, b) for a, b in found["merges"]))
        say("learning the vocabulary ...")
        made = learnt(sorted(set(self.corpus.wordings())), size)
        kept.write_text(json.dumps({"tokens": made.tokens, "merges": made.merges}))
        return made

    # ── a run ────────────────────────────────────────────────────────────────────────────────────────────────────

    def train(self) -> bool:
        """Goes on to the last step; False when it was told to stop before."""
        said = time.monotonic()
        self.network.train()
        while self.progress.step < self.steps and not self.stopping:
            started = time.monotonic()
            tokens, loss = self.step()
            p = self.progress
            p.step += 1
            p.tokens += tokens
            p.seconds += time.monotonic() - started
            p.loss = loss if math.isnan(p.loss) else 0.98 * p.loss + 0.02 * loss
            if time.monotonic() - said > SAY_SECONDS:
                said = time.monotonic()
                left = p.seconds / p.step * (self.steps - p.step)
                pace = f"{p.tokens / p.seconds:,.0f} tokens/s, {left / 60:.0f} min left"
                say(f"step {p.step:,} of {self.steps:,}, loss {p.loss:.3f}, {pace}")
            if p.step % SAVE_EVERY == 0:
                self.save()
        self.save()
        return self.progress.step >= self.steps

    def step(self) -> tuple[int, float]:
        """One step: (tokens computed, loss)."""
        share = rate(self.progress.step, self.steps)
        for optimizer, full in zip(self.optimizers, (MATRIX_RATE, RATE), strict=True):
            optimizer.zero_grad(set_to_none=True)
            for group in optimizer.param_groups:
                group["lr"] = full * share
        draw = random.Random(f"{SEED} {self.progress.step}")
        rows = [self.example(draw) for _ in range(self.examples)]
        learnt_in_all, answers = sum(sum(row.learnt) for row in rows), sum(len(row.answers) for row in rows)
        loss_in_all, tokens = 0.0, 0
        for part in parts(rows):
            ids, targets, learnt, begins = padded(part, self.device)
            names = torch.tensor([n for row in part for n in row.answers], device=self.device)
            with torch.autocast(self.device, dtype=torch.bfloat16):
                states = self.network(ids, learnt)
                logits, named = self.network.logits(states), self.which(states[begins[learnt]])
            loss = F.cross_entropy(logits.float(), targets[learnt], reduction="sum", label_smoothing=SMOOTHING)
            loss_in_all += loss.item()
            which = F.cross_entropy(named.float(), names, reduction="sum", label_smoothing=SMOOTHING)
            (loss / learnt_in_all + WHICH * which / answers).backward()  # type: ignore[no-untyped-call]
            tokens += ids.numel()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        return tokens, loss_in_all / learnt_in_all

    def example(self, draw: random.Random) -> Example:
        """One conversation."""
        turns = self.corpus.conversation(draw)
        ids, said = self.tokens.conversation(turns)
        if draw.random() < CUT:
            last = max(i for i, (before, now) in enumerate(zip(said, said[1:], strict=False)) if now and not before)
            end = last + 1 + FIRST_WORDS
            ids, said = ids[:end], said[:end]
        return Example(ids, said, [self.corpus.answers[text] for role, text in turns if role == "assistant"])

    # ── between runs ─────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def _checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    def _key(self) -> dict[str, Any]:
        answers = len(self.corpus.answers)
        return {"shape": asdict(self.shape), "examples": self.examples, "seed": SEED, "answers": answers}

    def save(self) -> None:
        partial = self._checkpoint.with_suffix(".partial")
        torch.save(
            {
                "key": self._key(),
                "network": self.network.state_dict(),
                "which": self.which.state_dict(),
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
        self.which.load_state_dict(kept["which"])
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


def rate(step: int, steps: int) -> float:
    """Share of the learning rate: a short way up, a flat part, then straight down to a fiftieth."""
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
    """Inputs, the token that follows each, where that one is to be learnt, and where it begins an answer; padding comes
    last, so that causal attention never sees it. All (rows, longest - 1)."""
    longest = max(len(row.ids) for row in rows)
    table = torch.zeros(len(rows), longest, dtype=torch.long)
    learnt = torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        table[i, : len(row.ids)] = torch.tensor(row.ids)
        learnt[i, : len(row.learnt)] = torch.tensor(row.learnt)
    begins = learnt[:, 1:] & ~learnt[:, :-1]
    return table[:, :-1].to(device), table[:, 1:].to(device), learnt[:, 1:].to(device), begins.to(device)


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
