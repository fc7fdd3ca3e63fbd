"""The prefill budget follows the measured cost of prompt tokens and the goal."""

from __future__ import annotations

from appliance.engine.budget import LARGEST, SMALLEST, PrefillBudget


def learned(goal: float, decode: float, per_token: float, **kwargs: int) -> PrefillBudget:
    budget = PrefillBudget(goal, batch=2_048, ubatch=kwargs.pop("ubatch", 512), **kwargs)
    for _ in range(50):
        budget.observe(8, 0, decode)
        budget.observe(8, 100, decode + 100 * per_token)
    return budget


def test_nobody_decodes_so_the_whole_batch_is_free() -> None:
    assert learned(0.2, 0.02, 0.001).tokens(0) == 2_048


def test_the_step_stays_within_the_goal() -> None:
    assert learned(0.2, 0.05, 0.001).tokens(8) == 2 * 64  # of 150: whole tiles


def test_a_burst_of_arrivals_stretches_the_goal_more_than_one_long_prompt() -> None:
    budget = learned(0.2, 0.05, 0.001, ubatch=4_096)
    assert budget.tokens(8, 1) == 2 * 64  # of 175
    assert budget.tokens(8, 4) == 8 * 64  # of 550
    assert budget.tokens(1, 31) == 14 * 64  # of 950: five times the goal, and not more


def test_a_slow_box_still_advances_and_a_fast_one_is_bounded() -> None:
    assert learned(0.2, 0.5, 0.01).tokens(8) == SMALLEST
    assert learned(0.2, 0.001, 1e-6, ubatch=4_096).tokens(8) == LARGEST


def test_a_mixed_step_fits_one_graph() -> None:
    assert learned(0.6, 0.01, 0.001).tokens(32) == 512 - 32


def test_a_fixed_budget_is_kept() -> None:
    assert learned(0.2, 0.05, 0.001, fixed=77).tokens(8) == 77


def test_before_anything_is_measured_the_budget_is_small() -> None:
    assert PrefillBudget(0.2, batch=2_048, ubatch=512).tokens(1) == SMALLEST
