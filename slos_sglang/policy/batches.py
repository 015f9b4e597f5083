"""The next batch, by earliest due token (paper, section 3: algorithm 2).

A batch may last until the earliest token that is due (the paper's t0): its size is dynamic, as large as the tightest
due token allows. Into it go, in this order,

1. the decoders that would be late if they sat this batch out, or would cut the next one short,
2. prefill chunks, earliest first token first, as many tokens as there is time for,
3. the other decoders, where time is left,
4. best effort, which must hardly stretch the batch: decoders, then chunks.

Everything else is parked: it keeps its KV and sits this batch out. Within 2 and 3 a request's `Standing` goes before
its due time: only promises that can still be kept decide how long a batch may last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from slos_sglang.policy.batch_time import BatchSize, CostModel
from slos_sglang.policy.request import INF, Request


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds on batches.

    best_effort_max_wait_s  ageing: a best-effort request is due this long after it was last served
    best_effort_share       most of the time that aged best effort may take from promised requests
    max_batch_ms            longest batch while promised prefills wait, so that a newcomer soon gets its turn
    best_effort_fill        share of the time to the earliest due token up to which best effort may stretch a batch
    min_chunk_tokens        a smaller chunk is not worth a row, unless it completes its prompt
    admission_headroom      admission asks for this many times the work it foresees (batches are whole, steps vary)
    """

    best_effort_max_wait_s: float = 5.0
    best_effort_share: float = 0.25
    max_batch_ms: float = 60.0
    best_effort_fill: float = 0.6
    min_chunk_tokens: int = 16
    admission_headroom: float = 1.3


@dataclass(frozen=True, kw_only=True)
class Memory:
    """KV memory, tokens: all of it, and what nobody holds (what a prefix cache could give back counts as free)."""

    capacity_tokens: int
    free_tokens: int


@dataclass(slots=True, kw_only=True)
class Batch:
    """A decision: who decodes, whose prompt advances by how many tokens, and how long it should take.

    `preempt` lose their KV before it runs, keep their tokens, and wait again.
    """

    decode: list[Request] = field(default_factory=list)
    prefill: list[tuple[Request, int]] = field(default_factory=list)
    preempt: list[Request] = field(default_factory=list)
    size: BatchSize = field(default_factory=BatchSize)
    predicted_ms: float = 0.0


def due_s(request: Request, limits: Limits) -> float:
    """When the request is next due: its next token if that is promised, else its turn by ageing."""
    if not request.standard:
        return request.served_s + limits.best_effort_max_wait_s
    # A token in flight counts as produced.
    return request.due_s + request.pending * request.pace_s if request.pending else request.due_s


def aged(request: Request, now_s: float, limits: Limits) -> bool:
    """True for best effort that was not served for too long."""
    return not request.standard and due_s(request, limits) <= now_s


class Standing(IntEnum):
    """Who goes first."""

    TURN = 0  # best effort that has aged, in a batch that is its turn
    PROMISED = 1
    HOPEFUL = 2  # declined, but it could still be in time
    LOST = 3  # promised, but a target was missed: it is served at its pace and holds nobody up
    BEST_EFFORT = 4


def standing(request: Request, now_s: float, limits: Limits, *, turn: bool = False) -> Standing:
    """Where the request stands at `now_s`; `turn`: aged best effort goes first."""
    if request.constrained and not request.lost(now_s):
        return Standing.PROMISED if request.standard else Standing.HOPEFUL
    if request.standard:
        return Standing.LOST
    return Standing.TURN if turn and aged(request, now_s, limits) else Standing.BEST_EFFORT


class _Draft:
    """A batch being filled, and the time it may take."""

    def __init__(self, cost: CostModel, limits: Limits) -> None:
        self.cost, self.limits = cost, limits
        self.batch = Batch()

    def batch_ms_with(self, request: Request) -> float:
        size = self.batch.size
        return self.cost.batch_ms(
            BatchSize(
                tokens=size.tokens + 1,
                requests=size.requests + 1,
                context_tokens=size.context_tokens + request.context_tokens + 1,
            )
        )

    def decode(self, request: Request) -> None:
        self.batch.decode.append(request)
        self.batch.size.add(tokens=1, context_tokens=request.context_tokens + 1)

    def prefill(self, request: Request, within_ms: float) -> bool:
        """Add a chunk of `request` if one fits; False when no further prompt can follow."""
        left = request.uncached_tokens
        room = self.cost.chunk_tokens(self.batch.size, prefix_tokens=request.context_tokens, within_ms=within_ms)
        tokens = min(left, room)
        if tokens <= 0 or (tokens < left and tokens < self.limits.min_chunk_tokens):
            return False
        self.batch.prefill.append((request, tokens))
        self.batch.size.add(tokens=tokens, context_tokens=request.context_tokens + tokens)
        return tokens == left


def form_batch(
    now_s: float,
    decoding: Sequence[Request],
    waiting: Sequence[Request],
    cost: CostModel,
    limits: Limits,
    *,
    turn: bool = False,
) -> Batch:
    """Choose the next batch.

    now_s     when the batch will start, s
    decoding  requests with a first token; `waiting`: those whose prompt is not yet computed
    turn      aged best effort goes first
    Returns a non-empty `Batch` whenever there is anything to run.
    """
    draft = _Draft(cost, limits)
    stands = {id(r): standing(r, now_s, limits, turn=turn) for r in (*decoding, *waiting)}

    def key(request: Request) -> tuple[int, float, int]:
        stand = stands[id(request)]
        if stand is Standing.HOPEFUL:
            return (stand, request.due_s, request.seq)
        if request.uncached_tokens and not request.standard:  # first come, first served
            return (stand, request.arrival_s, request.seq)
        return (stand, due_s(request, limits), request.seq)

    decoders = sorted(decoding, key=key)
    prompts = sorted(waiting, key=key)
    promised = [r for r in decoders if stands[id(r)] is Standing.PROMISED]
    pressing = [r for r in prompts if stands[id(r)] is not Standing.BEST_EFFORT]
    patient = [r for r in prompts if stands[id(r)] is Standing.BEST_EFFORT]

    # How long the batch may last: until the earliest due token, planned with the cost model's own margin. Where
    # decoders have fallen behind, a prompt that is due before them still gets a third of the time.
    floor_ms = cost.batch_ms(_rows(promised))
    behind = any(
        stands[id(p)] is Standing.PROMISED and p.due_s <= due_s(d, limits) for p in prompts[:1] for d in promised[:1]
    )
    slack_ms = min([(due_s(r, limits) - now_s) * 1e3 / cost.margin for r in promised], default=INF)
    window_ms = max(slack_ms, floor_ms * (1.5 if behind else 1.0))
    if prompts:
        window_ms = min(window_ms, max(limits.max_batch_ms, floor_ms))

    # 1. Whoever would be late after this batch and one as long as the tightest pace allows: every batch costs its
    # constant, so a next one cut short by somebody who sat this one out is dear.
    pace_ms = min([r.pace_s * 1e3 for r in promised], default=INF)
    next_ms = max(min(pace_ms, limits.max_batch_ms), floor_ms)
    horizon_s = now_s + (window_ms * cost.margin + next_ms) / 1e3 if window_ms < INF else INF
    rest = []
    for request in decoders:
        if stands[id(request)] is Standing.TURN or (request.standard and due_s(request, limits) <= horizon_s):
            draft.decode(request)
        else:
            rest.append(request)

    # 2. Prompts. One that is completed here has its first token when the batch ends, which therefore ends before
    # that is due.
    for request in pressing:
        if not draft.prefill(request, window_ms):
            break
        if stands[id(request)] is Standing.PROMISED:
            first_token_ms = (due_s(request, limits) - now_s) * 1e3 / cost.margin
            window_ms = min(window_ms, max(first_token_ms, cost.batch_ms(draft.batch.size)))

    # 3. The other decoders. 4. Best effort.
    best_effort_ms = window_ms if not (promised or pressing) else window_ms * limits.best_effort_fill
    for request in rest:
        within_ms = best_effort_ms if stands[id(request)] is Standing.BEST_EFFORT else window_ms
        if draft.batch_ms_with(request) <= within_ms:
            draft.decode(request)
    if sum(tokens for _, tokens in draft.batch.prefill) == sum(r.uncached_tokens for r in pressing):
        for request in patient:
            if not draft.prefill(request, best_effort_ms):
                break

    batch = draft.batch
    if not batch.decode and not batch.prefill:
        _run_something(draft, decoders, prompts)
    batch.predicted_ms = cost.batch_ms(batch.size)
    return batch


def _run_something(draft: _Draft, decoders: Sequence[Request], prompts: Sequence[Request]) -> None:
    """Never idle while there is work, whatever the cost model believes."""
    for request in decoders:
        draft.decode(request)
    if not decoders and prompts:
        request = prompts[0]
        tokens = min(request.uncached_tokens, draft.limits.min_chunk_tokens)
        draft.batch.prefill.append((request, tokens))
        draft.batch.size.add(tokens=tokens, context_tokens=request.context_tokens + tokens)


def _rows(requests: Sequence[Request]) -> BatchSize:
    size = BatchSize()
    for request in requests:
        size.add(tokens=1, context_tokens=request.context_tokens + 1)
    return size
