"""PB*: small cases by hand, its laws on drawn ones, and an execution batch by batch that delivers it."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from slos_sglang.policy.batch_time import BatchSize, CostModel, Piece
from slos_sglang.policy.batches import Limits, Memory
from slos_sglang.policy.prefill_budget import TOO_MANY, Decoders, prefill_budget
from slos_sglang.policy.state import World, world_of

# 10 ms a step, 0.1 ms a token.
COST = CostModel(Piece(tokens_ms=0.1, const_ms=10))
NO_CAP_MS = 1e6


def world(cost: CostModel, max_batch_ms: float = NO_CAP_MS) -> World:
    return world_of(cost, Limits(max_batch_ms=max_batch_ms), Memory())


def decoders(*tiers: tuple[int, float], context_tokens: int = 0) -> Decoders:
    counts = np.array([count for count, _ in tiers], dtype=np.int64)
    return Decoders(counts, np.array([pace_ms for _, pace_ms in tiers], dtype=np.float64), context_tokens)


def test_by_hand() -> None:
    # Nobody decodes: one batch, 90 ms of tokens.
    assert prefill_budget(100, decoders(), world(COST)) == 900
    # Capped at 50 ms: two batches, 40 ms of tokens each.
    assert prefill_budget(100, decoders(), world(COST, 50)) == 800
    # Ten decoders in each.
    assert prefill_budget(100, decoders((10, 50)), world(COST)) == 780
    # Four batches of 400: the ten at 50 ms in each, the ten at 100 ms in every second.
    assert prefill_budget(200, decoders((10, 50), (10, 100)), world(COST)) == 1600 - 40 - 20
    # Time for a batch and a half; the second starts, the tier that rides in it has to.
    assert prefill_budget(75, decoders((10, 50)), world(COST)) == 390 + 140


def test_a_population_that_cannot_be_held_leaves_nothing() -> None:
    # 400 tokens take all of 50 ms.
    assert prefill_budget(100, decoders((400, 50)), world(COST)) == 0
    assert prefill_budget(100, decoders((401, 50)), world(COST)) == TOO_MANY


def test_a_roofline_and_context() -> None:
    roof = CostModel(Piece(tokens_ms=0.1, const_ms=10), Piece(tokens_ms=0.01, const_ms=60))
    # Below 500 tokens the second piece rules: 60 ms and little more.
    assert prefill_budget(64, decoders(), world(roof)) == 400
    assert prefill_budget(59, decoders(), world(roof)) == 0
    # 5 decoders over 99 tokens of KV and their next one cost 5 ms; a prompt token costs 0.1 + 0.01 ms.
    context = CostModel(Piece(tokens_ms=0.1, context_ms=0.01, const_ms=10))
    assert prefill_budget(50, decoders((5, 50), context_tokens=99), world(context)) == int((40 - 0.5 - 5) / 0.11)


@dataclass
class Decoder:
    pace_ms: float
    due_ms: float


def executed(within_ms: float, length_ms: float, tiers: list[tuple[int, float]], context: int, cost: CostModel) -> int:
    """What an execution in batches of `length_ms` delivers, its last batch ending where that brings most; it asserts
    that no batch takes longer than it may and that everybody keeps his pace."""
    running = [Decoder(pace_ms, pace_ms) for count, pace_ms in tiers for _ in range(count)]
    start_ms, done, best = 0.0, 0, 0
    while start_ms < within_ms:
        whole_ms = start_ms + length_ms
        ends = {min(whole_ms, within_ms), *(d.due_ms - length_ms for d in running)}
        for end_ms in sorted(e for e in ends if start_ms < e <= within_ms and e <= whole_ms):
            done_by_then = done + _batch(start_ms, end_ms, length_ms, running, done, context, cost)[0]
            best = max(best, done_by_then)
        chunk, riders = _batch(start_ms, whole_ms, length_ms, running, done, context, cost)
        size = BatchSize(chunk + len(riders), (chunk > 0) + len(riders), len(riders) * (context + 1) + chunk)
        size.context_tokens += done if chunk else 0
        assert cost.batch_ms(size) <= length_ms + 1e-4
        for decoder in riders:
            assert decoder.due_ms >= whole_ms - 1e-5, "late"
            decoder.due_ms += decoder.pace_ms
        done += chunk
        start_ms = whole_ms
    return best


def _batch(
    start_ms: float, end_ms: float, length_ms: float, running: list[Decoder], done: int, context: int, cost: CostModel
) -> tuple[int, list[Decoder]]:
    riders = [d for d in running if d.due_ms < end_ms + length_ms - 1e-6]
    size = BatchSize(len(riders), len(riders), len(riders) * (context + 1))
    return cost.chunk_tokens(size, prefix_tokens=done, within_ms=end_ms - start_ms + 1e-6), riders


PIECES = st.builds(
    Piece,
    tokens_ms=st.floats(0.02, 0.2),
    requests_ms=st.sampled_from((0.0, 0.3, 2.0)),
    context_ms=st.sampled_from((0.0, 1e-3)),
    const_ms=st.floats(1, 30),
)
COSTS = st.lists(PIECES, min_size=1, max_size=2).map(lambda pieces: CostModel(*pieces))
TIERS = st.lists(st.tuples(st.integers(0, 10), st.floats(20, 200)), max_size=4).map(
    lambda tiers: sorted(tiers, key=lambda tier: tier[1])
)
CAPS = st.sampled_from((60.0, 150.0, NO_CAP_MS))


@given(COSTS, TIERS, CAPS, st.integers(0, 2000), st.lists(st.floats(0, 500), min_size=2, max_size=8))
def test_it_never_falls_with_time(
    cost: CostModel, tiers: list[tuple[int, float]], cap_ms: float, context: int, times: list[float]
) -> None:
    found = [
        prefill_budget(t, decoders(*tiers, context_tokens=context), world(cost, cap_ms)) for t in sorted([0.0, *times])
    ]
    assert found[0] <= 0 and all(later >= sooner for sooner, later in pairwise(found))


@given(COSTS, TIERS.filter(bool), CAPS, st.floats(0, 500), st.data())
def test_it_never_rises_with_decoders(
    cost: CostModel, tiers: list[tuple[int, float]], cap_ms: float, within_ms: float, data: st.DataObject
) -> None:
    which, more = data.draw(st.integers(0, len(tiers) - 1)), data.draw(st.integers(1, 5))
    crowd = [(count + more * (k == which), pace_ms) for k, (count, pace_ms) in enumerate(tiers)]
    there = world(cost, cap_ms)
    assert prefill_budget(within_ms, decoders(*crowd), there) <= prefill_budget(within_ms, decoders(*tiers), there)


@given(COSTS, TIERS, CAPS, st.integers(0, 2000), st.floats(1, 500))
@example(COST, [(0, 33.0), (10, 50.0), (10, 70.0)], NO_CAP_MS, 0, 400.0)
def test_an_execution_delivers_it(
    cost: CostModel, tiers: list[tuple[int, float]], cap_ms: float, context: int, within_ms: float
) -> None:
    found = prefill_budget(within_ms, decoders(*tiers, context_tokens=context), world(cost, cap_ms))
    if found == TOO_MANY:
        return
    longest_ms = min([world(cost, cap_ms).max_batch_ms, *(pace_ms for count, pace_ms in tiers if count)])
    rows = sum(count for count, _ in tiers)
    together = cost.batch_ms(BatchSize(rows, rows, rows * (context + 1)))
    lengths = [length for length in (longest_ms, *(p for _, p in tiers)) if together <= length + 1e-6]
    delivered = [executed(within_ms, length, tiers, context, cost) for length in lengths if length <= longest_ms]
    assert found == max(delivered)
