"""A request's due times, and that its own account of them agrees with the client's."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slos_sglang.measure import attainment
from slos_sglang.policy.batch_time import CostModel, Piece
from slos_sglang.policy.request import INF, Request
from slos_sglang.slo import WireSLO

COST = CostModel(Piece(tokens_ms=0.1, requests_ms=0.4, const_ms=6.5))


def request(slo: WireSLO | None, *, prompt: int = 100, cached: int = 0, cap: int = 64) -> Request:
    r = Request(rid="r", seq=0, arrival_s=10.0, slo=slo, max_tokens=cap)
    r.uncached_tokens, r.context_tokens = prompt - cached, cached
    r.set_targets(COST)
    return r


def test_a_slowdown_is_relative_to_the_uncached_prompt() -> None:
    assert request(WireSLO(ttft_slowdown=3)).ttft_s == pytest.approx(3 * (6.5 + 0.4 + 10) / 1e3)
    assert request(WireSLO(ttft_slowdown=3), cached=90).ttft_s == pytest.approx(3 * (6.5 + 0.4 + 1) / 1e3)


def test_the_operators_minimum_holds_for_a_slowdown_too() -> None:
    r = Request(rid="r", seq=0, arrival_s=0, slo=WireSLO(ttft_slowdown=1))
    r.uncached_tokens = 10
    r.set_targets(COST, min_ttft_ms=200)
    assert r.ttft_s == 0.2


def test_without_targets_nothing_is_due() -> None:
    r = request(None)
    r.token(11.0)
    r.token(12.0)
    assert r.due_s == INF and r.kept


def test_the_pace_starts_at_the_first_token_and_the_rule_at_the_deadline() -> None:
    r = request(WireSLO(ttft_ms=500, tpot_ms=100))
    assert r.due_s == pytest.approx(10.5)
    r.token(10.2)
    assert r.due_s == pytest.approx(10.3)
    assert r.ruled_s == pytest.approx(10.5)
    r.token(10.21)
    assert r.due_s == pytest.approx(10.4), "an early token earns slack"


def test_an_early_first_token_lends_credit_that_is_repaid_within_the_tokens_it_surely_has() -> None:
    r = Request(rid="r", seq=0, arrival_s=10.0, slo=WireSLO(ttft_ms=500, tpot_ms=100), sure_tokens=5)
    r.uncached_tokens = 100
    r.set_targets(COST, credit_share=0.2)
    r.token(10.2)
    # A fifth of 5 x 100 ms is lent; the next four tokens come 25 ms faster than their TPOT.
    assert r.due_s == pytest.approx(10.2 + 0.1 + 0.075)
    for n in range(1, 5):
        r.token(10.3 + n * 0.075)
        assert (r.pace_s == pytest.approx(0.1)) == (n == 4)
    assert r.paced_s == pytest.approx(10.2 + 4 * 0.1), "from here on the mean TPOT is kept"
    assert r.due_s == pytest.approx(10.2 + 5 * 0.1)


def test_a_late_first_token_lends_nothing() -> None:
    r = Request(rid="r", seq=0, arrival_s=10.0, slo=WireSLO(ttft_ms=500, tpot_ms=100), sure_tokens=5)
    r.uncached_tokens = 100
    r.set_targets(COST, credit_share=0.2)
    r.token(10.5)
    assert r.due_s == pytest.approx(10.6) and r.pace_s == pytest.approx(0.1)


def test_a_lost_promise_does_not_catch_up() -> None:
    r = request(WireSLO(ttft_ms=500, tpot_ms=100))
    r.token(12.0)
    assert not r.kept
    r.token(13.0)
    assert r.due_s == pytest.approx(13.1)


def test_a_budget_slows_prefill_and_decode_alike() -> None:
    r = request(WireSLO(budget_ms=2 * (16.9 + 9 * 7)), cap=9)
    assert r.deadline_s == pytest.approx(10 + 2 * (16.9 + 63) / 1e3)
    assert r.due_s == pytest.approx(10 + 2 * 16.9 / 1e3)
    assert r.pace_s == pytest.approx(2 * 7 / 1e3)
    assert r.ttft_s == r.tpot_s == INF, "a pace that was derived is no target"


def test_thinking_ends_at_the_marker() -> None:
    r = request(WireSLO(ttft_ms=500, think_tpot_ms=50, tpot_ms=100))
    r.token(10.1)
    r.token(10.15)
    assert r.due_s == pytest.approx(10.2)
    r.end_thinking()
    assert r.due_s == pytest.approx(10.25) and r.phases == ["think", "answer"]
    r.token(10.25)
    r.end_thinking()
    assert r.phases == ["think", "answer"], "once"


def test_undecided_until_judged_and_while_the_first_token_can_be_in_time() -> None:
    r = request(WireSLO(ttft_ms=500))
    assert r.undecided(99.0), "everybody is judged once"
    r.decline()
    assert r.undecided(10.4) and not r.undecided(10.6)
    r.admit()
    assert not r.undecided(10.4) and r.standard and not r.declined
    assert not request(None).undecided(0)


@given(
    ttft_ms=st.one_of(st.none(), st.floats(10, 500)),
    tpot_ms=st.one_of(st.none(), st.floats(5, 100)),
    gaps=st.lists(st.floats(0.001, 0.2), min_size=1, max_size=60),
)
def test_the_receipt_and_the_clients_clock_agree(
    ttft_ms: float | None, tpot_ms: float | None, gaps: list[float]
) -> None:
    r = request(WireSLO(ttft_ms=ttft_ms, tpot_ms=tpot_ms))
    now, times = 10.0, []
    for gap in gaps:
        now += gap
        times.append(now)
        r.token(now)
    r.finish(now)
    assert r.kept == attainment.kept_token_rule(attainment.Targets(ttft_ms=ttft_ms, tpot_ms=tpot_ms), 10.0, times)
