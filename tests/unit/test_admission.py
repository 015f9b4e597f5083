"""Admission: the processor demand test on cases worked out by hand."""

import pytest

from slos_sglang.policy.admission import judge
from slos_sglang.policy.batch_time import CostModel, Piece
from slos_sglang.policy.batches import Limits
from slos_sglang.policy.request import Request
from slos_sglang.policy.scheduler import Scheduler
from slos_sglang.slo import WireSLO

# 10 ms a step, 0.1 ms a token.
COST = CostModel(Piece(tokens_ms=0.1, const_ms=10))
LIMITS = Limits(max_batch_ms=1000, admission_headroom=1.0)


def prompt(rid: str, tokens: int, *, ttft_ms: float, tpot_ms: float | None = None, seq: int = 0) -> Request:
    r = Request(rid=rid, seq=seq, arrival_s=0.0, slo=WireSLO(ttft_ms=ttft_ms, tpot_ms=tpot_ms))
    r.uncached_tokens = tokens
    r.set_targets(COST)
    return r


def decoder(rid: str, *, tpot_ms: float) -> Request:
    r = prompt(rid, 10, ttft_ms=100, tpot_ms=tpot_ms)
    r.uncached_tokens = 0
    r.admit()
    r.token(0.0)
    return r


def test_what_fits_is_admitted_and_what_does_not_is_declined_with_the_reason() -> None:
    # 10 ms for the step and 20 for 200 tokens: 30 ms of work.
    assert judge(0.0, prompt("a", 200, ttft_ms=30.1), [], COST, LIMITS).admitted
    verdict = judge(0.0, prompt("a", 200, ttft_ms=29.9), [], COST, LIMITS)
    assert not verdict.admitted
    assert "30 ms of work is due within 30 ms, its own first-token deadline" in verdict.reason


def test_an_earlier_promise_is_not_broken_for_a_tighter_newcomer() -> None:
    first = prompt("first", 800, ttft_ms=100)
    first.admit()
    tight = prompt("tight", 200, ttft_ms=60)
    verdict = judge(0.0, tight, [first], COST, LIMITS)
    assert not verdict.admitted and "an earlier promise's" in verdict.reason
    assert judge(0.0, prompt("small", 90, ttft_ms=60), [first], COST, LIMITS).admitted


def test_a_looser_newcomer_waits_behind() -> None:
    first = prompt("first", 800, ttft_ms=100)
    first.admit()
    assert judge(0.0, prompt("later", 200, ttft_ms=121), [first], COST, LIMITS).admitted
    assert not judge(0.0, prompt("later", 200, ttft_ms=109), [first], COST, LIMITS).admitted


def test_decode_load_that_can_not_be_held_is_refused() -> None:
    # A step every 20 ms costs half of the time; a token every 20 ms costs 0.5 % each: 100 fit.
    running = [decoder(f"d{i}", tpot_ms=20) for i in range(101)]
    newcomer = prompt("n", 1, ttft_ms=10_000, tpot_ms=20)
    assert judge(0.0, newcomer, running[:98], COST, LIMITS).admitted
    verdict = judge(0.0, newcomer, running, COST, LIMITS)
    assert not verdict.admitted and "decode rate" in verdict.reason and verdict.retry_after_s > 0


def test_decode_tokens_due_before_the_deadline_count() -> None:
    # A step every 25 ms, the prompt's 20 ms, and what ten decoders are due: 10 tokens by 25 ms, 20 by 50 ms.
    running = [decoder(f"d{i}", tpot_ms=25) for i in range(10)]
    # By 36 ms: 14.4 + 20 + 1; by 35 ms: 14 + 20 + 1.1 would be too much.
    assert judge(0.0, prompt("a", 200, ttft_ms=36), running, COST, LIMITS).admitted
    assert not judge(0.0, prompt("a", 200, ttft_ms=34.9), running, COST, LIMITS).admitted
    assert judge(0.0, prompt("a", 200, ttft_ms=34.9), [], COST, LIMITS).admitted


def test_a_spent_budget_is_declined() -> None:
    r = Request(rid="r", seq=0, arrival_s=0.0, slo=WireSLO(budget_ms=-5))
    r.uncached_tokens = 1
    r.set_targets(COST)
    verdict = judge(0.0, r, [], COST, LIMITS)
    assert not verdict.admitted and "budget is spent" in verdict.reason


def test_asked_in_order_of_deadline_and_asked_again() -> None:
    policy = Scheduler(cost=COST, limits=LIMITS)
    a, b = prompt("a", 400, ttft_ms=60, seq=1), prompt("b", 400, ttft_ms=70, seq=0)
    verdicts = policy.admit(0.0, [b, a], [], [b, a])
    assert [(r.rid, v.admitted) for r, v in verdicts] == [("a", True), ("b", False)]
    assert b.declined and b.tier == "best_effort" and b.undecided(0.01)
    policy.admit(0.015, [b], [], [b])
    assert b.standard and not b.declined, "the other is gone: there is room again"


@pytest.mark.parametrize("headroom", [1.0, 1.5])
def test_headroom_asks_for_more_time(headroom: float) -> None:
    limits = Limits(max_batch_ms=1000, admission_headroom=headroom)
    assert judge(0.0, prompt("a", 200, ttft_ms=40), [], COST, limits).admitted == (headroom == 1.0)
