"""One simulated server: a step runs the batch that its policy forms and takes the time that the true cost model says.

What must stay true, and is asserted at every step: KV is never over capacity; a batch holds nobody twice, only
requests that are here, and never more of a prompt than is left; nobody is in two queues; whom the policy admitted stays
admitted. Queues are in order of arrival.
"""

from __future__ import annotations

import random
from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from time import perf_counter
from typing import TYPE_CHECKING, Protocol

from slos_sglang.measure.result import Outcome
from slos_sglang.policy.batch_time import BatchSize, CostModel, OnlineCostModel
from slos_sglang.policy.batches import Batch, Limits, Memory
from slos_sglang.policy.lengths import LengthEstimator
from slos_sglang.policy.request import Request
from slos_sglang.sim.memory import KVMemory
from slos_sglang.workloads.program import Program, Stage

if TYPE_CHECKING:
    from slos_sglang.policy.admission import Verdict

# How often the estimate of an output's length is asked for again.
REFINE_EVERY_TOKENS = 16


class Policy(Protocol):
    """What decides on a replica. `cost` is what it believes of the server (the truth is the simulator's); `limits` say
    how requests are paced.
    """

    cost: CostModel
    limits: Limits

    def admit(
        self,
        now_s: float,
        undecided: Sequence[Request],
        decoding: Sequence[Request],
        waiting: Sequence[Request],
        memory: Memory,
    ) -> list[tuple[Request, Verdict]]:
        """Judge the undecided requests."""

    def next_batch(
        self, now_s: float, decoding: Sequence[Request], waiting: Sequence[Request], memory: Memory
    ) -> Batch:
        """The batch to run at `now_s`; an empty one idles until the next event."""

    def ended(self, request: Request, now_s: float) -> None:
        """`request` has had its last token."""


class Place(Enum):
    """Where a call is."""

    NOWHERE = auto()
    WAITING = auto()
    DECODING = auto()
    MOVING = auto()  # its prompt is computed here, another replica will take its KV over
    ENDED = auto()


@dataclass(slots=True, kw_only=True)
class Call:
    """One stage of a program on its way through a replica, and what became of it.

    mark      number of output tokens at which something happens next: thinking ends, or the output, or its estimate
    step      the last step of its replica that it was in
    admitted  the policy promised its targets
    verdicts  what the policy said and when: the first answer, or every one where the run is traced
    """

    program: Program
    number: int
    request: Request
    mark: int = 0
    replica: int = -1
    place: Place = Place.NOWHERE
    step: int = -1
    admitted: bool = False
    outcome: Outcome | None = None
    token_s: list[float] = field(default_factory=list)
    verdicts: list[tuple[float, Verdict]] = field(default_factory=list)

    @property
    def stage(self) -> Stage:
        return self.program.stages[self.number]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step that was run, by request ids; for schedules worked out by hand, and for plots."""

    replica: int
    start_s: float
    end_s: float
    decode: tuple[str, ...]
    prefill: tuple[tuple[str, int], ...]
    preempt: tuple[str, ...]
    held_tokens: int


def _seq(request: Request) -> int:
    return request.seq


class Replica:
    """A server with a policy; `simulate` tells it what happens and when its step ends."""

    def __init__(
        self,
        index: int,
        policy: Policy,
        true_cost: CostModel,
        memory: KVMemory,
        *,
        lengths: LengthEstimator | None,
        noise: float,
        seed: int,
        trace: bool,
        timed: bool,
    ) -> None:
        self.index, self.policy, self.true_cost, self.memory = index, policy, true_cost, memory
        self.waiting: list[Request] = []
        self.decoding: list[Request] = []
        # Calls prefilled elsewhere, whose KV comes here as soon as there is room, first come first served.
        self.coming: list[tuple[Call, Replica]] = []
        # Prefilled here, to be taken over by another replica; they hold their KV until then.
        self.moving: list[Request] = []
        # Their clients have gone; they leave when the step ends.
        self.leaving: list[Call] = []
        self.batch: Batch | None = None
        self.steps: list[Step] = []
        self.decision_s: list[float] = []
        self.step_count = 0
        self.preemptions = 0
        # Something happened since it was last asked.
        self.awake = False
        self._took_s = 0.0
        self._undecided: list[Request] = []
        self._lengths, self._noise, self._trace, self._timed = lengths, noise, trace, timed
        self._step_rng, self._draft_rng = (random.Random(f"{seed}/{what}/{index}") for what in ("noise", "drafts"))

    # What happens ------------------------------------------------------------------------------------------------

    def arrive(self, call: Call, now_s: float) -> None:
        """A call comes in; its targets are set by what of its prompt is cached here."""
        request, stage = call.request, call.stage
        cached = stage.cached_tokens
        if call.number:
            cached = min(self.memory.find(call.program.id, cached, request), stage.prompt_tokens - 1)
        request.context_tokens = cached
        request.uncached_tokens = stage.prompt_tokens - cached
        request.served_s = now_s
        self._estimate(request)
        request.set_targets(self.true_cost, credit_share=self.policy.limits.credit_share)
        self._set_mark(call)
        call.replica, call.place = self.index, Place.WAITING
        self.waiting.append(request)
        if request.constrained:
            self._undecided.append(request)
        self.awake = True

    def abort(self, call: Call) -> None:
        """Its client has gone. A step that runs is not interrupted."""
        if self.batch is None or call.place is Place.MOVING:
            self.end(call, "failed")
        else:
            self.leaving.append(call)

    def end(self, call: Call, outcome: Outcome) -> None:
        """The call leaves; what it computed stays cached."""
        request = call.request
        if call.place is Place.WAITING:
            self.waiting.remove(request)
        elif call.place is Place.DECODING:
            self.decoding.remove(request)
        else:
            self.moving.remove(request)
        if request in self._undecided:
            self._undecided.remove(request)
        if request.started:
            self.memory.keep(call.program.id, request.context_tokens)
            request.started = False
        call.place, call.outcome = Place.ENDED, outcome
        self.awake = True

    # A step ------------------------------------------------------------------------------------------------------

    def decide(self, now_s: float) -> tuple[float | None, list[Call]]:
        """Ask the policy and start its batch: how long that takes in s (None: idle), and whom it rejected."""
        self.awake = False
        self._take_over()
        if not self.waiting and not self.decoding:
            return None, []
        start_s = perf_counter() if self._timed else 0.0
        rejected = self._admit(now_s)
        batch = self.policy.next_batch(now_s, self.decoding, self.waiting, self.memory.view())
        if self._timed:
            self.decision_s.append(perf_counter() - start_s)
        if not batch.decode and not batch.prefill and not batch.preempt:
            return None, rejected
        self._check_queues()
        for request in self.waiting:
            if request.standard and not request.started and request.context_tokens:
                self.memory.use(request.handle.program.id)
        self._start(batch)
        step_s = self.true_cost.batch_ms(batch.size) / 1e3
        if self._noise:
            step_s *= self._step_rng.lognormvariate(0.0, self._noise)
        self.batch, self._took_s = batch, step_s
        if self._trace:
            self._record(batch, now_s, now_s + step_s)
        return step_s, rejected

    def _admit(self, now_s: float) -> list[Call]:
        self._undecided = [r for r in self._undecided if r.undecided(now_s)]
        if not self._undecided:
            return []
        verdicts = self.policy.admit(now_s, self._undecided, self.decoding, self.waiting, self.memory.view())
        rejected = []
        for request, verdict in verdicts:
            call: Call = request.handle
            if self._trace or not call.verdicts:
                call.verdicts.append((now_s, verdict))
            assert verdict.admitted == request.standard, "the verdict is not what the request was told"
            if call.admitted and not verdict.admitted:
                self._undecided.append(request)
            call.admitted = verdict.admitted
            if not verdict.admitted and request.slo is not None and request.slo.on_decline == "reject":
                rejected.append(call)
        for call in rejected:
            self.end(call, "declined")
        return rejected

    def _take_over(self) -> None:
        """Take the KV of calls that were prefilled elsewhere, as far as there is room for it and a next token."""
        while self.coming:
            call, source = self.coming[0]
            request = call.request
            if call.place is not Place.MOVING:
                self.coming.pop(0)  # its client has gone
                continue
            blocks = self.memory.blocks(request.context_tokens + 1)
            free = self.memory.capacity_blocks - self.memory.held_blocks - len(self.decoding)
            if blocks > free and (self.decoding or self.waiting):
                return
            self.coming.pop(0)
            source.moving.remove(request)
            source.memory.keep(call.program.id, request.context_tokens)
            source.awake = True
            self.memory.grow(self.memory.blocks(request.context_tokens))
            call.replica, call.place, call.step = self.index, Place.DECODING, -1
            insort(self.decoding, request, key=_seq)

    def _check_queues(self) -> None:
        """Nobody is in two queues, whom the policy admitted stays admitted, and memory is what they hold."""
        block, blocks, index = self.memory.block_tokens, 0, self.index
        for requests, place in ((self.decoding, Place.DECODING), (self.waiting, Place.WAITING)):
            for request in requests:
                call: Call = request.handle
                assert call.place is place and call.replica == index, f"{request.rid} is in two queues"
                assert request.standard or not call.admitted, f"{request.rid} was admitted, then demoted"
                if request.started:
                    blocks += -(-request.context_tokens // block)
        blocks += sum(self.memory.blocks(request.context_tokens) for request in self.moving)
        assert blocks == self.memory.held_blocks, f"{self.memory.held_blocks} blocks are held, not {blocks}"

    def _start(self, batch: Batch) -> None:
        """Check the batch and give it its memory."""
        memory = self.memory
        block = memory.block_tokens
        self.step_count += 1
        step, index = self.step_count, self.index
        for request in batch.preempt:
            self._preempt(request)
        blocks = tokens = context = 0
        row_tokens = 1 + batch.drafts
        beyond = row_tokens + block - 1
        for request in batch.decode:
            call: Call = request.handle
            assert call.place is Place.DECODING and call.replica == index, f"{request.rid} does not decode here"
            assert call.step != step, f"{request.rid} is in the batch twice"
            call.step = step
            context += request.context_tokens
            # `memory.new_blocks`, a hot spot: what its last block has no room for.
            blocks += (beyond - -request.context_tokens % block) // block
        for request, chunk in batch.prefill:
            call = request.handle
            assert call.place is Place.WAITING and call.replica == index, f"{request.rid} does not wait here"
            assert call.step != step, f"{request.rid} is in the batch twice"
            assert 0 < chunk <= request.uncached_tokens, f"{request.rid} has no {chunk} tokens of its prompt left"
            call.step = step
            tokens += chunk
            context += request.context_tokens + chunk
            blocks += memory.new_blocks(request.context_tokens, chunk)
            if not request.started:
                request.started = True
                memory.claim(call.program.id, request.context_tokens)
        memory.grow(blocks)
        rows = len(batch.decode)
        decoded = rows * row_tokens
        size = BatchSize(
            tokens + decoded, len(batch.prefill) + rows, context + decoded, draft_steps=batch.drafts if rows else 0
        )
        assert batch.size == size, f"the batch is {size}, not {batch.size}"

    def _preempt(self, request: Request) -> None:
        """Drop its KV; it waits again with prompt and output to compute."""
        call: Call = request.handle
        assert request.started, f"{request.rid} has nothing to lose"
        self.memory.release(request.context_tokens)
        if call.place is Place.DECODING:
            self.decoding.remove(request)
            insort(self.waiting, request, key=_seq)
            call.place = Place.WAITING
        request.uncached_tokens = call.stage.prompt_tokens + request.output_tokens
        request.context_tokens = 0
        request.started = False
        request.preemptions += 1
        self.preemptions += 1

    def finish(self, now_s: float) -> tuple[list[Call], list[Call]]:
        """The step in flight has ended: the calls that ended with it, and those whose prompt is now computed."""
        batch = self.batch
        assert batch is not None
        ended: list[Call] = []
        prefilled: list[Call] = []
        self.batch = None
        self.awake = True
        if isinstance(self.policy.cost, OnlineCostModel):
            self.policy.cost.observe(batch.size, self._took_s * 1e3)
        for request in batch.decode:
            call: Call = request.handle
            tokens = self._accepted(call, batch.drafts) if batch.drafts else 1
            request.context_tokens += tokens
            for _ in range(tokens):
                request.token(now_s)
                call.token_s.append(now_s)
                if request.output_tokens == call.mark:
                    self._at_mark(call, now_s, ended)
        for request, tokens in batch.prefill:
            request.context_tokens += tokens
            request.uncached_tokens -= tokens
            request.served_s = now_s
            if request.uncached_tokens:
                continue
            self.waiting.remove(request)
            insort(self.decoding, request, key=_seq)
            call = request.handle
            call.place = Place.DECODING
            first = not request.output_tokens
            request.token(now_s)
            call.token_s.append(now_s)
            if request.output_tokens == call.mark:
                self._at_mark(call, now_s, ended)
            if first and call.place is Place.DECODING:
                prefilled.append(call)
        for call in self.leaving:
            if call.place is not Place.ENDED:
                self.end(call, "failed")
                ended.append(call)
        self.leaving = []
        return ended, [call for call in prefilled if call.place is Place.DECODING]

    def _accepted(self, call: Call, drafts: int) -> int:
        """Output tokens of a call for which so many were drafted: one, and the drafted ones up to the first rejected.
        The memory of the others is given back.
        """
        request, tokens = call.request, 1
        while tokens <= drafts and self._draft_rng.random() < self.true_cost.acceptance:
            tokens += 1
        tokens = min(tokens, call.stage.output_tokens - request.output_tokens)
        self.memory.shrink(self.memory.new_blocks(request.context_tokens + tokens, 1 + drafts - tokens))
        return tokens

    def hand_over(self, call: Call, target: Replica) -> None:
        """`target` will decode the call; its KV stays here until it is taken."""
        self.decoding.remove(call.request)
        if call.request in self._undecided:
            self._undecided.remove(call.request)
        self.moving.append(call.request)
        call.place = Place.MOVING
        target.coming.append((call, self))
        target.awake = True

    def _at_mark(self, call: Call, now_s: float, ended: list[Call]) -> None:
        request, stage = call.request, call.stage
        if request.output_tokens == stage.output_tokens:
            request.finish(now_s)
            if self._lengths:
                self._lengths.finished(request)
            self.policy.ended(request, now_s)
            self.end(call, "finished")
            ended.append(call)
            return
        if request.output_tokens >= stage.think_tokens:
            request.next_phase()
        self._estimate(request)
        self._set_mark(call)

    def _estimate(self, request: Request) -> None:
        if self._lengths:
            request.left_tokens = self._lengths.expect(request)
            request.sure_tokens = self._lengths.at_least(request)
            request.expect(self._lengths.at_most(request), request.think_tokens)

    def _set_mark(self, call: Call) -> None:
        request, stage = call.request, call.stage
        # Where it could have thought and did not, that shows with the first token.
        call.mark = max(stage.think_tokens, 1) if request.thinking else stage.output_tokens
        if self._lengths:
            call.mark = min(call.mark, request.output_tokens + REFINE_EVERY_TOKENS)

    def _record(self, batch: Batch, start_s: float, end_s: float) -> None:
        self.steps.append(
            Step(
                replica=self.index,
                start_s=start_s,
                end_s=end_s,
                decode=tuple(r.rid for r in batch.decode),
                prefill=tuple((r.rid, tokens) for r, tokens in batch.prefill),
                preempt=tuple(r.rid for r in batch.preempt),
                held_tokens=self.memory.held_blocks * self.memory.block_tokens,
            )
        )
