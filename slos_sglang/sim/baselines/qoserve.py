"""QoServe (first named Niyama): chunks as large as the decoders' slack allows, and hopeless requests give way early.

Source: QoServe (ASPLOS'26), sections on dynamic chunking, hybrid prioritization, eager relegation and selective
preemption. Every step decodes everybody. The batch may last until the earliest of their next tokens is due (by the
deadline of the first token plus TPOT each, as its authors count) and holds at most `max_chunk_tokens` of prompts,
at least `min_chunk_tokens`. Prompts go by deadline + `ms_per_token` x tokens left, a blend of earliest deadline and
shortest job first. One that can't make its deadline any more even alone is relegated: it waits until nobody else does.
A prompt in progress is overtaken only where it can still make its deadline after the one that overtakes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from slos_sglang.policy.batches import Batch, Memory
from slos_sglang.policy.request import INF, Request
from slos_sglang.sim.baselines.common import Baseline, Room, decode_all

# Nobody decodes: the chunk's own bound is all that holds.
_NO_SLACK_MS = 1e9


@dataclass(kw_only=True)
class QoServe(Baseline):
    """Dynamic chunks, hybrid priority, early relegation."""

    ms_per_token: float = 8.0
    min_chunk_tokens: int = 128
    max_chunk_tokens: int = 2560
    watermark: float = 0.01

    def next_batch(
        self, now_s: float, decoding: Sequence[Request], waiting: Sequence[Request], memory: Memory
    ) -> Batch:
        batch = Batch(drafts=self.drafts)
        started = [r for r in waiting if r.started]
        room = Room(memory, watermark=self.watermark, started=started)
        decode_all(batch, room, decoding, started)
        if waiting and not batch.preempt:
            slack_ms = self._slack_ms(now_s, decoding)
            self._prompts(batch, room, self._order(now_s, waiting), slack_ms, alone=not decoding and not started)
        batch.predicted_ms = self.cost.batch_ms(batch.size)
        return batch

    def _slack_ms(self, now_s: float, decoding: Sequence[Request]) -> float:
        """Until the earliest next token is due; those that have missed theirs for good hold nobody up."""
        return min(
            [(r.ruled_s + r.tpot_s - now_s) * 1e3 for r in decoding if r.kept and r.tpot_s < INF], default=_NO_SLACK_MS
        )

    def _order(self, now_s: float, waiting: Sequence[Request]) -> list[Request]:
        def priority(request: Request) -> tuple[bool, float, int]:
            due_s = request.ttft_due_s
            relegated = now_s + self._alone_s(request) > due_s or request.lost(now_s)
            if due_s == INF:
                due_s = request.arrival_s
            return (relegated, due_s + self.ms_per_token / 1e3 * request.uncached_tokens, request.seq)

        order = sorted(waiting, key=priority)
        first = order[0]
        for request in order:
            if request.started and request is not first:
                behind_s = self._alone_s(first) + self._alone_s(request)
                if now_s + self._alone_s(request) <= request.ttft_due_s < now_s + behind_s:
                    order.remove(request)
                    order.insert(0, request)
                break
        return order

    def _alone_s(self, request: Request) -> float:
        return self.cost.prefill_ms(request.uncached_tokens, prefix_tokens=request.context_tokens) / 1e3

    def _prompts(self, batch: Batch, room: Room, prompts: Sequence[Request], slack_ms: float, *, alone: bool) -> None:
        chunked = 0
        for request in prompts:
            within = self.cost.chunk_tokens(batch.size, prefix_tokens=request.context_tokens, within_ms=slack_ms)
            left = min(max(within, self.min_chunk_tokens - chunked), self.max_chunk_tokens - chunked)
            if left <= 0:
                return
            if not (request.started or (alone and not chunked) or room.may_start(request)):
                continue
            tokens = min(left, request.uncached_tokens)
            if room.take(request, tokens):
                batch.add(request, tokens)
                chunked += tokens
