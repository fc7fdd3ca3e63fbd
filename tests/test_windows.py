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


def test_of_several_payers_one_that_nears_its_month_is_enough_for_the_warning() -> None:
    windows = Windows()
    account, key = Payer("a", Limits(month=10)), Payer("k", Limits(minute=100))
    for _ in range(8):
        charge = windows.take([account, key], NOON)
    assert charge.view == View("month", 10, 2, at("2026-04-01T00:00:00"), True)
    windows.take([key], NOON)
    view = windows.view([Payer("a", Limits(month=10)), Payer("k", Limits(minute=10))], NOON)
    assert view is not None and (view.window, view.nearly) == ("minute", True)


def test_a_charge_knows_what_was_left_when_it_was_taken() -> None:
    windows = Windows()
    views = [windows.take([COMMUNITY], NOON).view for _ in range(20)]
    assert [view.remaining for view in views if view] == list(range(19, -1, -1))


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("step", [-3_600, 3_600])
@pytest.mark.parametrize("now", ["2026-03-31T23:30:00", "2026-04-01T00:20:00", "2026-03-10T12:00:30"])
def test_a_clock_that_is_set_gives_no_second_month(now: str, step: int, restart: bool) -> None:
    """However the clock is set by an hour and back, and the process started again: two months, two allowances."""
    windows = Windows()
    month = Payer("a", Limits(month=100))
    taken = 0
    kept: dict[tuple[str, str], tuple[int, int]] = {}  # as a store keeps the newest window
    for moment in (at(now), at(now) + step, at(now), at(now) + step, at(now), at("2026-04-02T00:00:00")):
        windows.forget(moment)
        if restart:
            windows = Windows()
            for (payer, window), (start, calls) in kept.items():
                windows.restore(payer, window, start, calls, moment)
        for _ in range(150):
            try:
                charge = windows.take([month], moment)
            except MonthlyLimitReached as error:
                assert error.retry_after is not None and error.retry_after >= 1
            else:
                taken += 1
                for payer, window, start in charge.places:
                    before, calls = kept.get((payer, window), (start, 0))
                    if start >= before:
                        kept[payer, window] = (start, calls * (start == before) + 1)
    assert 100 <= taken <= 200


def test_minute_and_hour_follow_a_clock_that_is_set_back_but_keep_what_was_used() -> None:
    windows = Windows()
    three = Payer("a", Limits(minute=3))
    for _ in range(3):
        windows.take([three], NOON + 1_800)
    with pytest.raises(RateLimited) as caught:
        windows.take([three], NOON - 1_800)
    assert caught.value.retry_after == 60
    windows.take([three], NOON - 1_740)


def test_a_clock_that_was_far_ahead_does_not_lock_anybody_out() -> None:
    windows = Windows()
    few = Payer("a", Limits(month=1))
    windows.take([few], at("2031-01-01T00:00:00"))
    with pytest.raises(MonthlyLimitReached):
        windows.take([few], NOON)
    windows.take([few], at("2026-04-01T00:00:00"))
    restarted = Windows()
    restarted.restore("a", "month", at("2031-01-01T00:00:00"), 1, NOON)
    restarted.take([few], NOON)


def test_a_restored_count_goes_on_and_what_has_long_ended_is_forgotten() -> None:
    windows = Windows()
    windows.restore("a", "month", at("2026-03-01T00:00:00"), 999, NOON)
    windows.restore("a", "hour", NOON - 7_200, 200, NOON)
    windows.take([COMMUNITY], NOON)
    with pytest.raises(MonthlyLimitReached):
        windows.take([COMMUNITY], NOON)
    windows.take([Payer("address", Limits(minute=5))], NOON)
    assert len(windows) == 2
    windows.forget(at("2026-03-12T12:00:00"))
    assert len(windows) == 1, "whose longest limit is a minute is soon forgotten"
    windows.forget(at("2026-04-01T23:59:59"))
    assert len(windows) == 1, "an hour's step back would still come into that month"
    windows.forget(at("2026-04-02T00:00:00"))
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


def test_tokens_of_a_day_refuse_until_the_next_and_show_the_day() -> None:
    windows, now = Windows(), 1_773_144_000
    key = Payer("key", Limits(minute=50), tokens=100)
    windows.take([key], now)
    windows.spend([key], 99, now)
    windows.take([key], now)  # it begins below the limit
    windows.spend([key], 30, now)
    with pytest.raises(RateLimited, match="tokens per day") as refused:
        windows.take([key], now)
    assert refused.value.retry_after == 86_400 - now % 86_400 and refused.value.window == "day"
    shown = windows.view([key], now, refused=True)
    assert shown is not None and (shown.window, shown.limit, shown.remaining) == ("day", 100, 0)
    assert shown.reset == now + refused.value.retry_after
    windows.take([key], shown.reset)
    windows.spend([key], 100, shown.reset)
    with pytest.raises(RateLimited):
        windows.take([key], shown.reset - 3_600)  # a clock that was set back gives nothing back
    windows.forget(shown.reset + 2 * 86_400)
    windows.take([key], shown.reset + 2 * 86_400)
