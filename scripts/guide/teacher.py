"""The teacher: a linear classifier of hashed word and character n-grams (Joulin et al., 2016) that names the answer.

It learns in minutes and follows wordings that nobody wrote better than a small transformer does by itself. So the
network learns from it (Hinton et al., 2015): what it makes of questions that are cut and mixed from the written ones.
It is not part of the model.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from scripts.guide.corpus import Corpus

BUCKETS = 1 << 17
EPOCHS = 5
EXAMPLES = 512  # of a step
RATE = 0.5
SMOOTHING = 0.02
NOISED, REGULAR, FOREIGN = 2, 150, 25_000  # copies of a wording; wordings that a program made, per answer; questions

_WORD = re.compile(r"[a-z0-9_./'-]+")


def features(question: str) -> list[int]:
    """Buckets of the question's runs of one to three words, and of two to five characters within a word."""
    words = [word for found in _WORD.findall(question.lower()) if (word := found.strip(".'-/"))]
    grams = {"w" + " ".join(words[i : i + n]) for n in (1, 2, 3) for i in range(len(words) - n + 1)}
    for word in (f" {word} " for word in words):
        grams |= {"c" + word[i : i + n] for n in (2, 3, 4, 5) for i in range(len(word) - n + 1)}
    return [zlib.crc32(gram.encode()) % BUCKETS for gram in sorted(grams)]


class Teacher(torch.nn.Module):
    """Questions to the log-odds of the answers, (questions, answers)."""

    frequent: Tensor

    def __init__(self, answers: int) -> None:
        super().__init__()
        self.weight = torch.nn.EmbeddingBag(BUCKETS, answers, mode="sum", sparse=True)
        torch.nn.init.zeros_(self.weight.weight)
        self.register_buffer("frequent", torch.ones(BUCKETS))  # inverse document frequencies

    def forward(self, questions: Sequence[Sequence[int]]) -> Tensor:
        """`questions` as their features; each question's weights have the length 1."""
        lengths = torch.tensor([len(q) for q in questions])
        buckets = torch.tensor([bucket for q in questions for bucket in q], dtype=torch.long)
        weights = self.frequent[buckets]
        rows = torch.repeat_interleave(torch.arange(len(questions)), lengths)
        norms = torch.zeros(len(questions)).index_add_(0, rows, weights**2).sqrt()
        odds: Tensor = self.weight(buckets, lengths.cumsum(0) - lengths, per_sample_weights=weights / norms[rows])
        return odds

    def shares(self, questions: Sequence[str]) -> Tensor:
        """How likely each answer is meant, (questions, answers)."""
        with torch.no_grad():
            shares: Tensor = self([features(question) for question in questions]).softmax(1)
        return shares


def taught(corpus: Corpus, answers: int, seed: int) -> Teacher:
    """A teacher that has learnt the corpus. Takes three minutes on two cores."""
    draw = random.Random(f"{seed} teacher")
    asked = list(corpus.examples(draw, noised=NOISED, regular=REGULAR, foreign=FOREIGN))
    rows = [(features(question), answer) for question, answer in asked]
    teacher = Teacher(answers)
    found = torch.bincount(torch.tensor([bucket for buckets, _ in rows for bucket in buckets]), minlength=BUCKETS)
    teacher.frequent = torch.log((1 + len(rows)) / (1 + found)) + 1
    optimizer = torch.optim.Adagrad(teacher.weight.parameters(), lr=RATE)
    for epoch in range(EPOCHS):
        draw.shuffle(rows)
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - epoch / EPOCHS)
        for begin in range(0, len(rows), EXAMPLES):
            part = rows[begin : begin + EXAMPLES]
            odds = teacher([buckets for buckets, _ in part])
            loss = F.cross_entropy(odds, torch.tensor([answer for _, answer in part]), label_smoothing=SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return teacher
