"""PB*: how much prefill fits beside a decode population (paper, section 2).

Batches are run forward: each lasts as long as the tightest pace allows (or the cap on batches), carries the decoders
that would be late after the next one, and gives the rest of its time to prompts. So the size of batches is dynamic.

What must stay true: the answer never falls with time, never rises with decoders, and some batch-by-batch execution
delivers it while every decoder keeps its pace. A prefill is priced as one prompt without a cached prefix.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from slos_sglang.policy.plan import batch_ms, chunk_tokens
from slos_sglang.policy.state import World

# The decode population cannot keep its pace, prefill or not.
TOO_MANY = -1
_EPSILON_MS = 1e-6


class Decoders(NamedTuple):
    """A decode population: `counts` requests in each tier, a token every `paces_ms`, each over `context_tokens` of KV.

    Tiers are in the order of their paces; one without requests still names a length that batches may have.
    """

    counts: NDArray[np.int64]
    paces_ms: NDArray[np.float64]
    context_tokens: int


@njit(cache=True)
def prefill_budget(within_ms: float, decoders: Decoders, world: World) -> int:
    """The most prompt tokens that can be computed within `within_ms` while all `decoders`, who got a token just now,
    keep their pace; `TOO_MANY` where they cannot, on their own, for good.
    """
    tiers = decoders.counts.size
    longest_ms = world.max_batch_ms
    for k in range(tiers):
        if decoders.counts[k] > 0:
            longest_ms = min(longest_ms, decoders.paces_ms[k])
    best = _in_batches_of(longest_ms, within_ms, decoders, world)
    for k in range(tiers):
        if decoders.paces_ms[k] < longest_ms:
            best = max(best, _in_batches_of(decoders.paces_ms[k], within_ms, decoders, world))
    return best


@njit(cache=True)
def prefill_budgets(
    within_ms: NDArray[np.float64],
    counts: NDArray[np.int64],
    paces_ms: NDArray[np.float64],
    context_tokens: int,
    world: World,
) -> NDArray[np.int64]:
    """`prefill_budget` for many: entry k of `within_ms` with row k of `counts` (a column a tier)."""
    found = np.empty(within_ms.size, dtype=np.int64)
    for k in range(within_ms.size):
        found[k] = prefill_budget(within_ms[k], Decoders(counts[k], paces_ms, context_tokens), world)
    return found


@njit(cache=True)
def _in_batches_of(length_ms: float, within_ms: float, decoders: Decoders, world: World) -> int:
    """`prefill_budget` with all batches of one length, which is no longer than any pace.

    So nobody is ever due before a batch ends, and each tier rides when its own pace says so; now and then all do.
    """
    tiers, rows = decoders.counts.size, decoders.counts.sum()
    if batch_ms(rows, rows, rows * (decoders.context_tokens + 1), 0, world) > length_ms + _EPSILON_MS:
        return TOO_MANY
    due_ms = np.where(decoders.counts > 0, decoders.paces_ms, np.inf)
    start_ms, done, best = 0.0, 0, 0
    while start_ms < within_ms:
        end_ms = start_ms + length_ms
        # The last batch may end early, even before somebody has to ride in it: what is done by then is done.
        last_ms = min(end_ms, within_ms)
        for k in range(tiers):
            early_ms = due_ms[k] - length_ms
            if start_ms < early_ms <= last_ms:
                best = max(best, done + _room(start_ms, early_ms, length_ms, due_ms, done, decoders, world))
        if last_ms < end_ms:
            return max(best, done + _room(start_ms, last_ms, length_ms, due_ms, done, decoders, world))
        done += _room(start_ms, end_ms, length_ms, due_ms, done, decoders, world)
        best = max(best, done)
        for k in range(tiers):
            if due_ms[k] < end_ms + length_ms - _EPSILON_MS:
                due_ms[k] += decoders.paces_ms[k]
        start_ms = end_ms
    return best


@njit(cache=True)
def _room(
    start_ms: float,
    end_ms: float,
    length_ms: float,
    due_ms: NDArray[np.float64],
    done: int,
    decoders: Decoders,
    world: World,
) -> int:
    """Prompt tokens in a batch from `start_ms` to `end_ms`, after `done`, beside those late after another one."""
    rows = 0
    for k in range(decoders.counts.size):
        if due_ms[k] < end_ms + length_ms - _EPSILON_MS:
            rows += decoders.counts[k]
    within_ms = end_ms - start_ms + _EPSILON_MS
    return chunk_tokens(rows, rows, rows * (decoders.context_tokens + 1), 0, done, within_ms, world)
