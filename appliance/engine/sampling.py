"""Draws tokens from logits, in NumPy on the rows that llama.cpp computed (which it may change in place).

The order is: constraint mask, logit bias, penalties, temperature, top-k, top-p, min-p, draw. Top-k over a vocabulary of
128,000 without sorting it: the row is folded to one maximum per column; the k-th largest of these bounds the k-th
largest of the row from below, so that only a few values remain to be sorted. Owns no state but each choice's generator.
"""

from __future__ import annotations

import math
import random
import secrets
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from appliance.errors import InternalError
from appliance.messages import Sampling

Row = NDArray[np.float32]
Ids = NDArray[np.int64]

FOLD = 64  # rows of the folded view
FEW = 256
FIRST_NUCLEUS = 256  # candidates that nearly always hold the whole top-p nucleus

COLDEST = 1e-5  # below it nothing but the likeliest token has a share that a float can tell


class Sampler:
    """One choice's way of drawing: its settings and its random generator."""

    __slots__ = ("_bias_ids", "_bias_values", "_penalised", "_random", "settings")

    def __init__(self, settings: Sampling, *, choice: int = 0) -> None:
        self.settings = settings
        seed = secrets.randbits(64) if settings.seed is None else settings.seed
        self._random = random.Random(f"{seed} {choice}")
        self._bias_ids = np.array([i for i, _ in settings.logit_bias], np.int64)
        self._bias_values = np.array([v for _, v in settings.logit_bias], np.float32)
        s = settings
        self._penalised = s.repeat_penalty != 1.0 or s.frequency_penalty != 0.0 or s.presence_penalty != 0.0

    def draw(self, row: Row, history: NDArray[np.int32], allowed: NDArray[np.bool_] | None = None) -> int:
        """A token id. `row` has shape (n_vocab,) and is changed; `allowed` has the same shape; `history` precedes."""
        if allowed is not None:
            row[: len(allowed)][~allowed] = -np.inf
        if len(self._bias_ids):
            row[self._bias_ids] += self._bias_values
        if self._penalised:
            self._penalise(row, history)
        s = self.settings
        if s.temperature < COLDEST:
            return greedy(row)
        if not s.top_k and s.top_p == 1.0 and s.min_p == 0.0:
            return self._pick_of_all(row)
        return self._pick(*self._candidates(row))

    def _penalise(self, row: Row, history: NDArray[np.int32]) -> None:
        s = self.settings
        ids, counts = np.unique(history[-s.penalty_last_n :] if s.penalty_last_n else history[:0], return_counts=True)
        values = row[ids]
        values = np.where(values > 0, values / s.repeat_penalty, values * s.repeat_penalty)
        row[ids] = values - counts.astype(np.float32) * s.frequency_penalty - s.presence_penalty

    def _candidates(self, row: Row) -> tuple[Ids, Row, float]:
        """Every token that top-k, top-p and min-p may leave: ids and temperature-scaled logits, largest first, and the
        probability mass that top-p refers to, in units of the likeliest token's (0: that of these candidates)."""
        s = self.settings
        scale = np.float32(1.0 / s.temperature)
        if s.top_k:
            ids, logits = top(row, s.top_k)
            return ids, logits * scale, 0.0
        scaled = row * scale
        mass = float(np.exp(scaled - scaled.max()).sum(dtype=np.float64)) if s.top_p < 1.0 else 0.0
        if s.min_p > 0.0:
            ids = np.flatnonzero(scaled >= scaled.max() + np.log(s.min_p))
            ids = ids[np.argsort(-scaled[ids], kind="stable")]
        else:
            ids = nucleus(scaled, s.top_p * mass)
        return ids, scaled[ids], mass

    def _pick_of_all(self, row: Row) -> int:
        """Where nothing limits the choice."""
        weights = np.exp((row - row.max()) * np.float32(1.0 / self.settings.temperature), dtype=np.float64)
        cumulative = weights.cumsum()
        if not math.isfinite(cumulative[-1]):
            raise InternalError("The model produced no usable probabilities.")
        index = int(cumulative.searchsorted(self._random.random() * cumulative[-1], side="right"))
        return min(index, len(weights) - 1)

    def _pick(self, ids: Ids, logits: Row, mass: float) -> int:
        """One of the candidates. Of few, lists are faster than arrays: the caches are cold after the weights."""
        s = self.settings
        weights: list[float] | NDArray[np.float64]
        cumulative: list[float] | NDArray[np.float64]
        if not len(ids):
            raise InternalError("The model produced no usable probabilities.")
        if len(ids) > FEW:
            many = np.exp(logits - logits[0], dtype=np.float64)
            weights, cumulative = many, many.cumsum()
        else:
            values = logits.tolist()
            weights = [math.exp(value - values[0]) for value in values]
            cumulative = list(accumulate(weights))
        if not math.isfinite(cumulative[-1]):
            raise InternalError("The model produced no usable probabilities.")
        keep = len(weights)
        if s.top_p < 1.0:
            keep = min(keep, bisect_left(cumulative, s.top_p * (mass or cumulative[-1])) + 1)
        while weights[keep - 1] < s.min_p:
            keep -= 1
        return int(ids[min(bisect_right(cumulative, self._random.random() * cumulative[keep - 1]), keep - 1)])


def greedy(row: Row) -> int:
    """The likeliest token; of equals the lowest id."""
    token = int(row.argmax())
    if not np.isfinite(row[token]):
        raise InternalError("The model produced no usable probabilities.")
    return token


def top(row: Row, k: int) -> tuple[Ids, Row]:
    """Ids and values of the `k` largest entries, largest first, equals by lowest id. Exact; linear, without a sort."""
    n = len(row)
    if k >= n:
        ids = np.argsort(-row, kind="stable")
        return ids, row[ids]
    ids = _hopeful(row, k)
    if not len(ids):
        ids = np.flatnonzero(row > -np.inf)  # masked: few are left
    ids = ids[np.argsort(-row[ids], kind="stable")][:k]
    return ids, row[ids]


def _hopeful(row: Row, k: int) -> Ids:
    """Ids, ascending, among which the `k` largest are; none where too few of the row are finite to tell."""
    columns = len(row) // FOLD
    if k < columns // 2:
        folded = row[: columns * FOLD].reshape(FOLD, columns).max(axis=0)
    else:
        folded = row.copy()
    folded.partition(len(folded) - k)
    bound = folded[-k]
    return (row >= bound).nonzero()[0] if bound > -np.inf else np.empty(0, np.int64)


def nucleus(scaled: Row, mass: float) -> Ids:
    """The likeliest tokens that together hold at least `mass`, in units of the likeliest token's weight."""
    k = FIRST_NUCLEUS
    while True:
        ids, logits = top(scaled, k)
        if len(ids) < k or np.exp(logits - logits[0], dtype=np.float64).sum() >= mass:
            return ids
        k *= 8


def log_sum_exp(row: Row) -> float:
    """log(sum(exp(row))), stable."""
    largest = float(row.max())
    return largest + float(np.log(np.exp(row - np.float32(largest)).sum(dtype=np.float64)))


def log_probabilities(
    row: Row, tokens: Sequence[int], alternatives: int
) -> tuple[list[float], list[tuple[int, float]]]:
    """Natural-log probabilities of `tokens` and of the likeliest `alternatives` under the unmodified `row`."""
    total = log_sum_exp(row)
    chosen = [float(row[t]) - total for t in tokens]
    if not alternatives:
        return chosen, []
    ids, values = top(row, alternatives)
    return chosen, [(int(i), float(v) - total) for i, v in zip(ids, values, strict=True)]
