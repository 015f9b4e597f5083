"""What the baselines share: free blocks while a batch is being filled, and decoding with preemption by recompute."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from slos_sglang.policy.batch_time import CostModel
from slos_sglang.policy.batches import Batch, Limits, Memory
from slos_sglang.policy.request import Request

if TYPE_CHECKING:
    from slos_sglang.policy.admission import Verdict


@dataclass(kw_only=True)
class Baseline:
    """A scheduler that takes everybody and promises nothing. `cost` is what it believes of the server; `drafts` tokens
    are drafted for every decoder in every step, as engines with a draft model do.
    """

    cost: CostModel
    limits: Limits = field(default_factory=Limits)
    drafts: int = 0

    def __post_init__(self) -> None:
        if self.drafts < 0:
            raise ValueError(f"drafts must be at least 0, not {self.drafts!r}")
        if self.drafts and not self.cost.acceptance:
            raise ValueError(f"drafts must be 0 on a server without a draft model, not {self.drafts!r}")

    def admit(
        self,
        now_s: float,
        undecided: Sequence[Request],
        decoding: Sequence[Request],
        waiting: Sequence[Request],
        memory: Memory,
    ) -> list[tuple[Request, Verdict]]:
        """Nobody is judged."""
        return []

    def ended(self, request: Request, now_s: float) -> None:
        """Nothing is kept."""


class Room:
    """Free KV blocks while a batch is being filled.

    watermark  share of all blocks that new requests leave free
    started    prompts in progress: what is left of them is set aside from new requests, or they could block each other
    """

    def __init__(self, memory: Memory, *, watermark: float = 0.0, started: Iterable[Request] = ()) -> None:
        self.block_tokens = memory.block_tokens
        self.blocks = memory.free_tokens // memory.block_tokens
        self.aside = int(watermark * (memory.capacity_tokens // memory.block_tokens))
        self.aside += sum(self.need(r, r.uncached_tokens) for r in started)

    def need(self, request: Request, tokens: int) -> int:
        """Blocks that `tokens` more of the request take; one that starts takes those of its cached prefix too."""
        held = -(-request.context_tokens // self.block_tokens) if request.started else 0
        return -(-(request.context_tokens + tokens) // self.block_tokens) - held

    def take(self, request: Request, tokens: int) -> bool:
        """Take what `tokens` more of the request need, if that is there."""
        need = self.need(request, tokens)
        if need > self.blocks:
            return False
        self.blocks -= need
        if request.uncached_tokens:
            self.aside += (0 if request.started else self.need(request, request.uncached_tokens)) - need
        return True

    def may_start(self, request: Request) -> bool:
        """Is there room for a new request's whole prompt?"""
        return self.need(request, request.uncached_tokens) <= self.blocks - self.aside

    def give_back(self, request: Request) -> None:
        """The request is preempted."""
        self.blocks += -(-request.context_tokens // self.block_tokens)
        if request.uncached_tokens:
            self.aside -= self.need(request, request.uncached_tokens)


def _arrival(request: Request) -> tuple[int, int]:
    return (0, request.seq)


def decode_all(
    batch: Batch,
    room: Room,
    decoding: Sequence[Request],
    started: Sequence[Request] = (),
    keep: Callable[[Request], tuple[int, int]] = _arrival,
) -> None:
    """The next token of every decoder; where memory is short the last in order of `keep` loses its KV.

    started  prompts in progress: they hold KV and may be the ones to lose it
    keep     by default in order of arrival (vLLM)

    Where memory is short nothing is drafted.
    """
    block, row_tokens = room.block_tokens, 1 + batch.drafts
    contexts = [r.context_tokens for r in decoding]
    if batch.drafts:
        need = sum(room.need(r, row_tokens) for r in decoding)
    else:
        need = [context % block for context in contexts].count(0)
    if need <= room.blocks:
        room.blocks -= need
        batch.decode.extend(decoding)
        batch.size.tokens += len(decoding) * row_tokens
        batch.size.requests += len(decoding)
        batch.size.context_tokens += sum(contexts) + len(decoding) * row_tokens
        batch.size.draft_steps = batch.drafts if decoding else 0
        return
    batch.drafts = 0
    holders = sorted((*decoding, *started), key=keep)
    while holders:
        request = holders.pop(0)
        while request.uncached_tokens == 0 and not room.take(request, 1):
            latest = holders.pop() if holders else request
            batch.preempt.append(latest)
            room.give_back(latest)
            if latest is request:
                return
        if request.uncached_tokens == 0:
            batch.add(request, 1)
