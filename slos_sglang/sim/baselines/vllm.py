"""vLLM before chunked prefill: prompts first.

Source: vLLM 0.6, `Scheduler._schedule_default`. While the first in the queue fits into memory (with 1 % spared), the
step holds prompts only, whole and first come, first served, up to `max_batch_tokens` (its default is the model's
length, at least 2048) and `max_requests`; a longer prompt runs alone. Otherwise everybody decodes, and where a token
finds no block the latest arrival is preempted and recomputed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from slos_sglang.policy.batches import Batch, Memory
from slos_sglang.policy.request import Request
from slos_sglang.sim.baselines.common import Baseline, Room, decode_all


@dataclass(kw_only=True)
class VLLM(Baseline):
    """Prefill first, whole prompts."""

    max_batch_tokens: int = 2048
    max_requests: int = 256
    watermark: float = 0.01

    def next_batch(
        self, now_s: float, decoding: Sequence[Request], waiting: Sequence[Request], memory: Memory
    ) -> Batch:
        batch = Batch(drafts=self.drafts)
        room = Room(memory, watermark=self.watermark)
        for request in waiting:
            tokens = request.uncached_tokens
            full = batch.size.tokens + tokens > self.max_batch_tokens and batch.prefill
            if full or len(decoding) + len(batch.prefill) >= self.max_requests:
                break
            # Alone it starts whatever the watermark says.
            alone = not decoding and not batch.prefill
            if not (alone or room.may_start(request)) or not room.take(request, tokens):
                break
            batch.add(request, tokens)
        if not batch.prefill:
            decode_all(batch, room, decoding)
        batch.predicted_ms = self.cost.batch_ms(batch.size)
        return batch
