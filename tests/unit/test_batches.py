"""Batch formation: small cases worked out by hand, and what holds for every load."""

from slos_sglang.policy.batch_time import CostModel, Piece
from slos_sglang.policy.batches import Limits, form_batch
from slos_sglang.policy.request import Request
from slos_sglang.policy.scheduler import Scheduler
from slos_sglang.slo import WireSLO

# A step takes 10 ms, a token 0.1 ms, a row nothing: a batch of 50 ms has room for 400 tokens.
COST = CostModel(Piece(tokens_ms=0.1, const_ms=10))
LIMITS = Limits(max_batch_ms=1000)


def make(
    rid: str, *, due_ms: float | None, left: int = 0, seq: int = 0, promised: bool = True, pace_ms: float = 100
) -> Request:
    """A request whose next token is due in `due_ms` from t = 0; with `left` prompt tokens it still waits."""
    r = Request(rid=rid, seq=seq, arrival_s=0.0, slo=WireSLO(tpot_ms=pace_ms) if promised else None)
    r.uncached_tokens, r.pace_s = left, pace_ms / 1e3
    if not left:
        r.output_tokens = 1
    if promised:
        r.admit()
        assert due_ms is not None
        r.due_s = due_ms / 1e3
    return r


def plan(
    decoding: list[Request], waiting: list[Request], limits: Limits = LIMITS, **kw: bool
) -> tuple[set[str], dict[str, int]]:
    batch = form_batch(0.0, decoding, waiting, COST, limits, **kw)
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
    decode, prefill = plan(decoding, [make("p", due_ms=500, left=1000)])
    assert decode == {"tight"} and prefill == {"p": 399}


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
    limits = Limits(max_batch_ms=1000, min_chunk_tokens=50)
    decoder = make("d", due_ms=12)
    assert plan([decoder], [make("p", due_ms=500, left=100)], limits) == ({"d"}, {})
    assert plan([decoder], [make("p", due_ms=500, left=19)], limits) == ({"d"}, {"p": 19})


def test_best_effort_gets_what_is_left_over() -> None:
    waiting = [make("be", due_ms=None, left=1000, promised=False), make("p", due_ms=500, left=100)]
    # 60 % of the 50 ms: 30 ms hold 10 + 0.1 + 10 and 99 tokens of best effort.
    decode, prefill = plan([make("d", due_ms=50)], waiting)
    assert decode == {"d"} and prefill == {"p": 100, "be": 99}


def test_aged_best_effort_goes_first_when_it_is_its_turn() -> None:
    old = make("old", due_ms=None, left=300, promised=False)
    old.arrival_s = old.served_s = -10.0
    waiting = [old, make("p", due_ms=500, left=1000)]
    assert plan([make("d", due_ms=50)], waiting)[1] == {"p": 399}
    assert plan([make("d", due_ms=50)], waiting, turn=True)[1] == {"old": 300, "p": 99}


def test_a_lost_promise_does_not_hold_the_others_up() -> None:
    lost = make("lost", due_ms=-300)
    lost.kept = False
    _, prefill = plan([lost, make("d", due_ms=50)], [make("p", due_ms=500, left=1000)])
    assert sum(prefill.values()) >= 398


def test_longest_batch_while_prompts_wait() -> None:
    _, prefill = plan([], [make("p", due_ms=5000, left=10_000)], Limits(max_batch_ms=60))
    assert prefill == {"p": 500}


def test_best_effort_turns_take_no_more_than_their_share() -> None:
    limits = Limits(max_batch_ms=60, best_effort_share=0.25)
    policy = Scheduler(cost=COST, limits=limits)
    old = make("old", due_ms=None, left=100_000, promised=False)
    turns = []
    for step in range(100):
        now_s = 100 + step * 0.06
        old.served_s = now_s - 10
        batch = policy.next_batch(now_s, [], [make("p", due_ms=1e9, left=10_000), old])
        turns.append(batch.prefill[0][0] is old)
    assert 20 <= sum(turns) <= 26
