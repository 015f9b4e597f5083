"""vLLM today: one queue of running requests, chunked prompts, one token budget.

Source: vLLM V1, `Scheduler.schedule`. Whoever runs, decoding or with a prompt in progress, is served in order of
arrival; then waiting prompts start, first come, first served, until `budget_tokens` are spent (its default of a server
on an A100: 2048). A prompt starts when its chunk finds blocks, with no watermark. Where somebody that runs finds no
block the latest arrival is preempted and recomputed, and nothing new starts in that step; a prompt in progress, the
latest to start, loses its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from slos_sglang.policy.batches import Batch, Memory
from slos_sglang.policy.request import Request
from slos_sglang.sim.baselines.common import Baseline, Room, decode_all


@dataclass(kw_only=True)
class VLLMV1(Baseline):
    """Decode first, then chunks that need only fit themselves."""

    budget_tokens: int = 2048
    max_requests: int = 256

    def next_batch(
        self, now_s: float, decoding: Sequence[Request], waiting: Sequence[Request], memory: Memory
    ) -> Batch:
        batch = Batch(drafts=self.drafts)
        room = Room(memory)
        started = [r for r in waiting if r.started]
        decode_all(batch, room, decoding, started)
        rows = len(decoding)
        for request in (*started, *(r for r in waiting if not r.started)):
            left = self.budget_tokens - batch.size.tokens
            if left <= 0 or rows >= self.max_requests or batch.preempt:
                break
            tokens = min(left, request.uncached_tokens)
            if not room.take(request, tokens):
                if request.started and batch.decode:
                    batch.preempt.append(request)
                break
            batch.add(request, tokens)
            rows += 1
        batch.predicted_ms = self.cost.batch_ms(batch.size)
        return batch
