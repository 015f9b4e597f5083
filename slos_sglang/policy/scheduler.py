"""The decision of one step: promise, then form the batch.

This is the whole scheduler; engine and simulator hand it what waits and what runs, and apply what it returns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from slos_sglang.policy import plan
from slos_sglang.policy.admission import GAVE_WAY, Method, Outlook, Verdict
from slos_sglang.policy.batch_time import BatchSize, CostModel
from slos_sglang.policy.batches import TURN_AFTER, UNBOUNDED, Batch, Limits, Memory, aged, fill, make_room
from slos_sglang.policy.demand import Demand
from slos_sglang.policy.holds import Holds
from slos_sglang.policy.programs import Programs
from slos_sglang.policy.request import INF, Request, lost, table_of
from slos_sglang.policy.state import Flags, Rows, World, copy_of, rows_of, world_of

_NO_BOUND_MS = 1e9
# When to ask again what is declined for the sake of others, s.
_RETRY_S = 1.0


@dataclass(kw_only=True)
class Scheduler:
    """Admission and batch formation over one cost model.

    `asked_per_step` bounds how many declined requests are asked again in one step; `admission` says how newcomers are
    chosen (see `admission.py`) and `late_commitment` whether promises bind only once their prompt begins; `programs` is
    what is kept for those that have begun, `holds` which conversations are, `demand` what may be asked of the memory.
    """

    cost: CostModel
    limits: Limits = field(default_factory=Limits)
    asked_per_step: int = 4
    admission: Method = "auto"
    late_commitment: bool = True
    programs: Programs = field(default_factory=Programs)
    holds: Holds = field(default_factory=Holds)
    demand: Demand = field(default_factory=Demand)
    _last_turn_s: float = -math.inf
    _turn_owed: bool = False
    _lends: bool = False

    def admit(
        self,
        now_s: float,
        undecided: Sequence[Request],
        decoding: Sequence[Request],
        waiting: Sequence[Request],
        memory: Memory = UNBOUNDED,
    ) -> list[tuple[Request, Verdict]]:
        """Judge the undecided requests, new ones first, then by deadline; sets their tier.

        A request is undecided when it is new, or was declined and has lost nothing yet. Returns each that was judged
        with its verdict, and each that gave way; the others are asked in a later step.
        """
        if not undecided:
            return []
        asking = sorted(undecided, key=lambda r: (r.judged, r.due_s, r.seq))
        new = sum(not r.judged for r in asking)
        asking = asking[: max(min(new, 4 * self.asked_per_step), self.asked_per_step)]
        for request in asking:
            if not request.judged:
                self.programs.arrived(request)
                self.holds.arrived(request)
                self.demand.arrived(request)
            if not request.standard:
                request.share_again(now_s)
        if self._turn_owed:
            owed = Verdict(admitted=False, reason="best effort has waited too long", retry_after_s=_RETRY_S)
            verdicts = [(request, owed) for request in asking]
        else:
            promised, _ = _promised(now_s, [*decoding, *waiting])
            returns = self.programs.expected(now_s)
            others, large = self._by_size(asking, now_s, promised, memory)
            outlook = Outlook(
                now_s,
                [*promised, *returns],
                others,
                self.cost,
                self.limits,
                memory,
                late_commitment=self.late_commitment,
            )
            verdicts = list(zip(others, outlook.judge(others, self.admission), strict=True))
            verdicts += large
            verdicts += [(request, GAVE_WAY) for request in outlook.gave_way]
            if any(verdict.admitted for _, verdict in verdicts):
                self._lends = outlook.lends
        for request, verdict in verdicts:
            if verdict.admitted:
                request.admit()
            else:
                request.decline(verdict.reason)
        return verdicts

    def _by_size(
        self, asking: Sequence[Request], now_s: float, promised: Sequence[Request], memory: Memory
    ) -> tuple[list[Request], list[tuple[Request, Verdict]]]:
        """Those that may ask for what they do, and those that ask for too much where memory is scarce."""
        if not self._scarce(promised, memory):
            return list(asking), []
        others, large = [], []
        for request, times in zip(asking, self.demand.excess(asking, now_s, memory), strict=True):
            if times > 1:
                large.append((request, _asks_too_much(times)))
            else:
                others.append(request)
        return others, large

    def _scarce(self, promised: Sequence[Request], memory: Memory) -> bool:
        """Do promised requests hold so much of the memory that there is none to spare?"""
        held = sum(request.context_tokens for request in promised if request.started)
        return held > self.limits.scarce_memory * memory.capacity_tokens >= 0

    def ended(self, request: Request, now_s: float, aborted: bool = False) -> None:
        """`request` has had its last token, or was given up (its client `aborted` it, or it was refused)."""
        self.programs.ended(request, now_s)
        if not aborted:
            self.demand.ended(request, now_s)
            self.holds.ended(request, now_s)

    def next_batch(
        self, now_s: float, decoding: Sequence[Request], waiting: Sequence[Request], memory: Memory = UNBOUNDED
    ) -> Batch:
        """The batch to run at `now_s`: promised work by plan, then what else has room and endangers nobody."""
        everyone = [*decoding, *waiting]
        promised, others = _promised(now_s, everyone)
        if not promised:
            return self._left_over(now_s, others, memory)

        world = world_of(self.cost, self.limits, memory, margin=self.cost.margin)
        chosen = _Chosen(now_s, promised, world, lends=self._lends)
        self._lends = chosen.lends
        batch = chosen.batch(self.cost)
        if others:
            batch = self._with_others(chosen, batch, others, memory, scarce=self._scarce(promised, memory))
        if not batch.size.requests:
            return self._left_over(now_s, everyone, memory)
        prompts = {id(r) for r, _ in batch.prefill}
        kept = sum(memory.blocks(r.context_tokens) for r in chosen.unstarted if id(r) not in prompts)
        self._make_room(batch, memory.without(kept), promised, others)
        return batch

    def _make_room(self, batch: Batch, memory: Memory, promised: Sequence[Request], others: Sequence[Request]) -> None:
        """Memory is short: best effort goes first, the latest arrival of each before the earlier ones."""
        claimed = sum(r.context_tokens for r, _ in batch.prefill if not r.started)
        if claimed + batch.size.tokens + batch.size.requests * memory.block_tokens > memory.free_tokens:
            latest = [*sorted(others, key=lambda r: -r.seq), *sorted(promised, key=lambda r: -r.seq)]
            make_room(batch, memory, latest[:-1])
            batch.predicted_ms = self.cost.batch_ms(batch.size)

    def _with_others(
        self, chosen: _Chosen, batch: Batch, others: Sequence[Request], memory: Memory, *, scarce: bool
    ) -> Batch:
        """`batch` with others beside it, where that breaks no promise: all the time there is for who could still be in
        time without one, little for best effort, except for the turn of the oldest.
        """
        limits, now_s = self.limits, chosen.now_s
        longest_ms = min(chosen.slack_ms, limits.longest_ms(self.cost))
        hopeful = [r for r in others if r.hopeful(now_s)]
        if hopeful and not scarce:
            batch = self._beside(chosen, batch, hopeful, memory, within_ms=longest_ms)
        rest = [r for r in others if not r.hopeful(now_s)]
        self._turn_owed = False
        if not rest:
            self._last_turn_s = now_s
            return batch
        oldest = min(rest, key=lambda r: (not aged(r, now_s, limits), r.uncached_tokens > 0, r.seq))
        waited_s = now_s - max(self._last_turn_s, oldest.served_s)
        turn = waited_s >= TURN_AFTER * limits.best_effort_max_wait_s
        room_ms = min(longest_ms, limits.best_effort_steps * self.cost.const_ms)
        if turn:
            least_ms = self._least_ms(batch, oldest)
            rooms_ms = [least_ms] if chosen.prompts_are_left else [max(room_ms, least_ms), least_ms]
        elif scarce or chosen.prompts_are_left:
            return batch
        else:
            # What decoders are ahead of their pace is kept for who comes next: one longest batch of it.
            rooms_ms = [min(room_ms, chosen.slack_ms - limits.longest_ms(self.cost))]
        for within_ms in rooms_ms:
            filled = self._beside(chosen, batch, rest, memory, within_ms=within_ms, turn=turn)
            if filled is not batch:
                self._last_turn_s = now_s
                return filled
        self._turn_owed = waited_s >= limits.best_effort_max_wait_s
        return batch

    def _least_ms(self, batch: Batch, request: Request) -> float:
        """What `batch` takes with the least of `request` beside it."""
        tokens = min(request.uncached_tokens, self.limits.min_chunk_tokens(self.cost)) or 1 + batch.drafts
        size = replace(batch.size)
        size.add(tokens=tokens, context_tokens=request.context_tokens + tokens)
        return self.cost.batch_ms(size) * self.cost.margin

    def _beside(
        self,
        chosen: _Chosen,
        batch: Batch,
        some: Sequence[Request],
        memory: Memory,
        *,
        within_ms: float,
        turn: bool = False,
    ) -> Batch:
        """`batch` with as much of `some` as fits into `within_ms`; without, where that would break a promise."""
        margin = self.cost.margin
        filled = fill(
            batch,
            chosen.now_s,
            some,
            self.cost,
            self.limits,
            within_ms=max(within_ms / margin, batch.predicted_ms),
            free_tokens=memory.free_tokens - batch.size.tokens - sum(r.context_tokens for r in chosen.unstarted),
            kept_tokens=0 if turn else memory.kept_tokens,
            turn=turn,
        )
        more = filled.size.requests > batch.size.requests
        if more and chosen.safe(filled.predicted_ms * margin, batch.predicted_ms * margin):
            return filled
        return batch

    def _left_over(self, now_s: float, others: Sequence[Request], memory: Memory) -> Batch:
        """Nothing promised can run: everybody else gets all of it, in batches that let a newcomer in soon."""
        self._turn_owed, self._last_turn_s = False, now_s
        limits = self.limits
        prompts = any(r.uncached_tokens for r in others)
        turn = any(aged(r, now_s, limits) for r in others)
        within_ms = limits.longest_ms(self.cost) if prompts else _NO_BOUND_MS
        batch = fill(
            Batch(),
            now_s,
            others,
            self.cost,
            limits,
            within_ms=within_ms,
            free_tokens=memory.free_tokens,
            kept_tokens=memory.kept_tokens,
            turn=turn,
        )
        if not batch.size.requests and others:
            # Never idle while there is work: whatever the cost model believes, and though memory is short.
            first = min(others, key=lambda r: (r.uncached_tokens > 0, r.seq))
            batch.add(first, min(first.uncached_tokens, limits.min_chunk_tokens(self.cost)) or 1)
            batch.predicted_ms = self.cost.batch_ms(batch.size)
        self._make_room(batch, memory, (), others)
        return batch


def _promised(now_s: float, everyone: Sequence[Request]) -> tuple[list[Request], list[Request]]:
    """Those whose promise can still be kept, by arrival, and the others, as they come."""
    table = table_of(everyone)
    kept = table["standard"] & ~lost(table, now_s)
    rows = np.nonzero(kept)[0]
    rows = rows[np.argsort(table["seq"][rows], kind="stable")]
    return [everyone[i] for i in rows.tolist()], [everyone[i] for i in np.nonzero(~kept)[0].tolist()]


def _asks_too_much(times: float) -> Verdict:
    reason = f"KV memory is short, and it asks for {times:.1f} times what a call may for the latest ones to find room"
    return Verdict(admitted=False, reason=reason, retry_after_s=_RETRY_S)


class _Chosen:
    """The plan's next step for the `promised` requests (in arrival order), as arrays and as a batch.

    It `lends` prompts what decoders have in reserve where promises hang on that, no longer than they do.
    """

    def __init__(self, now_s: float, promised: Sequence[Request], world: World, *, lends: bool) -> None:
        self.now_s = now_s
        self._promised, self._world = promised, world
        table = table_of(promised)
        self._rows = rows_of(table)
        self._decodes = self._rows.uncached == 0
        prompts = np.nonzero(~self._decodes)[0]
        self._prompts = prompts[np.argsort(table["due_s"][prompts], kind="stable")]
        self._tightest_s = table["due_s"][self._decodes].min(initial=INF)
        self._take = np.zeros(len(promised), dtype=np.int64)
        nobody = np.zeros(len(promised), dtype=np.bool_)
        if lends and self._kept(now_s, copy_of(self._rows), nobody, nobody.copy()):
            lends = False
        if lends:
            self._world = world._replace(lends=True)
            plan.lend(self._rows)
        self.lends = lends
        _, self._drafts = plan.choose(now_s, self._rows, self._prompts, self._world, self._take)

    def batch(self, cost: CostModel) -> Batch:
        """Decoders by arrival, then chunks by due time."""
        there, drafts = self._take > 0, self._drafts
        decode = [self._promised[i] for i in np.nonzero(there & self._decodes)[0].tolist()]
        tokens = int(self._take.sum()) + drafts * len(decode)
        context_tokens = int(self._rows.context[there].sum()) + tokens
        size = BatchSize(tokens, int(there.sum()), context_tokens, draft_steps=drafts if decode else 0)
        chunks = self._prompts[there[self._prompts]]
        return Batch(
            decode=decode,
            prefill=[(self._promised[i], int(self._take[i])) for i in chunks.tolist()],
            size=size,
            predicted_ms=cost.batch_ms(size),
            drafts=drafts,
        )

    @cached_property
    def unstarted(self) -> list[Request]:
        """Those that hold no KV of their own yet: what is cached of their prompts is spoken for all the same."""
        return [r for i in self._prompts.tolist() if not (r := self._promised[i]).started]

    @property
    def prompts_are_left(self) -> bool:
        """A prompt is not completed by this step."""
        return bool((self._take < self._rows.uncached).any())

    @property
    def slack_ms(self) -> float:
        """Until the earliest due token of a decoder."""
        return float(self._tightest_s - self.now_s) * 1e3

    def safe(self, took_ms: float, alone_ms: float) -> bool:
        """Will every promise be kept if the step takes `took_ms`, or at least each that `alone_ms` would keep?"""
        nobody = np.zeros(len(self._promised), dtype=np.bool_)
        if self._kept_after(took_ms, excused=nobody):
            return True
        late = nobody.copy()
        kept = self._kept_after(alone_ms, excused=~nobody, late=late)
        return not kept or (bool(late.any()) and self._kept_after(took_ms, excused=late))

    def _kept_after(self, took_ms: float, *, excused: Flags, late: Flags | None = None) -> bool:
        late = np.zeros_like(excused) if late is None else late
        after = copy_of(self._rows)
        end_s = self.now_s + took_ms / 1e3
        gain = int(plan.counted(self._drafts, self._world))
        if plan.advance(end_s, after, self._take, gain, self._world, excused, late) >= 0:
            return False
        return self._kept(end_s, after, excused, late)

    def _kept(self, now_s: float, rows: Rows, excused: Flags, late: Flags) -> bool:
        return bool(plan.foresee(now_s, rows, self._world, excused, late)[0] == plan.KEPT)
