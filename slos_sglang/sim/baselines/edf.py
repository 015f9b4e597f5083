"""Earliest deadline first, nobody refused.

Source: the textbook (Liu and Layland, 1973) at the grain of batches: every decoder's next token, then prompts by the
due time of their first token, into batches of at most `max_batch_ms`, so that a newcomer soon gets its turn. To let
decoders that are not due yet sit out while prompts wait would be purer and is worse: they hold their KV longer, and
capacity falls by a tenth to a quarter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from slos_sglang.policy.batches import Batch, Memory
from slos_sglang.policy.request import Request
from slos_sglang.sim.baselines.common import Baseline, Room, decode_all


@dataclass(kw_only=True)
class EDF(Baseline):
    """Decode first, then chunks by deadline."""

    max_batch_ms: float = 120.0
    watermark: float = 0.01

    def next_batch(
        self, now_s: float, decoding: Sequence[Request], waiting: Sequence[Request], memory: Memory
    ) -> Batch:
        batch = Batch(drafts=self.drafts)
        started = [r for r in waiting if r.started]
        room = Room(memory, watermark=self.watermark, started=started)
        decode_all(batch, room, decoding, started)
        for request in () if batch.preempt else sorted(waiting, key=lambda r: (r.ttft_due_s, r.seq)):
            within = self.cost.chunk_tokens(
                batch.size, prefix_tokens=request.context_tokens, within_ms=self.max_batch_ms
            )
            alone = not batch.size.requests and not started
            if within <= 0 and batch.size.requests:
                break
            if not (request.started or alone or room.may_start(request)):
                continue
            tokens = min(max(within, 1), request.uncached_tokens)
            if room.take(request, tokens):
                batch.add(request, tokens)
        batch.predicted_ms = self.cost.batch_ms(batch.size)
        return batch
