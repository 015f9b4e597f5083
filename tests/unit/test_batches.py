"""Batch formation: small cases worked out by hand."""

import pytest

from slos_sglang.policy.batch_time import CostModel, Piece
from slos_sglang.policy.batches import Limits, Memory
from slos_sglang.policy.request import Request
from slos_sglang.policy.scheduler import Scheduler
from slos_sglang.slo import WireSLO

# A step takes 10 ms, a token 0.1 ms, a row nothing: a batch of 50 ms has room for 400 tokens.
COST = CostModel(Piece(tokens_ms=0.1, const_ms=10))
LIMITS = Limits(max_batch_ms=1000, rides_ahead=1.0)


def make(
    rid: str, *, due_ms: float | None, left: int = 0, seq: int = 0, promised: bool = True, pace_ms: float = 100
) -> Request:
    """A request whose next token is due in `due_ms` from t = 0; with `left` prompt tokens it still waits."""
    r = Request(rid=rid, seq=seq, arrival_s=0.0, slo=WireSLO(tpot_ms=pace_ms) if promised else None, left_tokens=8)
    r.uncached_tokens, r.pace_s = left, pace_ms / 1e3
    if not left:
        r.output_tokens, r.started = 1, True
    if promised:
        r.admit()
        assert due_ms is not None
        r.due_s = r.first_due_s = due_ms / 1e3
        if not left:
            r.paced_s = r.due_s - r.pace_s
    return r


def plan(
    decoding: list[Request],
    waiting: list[Request],
    limits: Limits = LIMITS,
    memory: Memory | None = None,
    cost: CostModel = COST,
) -> tuple[set[str], dict[str, int]]:
    policy = Scheduler(cost=cost, limits=limits)
    batch = policy.next_batch(0.0, decoding, waiting, memory or Memory())
    assert batch.predicted_ms == cost.batch_ms(batch.size)
    return {r.rid for r in batch.decode}, {r.rid: tokens for r, tokens in batch.prefill}


def test_the_earliest_due_token_sets_the_size() -> None:
    # The decoder is due in 50 ms: 10 ms for the step, 0.1 for its token, 39.9 for 399 prompt tokens.
    decode, prefill = plan([make("d", due_ms=50)], [make("p", due_ms=500, left=1000)])
    assert decode == {"d"} and prefill == {"p": 399}


def test_a_looser_decoder_makes_room_for_more() -> None:
    _, prefill = plan([make("d", due_ms=100)], [make("p", due_ms=500, left=2000)])
    assert prefill == {"p": 899}


def test_who_is_not_due_sits_out_while_prompts_wait() -> None:
    decoding = [make("tight", due_ms=50), make("loose", due_ms=400)]
    prompts = [make("p", due_ms=500, left=1000)]
    assert plan(decoding, prompts) == ({"tight"}, {"p": 399})
    assert plan(decoding, prompts, Limits(max_batch_ms=1000, rides_ahead=5)) == ({"tight", "loose"}, {"p": 398})


def test_fewer_ride_ahead_where_their_rows_are_dear() -> None:
    # Batches last 100 ms here, so the loose ones are due within 4 batches after this one. Where rows cost next to
    # nothing they ride. With rows of 10 ms a step takes 20 ms with one, and 30 more with all four: they ride
    # 5 * 20 / 30 batches ahead, no more.
    decoding = [make("tight", due_ms=100), *(make(f"loose{n}", due_ms=500) for n in range(3))]
    prompts = [make("p", due_ms=900, left=1000)]
    limits = Limits(max_batch_ms=100, rides_ahead=5)
    dear = CostModel(Piece(tokens_ms=0.1, requests_ms=10.0, const_ms=10.0))
    assert plan(decoding, prompts, limits)[0] == {"tight", "loose0", "loose1", "loose2"}
    assert plan(decoding, prompts, limits, cost=dear)[0] == {"tight"}


def test_nobody_sits_out_for_nothing() -> None:
    decode, _ = plan([make("tight", due_ms=50), make("loose", due_ms=400)], [])
    assert decode == {"tight", "loose"}


def test_prompts_go_by_deadline_and_a_tight_newcomer_overtakes() -> None:
    half_done = make("long", due_ms=900, left=700, seq=0)
    newcomer = make("tight", due_ms=60, left=200, seq=1)
    _, prefill = plan([make("d", due_ms=50)], [half_done, newcomer])
    assert list(prefill.items()) == [("tight", 200), ("long", 199)]


def test_a_batch_ends_before_a_first_token_it_completes_is_due() -> None:
    # "tight" must have its token in 40 ms: 10 + 20 + 10 ms leave room for 100 tokens of the long one.
    _, prefill = plan([], [make("long", due_ms=900, left=700), make("tight", due_ms=40, left=200)])
    assert prefill == {"tight": 200, "long": 100}


def test_a_crumb_of_a_chunk_is_left_out_unless_it_completes_the_prompt() -> None:
    limits = Limits(max_batch_ms=1000, min_chunk_steps=0.5)
    decoder = make("d", due_ms=12)
    assert plan([decoder], [make("p", due_ms=500, left=100)], limits) == ({"d"}, {})
    assert plan([decoder], [make("p", due_ms=500, left=19)], limits) == ({"d"}, {"p": 19})


def test_best_effort_gets_what_is_left_over() -> None:
    waiting = [make("be", due_ms=None, left=1000, promised=False), make("p", due_ms=500, left=10)]
    limits = Limits(max_batch_ms=60, best_effort_steps=2)
    # Two steps are 20 ms: 10 + 0.1 + 1 and 89 tokens of best effort.
    assert plan([make("d", due_ms=100)], waiting, limits) == ({"d"}, {"p": 10, "be": 89})
    # The decoder is 77 ms ahead, 60 of which are for who comes next.
    assert plan([make("d", due_ms=77)], waiting, limits) == ({"d"}, {"p": 10, "be": 59})
    assert plan([make("d", due_ms=65)], waiting, limits) == ({"d"}, {"p": 10})


def test_best_effort_that_would_break_a_promise_gets_nothing() -> None:
    # A batch of 30 ms would leave "p" 20 ms for its 10 + 19.9; without best effort it takes 10 + 0.1 + 19.9 at once.
    waiting = [make("p", due_ms=30.1, left=199), make("be", due_ms=None, left=1000, promised=False)]
    assert plan([make("d", due_ms=100)], waiting) == ({"d"}, {"p": 199})


def test_aged_best_effort_has_its_turn_where_that_breaks_no_promise() -> None:
    old = make("old", due_ms=None, left=600, promised=False)
    old.arrival_s = old.served_s = -10.0
    decoder = make("d", due_ms=50)
    limits = Limits(max_batch_ms=1000, best_effort_steps=3)
    assert plan([decoder], [old], limits) == ({"d"}, {"old": 199}), "it may use what is kept for who comes next"
    late = make("p", due_ms=70, left=500)
    assert plan([decoder], [old, late], limits) == ({"d"}, {"p": 399}), "10 + 39.9 ms leave 20 ms for 101 tokens"
    soon = make("p", due_ms=500, left=300)
    assert plan([decoder], [old, soon], limits) == ({"d"}, {"p": 300, "old": 50}), "the least where there is no more"


def test_nothing_is_promised_while_best_effort_waits_too_long() -> None:
    policy = Scheduler(cost=COST, limits=LIMITS)
    old = make("old", due_ms=None, left=600, promised=False)
    old.arrival_s = old.served_s = -10.0
    tight = make("p", due_ms=50, left=399)
    newcomer = make("n", due_ms=5000, left=10)
    newcomer.standard, newcomer.judged = False, False
    policy.next_batch(0.0, [], [tight, old])
    ((_, verdict),) = policy.admit(0.01, [newcomer], [], [tight, old, newcomer])
    assert not verdict.admitted and "best effort has waited too long" in verdict.reason
    policy.next_batch(0.02, [], [old])
    ((_, verdict),) = policy.admit(0.03, [newcomer], [], [old, newcomer])
    assert verdict.admitted


def test_best_effort_that_is_served_holds_up_no_promises_though_others_of_it_wait() -> None:
    policy = Scheduler(cost=COST, limits=LIMITS)
    served, waiting = (make(rid, due_ms=None, left=left, promised=False) for rid, left in (("s", 0), ("w", 600)))
    waiting.seq = -1
    for request in (served, waiting):
        request.arrival_s = request.served_s = -10.0
    decoder, newcomer = make("d", due_ms=5000), make("n", due_ms=5000, left=10)
    newcomer.standard, newcomer.judged = False, False
    full = Memory(capacity_tokens=1000, free_tokens=500)  # no room for the one that waits
    batch = policy.next_batch(0.0, [decoder, served], [waiting], full)
    assert served in batch.decode and not batch.prefill
    ((_, verdict),) = policy.admit(0.01, [newcomer], [decoder, served], [waiting, newcomer], full)
    assert verdict.admitted


def test_a_lost_promise_does_not_hold_the_others_up() -> None:
    lost = make("lost", due_ms=-300)
    lost.kept = False
    _, prefill = plan([lost, make("d", due_ms=50)], [make("p", due_ms=500, left=1000)])
    assert sum(prefill.values()) >= 398


def test_longest_batch_while_prompts_wait() -> None:
    _, prefill = plan([], [make("p", due_ms=5000, left=10_000)], Limits(max_batch_ms=60))
    assert prefill == {"p": 500}


def test_a_prompt_starts_only_where_its_whole_answer_will_fit() -> None:
    # Each needs 100 + 8 tokens; of three that would all be done together only two fit.
    waiting = [make(rid, due_ms=500, left=100, seq=seq) for seq, rid in enumerate("abc")]
    memory = Memory(capacity_tokens=300, free_tokens=300)
    assert plan([], waiting, memory=memory)[1] == {"a": 100, "b": 100}


def test_best_effort_gives_up_its_memory_to_a_promise() -> None:
    holder = make("be", due_ms=None, promised=False)
    holder.context_tokens = 150
    policy = Scheduler(cost=COST, limits=LIMITS)
    batch = policy.next_batch(
        0.0, [holder], [make("p", due_ms=500, left=100, seq=1)], Memory(capacity_tokens=200, free_tokens=50)
    )
    assert batch.preempt == [holder] and [r.rid for r, _ in batch.prefill] == ["p"] and not batch.decode


@pytest.mark.parametrize("block_tokens", [1, 16])
def test_memory_counts_whole_blocks(block_tokens: int) -> None:
    waiting = [make("a", due_ms=500, left=20), make("b", due_ms=500, left=20, seq=1)]
    memory = Memory(capacity_tokens=56, free_tokens=56, block_tokens=block_tokens)
    # 20 + 8 tokens each: 56 in all, or two blocks of 16 each: 64.
    assert plan([], waiting, memory=memory)[1] == ({"a": 20, "b": 20} if block_tokens == 1 else {"a": 20})
