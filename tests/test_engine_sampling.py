"""Drawing tokens: against plain definitions written with sorts and loops."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from appliance.engine.sampling import Sampler, greedy, log_probabilities, log_sum_exp, top
from appliance.errors import InternalError
from appliance.messages import Sampling

NO_HISTORY = np.empty(0, np.int32)


def logits(seed: int, size: int, spread: float = 3.0) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).normal(size=size) * spread).astype(np.float32)


def draws(
    sampling: Sampling, row: NDArray[np.float32], n: int = 2_000, **kwargs: NDArray[np.int32]
) -> NDArray[np.int64]:
    sampler = Sampler(sampling)
    drawn = [sampler.draw(row.copy(), kwargs.get("history", NO_HISTORY)) for _ in range(n)]
    return np.array(drawn, np.int64)


def softmax(row: NDArray[np.float32]) -> NDArray[np.float64]:
    weights: NDArray[np.float64] = np.exp(row.astype(np.float64) - row.max())
    weights /= weights.sum()
    return weights


def allowed_by(s: Sampling, row: NDArray[np.float32]) -> set[int]:
    """The tokens that may be drawn, by the textbook: temperature, top-k, top-p, min-p."""
    p = softmax(row / np.float32(s.temperature))
    order = np.argsort(-p, kind="stable")[: s.top_k or len(p)]
    kept = p[order] / p[order].sum() if s.top_k else p[order]
    n = int(np.searchsorted(np.cumsum(kept), s.top_p)) + 1 if s.top_p < 1 else len(order)
    order, kept = order[:n], kept[:n]
    return {int(t) for t, q in zip(order, kept, strict=True) if q >= s.min_p * kept[0]}


@given(st.integers(0, 10**6), st.sampled_from([70, 1_000, 5_000]), st.integers(1, 300))
def test_top_is_exact(seed: int, size: int, k: int) -> None:
    row = np.round(logits(seed, size), 1)  # with many equals
    ids, values = top(row, k)
    expected = np.argsort(-row, kind="stable")[:k]
    assert ids.tolist() == expected.tolist()
    assert (values == row[expected]).all()


def test_top_of_a_masked_row_returns_only_what_is_left() -> None:
    row = np.full(10_000, -np.inf, np.float32)
    row[[5, 77, 9_999]] = [1.0, 3.0, 2.0]
    assert top(row, 40)[0].tolist() == [77, 9_999, 5]


@given(
    st.integers(0, 10**6),
    st.sampled_from([0.3, 1.0, 1.7]),
    st.sampled_from([0, 1, 5, 40]),
    st.sampled_from([0.1, 0.9, 1.0]),
    st.sampled_from([0.0, 0.05, 0.5]),
)
@settings(max_examples=60, deadline=None)
def test_only_tokens_that_the_filters_leave_are_drawn(seed: int, t: float, k: int, p: float, m: float) -> None:
    sampling = Sampling(temperature=t, top_k=k, top_p=p, min_p=m, seed=seed)
    row = logits(seed, 3_000)
    assert set(draws(sampling, row, 50).tolist()) <= allowed_by(sampling, row)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=1),
        Sampling(temperature=0.5, top_k=8, top_p=1.0, min_p=0.0, seed=2),
        Sampling(temperature=1.0, top_k=0, top_p=0.8, min_p=0.0, seed=3),
        Sampling(temperature=1.5, top_k=0, top_p=1.0, min_p=0.1, seed=4),
    ],
)
def test_the_distribution_is_the_textbooks(sampling: Sampling) -> None:
    row = logits(9, 300, 1.5)
    expected = softmax(row / np.float32(sampling.temperature))
    mask = np.zeros(300, np.bool_)
    mask[list(allowed_by(sampling, row))] = True
    expected = np.where(mask, expected, 0) / expected[mask].sum()
    seen = np.bincount(draws(sampling, row, 20_000), minlength=300) / 20_000
    assert np.abs(seen - expected).sum() / 2 < 0.06  # total variation; 20,000 draws of 300 values leave about 0.04


def test_the_seed_decides_and_choices_differ() -> None:
    row = logits(1, 1_000)
    one = Sampling(temperature=1.0, seed=5)
    assert draws(one, row, 20).tolist() == draws(one, row, 20).tolist()
    assert draws(one, row, 20).tolist() != draws(Sampling(temperature=1.0, seed=6), row, 20).tolist()
    first, second = Sampler(one, choice=0), Sampler(one, choice=1)
    assert [first.draw(row.copy(), NO_HISTORY) for _ in range(20)] != [
        second.draw(row.copy(), NO_HISTORY) for _ in range(20)
    ]


def test_temperature_zero_is_greedy_with_the_lowest_id_of_equals() -> None:
    row = np.array([1, 7, 7, 3], np.float32)
    assert Sampler(Sampling(temperature=0)).draw(row, NO_HISTORY) == 1


def test_a_mask_is_obeyed_and_bias_and_penalties_move_the_choice() -> None:
    row = np.array([5.0, 4.0, 3.0, -1.0], np.float32)
    zero = Sampling(temperature=0)
    assert Sampler(zero).draw(row.copy(), NO_HISTORY, np.array([False, False, True, True])) == 2
    assert Sampler(Sampling(temperature=0, logit_bias=((3, 50.0),))).draw(row.copy(), NO_HISTORY) == 3
    seen = np.array([0, 0, 0], np.int32)
    assert Sampler(Sampling(temperature=0, presence_penalty=1.5)).draw(row.copy(), seen) == 1
    assert Sampler(Sampling(temperature=0, frequency_penalty=0.5)).draw(row.copy(), seen) == 1
    assert Sampler(Sampling(temperature=0, frequency_penalty=0.5)).draw(row.copy(), seen[:1]) == 0
    assert Sampler(Sampling(temperature=0, repeat_penalty=2.0)).draw(row.copy(), seen) == 1
    assert Sampler(Sampling(temperature=0, repeat_penalty=2.0, penalty_last_n=0)).draw(row.copy(), seen) == 0


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_unusable_logits_are_an_error_not_a_token(bad: float, temperature: float) -> None:
    with pytest.raises(InternalError), np.errstate(invalid="ignore"):
        Sampler(Sampling(temperature=temperature)).draw(np.full(500, bad, np.float32), NO_HISTORY)


def test_log_probabilities_are_those_of_the_row() -> None:
    row = logits(4, 2_000)
    expected = np.log(softmax(row))
    chosen, alternatives = log_probabilities(row, [17], 5)
    assert chosen[0] == pytest.approx(expected[17], abs=1e-4)
    assert [i for i, _ in alternatives] == np.argsort(-row, kind="stable")[:5].tolist()
    assert alternatives[0][1] == pytest.approx(expected.max(), abs=1e-4)
    assert log_sum_exp(row + np.float32(1_000)) == pytest.approx(log_sum_exp(row) + 1_000, abs=1e-2)


def test_greedy_takes_the_largest() -> None:
    assert greedy(logits(3, 999)) == int(logits(3, 999).argmax())
