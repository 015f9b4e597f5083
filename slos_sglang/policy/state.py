"""What the plan knows, as arrays: a row a promised request, and what batches cost.

Requests become `Rows` for a look ahead and are not touched by it. Times are seconds, costs milliseconds.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from slos_sglang.policy.batch_time import CostModel
from slos_sglang.policy.batches import Limits, Memory
from slos_sglang.policy.request import Table

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]

# The future is not looked at beyond this: a longer output is planned as if it ended here, at its pace all the same.
FORESEEN_TOKENS = 1 << 15


class Rows(NamedTuple):
    """Requests as arrays, in arrival order; one without tokens `left` is not there.

    uncached   prompt tokens to compute; 0: it decodes   context    KV tokens it attends to
    held       KV tokens spoken for: had, or cached      left       output tokens expected
    first_due  when its first token is due               paced      when its last token was due; inf: before the first
    pace       s from one due token to the next          deadline   when its last token is due
    credit     s that an early first token's slack may lend later ones, counted until `slack_until`
    repay      tokens after the first within which that is repaid, by a faster pace
    reserve    s that a token may come after it is due before its target is missed
    switch     output tokens until `later` is its pace: thinking ends, or credit is repaid; 0: never
    """

    uncached: Ints
    context: Ints
    held: Ints
    left: Ints
    first_due: Floats
    paced: Floats
    pace: Floats
    credit: Floats
    slack_until: Floats
    reserve: Floats
    deadline: Floats
    repay: Ints
    switch: Ints
    later: Floats


class World(NamedTuple):
    """What a batch costs (an entry a piece of the cost model, ms), how likely a drafted token is accepted (0: there are
    none), what bounds a batch, and whether prompts may be lent what decoders have in reserve.
    """

    tokens_ms: Floats
    requests_ms: Floats
    context_ms: Floats
    draft_ms: Floats
    const_ms: Floats
    acceptance: float
    max_batch_ms: float
    rides_ahead: float
    min_chunk_tokens: int
    memory_tokens: int
    block_tokens: int
    lends: bool


def rows_of(table: Table) -> Rows:
    """The rows of requests in arrival order, from their numbers."""
    pending, context, thinking = table["pending"], table["context_tokens"].copy(), table["thinking"]
    paced, pace = table["paced_s"].copy(), table["pace_s"].copy()
    if pending.any():
        flying = pending > 0
        paced[flying] += pending[flying] * pace[flying]
    return Rows(
        uncached=table["uncached_tokens"].copy(),
        context=context,
        held=context.copy(),
        left=np.minimum(np.maximum(table["left_tokens"] - pending, 1), FORESEEN_TOKENS),
        first_due=table["first_due_s"].copy(),
        paced=paced,
        pace=pace,
        credit=table["credit_s"].copy(),
        slack_until=table["slack_until_s"].copy(),
        reserve=table["reserve_s"].copy(),
        deadline=table["deadline_s"].copy(),
        repay=np.maximum(table["sure_tokens"] - 1, 1),
        switch=np.where(thinking, table["think_tokens"], np.maximum(table["repay_tokens"], 0)),
        later=np.where(thinking, table["answer_pace_s"], table["full_pace_s"]),
    )


def copy_of(rows: Rows) -> Rows:
    """The same rows in arrays of their own."""
    return Rows(*(column.copy() for column in rows))  # type: ignore[arg-type]


def world_of(cost: CostModel, limits: Limits, memory: Memory, *, margin: float = 1.0) -> World:
    """The bounds and costs of batches, every batch taking `margin` times its prediction."""
    pieces = cost.pieces
    return World(
        tokens_ms=np.array([p.tokens_ms * margin for p in pieces]),
        requests_ms=np.array([p.requests_ms * margin for p in pieces]),
        context_ms=np.array([p.context_ms * margin for p in pieces]),
        draft_ms=np.array([p.spec_steps_ms * margin for p in pieces]),
        const_ms=np.array([p.const_ms * margin for p in pieces]),
        acceptance=cost.acceptance,
        max_batch_ms=limits.longest_ms(cost) * margin,
        rides_ahead=float(limits.rides_ahead),
        min_chunk_tokens=limits.min_chunk_tokens(cost),
        memory_tokens=memory.capacity_tokens,
        block_tokens=memory.block_tokens,
        lends=False,
    )
