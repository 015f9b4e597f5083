"""Sarathi-Serve: chunked prefill under a fixed token budget, decode first.

Source: Sarathi-Serve (OSDI'24), section 4.2. Every step decodes everybody, then fills its `budget_tokens` with chunks
of prompts, first come, first served. A prompt starts when all of it fits into memory with 1 % spared; a decoder
without a block preempts the latest arrival. Its authors choose the budget by the TPOT target; an evaluation shows its
best.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from slos_sglang.policy.batches import Batch, Memory
from slos_sglang.policy.request import Request
from slos_sglang.sim.baselines.common import Baseline, Room, decode_all


@dataclass(kw_only=True)
class Sarathi(Baseline):
    """Decode first, then chunks up to the budget."""

    budget_tokens: int = 512
    max_requests: int = 256
    watermark: float = 0.01

    def next_batch(
        self, now_s: float, decoding: Sequence[Request], waiting: Sequence[Request], memory: Memory
    ) -> Batch:
        batch = Batch(drafts=self.drafts)
        started = [r for r in waiting if r.started]
        room = Room(memory, watermark=self.watermark, started=started)
        decode_all(batch, room, decoding, started)
        # Whoever was preempted makes room for others first.
        for request in () if batch.preempt else waiting:
            left = self.budget_tokens - batch.size.tokens
            if left <= 0 or batch.size.requests >= self.max_requests:
                break
            alone = not batch.size.requests and not started
            if not (request.started or alone or room.may_start(request)):
                break
            tokens = min(left, request.uncached_tokens)
            if not room.take(request, tokens):
                break
            batch.add(request, tokens)
        batch.predicted_ms = self.cost.batch_ms(batch.size)
        return batch
