"""How long conversations are kept while their tools run, and what best effort then leaves alone."""

import pytest

from slos_sglang.policy.batch_time import CostModel, Piece
from slos_sglang.policy.batches import Batch, Memory
from slos_sglang.policy.holds import Holds, Mode, Over, worth_waiting_s
from slos_sglang.policy.request import INF, Request
from slos_sglang.policy.scheduler import Scheduler
from slos_sglang.slo import WireSLO

# A token takes 0.025 ms, and it is worth waiting for a return for a second where all of the memory is in use.
COST = CostModel(Piece(tokens_ms=0.025, const_ms=1e-6))
CAPACITY = 10_000


def call(seq: int, program: str, *, at_s: float = 0.0, tokens: int = 300, stage: str = "act", **slo: float) -> Request:
    request = Request(rid=f"{program}/{seq}", seq=seq, arrival_s=at_s, slo=WireSLO(program=program, stage=stage, **slo))
    request.context_tokens = tokens
    return request


def taught(*gaps_s: float, mode: Mode = "auto") -> tuple[Holds, list[Over]]:
    """What came back after these gaps (INF: never), and what will be over from here on."""
    over: list[Over] = []
    holds = Holds(mode=mode)
    for n, gap_s in enumerate(gaps_s):
        holds.ended(call(2 * n, f"p{n}"), 0.0)
        if gap_s < INF:
            holds.arrived(call(2 * n + 1, f"p{n}", at_s=gap_s))
    holds.ended(call(999, "late", stage="other"), 1e4)  # who is not back by now is given up
    assert not holds.any or mode == "always"
    holds.report = over.append
    return holds, over


def kept_s(holds: Holds, over: list[Over], *, used: float = 0.1, capacity: int = CAPACITY, **slo: float) -> float:
    """How long a conversation is kept where so much of the memory is used and nobody comes."""
    holds.ended(call(5000, "away", **slo), 2e4)
    for step in range(30_000):
        calls = holds.held(2e4 + step / 100, capacity_tokens=capacity, used_tokens=int(used * capacity), cost=COST)
        if not calls:
            break
    return over[-1].held_s if over else 0.0


def test_what_is_worth_waiting_for() -> None:
    assert worth_waiting_s([1.0, 1.0, 2.0], 10.0) == 2.0
    assert worth_waiting_s([1.0, 1.0, 9.0], 5.0) == 1.0  # the last one takes longer than it saves
    assert worth_waiting_s([1.0, 1.0, INF], 5.0) == 1.0
    assert worth_waiting_s([4.0, INF, INF], 5.0) == 0.0  # one of three saves 5, all three cost 12
    assert worth_waiting_s([INF, INF], 1e9) == 0.0
    assert worth_waiting_s([], 1e9) == 0.0


def test_the_time_grows_with_the_gap_and_with_its_spread() -> None:
    short, long, spread = (kept_s(*taught(*gaps)) for gaps in ((0.2,) * 6, (1.0,) * 6, (0.4, 0.7, 1.0, 1.3, 1.6)))
    assert 0.2 < short < 0.3 and 1.0 < long < 1.3
    assert spread > long


def test_the_time_shrinks_with_pressure() -> None:
    gaps = (0.2, 0.2, 0.2, 0.4, 1.6, 6.4)
    times = [kept_s(*taught(*gaps), used=used) for used in (0.05, 0.3, 1.0)]
    assert times[0] > times[1] > times[2] > 0.0
    assert times[0] > 6.4
    assert kept_s(*taught(*(20.0,) * 6), used=1.0) == 0.0


def test_the_time_shrinks_while_it_is_kept() -> None:
    holds, over = taught(*(3.0,) * 6)
    holds.ended(call(5000, "away"), 2e4)
    assert holds.held(2e4 + 2.0, capacity_tokens=CAPACITY, used_tokens=1000, cost=COST)
    assert not holds.held(2e4 + 2.1, capacity_tokens=CAPACITY, used_tokens=CAPACITY, cost=COST)
    assert len(over) == 1


@pytest.mark.parametrize(
    ("gaps", "slo"),
    [
        ((), {}),  # nobody knows
        ((INF,) * 6, {}),  # nobody ever came
        ((0.2,) * 6, {"rest_calls": 0.0}),  # the client says that none follows
    ],
)
def test_where_no_return_is_expected_nothing_is_kept(gaps: tuple[float, ...], slo: dict[str, float]) -> None:
    holds, over = taught(*gaps)
    holds.ended(call(5000, "away", **slo), 2e4)
    assert not holds.any and not over


def test_what_the_client_announces_counts_before_anything_was_seen() -> None:
    assert kept_s(*taught(), gap_ms=500.0) == pytest.approx(1.2, abs=0.02)
    # And it scales what was seen: their spread stays.
    assert kept_s(*taught(*(0.1, 0.1, 0.1, 0.5) * 8), gap_ms=1000.0, used=0.02) == pytest.approx(1.2 * 2.5, rel=0.05)


def test_a_return_ends_it() -> None:
    holds, over = taught(*(1.0,) * 6)
    away = call(5000, "away")
    holds.ended(away, 2e4)
    assert holds.held(2e4, capacity_tokens=CAPACITY, used_tokens=1, cost=COST) == [away]
    holds.arrived(call(5001, "away", at_s=2e4 + 0.7))
    assert not holds.any
    assert over == [Over(request=away, held_s=pytest.approx(0.7), gap_s=pytest.approx(0.7))]


def test_of_a_program_s_conversations_the_one_that_goes_on_is_not_waited_for_any_more() -> None:
    holds, over = taught(*(1.0,) * 6)
    forks = [call(5000 + n, "forks", tokens=tokens) for n, tokens in enumerate((300, 500, 700))]
    for fork in forks:
        holds.ended(fork, 2e4)
    holds.arrived(call(5010, "forks", at_s=2e4 + 0.1, tokens=499))
    assert [o.request for o in over] == [forks[1]]


def test_the_next_to_return_is_used_last() -> None:
    holds, _ = taught()
    calls = [call(5000 + n, f"p{n}", gap_ms=gap_ms) for n, gap_ms in enumerate((300.0, 100.0, 200.0))]
    for each in calls:
        holds.ended(each, 2e4)
    kept = holds.held(2e4, capacity_tokens=CAPACITY, used_tokens=1, cost=COST)
    assert [each.slo.gap_ms for each in kept if each.slo] == [300.0, 200.0, 100.0]


def test_never_and_always() -> None:
    assert kept_s(*taught(*(0.2,) * 6, mode="never")) == 0.0
    assert kept_s(*taught(mode="always"), used=1.0) == pytest.approx(60.0)
    assert kept_s(*taught(*(0.2,) * 3, 30.0, mode="always"), used=1.0) == pytest.approx(90.0)


def test_who_comes_after_being_given_up_teaches_that() -> None:
    holds, over = taught()
    for n in range(4):
        holds.ended(call(2 * n, f"slow{n}"), 2e4 + n)
        holds.ended(call(1, "other", stage="other"), 2e4 + n + 70.0)  # by now it is given up
        holds.arrived(call(2 * n + 1, f"slow{n}", at_s=2e4 + n + 80.0))
    assert kept_s(holds, over, capacity=100 * CAPACITY) > 80.0


def test_an_aborted_call_keeps_nothing() -> None:
    scheduler = Scheduler(cost=COST, holds=Holds(mode="auto"))
    scheduler.ended(call(0, "a", gap_ms=100.0), 0.0, True)
    assert not scheduler.holds.any
    scheduler.ended(call(1, "a", gap_ms=100.0), 0.0)
    assert scheduler.holds.any


def test_only_so_many_are_remembered() -> None:
    holds, over = taught(*(1.0,) * 6)
    for n in range(1100):
        holds.ended(call(n, f"q{n}"), 2e4)
    assert len(holds.held(2e4, capacity_tokens=CAPACITY, used_tokens=1, cost=COST)) == 1024
    assert len(over) == 76


def waiting(seq: int, *, tokens: int, promised: bool = False) -> Request:
    slo = WireSLO(program=f"w{seq}", stage="act", ttft_ms=90.0, tpot_ms=100.0) if promised else None
    request = Request(rid=f"w{seq}", seq=seq, arrival_s=0.0, slo=slo, max_tokens=4)
    request.uncached_tokens, request.left_tokens, request.sure_tokens = tokens, 4, 4
    request.set_targets(COST)
    if promised:
        request.admit()
    return request


def taken(batch: Batch) -> dict[str, int]:
    return {request.rid: tokens for request, tokens in batch.prefill}


def test_best_effort_leaves_alone_what_is_kept_and_promises_do_not() -> None:
    memory = Memory(capacity_tokens=1000, free_tokens=600, kept_tokens=500)
    scheduler = Scheduler(cost=CostModel(Piece(tokens_ms=0.1, const_ms=10)))
    small, large = waiting(0, tokens=80), waiting(1, tokens=300)
    assert taken(scheduler.next_batch(0.0, [], [small, large], memory)) == {"w0": 80}
    promised = waiting(2, tokens=450, promised=True)
    batch = scheduler.next_batch(0.0, [], [promised, waiting(3, tokens=40)], memory)
    assert taken(batch) == {"w2": 450}
    assert not batch.preempt


def test_who_has_begun_goes_on() -> None:
    memory = Memory(capacity_tokens=1000, free_tokens=400, kept_tokens=400)
    decoder, chunked, new = waiting(0, tokens=1), waiting(1, tokens=100), waiting(2, tokens=100)
    decoder.uncached_tokens = 0
    decoder.started = chunked.started = True
    batch = Scheduler(cost=CostModel(Piece(tokens_ms=0.1, const_ms=10))).next_batch(
        0.0, [decoder], [chunked, new], memory
    )
    assert batch.decode == [decoder] and taken(batch) == {"w1": 100}


def test_room_for_outputs_is_not_taken_from_what_is_kept() -> None:
    decoder, new = waiting(0, tokens=1), waiting(1, tokens=100)
    decoder.uncached_tokens, decoder.started = 0, True
    scheduler = Scheduler(cost=CostModel(Piece(tokens_ms=0.1, const_ms=10)))
    for free_tokens, expected in ((408, {}), (409, {"w1": 100})):  # 4 tokens of each are to come, and one comes
        memory = Memory(capacity_tokens=1000, free_tokens=free_tokens, kept_tokens=300)
        assert taken(scheduler.next_batch(0.0, [decoder], [new], memory)) == expected


def test_best_effort_has_all_of_it_when_it_is_its_turn() -> None:
    memory = Memory(capacity_tokens=1000, free_tokens=600, kept_tokens=600)
    scheduler = Scheduler(cost=CostModel(Piece(tokens_ms=0.1, const_ms=10)))
    decoder = Request(rid="d", seq=0, arrival_s=0.0, slo=WireSLO(program="d", tpot_ms=1000.0), max_tokens=50)
    decoder.set_targets(COST)
    decoder.admit()
    decoder.started, decoder.context_tokens = True, 100
    decoder.token(0.0)
    aged = waiting(1, tokens=300)
    assert "w1" not in taken(scheduler.next_batch(0.1, [decoder], [aged], memory))
    scheduler._last_turn_s = aged.served_s = 0.0
    assert "w1" in taken(scheduler.next_batch(4.9, [decoder], [aged], memory))
