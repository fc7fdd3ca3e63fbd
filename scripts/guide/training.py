"""Trains the built-in guide: `scripts/train-builtin-model`. One fixed seed, no network, resumable, with progress.

Every step draws its examples from the seed and its own number, so that an interrupted run goes on as if nothing had
been; with more --steps, a finished run goes on. Most single questions are learnt with the first words of their answer
only: these decide which answer it is, and the rest is recited.
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
from collections.abc import Sequence
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
STEPS = 2_620
EXAMPLES = 48  # of a step
RATE = 2.5e-3
WARM_UP = 0.03  # share of the steps
DECAY = 0.1
DROPOUT = 0.1
SMOOTHING = 0.05  # of labels
CUT = 0.75  # share of the single questions that are learnt with the first words of their answer only
FIRST_WORDS = 14  # tokens
SAVE_EVERY = 100
SAY_SECONDS = 10.0


@dataclass(slots=True)
class Progress:
    """What is kept between runs, and reported at the end."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loss: float = float("nan")  # smoothed


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
        matrices = [p for p in self.network.parameters() if p.dim() == 2]
        vectors = [p for p in self.network.parameters() if p.dim() != 2]
        groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.98), fused=self.device == "cuda")
        self.progress = Progress()
        self.stopping = False
        self._resume()

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
        for group in self.optimizer.param_groups:
            group["lr"] = RATE * rate(self.progress.step, self.steps)
        draw = random.Random(f"{SEED} {self.progress.step}")
        rows = sorted((self.example(draw) for _ in range(self.examples)), key=lambda row: len(row[0]))
        wanted_in_all = sum(sum(said) for _, said in rows)
        loss_in_all, tokens = 0.0, 0
        self.optimizer.zero_grad(set_to_none=True)
        for part in chunks(rows, 4):  # rows of like length together: little is padding
            ids, targets, wanted = padded(part, self.device)
            with torch.autocast(self.device, dtype=torch.bfloat16):
                logits = self.network(ids, wanted)
            loss = F.cross_entropy(logits.float(), targets[wanted], reduction="sum", label_smoothing=SMOOTHING)
            (loss / wanted_in_all).backward()  # type: ignore[no-untyped-call]
            loss_in_all += loss.item()
            tokens += ids.numel()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        return tokens, loss_in_all / wanted_in_all

    def example(self, draw: random.Random) -> tuple[list[int], list[bool]]:
        """Token ids of one conversation, and which of them are to be learnt."""
        turns = self.corpus.conversation(draw)
        ids, said = self.tokens.conversation(turns)
        if len(turns) == 2 and draw.random() < CUT:
            end = said.index(True) + FIRST_WORDS
            ids, said = ids[:end], said[:end]
        return ids, said

    # ── between runs ─────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def _checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    def _key(self) -> dict[str, Any]:
        return {"shape": asdict(self.shape), "examples": self.examples, "seed": SEED}  # more steps may be added

    def save(self) -> None:
        partial = self._checkpoint.with_suffix(".partial")
        torch.save(
            {
                "key": self._key(),
                "network": self.network.state_dict(),
                "optimizer": self.optimizer.state_dict(),
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
        if {k: v for k, v in kept["key"].items() if k != "steps"} != self._key():
            say("the checkpoint is of another run; beginning anew")
            return
        self.network.load_state_dict(kept["network"])
        self.optimizer.load_state_dict(kept["optimizer"])
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
    """Share of the learning rate: a short way up, then half a cosine down to a hundredth."""
    warm = max(1, int(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def chunks(rows: Sequence[Any], count: int) -> list[Sequence[Any]]:
    size = math.ceil(len(rows) / count)
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def padded(rows: Sequence[tuple[list[int], list[bool]]], device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, the token that follows each, and where that one is to be learnt; padding comes last, so that causal
    attention never sees it. All (rows, longest - 1)."""
    longest = max(len(ids) for ids, _ in rows)
    table = torch.zeros(len(rows), longest, dtype=torch.long)
    wanted = torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, (ids, said) in enumerate(rows):
        table[i, : len(ids)] = torch.tensor(ids)
        wanted[i, : len(said)] = torch.tensor(said)
    return table[:, :-1].to(device), table[:, 1:].to(device), wanted[:, 1:].to(device)


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
