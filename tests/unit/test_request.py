"""A request's due times, and that its own account of them agrees with the client's."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slos_sglang.measure import attainment
from slos_sglang.policy.batch_time import CostModel, Piece
from slos_sglang.policy.request import INF, Request, lost, table_of
from slos_sglang.slo import Phase, WireSLO, encode_phases

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


# Twice the time that 16.9 ms of prefill and nine tokens of 7 ms take; a quarter of the slack is the prompt's.
TWICE_MS = 2 * (16.9 + 9 * 7)
FIRST_MS = 16.9 + (16.9 + 9 * 7) / 4
PACE_S = (TWICE_MS - FIRST_MS) / 9 / 1e3


def test_a_budget_slows_prefill_and_decode() -> None:
    r = request(WireSLO(budget_ms=TWICE_MS), cap=9)
    assert r.deadline_s == pytest.approx(10 + TWICE_MS / 1e3)
    assert r.due_s == pytest.approx(10 + FIRST_MS / 1e3)
    assert r.pace_s == pytest.approx(PACE_S)
    assert r.ttft_s == r.tpot_s == INF, "a pace that was derived is no target"


def test_a_budget_is_paced_by_the_output_there_may_be_not_by_the_cap() -> None:
    r = Request(rid="r", seq=0, arrival_s=10.0, slo=WireSLO(budget_ms=TWICE_MS), most_tokens=9)
    r.uncached_tokens = 100
    r.set_targets(COST)
    assert r.pace_s == pytest.approx(PACE_S)


def test_a_long_prompt_before_few_tokens_is_slowed_down_as_they_are() -> None:
    r = request(WireSLO(budget_ms=2 * (16.9 + 2 * 7)), cap=2)
    assert r.due_s == pytest.approx(10 + 2 * 16.9 / 1e3) and r.pace_s == pytest.approx(2 * 7 / 1e3)


def test_an_early_first_token_leaves_its_time_to_the_others() -> None:
    r = request(WireSLO(budget_ms=TWICE_MS), cap=9)
    r.token(10.0 + 16.9 / 1e3)
    assert r.pace_s == pytest.approx(PACE_S), "what was promised stands on it"
    r.expect(9, 1 << 30)
    assert r.pace_s == pytest.approx((r.deadline_s - r.paced_s) / 8)
    assert r.due_s == pytest.approx(r.paced_s + r.pace_s) and r.pace_s > PACE_S


def test_the_pace_is_looked_at_anew_when_other_lengths_are_expected() -> None:
    r = request(WireSLO(budget_ms=1000), cap=100)
    for n in range(10):
        r.token(10.1 + 0.01 * n)
    r.expect(20, 1 << 30)
    slower = r.pace_s
    assert slower == pytest.approx((11.0 - r.paced_s) / 10)
    r.expect(60, 1 << 30)
    assert r.pace_s == pytest.approx((11.0 - r.paced_s) / 50) and r.due_s == pytest.approx(r.paced_s + r.pace_s)
    r.expect(1 << 30, 1 << 30)
    assert r.pace_s == pytest.approx(max((11.0 - r.paced_s) / 90, 1.4 * 7 / 1e3)), "no more than the cap"


def test_no_pace_of_a_budget_is_faster_than_the_server_with_company() -> None:
    assert request(WireSLO(budget_ms=1), cap=50).pace_s == pytest.approx(1.4 * 7 / 1e3)


def test_no_pace_to_the_answer_is_faster_than_the_server() -> None:
    assert request(WireSLO(answer_ttft_ms=1), cap=50).pace_s == pytest.approx(7 / 1e3)


def test_a_tpot_tighter_than_the_budget_needs_stays() -> None:
    r = request(WireSLO(budget_ms=100_000, tpot_ms=20), cap=9)
    assert r.pace_s == 0.02
    r.token(10.1)
    assert r.pace_s == 0.02


def test_what_is_to_follow_has_its_share_of_the_budget() -> None:
    """One more call that costs as much as this one, and a tool in between."""
    alone = request(WireSLO(budget_ms=2000), cap=9)
    r = request(
        WireSLO(budget_ms=4300, rest_calls=1, rest_prompt_tokens=100, rest_output_tokens=9, rest_gaps_ms=300), cap=9
    )
    assert r.deadline_s == pytest.approx(14.3), "the promise is the program's"
    assert (r.pace_s, r.due_s) == (pytest.approx(alone.pace_s), pytest.approx(alone.due_s))


def test_what_a_program_takes_even_alone_is_known_where_something_follows() -> None:
    rest = {"rest_calls": 2, "rest_prompt_tokens": 100, "rest_output_tokens": 10, "rest_gaps_ms": 300}
    r = Request(rid="r", seq=0, arrival_s=10.0, slo=WireSLO(budget_ms=500, **rest), sure_tokens=5)
    r.uncached_tokens = 100
    r.set_targets(COST)
    assert r.program_ms == pytest.approx((16.9 + 5 * 7) + (2 * 6.5 + 10.4 + 10 * 7) + 300)
    r.token(10.1)
    r.token(10.2)
    assert r.program_ms == pytest.approx(3 * 7 + (2 * 6.5 + 10.4 + 10 * 7) + 300)
    assert request(WireSLO(budget_ms=500, rest_calls=0)).program_ms == 0.0, "the future of a last call is its own"


def test_delivery_is_planned_for() -> None:
    r = Request(rid="r", seq=0, arrival_s=10.0, slo=WireSLO(budget_ms=1000), max_tokens=9)
    r.uncached_tokens = 100
    r.set_targets(COST, delivery_ms=6.0)
    assert r.first_due_s + 9 * r.pace_s == pytest.approx(11.0 - 0.006)


def phased(*phases: Phase, cap: int = 64, **targets: float) -> Request:
    return request(WireSLO(phases=encode_phases(phases), **targets), cap=cap)  # type: ignore[arg-type]


def test_any_number_of_phases_follow_each_other() -> None:
    r = phased(
        Phase(name="think", tpot_ms=50, until="a"), Phase(name="plan", until="b"), Phase(name="answer", tpot_ms=100)
    )
    assert r.thinking and r.tpot_s == 0.05 and r.answer_tpot_s == 0.1, "the tightest that is to come"
    r.token(10.1)
    r.token(10.2)
    r.next_phase()
    assert r.thinking and r.tpot_s == INF
    r.token(10.5)
    r.next_phase()
    assert not r.thinking and r.tpot_s == 0.1
    r.token(10.6)
    r.token(10.8)
    r.next_phase()
    r.finish(10.8)
    assert r.phases == ["think", "plan", "answer"]
    assert [seen.tokens for seen in r.seen] == [2, 1, 2]
    assert [seen.tpot_s for seen in r.seen] == [pytest.approx(gap) for gap in (0.1, 0.3, 0.15)]


def test_the_first_token_after_thinking_is_due_and_paces_thinking() -> None:
    r = request(WireSLO(answer_ttft_ms=1000, tpot_ms=500))
    r.think_tokens = 9
    r.token(10.1)
    r.expect(64, r.think_tokens)
    assert r.pace_s == pytest.approx((11.0 - 10.1) / 9), "eight more, and the first of the answer"
    for n in range(1, 9):
        r.token(10.1 + 0.1 * n)
    r.next_phase()
    assert r.due_s == pytest.approx(11.0) and not r.lost(11.0)
    r.token(10.99)
    assert r.kept and r.pace_s == 0.5
    r.finish(10.99)
    assert r.kept


def test_the_time_until_the_answer_is_for_the_prompt_too() -> None:
    """16.9 ms of prefill, nine tokens of 7 ms to the answer's first one, and three times as much time."""
    r = Request(rid="r", seq=0, arrival_s=10.0, slo=WireSLO(answer_ttft_ms=3 * (16.9 + 63)), think_tokens=8)
    r.uncached_tokens = 100
    r.set_targets(COST)
    first_ms = 16.9 + 2 * (16.9 + 63) / 4
    assert r.due_s == pytest.approx(10.0 + first_ms / 1e3)
    assert r.pace_s == pytest.approx((3 * (16.9 + 63) - first_ms) / 9 / 1e3)


@pytest.mark.parametrize("known", [True, False])
def test_an_answer_that_can_not_begin_in_time_is_due_too_early_where_that_is_known(known: bool) -> None:
    numbers = {"think_tokens": 100} if known else {}
    r = Request(rid="r", seq=0, arrival_s=10.0, slo=WireSLO(answer_ttft_ms=300), max_tokens=2000, **numbers)
    r.uncached_tokens = 100
    r.set_targets(COST)
    assert (r.first_due_s < 10.0 + 16.9 / 1e3 - 1e-9) == known


@pytest.mark.parametrize("came", [True, False])
def test_a_late_first_token_of_the_answer_is_a_miss_and_so_is_none(came: bool) -> None:
    r = request(WireSLO(answer_ttft_ms=1000))
    r.token(10.1)
    assert not r.lost(11.0) and r.lost(11.06)
    if came:
        r.next_phase()
        r.token(11.06)
        assert not r.kept
    else:
        r.finish(10.2)
        assert not r.kept, "nothing of it was there by then"


def test_thinking_ends_at_the_marker() -> None:
    r = request(WireSLO(ttft_ms=500, think_tpot_ms=50, tpot_ms=100))
    r.token(10.1)
    r.token(10.15)
    assert r.due_s == pytest.approx(10.2)
    r.next_phase()
    assert r.due_s == pytest.approx(10.25) and r.phases == ["think", "answer"]
    r.token(10.25)
    r.next_phase()
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


@given(
    st.lists(
        st.tuples(
            st.integers(0, 2), st.booleans(), st.sampled_from((0.1, 1.0, INF)), st.sampled_from((0.5, 1.05, 2.0, INF))
        ),
        max_size=6,
    ),
    st.sampled_from((0.0, 0.105, 0.2, 1.0, 1.05, 1.06, 3.0)),
)
def test_many_at_once_are_lost_where_each_is(rows: list[tuple[int, bool, float, float]], now_s: float) -> None:
    requests = []
    for seq, (output_tokens, kept, ttft_s, until_s) in enumerate(rows):
        request = Request(rid=str(seq), seq=seq, arrival_s=0.0)
        request.output_tokens, request.kept, request.ttft_s = output_tokens, kept, ttft_s
        request.deadline_s, request.phase_due_s = (until_s, INF) if seq % 2 else (INF, until_s)
        requests.append(request)
    assert lost(table_of(requests), now_s).tolist() == [request.lost(now_s) for request in requests]


def test_a_declined_call_shares_what_is_left_of_its_budget_anew() -> None:
    r = Request(rid="r", seq=0, arrival_s=10.0, slo=WireSLO(budget_ms=TWICE_MS), most_tokens=9)
    r.uncached_tokens = 100
    r.set_targets(COST)
    r.decline("no room")
    r.share_again(10.0 + (16.9 + 9 * 7) / 1e3)
    assert r.pace_s == pytest.approx(1.4 * 7 / 1e3)
    first_ms = 16.9 + 0.4 * (16.9 + 9 * 7) / 4
    assert r.due_s == pytest.approx(10.0 + (16.9 + 9 * 7 + first_ms) / 1e3), "no more time, but a prompt has some"
    r.share_again(11.0)
    assert r.pace_s == pytest.approx(1.4 * 7 / 1e3), "a budget that is spent has no schedule"


def test_a_declined_turn_of_a_promised_program_that_is_short_of_time_leaves_nothing_for_what_follows() -> None:
    slo = WireSLO(budget_ms=TWICE_MS, rest_calls=1, rest_output_tokens=8, rest_gaps_ms=20)
    r = Request(rid="r", seq=0, arrival_s=10.0, slo=slo, most_tokens=9, sure_tokens=5)
    r.uncached_tokens, r.left_tokens = 100, 5
    r.set_targets(COST)
    r.decline("no room")
    late_s = 10.0 + (TWICE_MS - r.program_ms + 1) / 1e3
    r.share_again(late_s)
    assert r.most_tokens == 9 and r.rest_ms and r.gaps_ms, "a first call's program must be possible as a whole"
    r.favor = 0.5
    r.share_again(10.0)
    assert r.most_tokens == 9 and r.rest_ms and r.gaps_ms, "there is time for what follows"
    r.share_again(late_s)
    assert r.most_tokens == 5 and not r.rest_ms and not r.gaps_ms
    assert r.aim_s == pytest.approx(10.0 + TWICE_MS / 1e3) and r.pace_s == pytest.approx((r.aim_s - r.due_s) / 5)
