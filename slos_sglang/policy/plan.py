"""The plan: one compiled function chooses the next batch of promised work, another runs that choice forward.

`choose` is the paper's batch formation (section 3): a batch may last until the earliest due token (its t0), decoders
that come due go first, then prefill chunks by deadline, then whoever fits. `foresee` repeats it on the cost model until
everything promised is done or certain to be in time. The server runs `choose`, admission asks `foresee`, so what was
promised is what will happen, as long as steps take what the model says and outputs end where they are expected to:

    safe(state)  :=  foresee(state) meets every due time
    safe(state)  =>  safe(state after choose), because foresee takes exactly that step first
    any other step, and any new promise, is taken only where foresee finds it safe

Where the server has a draft model (paper, section 5), `choose` also says how many tokens are drafted for each decoder
of the batch: as many as leave prompts the largest share of a batch that lasts as long as the tightest pace allows for
the tokens counted on, or where no prompt waits, as many as bring decoders the most tokens in the time. How many are
accepted is chance. `foresee` gives decoders a few only; who had more luck is ahead of its pace and lets batches be
longer, who had less is due the sooner and makes the next one short.

Decoders keep their own pace, by which the mean of their token times is kept too. Only where that does not go together
with everybody's targets prompts are lent what decoders have in reserve (`World.lends`): the time that an early first
token has left until a later token misses its target.

Both work on arrays, a row a promised request, and are compiled by numba; uncompiled (`choose.py_func`) they are the
plain reference that the tests compare with. Times are seconds, costs milliseconds.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from slos_sglang.policy.batch_time import MAX_DRAFTS, CostModel, Piece, tokens_a_step
from slos_sglang.policy.batches import ROOM_FOR_WORK, Limits, Memory
from slos_sglang.policy.request import INF, Request, table_of
from slos_sglang.policy.state import FORESEEN_TOKENS, Flags, Ints, Rows, World, rows_of, world_of

# How a foreseen future ends: in time, a token late, memory short, or too far away to tell.
KEPT, LATE, NO_MEMORY, TOO_FAR = 0, 1, 2, 3

MAX_STEPS = FORESEEN_TOKENS + 1024
# Sums of binary fractions: a token exactly on its due time is on time.
_EPSILON_S = 1e-7
_NOBODY = -1
# Compiled, as all here.
accepted = njit(cache=True)(tokens_a_step)
# Of the drafted tokens that are accepted in the mean a plan counts on this share.
COUNTED = 0.25


@njit(cache=True)
def batch_ms(tokens: int, requests: int, context: int, drafts: int, world: World) -> float:
    """`CostModel.batch_ms`, bit for bit."""
    worst = 0.0
    if requests > 0:
        for k in range(world.const_ms.size):
            ms = (
                world.tokens_ms[k] * tokens
                + world.requests_ms[k] * requests
                + world.context_ms[k] * context
                + world.draft_ms[k] * drafts
                + world.const_ms[k]
            )
            worst = max(worst, ms)
    return worst


@njit(cache=True)
def chunk_tokens(
    tokens: int, requests: int, context: int, drafts: int, prefix: int, within_ms: float, world: World
) -> int:
    """The most tokens that one more row after `prefix` KV tokens may add to a batch of `within_ms`."""
    room = 1e15
    for k in range(world.const_ms.size):
        left_ms = (
            within_ms
            - (world.const_ms[k] + world.draft_ms[k] * drafts)
            - world.tokens_ms[k] * tokens
            - world.requests_ms[k] * (requests + 1)
            - world.context_ms[k] * (context + prefix)
        )
        room = min(room, left_ms / max(world.tokens_ms[k] + world.context_ms[k], 1e-9))
    return max(0, int(room + 1e-9))


@njit(cache=True)
def due_s(i: int, rows: Rows) -> float:
    """When the next token of row `i` is due."""
    due = rows.first_due[i] if rows.paced[i] == INF else rows.paced[i] + rows.pace[i]
    return float(min(due, rows.deadline[i]))


@njit(cache=True)
def lend(rows: Rows) -> None:
    """Let decoders come as late as their targets allow: what they have in reserve becomes part of when they are due."""
    for i in range(rows.left.size):
        if rows.reserve[i] > 0.0 and rows.reserve[i] < INF and rows.paced[i] < INF and rows.pace[i] < INF:
            rows.paced[i] += rows.reserve[i]
            rows.reserve[i] = 0.0


@njit(cache=True)
def _blocks(tokens: int, world: World) -> int:
    return (tokens + world.block_tokens - 1) // world.block_tokens * world.block_tokens


@njit(cache=True)
def fits(newcomer: int, rows: Rows, take: Ints, world: World) -> bool:
    """Would memory last if row `newcomer` started beside those that hold some, all to their expected ends?

    If all advance by a token a step, the peak lies where one of them ends: what those that are left then hold.
    """
    there = np.empty(rows.left.size, dtype=np.int64)
    count, total = 0, 0
    for i in range(rows.left.size):
        if rows.left[i] > 0 and (rows.held[i] > 0 or take[i] > 0 or i == newcomer):
            there[count] = i
            count += 1
            total += _blocks(rows.context[i] + rows.uncached[i] + rows.left[i], world)
    if total <= world.memory_tokens:
        return True
    there = there[:count]
    held = 0
    for rank, i in enumerate(there[np.argsort(-rows.left[there], kind="mergesort")]):
        held += rows.context[i] + rows.uncached[i] + world.block_tokens - 1
        if held + (rank + 1) * rows.left[i] > world.memory_tokens:
            return False
    return True


@njit(cache=True)
def counted(drafts: int, world: World) -> float:
    """Tokens of a step that a plan counts on: among several decoders one has little luck, and all wait for it."""
    return 1.0 + COUNTED * (accepted(drafts, world.acceptance) - 1.0)


@njit(cache=True)
def drafts_for(slack_ms: float, prompts_wait: bool, rows: Rows, world: World) -> int:
    """How many tokens to draft for each decoder of a batch that must end within `slack_ms`."""
    if world.acceptance == 0.0:
        return 0
    decoders, context, tightest_ms = 0, 0, INF
    for i in range(rows.left.size):
        if rows.left[i] > 0 and rows.uncached[i] == 0:
            decoders += 1
            context += rows.context[i] + 1
            tightest_ms = min(tightest_ms, rows.pace[i] * 1e3)
    late = batch_ms(decoders, decoders, context, 0, world) > slack_ms
    best, most = 0, -INF
    for drafts in range(MAX_DRAFTS + 1):
        tokens = decoders * (1 + drafts)
        all_ms = batch_ms(tokens, decoders, context + decoders * drafts, drafts, world)
        if drafts > 0 and all_ms > slack_ms and not late:
            break
        gain = accepted(drafts, world.acceptance)
        worth = gain / all_ms
        if prompts_wait and not late:
            length_ms = max(min(tightest_ms * counted(drafts, world), world.max_batch_ms), 1e-3)
            # Those with a looser pace ride in a part of the batches only.
            riders = 0.0
            for i in range(rows.left.size):
                if rows.left[i] > 0 and rows.uncached[i] == 0:
                    riders += min(length_ms / (rows.pace[i] * 1e3 * gain), 1.0)
            idle_ms = batch_ms(0, 1, 0, drafts, world)
            worth = (length_ms - idle_ms - riders / decoders * (all_ms - idle_ms)) / length_ms
        if worth > most:
            best, most = drafts, worth
    return best


@njit(cache=True)
def choose(now_s: float, rows: Rows, prompts: Ints, world: World, take: Ints) -> tuple[float, int]:
    """Choose the batch that starts at `now_s`: fills `take` with each prompt's tokens and 1 for each decoder that
    rides; returns its time in ms and how many tokens are drafted for each of these.

    prompts  the rows with a prompt to compute, by due time
    """
    take[:] = 0
    decoders, context, tightest_s, pace_s = 0, 0, INF, INF
    for i in range(rows.left.size):
        if rows.left[i] > 0 and rows.uncached[i] == 0:
            decoders += 1
            context += rows.context[i] + 1
            tightest_s = min(tightest_s, due_s(i, rows))
            pace_s = min(pace_s, rows.pace[i])
    head = _NOBODY
    for i in prompts:
        if rows.left[i] > 0 and rows.uncached[i] > 0:
            head = i
            break
    slack_ms = (tightest_s - now_s) * 1e3
    drafts = drafts_for(slack_ms, head != _NOBODY, rows, world) if decoders > 0 else 0
    row = 1 + drafts
    all_ms = batch_ms(decoders * row, decoders, context + decoders * drafts, drafts, world)
    if head == _NOBODY and all_ms <= slack_ms:
        for i in range(rows.left.size):
            if rows.left[i] > 0:
                take[i] = 1
        return all_ms, drafts

    # 1. Decoders that would be late after this batch and the next, or would cut the next ones short: each batch costs
    # its constant. But their rows take this batch's time: the dearer they are beside the constant, the fewer ride ahead
    # of their time. Where not even these fit, those that would be late after this one.
    longest_ms = max(world.max_batch_ms, ROOM_FOR_WORK * all_ms)
    window_ms = slack_ms if head == _NOBODY else min(slack_ms, longest_ms)
    next_ms = max(min(pace_s * accepted(drafts, world.acceptance) * 1e3, longest_ms), all_ms)
    idle_ms = batch_ms(0, 1, 0, drafts, world)
    rides_ahead = world.rides_ahead * min(idle_ms / max(all_ms - idle_ms, 1e-9), 1.0)
    requests, context = 0, 0
    for ahead in (rides_ahead, 0.0):
        horizon_s = now_s + (max(window_ms, 0.0) + next_ms * ahead) / 1e3
        requests, context = 0, 0
        for i in range(rows.left.size):
            take[i] = 0
            if rows.left[i] > 0 and rows.uncached[i] == 0 and due_s(i, rows) <= horizon_s:
                take[i] = 1
                requests += 1
                context += rows.context[i] + row
        if batch_ms(requests * row, requests, context, drafts, world) <= window_ms:
            break
    if requests == 0:
        drafts, row = 0, 1
    tokens = requests * row
    must_ms = batch_ms(tokens, requests, context, drafts, world)
    # Late whatever is done: a third of the time goes to a prompt that is due before the decoders, or to the other
    # decoders, who would each cost a batch's constant later.
    late = must_ms > window_ms
    behind = late and head != _NOBODY and due_s(head, rows) <= tightest_s
    window_ms = max(window_ms, must_ms * (ROOM_FOR_WORK if late else 1.0))

    # 2. Prompts. One that is completed here has its first token when the batch ends, which must be before it is due.
    for i in prompts:
        if rows.left[i] == 0 or rows.uncached[i] == 0:
            continue
        if late and not behind:
            break
        if rows.held[i] == 0 and world.memory_tokens >= 0 and not fits(i, rows, take, world):
            continue
        room = chunk_tokens(tokens, requests, context, drafts, rows.context[i], window_ms, world)
        chunk = min(room, rows.uncached[i])
        whole = chunk == rows.uncached[i]
        if chunk <= 0 or (not whole and chunk < world.min_chunk_tokens):
            break
        take[i] = chunk
        tokens += chunk
        requests += 1
        context += rows.context[i] + chunk
        if not whole:
            break
        so_far_ms = batch_ms(tokens, requests, context, drafts, world)
        window_ms = min(window_ms, max((due_s(i, rows) - now_s) * 1e3, so_far_ms))

    # 3. The other decoders. If there is nothing else to do, they are not kept waiting.
    for i in range(rows.left.size):
        if rows.left[i] > 0 and rows.uncached[i] == 0 and take[i] == 0:
            with_ms = batch_ms(tokens + row, requests + 1, context + rows.context[i] + row, drafts, world)
            if with_ms <= window_ms or requests == 0:
                take[i] = 1
                tokens += row
                requests += 1
                context += rows.context[i] + row
    return batch_ms(tokens, requests, context, drafts, world), drafts


@njit(cache=True)
def advance(now_s: float, rows: Rows, take: Ints, gain: int, world: World, excused: Flags, late: Flags) -> int:
    """The batch `take` has ended at `now_s`: move its rows on, decoders by `gain` tokens; the first row late that is
    not excused, or -1.
    """
    first = _NOBODY
    for i in range(rows.left.size):
        if take[i] == 0:
            continue
        must_s = min(due_s(i, rows) + rows.reserve[i], rows.deadline[i])
        tokens = 1
        if rows.uncached[i] > 0:
            rows.uncached[i] -= take[i]
            rows.context[i] += take[i]
            rows.held[i] = rows.context[i]
            if rows.uncached[i] > 0:
                continue
            # A prompt computed again after a preemption carries on with its pace.
            must_s = min(rows.first_due[i], rows.deadline[i]) if rows.paced[i] == INF else must_s
        else:
            tokens = min(gain, rows.left[i])
            rows.context[i] += tokens
            rows.held[i] = rows.context[i]
        if now_s > must_s + _EPSILON_S:
            late[i] = True
            if first == _NOBODY and not excused[i]:
                first = i
        for _ in range(tokens):
            _token(i, now_s, rows)
        if rows.left[i] == 0:
            rows.held[i] = 0
    if world.lends:
        lend(rows)
    return first


@njit(cache=True)
def _token(i: int, now_s: float, rows: Rows) -> None:
    """Row `i` has its next token at `now_s`."""
    if rows.paced[i] == INF:
        early_s = max(rows.slack_until[i] - now_s, 0.0)
        lent_s = min(early_s, rows.credit[i])
        rows.paced[i] = now_s + lent_s
        if rows.switch[i] == 0:
            rows.switch[i], rows.later[i] = rows.repay[i] + 1, rows.pace[i]
        rows.pace[i] -= lent_s / rows.repay[i]
        rows.reserve[i] += early_s - lent_s
    else:
        rows.paced[i] = now_s if rows.pace[i] == INF else rows.paced[i] + rows.pace[i]
    rows.switch[i] -= 1
    if rows.switch[i] == 0:
        rows.pace[i] = rows.later[i]
    rows.left[i] -= 1


@njit(cache=True)
def certain(now_s: float, rows: Rows, world: World, late: Flags) -> bool:
    """True where the decoders that are not late yet will be in time to their ends, whatever they take: nobody has a
    prompt left, and a batch of all at their longest is short enough for every due token and every pace.

    Then each batch may be one of all, and each of them finds its token due no earlier than that batch's end.
    """
    decoders, context, tightest_s, pace_s = 0, 0, INF, INF
    for i in range(rows.left.size):
        if rows.left[i] > 0:
            if rows.uncached[i] > 0:
                return False
            decoders += 1
            context += rows.context[i] + rows.left[i]
            if late[i]:
                continue
            tightest_s = min(tightest_s, due_s(i, rows))
            pace_s = min(pace_s, rows.pace[i])
            if rows.switch[i] > 0:
                pace_s = min(pace_s, rows.later[i])
    longest_ms = batch_ms(decoders, decoders, context, 0, world)
    if now_s * 1e3 + longest_ms > tightest_s * 1e3 or longest_ms > pace_s * 1e3:
        return False
    for i in range(rows.left.size):
        if rows.left[i] > 0 and not late[i] and now_s + rows.left[i] * longest_ms / 1e3 > rows.deadline[i]:
            return False
    return world.memory_tokens < 0 or context + decoders * (world.block_tokens - 1) <= world.memory_tokens


@njit(cache=True)
def foresee(now_s: float, rows: Rows, world: World, excused: Flags, late: Flags) -> tuple[int, int, float]:
    """Run `rows` (which it changes) from `now_s` on; how that ends, for which row first, and when.

    excused  rows whose lateness does not end it        late  is set for every row that was late
    """
    waiting = np.nonzero((rows.uncached > 0) & (rows.left > 0))[0]
    dues = np.empty(waiting.size)
    for k in range(waiting.size):
        dues[k] = due_s(waiting[k], rows)
    prompts = waiting[np.argsort(dues, kind="mergesort")]
    if world.lends:
        lend(rows)
    take = np.zeros(rows.left.size, dtype=np.int64)
    owed = 0.0
    for _ in range(MAX_STEPS):
        if certain(now_s, rows, world, late):
            return KEPT, _NOBODY, now_s
        ms, drafts = choose(now_s, rows, prompts, world, take)
        if ms == 0.0:
            for i in range(rows.left.size):
                if rows.left[i] > 0:
                    return NO_MEMORY, i, now_s
            return KEPT, _NOBODY, now_s
        # Whole tokens, as many in all as are counted on.
        owed += counted(drafts, world)
        gain = int(owed)
        owed -= gain
        if world.memory_tokens >= 0:
            held = 0
            for i in range(rows.left.size):
                if rows.left[i] > 0:
                    grows = take[i] if rows.uncached[i] > 0 else gain
                    held += _blocks(rows.context[i] + grows if take[i] > 0 else rows.held[i], world)
            if held > world.memory_tokens:
                return NO_MEMORY, _NOBODY, now_s
        now_s += ms / 1e3
        first = advance(now_s, rows, take, gain, world, excused, late)
        if first != _NOBODY:
            return LATE, first, now_s
    return TOO_FAR, _NOBODY, now_s


def compile_ahead() -> None:
    """Compile everything here (seconds, once a machine), so that no step of a server has to wait for it."""
    request = Request(rid="", seq=0, arrival_s=0.0, uncached_tokens=1, left_tokens=2)
    rows = rows_of(table_of([request]))
    world = world_of(CostModel(Piece(const_ms=1.0)), Limits(), Memory())
    nobody = np.zeros(1, dtype=np.bool_)
    lend(rows)
    choose(0.0, rows, np.zeros(1, dtype=np.int64), world, np.zeros(1, dtype=np.int64))
    foresee(0.0, rows, world, nobody, nobody.copy())
