"""Programs between their calls: what counts as invested, what is learned of returns, and that room is kept for them."""

from slos_sglang.policy.batch_time import CostModel, Piece
from slos_sglang.policy.programs import Programs
from slos_sglang.policy.request import Request
from slos_sglang.policy.scheduler import Scheduler
from slos_sglang.slo import WireSLO

# A step takes 10 ms, a token 0.1 ms.
COST = CostModel(Piece(tokens_ms=0.1, const_ms=10))


def call(seq: int, program: str, *, at_s: float, prompt: int = 300, cached: int = 0, ttft_ms: float = 200) -> Request:
    slo = WireSLO(program=program, stage="act", ttft_ms=ttft_ms, tpot_ms=100)
    request = Request(rid=f"{program}/{seq}", seq=seq, arrival_s=at_s, slo=slo)
    request.uncached_tokens, request.context_tokens, request.left_tokens = prompt - cached, cached, 2
    request.set_targets(COST)
    return request


def one_round(programs: Programs, seq: int, program: str, at_s: float, *, kept: bool = True) -> Request:
    """A call that ends at `at_s`, and the one that comes half a second later."""
    first = call(seq, program, at_s=at_s - 0.1)
    first.admit()
    first.kept, first.context_tokens = kept, 300
    programs.ended(first, at_s)
    back = call(seq + 1, program, at_s=at_s + 0.5, prompt=500, cached=300)
    programs.arrived(back)
    return back


def test_a_turn_is_worth_more_the_more_was_invested_in_promises_kept() -> None:
    programs = Programs()
    assert one_round(programs, 0, "a", 1.0).favor == 300 / (300 + 200 + 2)
    assert one_round(programs, 2, "b", 1.0, kept=False).favor == 0.0
    newcomer = call(4, "c", at_s=2.0)
    programs.arrived(newcomer)
    assert newcomer.favor == 0.0


def test_what_was_invested_adds_up_over_the_calls_of_a_program() -> None:
    programs = Programs()
    back = one_round(programs, 0, "a", 1.0)
    back.admit()
    back.context_tokens = 502
    programs.ended(back, 2.0)
    last = call(2, "a", at_s=2.1)
    programs.arrived(last)
    assert last.invested_tokens == 300 + 502


def test_room_is_kept_only_where_asked_for_and_only_until_it_is_too_late() -> None:
    for reserve, expected in ((0.0, 0), (0.5, 1)):
        programs = Programs(reserve=reserve)
        for n in range(3):
            one_round(programs, 2 * n, f"p{n}", n)
        away = call(9, "away", at_s=9.9)
        away.admit()
        programs.ended(away, 10.0)
        assert len(programs.expected(10.2)) == expected
        for request in programs.expected(10.2):
            assert (request.uncached_tokens, request.arrival_s, request.first_due_s) == (100, 10.5, 10.7)
        assert not programs.expected(12.0), "three gaps later it is given up"


def test_a_stage_after_which_programs_end_is_not_waited_for() -> None:
    programs = Programs(reserve=1.0)
    for n in range(3):
        one_round(programs, 2 * n, f"p{n}", n)
    for n in range(4, 9):
        ended = call(2 * n, f"p{n}", at_s=n)
        ended.admit()
        programs.ended(ended, n + 0.1)
        programs.expected(n + 9.0)
    last = call(99, "last", at_s=20.0)
    last.admit()
    programs.ended(last, 20.0)
    assert not programs.expected(20.1)


def test_a_newcomer_waits_for_a_return_that_needs_the_room() -> None:
    for reserve, admitted in ((0.0, True), (1.0, False)):
        scheduler = Scheduler(cost=COST, programs=Programs(reserve=reserve))
        for n in range(3):
            one_round(scheduler.programs, 2 * n, f"p{n}", n)
        away = call(9, "away", at_s=9.9)
        away.admit()
        scheduler.ended(away, 10.0)
        # The newcomer takes 560 ms in 12 batches, 680 of its 690; the return 20 ms of them before.
        newcomer = call(10, "new", at_s=10.05, prompt=5600, ttft_ms=690)
        ((_, verdict),) = scheduler.admit(10.05, [newcomer], [], [newcomer])
        assert verdict.admitted == admitted
        assert len(scheduler.programs.expected(10.05)) == (not admitted)


def test_a_turn_that_was_in_time_though_declined_keeps_its_program_going() -> None:
    programs = Programs()
    turn = one_round(programs, 0, "a", 1.0)
    turn.decline("no room")
    turn.context_tokens = 500
    programs.ended(turn, 2.0)
    last = call(2, "a", at_s=2.1)
    programs.arrived(last)
    assert last.favor > 0
    never = call(3, "b", at_s=2.0)
    never.decline("no room")
    programs.ended(never, 2.1)
    back = call(4, "b", at_s=2.2)
    programs.arrived(back)
    assert back.favor == 0.0, "nothing was promised"
