"""What happened to each request: SGLang's `Req` on one side, the policy's `Request` on the other.

Every `Req` carries its `Request` in the attribute `slo_state`. Tokens and step times are accounted for at the next
tick (`settle`), so that all ranks see the same numbers; only a receipt, which nothing is decided by, reads the local
clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from sglang.srt.managers.schedule_batch import FINISH_ABORT, Req, ScheduleBatch

from slos_sglang.engine.config import SLOConfig
from slos_sglang.engine.phases import MarkerWatch
from slos_sglang.engine.receipts import receipt
from slos_sglang.engine.wire import RECEIVED_KEY
from slos_sglang.policy.batch_time import BatchSize, OnlineCostModel
from slos_sglang.policy.holds import Over
from slos_sglang.policy.lengths import LengthEstimator
from slos_sglang.policy.request import CHECK_EVERY_TOKENS, INF, Request
from slos_sglang.slo import parse_wire
from slos_sglang.telemetry.events import EventWriter

# From the scheduler through detokenizer and HTTP to the client, ms; a deadline is the client's.
DELIVERY_MS = 6.0
# Of the steps in which nobody has an SLO, one in so many corrects the cost model.
_SAMPLED_EVERY = 8
# The HTTP process's time stamp counts if it is no older than this: another machine has another clock.
_OLDEST_ARRIVAL_S = 600.0


@dataclass(kw_only=True)
class Launched:
    """A batch on its way."""

    reqs: list[Req]
    size: BatchSize
    predicted_ms: float
    decode: list[str] = field(default_factory=list)
    prefill: dict[str, int] = field(default_factory=dict)
    parked: list[str] = field(default_factory=list)
    waiting: int = 0


class Tracker:
    """Keeps the policy's view of SGLang's requests; the cost model learns from it."""

    def __init__(
        self,
        config: SLOConfig,
        cost: OnlineCostModel,
        tokenizer: Callable[[], Any],
        *,
        rank: int,
        credit_share: float = 0.0,
        ended: Callable[[Request, float, bool], None] = lambda request, now_s, aborted: None,
    ) -> None:
        self._config = config
        self._cost = cost
        self._credit_share = credit_share
        self._ended = ended
        self._lengths = LengthEstimator()
        self._thinking = LengthEstimator()  # of first phases
        self._tokenizer = tokenizer
        self._events = EventWriter(config.events_of(rank))
        self._arrivals = 0
        self._in_flight: list[Launched] = []
        self._unwatched = 0
        self._done: Launched | None = None
        self._tick_s = 0.0

    @property
    def recording(self) -> bool:
        """True where every step is written to the event stream."""
        return self._events.on

    # Requests ---------------------------------------------------------------------------------------------------

    @staticmethod
    def state(req: Req) -> Request:
        """The policy's view of `req`."""
        return req.slo_state

    def enqueue(self, req: Req, now_s: float, *, is_retracted: bool) -> None:
        """`req` enters the queue, first or again. Raises `ValueError` for a malformed SLO or an empty prompt."""
        state: Request | None = getattr(req, "slo_state", None)
        if state is not None:
            state.preemptions += is_retracted
            return
        if not req.origin_input_ids:
            raise ValueError("the prompt is empty: there is nothing to compute")
        custom = req.sampling_params.custom_params or {}
        slo = parse_wire(custom["slo"]) if custom.get("slo") is not None else None
        received_s = float(custom.get(RECEIVED_KEY, now_s))
        known = now_s - _OLDEST_ARRIVAL_S < received_s <= now_s
        state = Request(
            rid=req.rid,
            seq=self._arrivals,
            arrival_s=received_s if known else now_s,
            slo=slo,
            max_tokens=req.sampling_params.max_new_tokens or 0,
            handle=req,
        )
        state.served_s = now_s
        state.left_tokens, state.sure_tokens = self._lengths.expect(state), self._lengths.at_least(state)
        state.most_tokens = self._lengths.at_most(state)
        req.slo_state = state
        markers = [phase.until for phase in slo.all_phases if phase.until is not None] if slo is not None else []
        if markers and self._tokenizer() is None:
            field = "think_end" if slo is not None and slo.phases is None else "phases"
            raise ValueError(f"slo.{field}={markers[0]!r} needs the server's tokenizer, which is switched off")
        if markers:
            state.think_tokens = self._thinking.expect(state)
        req.slo_markers = MarkerWatch(self._tokenizer(), markers) if markers else None
        self._arrivals += 1
        if not state.constrained:
            self.announce([state])

    def measure(self, req: Req, *, computed: int | None, started: bool = False) -> None:
        """`req` waits and `computed` of its tokens are cached, or done where it `started`: what is left to compute."""
        state = self.state(req)
        state.started = started
        total = len(req.origin_input_ids) + len(req.output_ids)
        state.context_tokens = computed or 0
        state.uncached_tokens = max(total - state.context_tokens, 1)
        if state.constrained and not state.targets_set:
            bounds = self._config.class_of(state.slo.stage if state.slo else None)
            state.set_targets(
                self._cost,
                min_ttft_ms=bounds.min_ttft_ms if bounds else None,
                delivery_ms=DELIVERY_MS,
                credit_share=self._credit_share,
            )

    def decoder(self, req: Req) -> Request:
        """`req` decodes: its view, brought up to date."""
        state = self.state(req)
        state.started, state.uncached_tokens = True, 0
        state.context_tokens = len(req.origin_input_ids) + len(req.output_ids)
        if state.output_tokens + state.pending < len(req.output_ids):  # it ran unwatched
            self._count_tokens(req, self._tick_s)
        if state.left_tokens <= 1:  # it is longer than was expected
            state.left_tokens = self._lengths.expect(state)
        return state

    def announce(self, requests: Iterable[Request]) -> None:
        """Tell the event stream who was promised what."""
        if not self._events.on:
            return
        for r in requests:
            if r.announced:
                continue
            r.announced = True
            self._events.arrive(
                t_s=r.arrival_s,
                rid=r.rid,
                program=r.slo.program if r.slo else None,
                stage=r.slo.stage if r.slo else None,
                tier=r.tier,
                declined=r.declined,
                prompt_tokens=len(r.handle.origin_input_ids),
                ttft_target_ms=None if r.ttft_s == INF else r.ttft_s * 1e3,
                tpot_target_ms=None if r.tpot_s == INF else r.tpot_s * 1e3,
                deadline_s=None if r.deadline_s == INF else r.deadline_s,
                reason=r.reason,
            )

    def kept(self, over: Over) -> None:
        """Tell the event stream how long a conversation was kept."""
        gap_ms = None if over.gap_s == INF else over.gap_s * 1e3
        self._events.kept(t_s=self._tick_s, rid=over.request.rid, kept_ms=over.held_s * 1e3, gap_ms=gap_ms)

    # Steps ------------------------------------------------------------------------------------------------------

    def start_of_next_step(self, now_s: float, *, overlap: bool) -> float:
        """When the batch being planned will start: under overlap when the one in flight ends."""
        if overlap and self._in_flight:
            return now_s + self._in_flight[-1].predicted_ms / 1e3
        return now_s

    def launch_unwatched(self, batch: ScheduleBatch) -> None:
        """`batch` is about to run, and nobody about has an SLO: only the cost model looks, now and then."""
        self._unwatched += 1
        size = BatchSize()
        if self._unwatched % _SAMPLED_EVERY == 0:
            extend = batch.forward_mode.is_extend()
            size.requests = len(batch.reqs)
            size.tokens = sum(batch.extend_lens) if extend else size.requests
            size.context_tokens = sum(len(r.origin_input_ids) + len(r.output_ids) for r in batch.reqs)
            if extend and batch.chunked_req is not None:
                size.context_tokens -= len(batch.chunked_req.origin_input_ids) - batch.chunked_req.extend_end
        self._in_flight.append(Launched(reqs=[], size=size, predicted_ms=self._cost.batch_ms(size)))

    def launch(self, batch: ScheduleBatch, parked: ScheduleBatch | None, *, waiting: int) -> None:
        """`batch` is about to run, while the decoders in `parked` sit it out."""
        now_s = self._tick_s
        extend = batch.forward_mode.is_extend()
        new_tokens = list(batch.extend_lens) if extend else [1] * len(batch.reqs)
        decoding = {id(r) for r in batch.decoding_reqs or ()} if extend else None
        size = BatchSize()
        launched = Launched(reqs=list(batch.reqs), size=size, predicted_ms=0.0, waiting=waiting)
        for req, tokens in zip(batch.reqs, new_tokens, strict=True):
            state = self.state(req)
            decodes = decoding is None or id(req) in decoding
            context = len(req.origin_input_ids) + len(req.output_ids) if decodes else req.extend_end
            size.add(tokens=tokens, context_tokens=context)
            state.served_s = now_s
            if decodes:
                launched.decode.append(req.rid)
            else:
                launched.prefill[req.rid] = tokens
            if req is not batch.chunked_req:
                state.pending += 1
        launched.predicted_ms = self._cost.batch_ms(size)
        if parked is not None and self._events.on:
            launched.parked = [r.rid for r in parked.reqs]
        self._in_flight.append(launched)

    def processed(self) -> None:
        """The oldest batch in flight has handed in its tokens."""
        if self._in_flight:
            self._done = self._in_flight.pop(0)

    def settle(self, now_s: float) -> None:
        """A new tick: account for the batch that was processed since the last one."""
        done, self._done = self._done, None
        if done is not None:
            measured_ms = (now_s - self._tick_s) * 1e3
            self._cost.observe(done.size, measured_ms)
            if self.recording:
                self._events.step(
                    t_s=self._tick_s,
                    measured_ms=measured_ms,
                    predicted_ms=done.predicted_ms,
                    decode=done.decode,
                    prefill=done.prefill,
                    parked=done.parked,
                    waiting=done.waiting,
                    context_tokens=done.size.context_tokens,
                )
            for req in done.reqs:
                self.state(req).pending = 0
                if not req.finished():
                    self._count_tokens(req, now_s)
            for launched in self._in_flight:
                for req in launched.reqs:
                    self.state(req).pending = 1
        self._tick_s = now_s

    def _count_tokens(self, req: Req, now_s: float) -> None:
        state = self.state(req)
        while state.output_tokens < len(req.output_ids):
            state.token(now_s)
            if state.thinking and req.slo_markers.completed_by(req.output_ids, state.output_tokens - 1):
                if len(state.seen) == 1:
                    self._thinking.finished(state)
                state.next_phase()
            elif state.timed and state.output_tokens % CHECK_EVERY_TOKENS == 0:
                state.expect(self._lengths.at_most(state), self._thinking.expect(state))

    def receipt(self, req: Req) -> dict[str, Any] | None:
        """The receipt of a request that has just finished; None where it asked for nothing."""
        state: Request | None = getattr(req, "slo_state", None)
        if state is None:
            return None  # SGLang refused it before it was queued
        now_s = time.perf_counter()
        aborted = isinstance(req.finished_reason, FINISH_ABORT)
        if state.constrained:
            self._ended(state, self._tick_s, aborted)  # as all ranks know it: before the local clock has a say
            self._count_tokens(req, now_s)
            state.finish(now_s)
        state.output_tokens = len(req.output_ids)
        if not aborted:
            self._lengths.finished(state)
        answer = receipt(state, now_s) if state.constrained else None
        if self._events.on:
            self._events.finish(
                t_s=now_s, rid=req.rid, output_tokens=len(req.output_ids), receipt=answer or receipt(state, now_s)
            )
        return answer

    def idle(self) -> None:
        """Nothing runs: hand out what the event stream still holds."""
        self._events.flush()
