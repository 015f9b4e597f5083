"""What a batch is, what bounds it, and who fills the room that promised work leaves.

Promised work comes first and is chosen by `plan`. Left-over time goes, in this order, to promises that were missed
(served at their pace, holding nobody up), to declined requests that could still be in time, and to best effort, first
come, first served. Everything else is parked: it keeps its KV and sits the batch out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum

from slos_sglang.policy.batch_time import BatchSize, CostModel
from slos_sglang.policy.request import Request

# The cap on batches in steps without any work: their share of the time is then at most a sixth where load is high.
MAX_BATCH = 6.0
# And how much longer than what every step costs, or all decoders together, it is at least.
ROOM_FOR_WORK = 1.5
# Best effort has its turn from this share of the ageing bound on, as soon as that breaks no promise: so the bound
# itself, where nothing new is promised until it had it, is seldom met.
TURN_AFTER = 0.5


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds on batches.

    max_batch_ms            longest batch while prompts wait, so that a newcomer soon gets its turn; None: `MAX_BATCH`
                            times what a step costs before any work
    best_effort_steps       longest batch that best effort may stretch, in steps without any work: who comes while it
                            runs waits. What decoders are ahead of their pace beyond `longest_ms` is all that it may use
    scarce_memory           where promised requests hold more than this share of the memory, nothing may slow them down
                            but turns: the sooner they end, the sooner the next one can be promised. And what a call
                            asks for may be too much (see `demand`)
    best_effort_max_wait_s  ageing: where no best effort was served for so long it is due; nothing is promised meanwhile
    min_chunk_steps         a chunk that takes less, in steps without any work, is not worth a row, unless it completes
                            its prompt
    rides_ahead             decoders ride in a batch that come due within so many batches after it, fewer where all of
                            them take longer than what every step costs; others may not
    credit_share            share of the expected output's time that the slack of an early first token may lend later
                            tokens, which repay it by their end: it allows longer batches and still keeps the mean TPOT
    """

    max_batch_ms: float | None = None
    best_effort_steps: float = 1.5
    scarce_memory: float = 0.5
    best_effort_max_wait_s: float = 5.0
    min_chunk_steps: float = 0.5
    rides_ahead: float = 10.0
    credit_share: float = 0.2

    def longest_ms(self, cost: CostModel) -> float:
        """The longest batch while prompts wait; there is room in it beside what every step costs."""
        const_ms = cost.const_ms
        if self.max_batch_ms is None:
            return MAX_BATCH * const_ms
        return max(self.max_batch_ms, ROOM_FOR_WORK * const_ms)

    def min_chunk_tokens(self, cost: CostModel) -> int:
        """The smallest chunk that is worth a row where it doesn't complete its prompt."""
        token_ms = max(p.tokens_ms for p in cost.pieces)
        return max(math.ceil(self.min_chunk_steps * cost.const_ms / max(token_ms, 1e-9)), 1)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """KV memory, tokens: all of it, and what nobody holds (what a prefix cache could give back counts as free).

    Of what is free `kept_tokens` are kept for conversations to go on (see `holds`): promises may have them, others only
    where it is their turn. A request occupies whole blocks. A capacity below zero is memory that never runs out.
    """

    capacity_tokens: int = -1
    free_tokens: int = 1 << 60
    kept_tokens: int = 0
    block_tokens: int = 1

    def blocks(self, tokens: int) -> int:
        """What `tokens` occupy, in whole blocks."""
        return -(-tokens // self.block_tokens) * self.block_tokens

    def without(self, tokens: int) -> Memory:
        """The same with `tokens` fewer that are free."""
        return replace(self, free_tokens=self.free_tokens - tokens)


UNBOUNDED = Memory()


@dataclass(slots=True, kw_only=True)
class Batch:
    """A decision: who decodes, whose prompt advances by how many tokens, and how long it should take.

    preempt  lose their KV before it runs, keep their tokens, and wait again
    drafts   tokens that are drafted for each decoder; set before anybody is added
    """

    decode: list[Request] = field(default_factory=list)
    prefill: list[tuple[Request, int]] = field(default_factory=list)
    preempt: list[Request] = field(default_factory=list)
    size: BatchSize = field(default_factory=BatchSize)
    predicted_ms: float = 0.0
    drafts: int = 0

    def add(self, request: Request, tokens: int) -> None:
        """`tokens` more of the request's prompt, or its next output token and what is drafted after it."""
        if request.uncached_tokens:
            self.prefill.append((request, tokens))
        else:
            self.decode.append(request)
            self.size.draft_steps = self.drafts
            tokens += self.drafts
        self.size.add(tokens=tokens, context_tokens=request.context_tokens + tokens)

    def remove(self, request: Request, tokens: int) -> None:
        """Take back what `add` did."""
        if request.uncached_tokens:
            self.prefill.remove((request, tokens))
        else:
            self.decode.remove(request)
            self.size.draft_steps = self.drafts if self.decode else 0
            tokens += self.drafts
        self.size.tokens -= tokens
        self.size.requests -= 1
        self.size.context_tokens -= request.context_tokens + tokens

    def draft_nothing(self) -> None:
        """Leave out what was to be drafted."""
        tokens = self.drafts * len(self.decode)
        self.size.tokens -= tokens
        self.size.context_tokens -= tokens
        self.size.draft_steps = self.drafts = 0


class Standing(IntEnum):
    """Who goes first among those without a promise to keep."""

    TURN = 0  # best effort that has aged
    LOST = 1  # promised, but a target was missed
    HOPEFUL = 2  # declined, but it could still be in time
    BEST_EFFORT = 3


def aged(request: Request, now_s: float, limits: Limits) -> bool:
    """True for best effort that was not served for so long that it may have a turn."""
    return not request.standard and now_s >= request.served_s + TURN_AFTER * limits.best_effort_max_wait_s


def _order(request: Request, now_s: float, limits: Limits, *, turn: bool) -> tuple[int, bool, float, int]:
    stand = Standing.BEST_EFFORT
    if turn and aged(request, now_s, limits):
        stand = Standing.TURN
    elif request.standard:
        stand = Standing.LOST
    elif request.hopeful(now_s):
        stand = Standing.HOPEFUL
    first = request.due_s if stand in (Standing.LOST, Standing.HOPEFUL) else request.arrival_s
    return (stand, request.uncached_tokens > 0, first, request.seq)


def fill(
    batch: Batch,
    now_s: float,
    others: Iterable[Request],
    cost: CostModel,
    limits: Limits,
    *,
    within_ms: float,
    free_tokens: int,
    kept_tokens: int = 0,
    turn: bool = False,
) -> Batch:
    """`batch` with as much of `others` as fits into `within_ms` and into free KV memory; the last prompt may be cut.

    Of the free memory `kept_tokens` are not for prompts that have not begun, nor what is expected of outputs. Who has
    begun may go on: it gives its memory back the sooner.
    """
    filled = Batch(
        decode=list(batch.decode),
        prefill=list(batch.prefill),
        preempt=batch.preempt,
        size=replace(batch.size),
        drafts=batch.drafts,
    )
    row_tokens = 1 + batch.drafts
    if kept_tokens:
        others = list(others)
        kept_tokens += sum(_to_come(r) for r in others if r.started)
    more_prompts = not any(tokens < request.uncached_tokens for request, tokens in batch.prefill)
    for request in sorted(others, key=lambda r: _order(r, now_s, limits, turn=turn)):
        prefix = request.context_tokens
        room = cost.chunk_tokens(filled.size, prefix_tokens=prefix, within_ms=within_ms)
        if not request.uncached_tokens:
            if room >= row_tokens and free_tokens >= row_tokens:
                filled.add(request, 1)
                free_tokens -= row_tokens
            continue
        left = request.uncached_tokens
        # What is cached of it counts as free until it starts.
        claimed = 0 if request.started else prefix
        tokens = min(left, room, free_tokens - claimed)
        if not more_prompts or tokens <= 0 or (tokens < left and tokens < limits.min_chunk_tokens(cost)):
            continue
        if not request.started:
            to_come = _to_come(request) if kept_tokens else 0
            if claimed + left + to_come + kept_tokens > free_tokens:
                continue
            kept_tokens += to_come
        filled.add(request, tokens)
        free_tokens -= claimed + tokens
        more_prompts = tokens == left
    filled.predicted_ms = cost.batch_ms(filled.size)
    return filled


def _to_come(request: Request) -> int:
    return max(min(request.left_tokens, request.max_tokens - request.output_tokens), 0)


def make_room(batch: Batch, memory: Memory, candidates: Sequence[Request]) -> None:
    """Draft nothing and preempt `candidates`, the first ones first, until the new tokens fit into free KV memory."""
    free, need = memory.free_tokens, _new_tokens(batch, memory)
    if need > free and batch.drafts:
        batch.draft_nothing()
        need = _new_tokens(batch, memory)
    tokens_of = {id(r): (r, tokens) for r, tokens in (*((r, 1) for r in batch.decode), *batch.prefill)}
    for request in candidates:
        if need <= free:
            return
        if id(request) in tokens_of:
            _, tokens = tokens_of.pop(id(request))
            need -= _grows(request, tokens, memory)
            batch.remove(request, tokens)
        if request.started:
            batch.preempt.append(request)
            free += memory.blocks(request.context_tokens)


def _new_tokens(batch: Batch, memory: Memory) -> int:
    """Free KV tokens that the batch takes, in whole blocks."""
    rows = (*((r, 1 + batch.drafts) for r in batch.decode), *batch.prefill)
    return sum(_grows(request, tokens, memory) for request, tokens in rows)


def _grows(request: Request, tokens: int, memory: Memory) -> int:
    held = memory.blocks(request.context_tokens) if request.started else 0
    return memory.blocks(request.context_tokens + tokens) - held
