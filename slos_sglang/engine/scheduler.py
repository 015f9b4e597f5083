"""SGLang's scheduler, steered by `policy/`.

Each step the policy sees what runs and what waits, and answers with a batch: who decodes, and whose prompt advances by
how many tokens. This class applies it to SGLang's own batches without copying any of its method bodies:

- the chunk budget of the step is set before SGLang forms the prefill batch, and the queue is put into the plan's order;
- decoders that sit the step out are split off and stay in `running_batch`, where aborts, pause and checks see them;
- a half-done prompt that the plan overtakes goes back to the queue; its KV stays in the radix tree.

While no request with an SLO is about, nor was a moment ago, every method falls through to SGLang's own.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from http import HTTPStatus
from typing import Any

from sglang.srt.managers.schedule_batch import NextBatchPlan, Req, ScheduleBatch
from sglang.srt.managers.schedule_policy import PrefillAdder
from sglang.srt.managers.scheduler import Scheduler, _make_abort_req
from sglang.srt.mem_cache.common import match_kv_cache, release_kv_cache
from sglang.srt.runtime_context import get_parallel

from slos_sglang.engine.batch_split import rejoin, split
from slos_sglang.engine.clock import TickingReceiver
from slos_sglang.engine.config import config_from_env
from slos_sglang.engine.kept_kv import KeptKV
from slos_sglang.engine.plugin import ANNOUNCED_KEY, OPERATOR_MIXED_ENV
from slos_sglang.engine.receipt_stream import SLOOutputStreamer
from slos_sglang.engine.tracking import Tracker
from slos_sglang.engine.wire import abort_reason
from slos_sglang.policy.admission import Verdict
from slos_sglang.policy.batch_time import OnlineCostModel
from slos_sglang.policy.batches import Batch, Limits, Memory
from slos_sglang.policy.dp import compile_ahead
from slos_sglang.policy.holds import Holds
from slos_sglang.policy.programs import Programs
from slos_sglang.policy.request import Request
from slos_sglang.policy.scheduler import Scheduler as Policy

# An agent comes back from its tool: for so long after the last request with an SLO batches stay short.
_RETURNS_WITHIN_S = 10.0
# Best effort leaves at most this share of the memory to conversations that are away.
_MOST_KEPT = 0.5
# To look a conversation of so many tokens up takes about 10 us: a twentieth of the time at most goes there.
_LOOK_S, _LOOK_TOKENS = 2e-4, 4096


class ParkingAdder(PrefillAdder):
    """SGLang's prefill adder, which also reserves the future tokens of the decoders that sit this step out."""

    parked: list[Req] = []  # noqa: RUF012 - set for one step by the scheduler, of which there is one a process

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.memory_budget.total_offset += sum(self._get_running_request_total_token_offset(r) for r in self.parked)


class SLOScheduler(Scheduler):
    """The scheduler of SGLang with deadlines; see the module's docstring."""

    # Attributes of SGLang's own that are set here.
    is_mixed_chunk: bool
    chunked_prefill_size: int | None
    chunked_req: Req | None
    waiting_queue: list[Req]
    running_batch: ScheduleBatch
    request_receiver: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._config = config_from_env()
        compile_ahead()
        self._cost = OnlineCostModel()
        self._policy = Policy(
            cost=self._cost,
            limits=Limits(best_effort_max_wait_s=self._config.best_effort_max_wait_s),
            admission=self._config.admission,
            late_commitment=self._config.late_commitment,
            programs=Programs(reserve=self._config.reserve_for_returns),
            holds=Holds(mode=self._config.hold_kv),
        )
        # This step's decoders, where the plan leaves some out; None: all.
        self._decode_only: list[Req] | None = None
        # Whether anybody about has an SLO, or had a moment ago; without, every method falls through.
        self._watched = False
        self._watched_until_s = 0.0
        # A decode batch that was split off for the step being run.
        self._active: ScheduleBatch | None = None
        # While SGLang forms a prefill batch: requests that come into the queue behind the decision's back.
        self._late: list[Req] | None = None
        super().__init__(*args, **kwargs)
        self._refuse_what_is_not_supported()
        self._stock_mixed_chunk = self.is_mixed_chunk and os.environ.get(OPERATOR_MIXED_ENV, "1") == "1"
        self._may_overtake = self.tree_cache.supports_prefix_sharing() and not self.tree_cache.supports_mamba()
        self._kept_kv = KeptKV(self.tree_cache)
        self._kept_tokens, self._look_again_s = 0, 0.0
        if not KeptKV.works_with(self.tree_cache):
            self._policy.holds.mode = "never"

    def _refuse_what_is_not_supported(self) -> None:
        parallel = get_parallel()
        for what, used in (
            ("pipeline parallelism (--pp-size)", parallel.pp_size > 1),
            ("data-parallel attention (--enable-dp-attention)", parallel.attn_dp_enabled),
            ("speculative decoding (--speculative-algorithm)", not self.spec_algorithm.is_none()),
            ("prefill/decode disaggregation (--disaggregation-mode)", self.disaggregation_mode.value != "null"),
            ("diffusion language models (--dllm-algorithm)", self.dllm_config is not None),
            ("--scheduler-recv-interval above 1", self.server_args.scheduler_recv_interval > 1),
            ("--chunked-prefill-size -1", self.chunked_prefill_size is None and self.is_generation),
        ):
            if used:
                raise SystemExit(f"slos-sglang: the SLO scheduler does not support {what} yet")

    # Construction -----------------------------------------------------------------------------------------------

    def init_request_receiver(self) -> None:
        super().init_request_receiver()
        self.request_receiver = TickingReceiver.over(self.request_receiver)
        self._tracker = Tracker(
            self._config,
            self._cost,
            lambda: self.tokenizer,
            rank=get_parallel().tp_rank,
            credit_share=self._policy.limits.credit_share,
            ended=self._policy.ended,
        )
        self._policy.holds.report = self._tracker.kept

    def get_output_streamer_class(self) -> type[SLOOutputStreamer]:
        return SLOOutputStreamer.reading(lambda req: self._tracker.receipt(req))

    def get_prefill_adder_class(self) -> type[PrefillAdder]:
        return ParkingAdder

    def get_init_info(self) -> dict[str, Any]:
        return super().get_init_info() | {ANNOUNCED_KEY: type(self).__name__}

    # Requests ---------------------------------------------------------------------------------------------------

    @property
    def _now_s(self) -> float:
        return self.request_receiver.now_s[0]

    def ingest_requests(self, stop_at_pause: bool = False) -> list[Any]:
        received = super().ingest_requests(stop_at_pause)
        self._tracker.settle(self._now_s)
        return received

    def _add_request_to_queue(self, req: Req, is_retracted: bool = False) -> None:
        if self._late is not None:
            self._late.append(req)
            return
        try:
            self._tracker.enqueue(req, self._now_s, is_retracted=is_retracted)
        except ValueError as error:
            self._refuse(req, abort_reason(HTTPStatus.BAD_REQUEST, str(error)))
            return
        super()._add_request_to_queue(req, is_retracted=is_retracted)

    def get_num_allocatable_reqs(self, running_bs: int, *args: Any, **kwargs: Any) -> int:
        # Those that sit the step out keep their places.
        return super().get_num_allocatable_reqs(running_bs + len(ParkingAdder.parked), *args, **kwargs)

    def _refuse(self, req: Req, reason: dict[str, Any]) -> None:
        """End a request that is not (or no longer) queued with an HTTP status."""
        self._release_aborted_request(req)
        self.send_abort_output(_make_abort_req(req, finished_reason=reason), req)

    # A step -----------------------------------------------------------------------------------------------------

    def get_next_batch_to_run(self, running_batch: ScheduleBatch, last_batch: ScheduleBatch | None) -> NextBatchPlan:
        self._decode_only = None
        return super().get_next_batch_to_run(running_batch, last_batch)

    def get_new_batch_prefill(self, running_batch: ScheduleBatch) -> NextBatchPlan:
        self._queue_ready_grammars()
        if self._any_slo(running_batch):
            self._watched_until_s = self._now_s + _RETURNS_WITHIN_S
        self._watched = self._now_s < self._watched_until_s or self._policy.holds.any
        if not self._watched:
            self.is_mixed_chunk = self._stock_mixed_chunk
            return self._prefill_pass(running_batch)
        batch = self._decide(running_batch)
        return self._apply(batch, running_batch)

    def _any_slo(self, running_batch: ScheduleBatch) -> bool:
        live = [*running_batch.reqs, *self.waiting_queue]
        if self.chunked_req is not None:
            live.append(self.chunked_req)
        return any(req.slo_state.constrained for req in live)

    def _queue_ready_grammars(self) -> None:
        """Requests leave the grammar queue only here; SGLang's own pass may be skipped this step."""
        if self.grammar_manager.has_waiting_grammars():
            for req in self.grammar_manager.get_ready_grammar_requests():
                self._add_request_to_queue(req)

    def _decide(self, running_batch: ScheduleBatch) -> Batch:
        """Ask the policy: admission of what is undecided, then the next batch."""
        for req in self.waiting_queue:
            # Best effort is measured once: a long backlog must not cost every step a look-up each.
            state = self._tracker.state(req)
            if state.uncached_tokens == 0 or state.standard or state.undecided(self._now_s):
                match_kv_cache(req, self.tree_cache)
                self._tracker.measure(req, computed=req.prefix_len)
        waiting = [self._tracker.state(req) for req in self.waiting_queue]
        if self.chunked_req is not None:
            self._tracker.measure(self.chunked_req, computed=self.chunked_req.extend_end, started=True)
            waiting.append(self._tracker.state(self.chunked_req))
        decoding = [self._tracker.decoder(req) for req in running_batch.reqs]
        now_s = self._tracker.start_of_next_step(self._now_s, overlap=self.enable_overlap)

        memory = self._keep(now_s, self._memory((*waiting, *decoding)))
        undecided = [r for r in (*waiting, *decoding) if r.undecided(now_s)]
        if undecided:
            judged = self._policy.admit(now_s, undecided, decoding, waiting, memory)
            rejected = [(r, v) for r, v in judged if not v.admitted and r.slo and r.slo.on_decline == "reject"]
            for request, verdict in rejected:
                self._reject(request, verdict)
                waiting.remove(request)
            self._tracker.announce(request for request, _ in judged)
            # A step judges only so many. The others wait: one that ran could no longer be rejected.
            waiting = [r for r in waiting if r.judged or not r.constrained]
        return self._policy.next_batch(now_s, decoding, waiting, memory)

    def _memory(self, live: Iterable[Request]) -> Memory:
        """KV memory as promises see it: SGLang does not take any away from best effort that runs."""
        best_effort_tokens = sum(r.context_tokens for r in live if r.started and not r.standard)
        return Memory(
            capacity_tokens=self.max_total_num_tokens - best_effort_tokens,
            free_tokens=self.token_to_kv_pool_allocator.available_size() + self.tree_cache.evictable_size(),
            block_tokens=self.token_to_kv_pool_allocator.page_size,
        )

    def _keep(self, now_s: float, memory: Memory) -> Memory:
        """`memory`, in which conversations that are away are kept from best effort."""
        capacity_tokens = self.max_total_num_tokens
        if now_s >= self._look_again_s:
            used_tokens = capacity_tokens - memory.free_tokens + self._kept_tokens
            calls = self._policy.holds.held(
                now_s, capacity_tokens=capacity_tokens, used_tokens=used_tokens, cost=self._cost
            )
            # While enough is empty for any step nothing is taken from the cache.
            step_tokens = (self.chunked_prefill_size or 0) + self.max_running_requests * memory.block_tokens
            empty = self.token_to_kv_pool_allocator.available_size() >= step_tokens
            self._kept_tokens = self._kept_kv.use(calls) if calls and not empty else 0
            self._look_again_s = now_s + _LOOK_S * (len(calls) + self._kept_tokens / _LOOK_TOKENS)
        return replace(memory, kept_tokens=min(self._kept_tokens, int(_MOST_KEPT * capacity_tokens)))

    def _reject(self, request: Request, verdict: Verdict) -> None:
        req = request.handle
        self.waiting_queue.remove(req)
        message = f"declined: {verdict.reason}"
        if verdict.retry_after_s:
            message += f"; it could be met in about {verdict.retry_after_s:.1f} s"
        self._refuse(req, abort_reason(HTTPStatus.TOO_MANY_REQUESTS, message, retry_after_s=verdict.retry_after_s))

    def _apply(self, batch: Batch, running_batch: ScheduleBatch) -> NextBatchPlan:
        """Turn the policy's batch into SGLang's: prefill and mixed steps here, the rest in `update_running_batch`."""
        decode = {id(r.handle) for r in batch.decode}
        # An aborted request leaves after one more step: not one that it sits out, holding its memory.
        decode.update(id(r) for r in running_batch.reqs if r.to_finish is not None)
        prompts = self._in_sglangs_order(batch)
        running_batch.batch_is_full = False
        if not prompts:
            self._decode_only = [r for r in running_batch.reqs if id(r) in decode]
            return NextBatchPlan(batch_to_run=None, running_batch=running_batch)

        # SGLang sees only what the plan chose: it would fill what is left of the budget with others.
        chosen = {id(req) for req, _ in prompts}
        others = [req for req in self.waiting_queue if id(req) not in chosen]
        self.waiting_queue = [req for req, _ in prompts if req is not self.chunked_req]
        active, parked = running_batch, ScheduleBatch(reqs=[])
        if not decode:
            active, parked = parked, running_batch
        elif len(decode) < len(running_batch.reqs):
            active = split(running_batch, lambda r: id(r) in decode)
            parked = running_batch
        plan = self._prefill(active, parked, tokens=sum(tokens for _, tokens in prompts))
        self.waiting_queue += others
        # Mixed in: an empty batch came back. Not mixed, or nothing admitted (log-probabilities, memory): `active` did.
        plan.running_batch = rejoin(parked, plan.running_batch)
        plan.running_batch.batch_is_full = False
        return plan

    def _prefill(self, active: ScheduleBatch, parked: ScheduleBatch, *, tokens: int) -> NextBatchPlan:
        """SGLang's own prefill pass with a chunk budget of `tokens`, mixing in the `active` decoders."""
        whole_budget = self.chunked_prefill_size
        self.is_mixed_chunk = True
        # SGLang takes one token a mixed row off the budget.
        self.chunked_prefill_size = tokens + len(active.reqs)
        ParkingAdder.parked = parked.reqs
        try:
            return self._prefill_pass(active)
        finally:
            self.chunked_prefill_size = whole_budget
            ParkingAdder.parked = []

    def _prefill_pass(self, running_batch: ScheduleBatch) -> NextBatchPlan:
        """SGLang's own pass. It asks for ready grammars once more; who turns up now has its turn, judged, next step."""
        self._late = []
        try:
            return super().get_new_batch_prefill(running_batch)
        finally:
            late, self._late = self._late, None
            for req in late:
                self._add_request_to_queue(req)

    def _in_sglangs_order(self, batch: Batch) -> list[tuple[Req, int]]:
        """The plan's prompts as SGLang can run them: the chunk in progress goes first, or back to the queue."""
        prompts = [(r.handle, tokens) for r, tokens in batch.prefill]
        if self.chunked_req is None or not prompts or prompts[0][0] is self.chunked_req:
            return prompts
        # Starting over would collect the log-probabilities of what is computed a second time.
        if self._may_overtake and not self.chunked_req.return_logprob:
            self._overtake()
            return prompts
        mine = [(req, tokens) for req, tokens in prompts if req is self.chunked_req]
        others = [(req, tokens) for req, tokens in prompts if req is not self.chunked_req]
        return mine + others if mine else [(self.chunked_req, sum(tokens for _, tokens in others))]

    def _overtake(self) -> None:
        """Put the half-done prompt back into the queue; the radix tree keeps what was computed."""
        req = self.chunked_req
        assert req is not None
        release_kv_cache(req, self.tree_cache, checkpoint=True)
        req.prefix_len = 0
        req.last_node = None
        req.extend_end = None
        req.kv.cache_protected_len = 0
        req.kv.cache_inserted_len = 0
        req.kv.kv_committed_len = 0
        req.extend_batch_idx = 0
        self.chunked_req = None
        self.waiting_queue.append(req)

    def update_running_batch(self, batch: ScheduleBatch) -> ScheduleBatch | None:
        chosen = self._decode_only
        if not chosen or len(chosen) == len(batch.reqs):
            return super().update_running_batch(batch)
        keep = {id(req) for req in chosen}
        if not batch.check_decode_mem():
            # Too little memory for the next tokens: SGLang's retraction must see everybody.
            return super().update_running_batch(batch)
        active = split(batch, lambda r: id(r) in keep)
        ready = super().update_running_batch(active)
        if ready is None or ready.is_empty():
            batch.merge_batch(active) if not active.is_empty() else None
            return None
        self._active = ready
        return ready

    def run_batch(self, batch: ScheduleBatch, pp_proxy_tensors: Any = None) -> Any:
        if self._watched or self._tracker.recording:
            parked = self.running_batch if self.running_batch is not batch else None
            self._tracker.launch(batch, parked, waiting=len(self.waiting_queue))
        else:
            self._tracker.launch_unwatched(batch)
        result = super().run_batch(batch, pp_proxy_tensors)
        if batch is self._active:
            # From here on everything that runs is in one place again.
            self._active = None
            self.running_batch = rejoin(self.running_batch, batch)
        return result

    def process_batch_result(self, batch: ScheduleBatch, result: Any) -> None:
        super().process_batch_result(batch, result)
        self._tracker.processed()

    def on_idle(self) -> None:
        super().on_idle()
        self._tracker.idle()
