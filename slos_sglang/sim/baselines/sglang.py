"""SGLang's own scheduler: prompts first, in chunks, in batches of their own or (mixed) with the decoders beside them.

Source: SGLang 0.5.23, `get_new_batch_prefill`, `PrefillAdder`, `retract_decode`, with what it chooses on an A100 of
40 GB (chunks of 4096 tokens). A prompt starts, first come, first served, while it and the output left to everybody that
runs (capped) fit into memory; no prompt, and everybody decodes. Where a token finds no memory, those with the fewest
output tokens (then the longest prompts) are retracted and recomputed. Simplified: output left is reserved in full, as
SGLang does for outputs of fixed length; otherwise it reserves a share that falls from 0.7 to 0.1 while nobody is
retracted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from slos_sglang.policy.batches import Batch, Memory
from slos_sglang.policy.request import Request
from slos_sglang.sim.baselines.common import Baseline, Room, decode_all


@dataclass(kw_only=True)
class SGLang(Baseline):
    """Prefill first, chunked; `mixed` lets decoders ride in prefill batches (`--enable-mixed-chunk`)."""

    chunk_tokens: int = 4096
    reserve_cap_tokens: int = 4096
    mixed: bool = False

    def next_batch(
        self, now_s: float, decoding: Sequence[Request], waiting: Sequence[Request], memory: Memory
    ) -> Batch:
        batch = Batch(drafts=self.drafts)
        room = Room(memory)
        started = [r for r in waiting if r.started]
        if waiting:
            free = memory.free_tokens - sum(self._reserved(r) for r in decoding)
            self._prompts(batch, room, [*started, *(r for r in waiting if not r.started)], free, len(decoding))
        rides = self.mixed and sum(room.need(r, 1) for r in decoding) <= room.blocks
        if not batch.prefill or rides:
            decode_all(batch, room, decoding, keep=lambda r: (-r.output_tokens, r.context_tokens - r.output_tokens))
        batch.predicted_ms = self.cost.batch_ms(batch.size)
        return batch

    def _prompts(self, batch: Batch, room: Room, prompts: Sequence[Request], free_tokens: int, decoders: int) -> None:
        left = self.chunk_tokens - (decoders if self.mixed else 0)
        for request in prompts:
            tokens = min(left, request.uncached_tokens)
            prefix = 0 if request.started else request.context_tokens
            free_tokens -= prefix + request.uncached_tokens + self._reserved(request)
            alone = not decoders and not batch.prefill
            may = request.started or alone or free_tokens >= 0
            if tokens <= 0 or not may or not room.take(request, tokens):
                return
            batch.add(request, tokens)
            left -= tokens

    def _reserved(self, request: Request) -> int:
        return min(request.left_tokens, self.reserve_cap_tokens)
