"""Both rules of attainment, worked out by hand, then as properties."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slos_sglang.measure.attainment import (
    Targets,
    checked_tokens,
    kept_mean_rule,
    kept_token_rule,
    mean_tpot_ms,
)

BOTH = (kept_token_rule, kept_mean_rule)


def evenly(first_s: float, gap_s: float, count: int) -> list[float]:
    return [first_s + gap_s * n for n in range(count)]


def test_checked_tokens_are_every_tenth_and_the_last():
    assert checked_tokens(1) == [1]
    assert checked_tokens(9) == [9]
    assert checked_tokens(10) == [10]
    assert checked_tokens(25) == [10, 20, 25]
    assert checked_tokens(30) == [10, 20, 30]


def test_first_token_has_five_percent_in_the_token_rule_and_none_in_the_mean_rule():
    targets = Targets(ttft_ms=200)
    assert kept_token_rule(targets, 1.0, [1.210])
    assert not kept_token_rule(targets, 1.0, [1.211])
    assert kept_mean_rule(targets, 1.0, [1.200])
    assert not kept_mean_rule(targets, 1.0, [1.201])


def test_token_rule_counts_from_the_ttft_deadline_when_the_first_token_is_early():
    # Deadline 0.2; token 10 is due at 0.2 + 9 * 0.05 * 1.05 = 0.6725. The first at 0.02 leaves 0.6525 for 9 gaps.
    targets = Targets(ttft_ms=200, tpot_ms=50)
    assert kept_token_rule(targets, 0.0, evenly(0.02, 0.0725, 10))
    assert not kept_token_rule(targets, 0.0, evenly(0.02, 0.0726, 10))
    # The mean rule gives no credit for an early start.
    assert not kept_mean_rule(targets, 0.0, evenly(0.02, 0.0725, 10))


def test_token_rule_counts_from_the_first_token_when_it_is_later_than_the_deadline():
    # First token at 0.205, within 5 %: token 10 is due at 0.205 + 0.4725 = 0.6775.
    targets = Targets(ttft_ms=200, tpot_ms=50)
    late = [0.205] * 9
    assert kept_token_rule(targets, 0.0, [*late, 0.6775])
    assert not kept_token_rule(targets, 0.0, [*late, 0.678])


def test_only_checked_tokens_count_in_the_token_rule():
    targets = Targets(ttft_ms=100, tpot_ms=10)
    stalled_early = [0.1, *[0.19] * 8, 0.1945]  # token 5 was due at 0.142, token 10 at 0.1945
    assert kept_token_rule(targets, 0.0, stalled_early)
    stalled_at_ten = [*evenly(0.1, 0.01, 9), 0.25, *evenly(0.251, 0.001, 10)]  # token 20 was due at 0.2995
    assert not kept_token_rule(targets, 0.0, stalled_at_ten)
    assert kept_mean_rule(targets, 0.0, stalled_at_ten)


def test_without_a_ttft_target_the_pace_counts_from_the_first_token():
    targets = Targets(tpot_ms=10)
    for rule in BOTH:
        assert rule(targets, 0.0, evenly(99.0, 0.01, 11))
    assert kept_token_rule(targets, 0.0, evenly(99.0, 0.0105, 11))
    assert not kept_mean_rule(targets, 0.0, evenly(99.0, 0.0105, 11))
    assert not kept_token_rule(targets, 0.0, evenly(99.0, 0.0106, 11))


def test_without_a_tpot_target_only_the_first_token_counts():
    for rule in BOTH:
        assert rule(Targets(ttft_ms=100), 0.0, [0.1, 99.0, 199.0])
        assert rule(Targets(), 0.0, [99.0, 199.0])


def test_thinking_and_answer_have_paces_of_their_own():
    # t0 = 0.1; 10 thinking tokens: the 10th due at 0.1 + 9 * 0.010 * 1.05 = 0.1945; the answer continues from there:
    # token 20 due at 0.1945 + 10 * 0.1 * 1.05 = 1.2445.
    targets = Targets(ttft_ms=100, think_tpot_ms=10, tpot_ms=100)
    thinking = evenly(0.1, 0.0105, 10)
    assert kept_token_rule(targets, 0.0, [*thinking, *evenly(0.2995, 0.105, 10)], think_tokens=10)
    assert not kept_token_rule(targets, 0.0, [*thinking, *evenly(0.3, 0.1051, 10)], think_tokens=10)
    slow_thinking = [*evenly(0.1, 0.011, 10), *evenly(0.2, 0.001, 10)]
    for rule in BOTH:
        assert not rule(targets, 0.0, slow_thinking, think_tokens=10)
        assert rule(targets, 0.0, slow_thinking, think_tokens=0)


def test_mean_rule_takes_each_phase_by_itself():
    targets = Targets(think_tpot_ms=10, tpot_ms=100)
    tokens = [*evenly(0.0, 0.010, 5), *evenly(0.140, 0.100, 5)]
    assert kept_mean_rule(targets, 0.0, tokens, think_tokens=5)
    assert not kept_mean_rule(targets, 0.0, tokens, think_tokens=6)
    # The gap between the last thinking token and the first of the answer is the answer's.
    assert kept_mean_rule(targets, 0.0, [0.0, 0.01, 0.11], think_tokens=2)
    assert not kept_mean_rule(targets, 0.0, [0.0, 0.01, 0.12], think_tokens=2)


def test_answer_counts_from_the_end_of_thinking_where_thinking_has_no_pace():
    targets = Targets(ttft_ms=100, tpot_ms=10)
    tokens = [0.1, 5.0, *evenly(5.01, 0.01, 8)]
    assert not kept_token_rule(targets, 0.0, tokens)
    assert kept_token_rule(targets, 0.0, tokens, think_tokens=2)


def test_a_deadline_for_the_whole():
    for rule, latest_s in ((kept_token_rule, 1.05), (kept_mean_rule, 1.0)):
        assert rule(Targets(e2e_ms=1000), 0.0, [0.5, latest_s])
        assert not rule(Targets(e2e_ms=1000), 0.0, [0.5, latest_s + 0.001])


def test_no_token_keeps_nothing_that_asks_for_one():
    for rule in BOTH:
        assert not rule(Targets(ttft_ms=100), 0.0, [])
        assert not rule(Targets(e2e_ms=100), 0.0, [])
        assert rule(Targets(tpot_ms=100), 0.0, [])


def test_a_target_must_be_positive():
    with pytest.raises(ValueError, match=r"targets\.tpot_ms .* not -1"):
        Targets(tpot_ms=-1)


def test_mean_tpot_needs_two_tokens():
    assert mean_tpot_ms([]) is None
    assert mean_tpot_ms([1.0]) is None
    assert mean_tpot_ms([1.0, 1.5, 2.0]) == 500


targets_ = st.builds(
    Targets,
    ttft_ms=st.none() | st.floats(1, 1000),
    tpot_ms=st.none() | st.floats(1, 200),
    think_tpot_ms=st.none() | st.floats(1, 200),
    e2e_ms=st.none() | st.floats(1, 5000),
)
token_gaps_s = st.lists(st.floats(0, 0.5), max_size=45)


def cumulative(gaps: list[float], start_s: float = 0.0) -> list[float]:
    times = []
    for gap in gaps:
        start_s += gap
        times.append(start_s)
    return times


@given(targets=targets_, gaps=token_gaps_s, think_tokens=st.integers(0, 50), shift_s=st.integers(0, 1000))
def test_the_clock_may_start_anywhere(targets, gaps, think_tokens, shift_s):
    tokens = cumulative(gaps)
    for rule in BOTH:
        # Well away from a due time, where rounding decides, the answer is the same.
        if rule(Targets(**scaled(targets, 0.999)), 0.0, tokens, think_tokens):
            assert rule(targets, shift_s, [t + shift_s for t in tokens], think_tokens)


def scaled(targets: Targets, by: float) -> dict[str, float | None]:
    return {name: None if value is None else value * by for name, value in vars(targets).items()}


@given(targets=targets_, gaps=token_gaps_s, think_tokens=st.integers(0, 50), by=st.floats(1, 3))
def test_looser_targets_are_never_harder(targets, gaps, think_tokens, by):
    tokens = cumulative(gaps)
    for rule in BOTH:
        if rule(targets, 0.0, tokens, think_tokens):
            assert rule(Targets(**scaled(targets, by)), 0.0, tokens, think_tokens)


@given(targets=targets_, gaps=token_gaps_s.filter(lambda gaps: len(gaps) > 1), at=st.integers(1, 44))
def test_serving_the_rest_earlier_never_loses(targets, gaps, at):
    tokens = cumulative(gaps)
    at = min(at, len(tokens) - 1)
    earlier = [*tokens[:at], *(max(tokens[at - 1], t - gaps[at]) for t in tokens[at:])]
    for rule in BOTH:
        if rule(targets, 0.0, tokens):
            assert rule(targets, 0.0, earlier)


@given(targets=targets_, count=st.integers(1, 60), think_tokens=st.integers(0, 60))
def test_a_stream_right_on_its_targets_keeps_both_rules(targets, count, think_tokens):
    ttft_s = (targets.ttft_ms or 7.0) / 1e3
    gaps = [
        ((targets.think_tpot_ms if n <= think_tokens else targets.tpot_ms) or 7.0) / 1e3 for n in range(2, count + 1)
    ]
    exact = Targets(**(vars(targets) | {"e2e_ms": None}))
    for rule in BOTH:
        assert rule(exact, 5.0, cumulative([ttft_s, *gaps], 5.0), think_tokens)
