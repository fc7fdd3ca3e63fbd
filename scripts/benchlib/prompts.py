"""Prompt texts of a wanted length in tokens, never the same twice, so that no cache of an earlier round can help."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

WORDS = (
    "anchor barley candle dipper ember falcon gravel hollow indigo jasper kettle lantern meadow nutmeg ochre pebble "
    "quiver rafter saddle thistle umber velvet walnut yarrow zenith birch copper drift elder fennel"
).split()
SHORT, LONG = 40, 240  # words of the two calls that measure tokens per word


def words(count: int, seed: str) -> str:
    """`count` words that only this seed brings in this order."""
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) for _ in range(count))


@dataclass(frozen=True, slots=True)
class Lengths:
    """How a model's tokenizer sees our words: tokens of the template, and tokens per word."""

    template: float
    per_word: float

    def text(self, tokens: int, seed: str, *, with_template: bool = True) -> str:
        """A text that makes a prompt of about `tokens` tokens, the template's included unless told otherwise."""
        own = tokens - (self.template if with_template else 0)
        return words(max(1, round(own / self.per_word)), seed)


async def measure(prompt_tokens: Callable[[str], Awaitable[int]], run: str) -> Lengths:
    """Two calls of `prompt_tokens`, which says how many tokens the prompt with this text has."""
    short = await prompt_tokens(words(SHORT, f"{run} short"))
    long = await prompt_tokens(words(LONG, f"{run} long"))
    per_word = (long - short) / (LONG - SHORT)
    return Lengths(max(0.0, short - SHORT * per_word), per_word)
