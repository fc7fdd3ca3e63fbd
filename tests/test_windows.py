"""Windows of calls: exact at every edge, charged all or none, and never generous when the clock is set."""

from __future__ import annotations

import calendar
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.access.windows import NAMES, Limits, Payer, View, Windows, bounds
from appliance.errors import MonthlyLimitReached, RateLimited

COMMUNITY = Payer("a", Limits(20, 200, 1_000))


def at(text: str) -> int:
    return calendar.timegm(datetime.fromisoformat(text).replace(tzinfo=UTC).timetuple())


NOON = at("2026-03-10T12:00:00")


@pytest.mark.parametrize(
    ("window", "now", "start", "end"),
    [
        ("minute", "2026-03-10T12:00:59", "2026-03-10T12:00:00", "2026-03-10T12:01:00"),
        ("hour", "2026-03-10T12:59:59", "2026-03-10T12:00:00", "2026-03-10T13:00:00"),
        ("month", "2026-03-31T23:59:59", "2026-03-01T00:00:00", "2026-04-01T00:00:00"),
        ("month", "2026-12-31T23:59:59", "2026-12-01T00:00:00", "2027-01-01T00:00:00"),
        ("month", "2028-02-29T10:00:00", "2028-02-01T00:00:00", "2028-03-01T00:00:00"),
        ("month", "2027-02-28T10:00:00", "2027-02-01T00:00:00", "2027-03-01T00:00:00"),
    ],
)
def test_windows_are_fixed_and_aligned_to_utc(window: str, now: str, start: str, end: str) -> None:
    assert bounds(window, at(now) + 0.9) == (at(start), at(end))


@given(st.sampled_from(NAMES), st.floats(0, 4e9))
def test_every_moment_lies_in_its_window_and_the_next_begins_where_it_ends(window: str, now: float) -> None:
    start, end = bounds(window, now)
    assert start <= now < end
    assert bounds(window, end)[0] == end


def test_exactly_as_many_as_the_limit_and_remaining_counts_down() -> None:
    windows = Windows()
    shown = []
    for _ in range(20):
        windows.take([COMMUNITY], NOON)
        view = windows.view([COMMUNITY], NOON)
        assert view is not None
        shown.append(view.remaining)
    assert shown == list(range(19, -1, -1))
    with pytest.raises(RateLimited) as caught:
        windows.take([COMMUNITY], NOON + 12.5)
    assert caught.value.retry_after == 48  # rounded up: at 47 s the minute has half a second left
    windows.take([COMMUNITY], NOON + 60)
    assert windows.used("a", NOON + 60) == {"minute": 1, "hour": 21, "month": 21}


def test_after_the_wait_a_call_succeeds_whatever_was_exhausted() -> None:
    windows = Windows()
    tight = Payer("a", Limits(5, 5, 100))
    for _ in range(5):
        windows.take([tight], NOON)
    with pytest.raises(RateLimited, match="per hour") as caught:
        windows.take([tight], NOON + 1)
    assert caught.value.retry_after == 3_599
    windows.take([tight], NOON + 1 + caught.value.retry_after)


def test_the_months_end_has_its_own_code_and_a_long_wait() -> None:
    windows = Windows()
    few = Payer("a", Limits(None, None, 2))
    for _ in range(2):
        windows.take([few], at("2026-12-31T23:59:58"))
    with pytest.raises(MonthlyLimitReached) as caught:
        windows.take([few], at("2026-12-31T23:59:58") + 0.5)
    assert caught.value.retry_after == 2
    windows.take([few], at("2027-01-01T00:00:00"))


def test_a_refused_call_charges_nobody() -> None:
    windows = Windows()
    key = Payer("key", Limits(minute=1))
    windows.take([COMMUNITY, key], NOON)
    for _ in range(3):
        with pytest.raises(RateLimited):
            windows.take([COMMUNITY, key], NOON)
    assert windows.used("a", NOON)["minute"] == windows.used("key", NOON)["minute"] == 1
    windows.take([COMMUNITY], NOON)  # another key of the account


def test_the_tightest_window_is_shown_of_equals_the_shorter_and_never_one_without_limit() -> None:
    windows = Windows()
    even = Payer("a", Limits(10, 10, None))
    windows.take([even], NOON)
    assert windows.view([even], NOON) == View("minute", 10, 9, NOON + 60, False)
    for _ in range(3):
        windows.take([even], NOON)
    assert windows.view([even], NOON + 60) == View("hour", 10, 6, NOON + 3_600, False)
    assert windows.view([Payer("b", Limits())], NOON) is None
    narrow = Payer("key", Limits(minute=2))
    windows.take([even, narrow], NOON + 60)
    assert windows.view([even, narrow], NOON + 60) == View("minute", 2, 1, NOON + 120, False)


def test_from_four_fifths_of_the_month_it_is_nearly_used_up() -> None:
    windows = Windows()
    month = Payer("a", Limits(month=10))
    for n in range(1, 11):
        windows.take([month], NOON)
        view = windows.view([month], NOON)
        assert view is not None and view.nearly == (n >= 8)


def test_a_charge_is_given_back_only_to_the_windows_it_was_taken_from() -> None:
    windows = Windows()
    charge = windows.take([COMMUNITY], NOON)
    windows.take([COMMUNITY], NOON + 60)
    windows.give_back(charge)
    assert windows.used("a", NOON + 60) == {"minute": 1, "hour": 1, "month": 1}


@pytest.mark.parametrize("step", [-3_600, 3_600])
@pytest.mark.parametrize("now", ["2026-03-31T23:30:00", "2026-04-01T00:20:00", "2026-03-10T12:00:30"])
def test_a_clock_that_is_set_gives_no_second_month(now: str, step: int) -> None:
    """However the clock is set by an hour and back, two months give at most two months' calls."""
    windows = Windows()
    month = Payer("a", Limits(month=100))
    taken = 0
    for moment in (at(now), at(now) + step, at(now), at(now) + step, at(now), at("2026-04-02T00:00:00")):
        for _ in range(150):
            try:
                windows.take([month], moment)
                taken += 1
            except MonthlyLimitReached as error:
                assert error.retry_after is not None and error.retry_after >= 1
    assert taken <= 200


def test_a_restored_count_goes_on_and_what_has_ended_is_forgotten() -> None:
    windows = Windows()
    windows.restore("a", "month", 999, NOON)
    windows.take([COMMUNITY], NOON)
    with pytest.raises(MonthlyLimitReached):
        windows.take([COMMUNITY], NOON)
    windows.forget(NOON)
    assert len(windows) == 1
    windows.forget(at("2026-04-01T00:00:00"))
    assert len(windows) == 0


class Reference:
    """The rule in its plainest form: all calls with their times."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.calls: list[float] = []

    def take(self, now: float) -> bool:
        for window, limit in zip(NAMES, self.limits, strict=True):
            start, end = bounds(window, now)
            if limit is not None and sum(start <= t < end for t in self.calls) >= limit:
                return False
        self.calls.append(now)
        return True


@given(
    st.lists(st.floats(0, 4_000), max_size=80),
    st.tuples(*[st.none() | st.integers(0, 12)] * 3).map(Limits._make),
)
def test_it_counts_as_a_list_of_all_calls_would(pauses: list[float], limits: Limits) -> None:
    windows, reference = Windows(), Reference(limits)
    now = float(at("2026-01-31T20:00:00"))
    for pause in pauses:
        now += pause
        try:
            windows.take([Payer("a", limits)], now)
            allowed = True
        except (RateLimited, MonthlyLimitReached):
            allowed = False
        assert allowed == reference.take(now)
