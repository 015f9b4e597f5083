"""Admission by forward simulation, on cases worked out by hand."""

from slos_sglang.policy.admission import Outlook, Verdict
from slos_sglang.policy.batch_time import CostModel, Piece
from slos_sglang.policy.batches import UNBOUNDED, Limits, Memory
from slos_sglang.policy.request import Request
from slos_sglang.policy.scheduler import Scheduler
from slos_sglang.slo import WireSLO

# 10 ms a step, 0.1 ms a token.
COST = CostModel(Piece(tokens_ms=0.1, const_ms=10))
LIMITS = Limits(max_batch_ms=1000)


def prompt(rid: str, tokens: int, *, ttft_ms: float, tpot_ms: float | None = None, out: int = 1) -> Request:
    r = Request(rid=rid, seq=ord(rid[0]), arrival_s=0.0, slo=WireSLO(ttft_ms=ttft_ms, tpot_ms=tpot_ms))
    r.uncached_tokens, r.left_tokens, r.max_tokens = tokens, out, out
    r.set_targets(COST)
    return r


def decoder(rid: str, *, tpot_ms: float, out: int = 1000, seq: int = 0) -> Request:
    r = prompt(rid, 10, ttft_ms=100, tpot_ms=tpot_ms, out=out)
    r.uncached_tokens, r.seq, r.started = 0, seq, True
    r.admit()
    r.token(0.0)
    r.reserve_s = 0.0  # as if its first token had come just in time
    return r


def judge(request: Request, promised: list[Request], memory: Memory = UNBOUNDED, *, now_s: float = 0.0) -> Verdict:
    return Outlook(now_s, promised, [request], COST, LIMITS, memory).ask(request)


def test_what_fits_is_admitted_and_what_does_not_is_declined_with_the_reason() -> None:
    # 10 ms for the step and 20 for 200 tokens: 30 ms of work.
    assert judge(prompt("a", 200, ttft_ms=30.1), []).admitted
    verdict = judge(prompt("a", 200, ttft_ms=29.9), [])
    assert not verdict.admitted
    assert "its prefill takes 30 ms, its first token is due within 30 ms" in verdict.reason


def test_an_earlier_promise_is_not_broken_for_a_tighter_newcomer() -> None:
    first = prompt("first", 800, ttft_ms=100)
    first.admit()
    verdict = judge(prompt("tight", 200, ttft_ms=60), [first])
    assert not verdict.admitted and "that of first, promised before" in verdict.reason
    # Together they take 10 + 9 + 80 ms; apart there would be a second 10.
    assert judge(prompt("small", 90, ttft_ms=99.1), [first]).admitted
    assert not judge(prompt("small", 90, ttft_ms=98.9), [first]).admitted


def test_a_looser_newcomer_waits_behind() -> None:
    first = prompt("first", 800, ttft_ms=100)
    first.admit()
    # Both in one batch would make the first one late beyond 100 tokens; the rest is a second batch: 100 + 10 + 10 ms.
    assert judge(prompt("later", 200, ttft_ms=121), [first]).admitted
    verdict = judge(prompt("later", 200, ttft_ms=109), [first])
    assert not verdict.admitted and "its own" in verdict.reason and 0.1 < verdict.retry_after_s < 0.2


def test_decode_load_that_can_not_be_held_is_refused() -> None:
    # A step of n tokens takes 10 + n/10 ms: at a token every 20 ms a hundred can decode for good.
    running = [decoder(f"d{i}", tpot_ms=20, seq=i) for i in range(100)]
    assert judge(prompt("n", 1, ttft_ms=10_000, tpot_ms=20, out=1000), running[:98]).admitted
    assert not judge(prompt("n", 1, ttft_ms=1000, tpot_ms=20, out=1000), running).admitted


def test_an_early_first_token_is_lent_only_where_a_promise_hangs_on_it() -> None:
    # The decoder had its first token a second early, and wants the next ones every 20 ms all the same.
    running = decoder("d", tpot_ms=20, out=200)
    running.slack_until_s, running.reserve_s, running.ruled_s = 1.0, 1.0, 1.0
    small, large = (prompt("n", tokens, ttft_ms=ttft) for tokens, ttft in ((300, 200), (4000, 450)))
    for request, lends in ((small, False), (large, True)):
        outlook = Outlook(0.0, [running], [request], COST, LIMITS, UNBOUNDED)
        assert outlook.ask(request).admitted and outlook.lends == lends
    running.reserve_s = 0.0
    assert judge(small, [running]).admitted and not judge(large, [running]).admitted


def test_a_promise_gives_way_to_much_less_work_until_it_begins() -> None:
    def asked(small: Request, **about: object) -> tuple[bool, bool]:
        """Is `small` promised, and is the large one still?"""
        large = prompt("large", 800, ttft_ms=100)
        scheduler = Scheduler(cost=COST, limits=LIMITS, late_commitment=bool(about.pop("late", True)))
        scheduler.admit(0.0, [large], [], [large])
        for name, value in about.items():
            setattr(large, name, value)
        verdicts = scheduler.admit(0.0, [small], [], [large, small])
        assert {r.rid for r, v in verdicts if v.admitted} == {r.rid for r in (small,) if r.standard}
        return small.standard, large.standard

    assert asked(prompt("small", 200, ttft_ms=60)) == (True, False)
    assert asked(prompt("small", 700, ttft_ms=95)) == (False, True), "that is not much less"
    assert asked(prompt("small", 200, ttft_ms=60), late=False) == (False, True)
    assert asked(prompt("small", 200, ttft_ms=60), started=True) == (False, True)
    assert asked(prompt("small", 200, ttft_ms=60), favor=0.5) == (False, True), "its program is under way"
    refused = WireSLO(ttft_ms=100, on_decline="reject")
    assert asked(prompt("small", 200, ttft_ms=60), slo=refused) == (False, True), "its client was told nothing else"
    valued = WireSLO(ttft_ms=100, value=2)
    assert asked(prompt("small", 200, ttft_ms=60), slo=valued) == (False, True)


def test_decoders_that_end_in_time_do_not_count_any_longer() -> None:
    running = [decoder(f"d{i}", tpot_ms=20, seq=i, out=10) for i in range(100)]
    # They are done after 10 steps of 20 ms.
    assert judge(prompt("n", 1, ttft_ms=300, tpot_ms=20, out=1000), running).admitted
    assert not judge(prompt("n", 1, ttft_ms=150, tpot_ms=20, out=1000), running).admitted


def test_a_promise_that_is_lost_anyway_stands_in_nobodys_way() -> None:
    hopeless = prompt("hopeless", 2000, ttft_ms=100)
    hopeless.admit()
    assert judge(prompt("n", 10, ttft_ms=5000), [hopeless]).admitted
    assert not judge(prompt("n", 10, ttft_ms=150), [hopeless]).admitted, "by deadline it comes after it"


def test_memory_that_would_run_out_is_the_reason() -> None:
    holder = decoder("holder", tpot_ms=50, out=100)
    holder.context_tokens = 500
    newcomer = prompt("n", 300, ttft_ms=1000, tpot_ms=100, out=50)
    assert judge(newcomer, [holder], Memory(capacity_tokens=1000, free_tokens=500)).admitted
    verdict = judge(newcomer, [holder], Memory(capacity_tokens=700, free_tokens=200))
    assert not verdict.admitted


def test_a_spent_budget_is_declined() -> None:
    r = Request(rid="r", seq=0, arrival_s=0.0, slo=WireSLO(budget_ms=-5))
    r.uncached_tokens = 1
    r.set_targets(COST)
    verdict = judge(r, [])
    assert not verdict.admitted and "budget is spent" in verdict.reason


def test_a_first_call_whose_program_can_not_be_in_time_is_declined() -> None:
    """The call takes 20 + 5 x 10 ms, what follows 10 + 10 + 100 x 10 ms, and the tool 300 ms."""
    rest = {"rest_calls": 1, "rest_prompt_tokens": 100, "rest_output_tokens": 100, "rest_gaps_ms": 300}
    for budget_ms, admitted in ((1300, False), (1450, True)):
        slo = WireSLO(budget_ms=budget_ms, **rest)
        r = Request(rid="r", seq=0, arrival_s=0.0, slo=slo, max_tokens=5, left_tokens=5, sure_tokens=5)
        r.uncached_tokens = 100
        r.set_targets(COST)
        verdict = judge(r, [])
        assert verdict.admitted == admitted
        assert admitted or verdict.reason == "its program needs 1400 ms even alone, 1300 ms are left"
        r.uncached_tokens = 0
        r.token(0.01)
        assert judge(r, []).admitted == admitted, "its own tokens do not make it feasible"


def test_asked_in_order_of_deadline_and_asked_again() -> None:
    policy = Scheduler(cost=COST, limits=LIMITS)
    a, b = prompt("a", 400, ttft_ms=60), prompt("b", 400, ttft_ms=70)
    verdicts = policy.admit(0.0, [b, a], [], [b, a])
    assert [(r.rid, v.admitted) for r, v in verdicts] == [("a", True), ("b", False)]
    assert b.declined and b.tier == "best_effort" and b.undecided(0.01)
    policy.admit(0.015, [b], [], [b])
    assert b.standard and not b.declined, "the other is gone: there is room again"
