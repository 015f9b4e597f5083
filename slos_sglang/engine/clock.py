"""One clock for all ranks.

Every tensor-parallel rank runs the scheduler, and a decision that reads a local clock would differ between them and
deadlock the collectives. So rank 0 reads the clock once an iteration, and the reading travels to the other ranks in
front of the requests that are broadcast anyway.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, fields
from typing import Any

from sglang.srt.managers.scheduler_components.request_receiver import SchedulerRequestReceiver


@dataclass(frozen=True)
class Tick:
    """A reading of rank 0's monotonic clock (`time.perf_counter`, as in SGLang's own request times), seconds."""

    now_s: float


@dataclass(kw_only=True, slots=True, frozen=True)
class TickingReceiver(SchedulerRequestReceiver):
    """SGLang's receiver, which also keeps `now_s[0]`, the time that this iteration's decisions take as now."""

    now_s: list[float]

    @classmethod
    def over(cls, receiver: SchedulerRequestReceiver) -> TickingReceiver:
        """The same receiver, ticking."""
        inherited = {field.name: getattr(receiver, field.name) for field in fields(receiver)}
        return cls(**inherited, now_s=[time.perf_counter()])

    def _broadcast_reqs_across_ranks(
        self, recv_reqs: list[Any] | None, local_reqs: list[Any] | None = None
    ) -> list[Any]:
        if recv_reqs is not None:
            recv_reqs = [Tick(time.perf_counter()), *recv_reqs]
        # Named, not `super()`: a slotted dataclass is a new class, which the zero-argument form does not find.
        received = SchedulerRequestReceiver._broadcast_reqs_across_ranks(self, recv_reqs, local_reqs)
        tick = received.pop(0)
        assert isinstance(tick, Tick), f"expected the time first, not {tick!r}"
        self.now_s[0] = tick.now_s
        return received
