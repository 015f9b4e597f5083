"""The scheduler with one of its ideas taken away, to see what that idea is worth; and as it is on a server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from slos_sglang.policy.admission import ADMITTED, Verdict
from slos_sglang.policy.batch_time import OnlineCostModel
from slos_sglang.policy.batches import UNBOUNDED, Batch, Memory
from slos_sglang.policy.request import Request
from slos_sglang.policy.scheduler import Scheduler
from slos_sglang.sim.replica import Policy


@dataclass(kw_only=True)
class AdmitAll(Scheduler):
    """Without admission: everybody is promised their targets."""

    def admit(
        self,
        now_s: float,
        undecided: Sequence[Request],
        decoding: Sequence[Request],
        waiting: Sequence[Request],
        memory: Memory = UNBOUNDED,
    ) -> list[tuple[Request, Verdict]]:
        for request in undecided:
            request.admit()
        return [(request, ADMITTED) for request in undecided]


@dataclass(kw_only=True)
class FixedBatch(Scheduler):
    """Without a dynamic batch size: prompts fill batches up to `budget_tokens` only, however much time there is."""

    budget_tokens: int = 512

    def next_batch(
        self, now_s: float, decoding: Sequence[Request], waiting: Sequence[Request], memory: Memory = UNBOUNDED
    ) -> Batch:
        planned = super().next_batch(now_s, decoding, waiting, memory)
        batch = Batch(preempt=planned.preempt)
        for request in planned.decode:
            batch.add(request, 1)
        for request, tokens in planned.prefill:
            room = self.budget_tokens - batch.size.tokens
            if room <= 0:
                break
            batch.add(request, min(tokens, room))
        batch.predicted_ms = self.cost.batch_ms(batch.size)
        return batch


@dataclass(kw_only=True)
class LearnsCost(Scheduler):
    """As on a server: the cost is where it starts from, each step corrects it, and a margin follows how steps vary."""

    def __post_init__(self) -> None:
        if len(self.cost.pieces) != 1:
            raise ValueError(f"the cost model must have one piece to be learned, not {len(self.cost.pieces)}")
        (piece,) = self.cost.pieces
        least = {name: max(getattr(piece, name), 1e-6) for name in ("requests_ms", "context_ms")}
        self.cost = OnlineCostModel(prior=replace(piece, **least))


ABLATIONS: dict[str, Callable[..., Policy]] = {
    "slos_admits_all": AdmitAll,
    "slos_fixed_batch": FixedBatch,
    "slos_learns_cost": LearnsCost,
}
