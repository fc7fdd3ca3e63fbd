"""Figures: medians with their spreads, ratios pair by pair, goals and the table. Pure; measures nothing."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

Verdict = Literal["met", "within the spread", "missed", "not measured", ""]


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, smallest and largest of some measurements."""

    median: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        if self.count == 1:
            return number(self.median)
        return f"{number(self.median)} ({number(self.low)}–{number(self.high)})"


def spread(values: Sequence[float]) -> Spread:
    """Raises ValueError for no values."""
    if not values:
        raise ValueError("a spread needs a value")
    return Spread(statistics.median(values), min(values), max(values), len(values))


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Pair by pair, so that a slow minute of the machine touches both sides of a ratio."""
    if len(ours) != len(theirs):
        raise ValueError("pairs need as many measurements of one as of the other")
    return [a / b for a, b in zip(ours, theirs, strict=True) if b]


def quantile(values: Sequence[float], q: float) -> float:
    """The value at rank `q` (0 to 1), linear between neighbours. Raises ValueError for no values."""
    if not values:
        raise ValueError("a quantile needs a value")
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def number(value: float) -> str:
    """Three significant digits, never in scientific notation."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}" if abs(value) >= 1 else f"{value:.3f}"


@dataclass(frozen=True, slots=True)
class Goal:
    """What a figure must reach. `lenient` accepts it when the goal lies inside the spread."""

    limit: float
    at_least: bool = True
    lenient: bool = False

    def __str__(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.limit:g}"

    def judge(self, value: Spread) -> Verdict:
        """The median decides."""
        if self.reached(value.median):
            return "met"
        best = value.high if self.at_least else value.low
        return "within the spread" if self.lenient and self.reached(best) else "missed"

    def reached(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. The goal is judged on the ratio where there is one, else on our figure."""

    scenario: str
    what: str
    unit: str
    ours: tuple[float, ...] = ()
    peer: tuple[float, ...] = ()
    peer_name: str = ""
    ratio: tuple[float, ...] = ()
    goal: Goal | None = None
    goal_on_ratio: bool = True
    note: str = ""

    @property
    def verdict(self) -> Verdict:
        if self.goal is None:
            return ""
        judged = self.ratio if self.goal_on_ratio else self.ours
        return self.goal.judge(spread(judged)) if judged else "not measured"

    def as_json(self) -> dict[str, Any]:
        """All measurements, their spreads and the verdict."""
        shown: dict[str, Any] = {k: v for k, v in asdict(self).items() if v not in ((), "", None)}
        shown["goal"] = asdict(self.goal) if self.goal else None
        shown["verdict"] = self.verdict
        for name in ("ours", "peer", "ratio"):
            if values := getattr(self, name):
                shown[name] = {**asdict(spread(values)), "values": [round(v, 6) for v in values]}
        return shown


def compared(row: Row, ours: Sequence[float], theirs: Sequence[float], peer_name: str, *, inverse: bool = False) -> Row:
    """`row` with both sides and their ratio, ours to theirs; `inverse` where less is better ("times shorter")."""
    pairs: list[float] = []
    if theirs:
        pairs = ratios(theirs, ours) if inverse else ratios(ours, theirs)
    name = peer_name if theirs else ""
    return replace(row, ours=tuple(ours), peer=tuple(theirs), peer_name=name, ratio=tuple(pairs))


HEADINGS = ("scenario", "figure", "ours", "peer", "ratio", "goal", "")


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text: median (smallest–largest) of every figure; notes below."""
    lines = [HEADINGS, *(_cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADINGS))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    text.insert(1, "  ".join("-" * width for width in widths))
    notes: dict[str, list[str]] = {}
    for row in rows:
        if row.note:
            notes.setdefault(row.note, []).append(f"{row.scenario}, {row.what}")
    return "\n".join([*text, *(f"{'; '.join(figures)}: {note}" for note, figures in notes.items())])


def _cells(row: Row) -> tuple[str, ...]:
    def side(values: tuple[float, ...]) -> str:
        return str(spread(values)) if values else "-"

    goal = "" if row.goal is None else f"{row.goal}{' ×' if row.goal_on_ratio else ''}"
    peer = f"{side(row.peer)} {row.peer_name}".strip()
    return (row.scenario, f"{row.what}, {row.unit}", side(row.ours), peer, side(row.ratio), goal, row.verdict)
