"""The cost model: its inverse, and what it learns from measured steps."""

import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slos_sglang.policy.batch_time import BatchSize, CostModel, OnlineCostModel, Piece

GPU = Piece(tokens_ms=0.072, requests_ms=0.02, context_ms=1e-4, const_ms=31.7)


def test_the_slowest_piece_decides() -> None:
    cost = CostModel(Piece(tokens_ms=1, const_ms=10), Piece(const_ms=50))
    assert cost.batch_ms(BatchSize(tokens=20, requests=1)) == 50
    assert cost.batch_ms(BatchSize(tokens=100, requests=1)) == 110
    assert cost.batch_ms(BatchSize()) == 0


@given(
    tokens=st.integers(0, 500),
    requests=st.integers(0, 64),
    context=st.integers(0, 20_000),
    prefix=st.integers(0, 2000),
    within_ms=st.floats(0, 500),
)
def test_a_chunk_is_the_largest_that_fits(
    tokens: int, requests: int, context: int, prefix: int, within_ms: float
) -> None:
    cost = CostModel(Piece(tokens_ms=0.1, requests_ms=0.4, context_ms=0.002, const_ms=6), Piece(const_ms=12))
    size = BatchSize(tokens=tokens, requests=requests, context_tokens=context)
    chunk = cost.chunk_tokens(size, prefix_tokens=prefix, within_ms=within_ms)

    def batch_ms(extra: int) -> float:
        grown = BatchSize(tokens=tokens, requests=requests, context_tokens=context)
        grown.add(tokens=extra, context_tokens=prefix + extra)
        return cost.batch_ms(grown)

    if chunk:
        assert batch_ms(chunk) <= within_ms + 1e-6
    if within_ms > 12:
        assert batch_ms(chunk + 1) > within_ms - 1e-6


def random_size(rng: random.Random) -> BatchSize:
    size = BatchSize()
    for _ in range(rng.randint(0, 30)):
        size.add(tokens=1, context_tokens=rng.randint(20, 900))
    if rng.random() < 0.4 or not size.requests:
        size.add(tokens=rng.randint(16, 400), context_tokens=rng.randint(16, 900))
    return size


@pytest.mark.parametrize("seed", range(5))
def test_steps_correct_a_wrong_prior(seed: int) -> None:
    rng = random.Random(seed)
    truth, online = CostModel(GPU), OnlineCostModel()
    errors = []
    for step in range(600):
        size = random_size(rng)
        measured = truth.batch_ms(size) * rng.lognormvariate(0, 0.05)
        if step >= 200:
            errors.append(abs(online.batch_ms(size) / measured - 1))
        online.observe(size, measured)
    assert statistics.mean(errors) < 0.06
    assert 1.0 <= online.margin < 1.2


def test_a_hiccup_counts_no_more_than_the_outlier_bound() -> None:
    rng = random.Random(0)
    truth, online = CostModel(GPU), OnlineCostModel()
    for _ in range(400):
        size = random_size(rng)
        online.observe(size, truth.batch_ms(size) * (50 if rng.random() < 0.01 else 1))
    size = random_size(rng)
    assert online.batch_ms(size) == pytest.approx(truth.batch_ms(size), rel=0.05)


def test_coefficients_stay_positive_whatever_is_measured() -> None:
    rng = random.Random(1)
    online = OnlineCostModel()
    for _ in range(300):
        online.observe(random_size(rng), rng.uniform(0.1, 100))
    piece = online.pieces[0]
    assert min(piece.tokens_ms, piece.requests_ms, piece.context_ms, piece.const_ms) >= 0


def test_a_prior_without_a_coefficient_is_refused() -> None:
    with pytest.raises(ValueError, match="positive coefficients"):
        OnlineCostModel(prior=Piece(tokens_ms=1))
