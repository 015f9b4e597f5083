"""The decision of one step: promise, then form the batch.

This is the whole scheduler; engine and simulator hand it what waits and what runs, and apply what it returns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from slos_sglang.policy.admission import Verdict, judge
from slos_sglang.policy.batch_time import CostModel
from slos_sglang.policy.batches import Batch, Limits, aged, form_batch
from slos_sglang.policy.request import Request


@dataclass(kw_only=True)
class Scheduler:
    """Admission and batch formation over one cost model.

    `asked_per_step` bounds how many declined requests are asked again in one step.
    """

    cost: CostModel
    limits: Limits = field(default_factory=Limits)
    asked_per_step: int = 16
    _last_turn_s: float = -math.inf

    def admit(
        self, now_s: float, undecided: Sequence[Request], decoding: Sequence[Request], waiting: Sequence[Request]
    ) -> list[tuple[Request, Verdict]]:
        """Judge the undecided requests, earliest deadline first; sets their tier.

        A request is undecided when it is new, or was declined and could still make its first token. Returns each with
        its verdict.
        """
        promised = [r for r in (*decoding, *waiting) if r.standard]
        verdicts = []
        for request in sorted(undecided, key=lambda r: (r.due_s, r.seq))[: self.asked_per_step]:
            verdict = judge(now_s, request, promised, self.cost, self.limits)
            if verdict.admitted:
                request.admit()
                promised.append(request)
            else:
                request.decline()
            verdicts.append((request, verdict))
        return verdicts

    def next_batch(self, now_s: float, decoding: Sequence[Request], waiting: Sequence[Request]) -> Batch:
        """The batch to run at `now_s`; see `form_batch`.

        Where best effort has aged, one batch in so many is its turn, so that the rest keeps its share of the time.
        """
        limits = self.limits
        turn_due_s = self._last_turn_s + limits.max_batch_ms / limits.best_effort_share / 1e3
        turn = now_s >= turn_due_s and any(aged(r, now_s, limits) for r in (*decoding, *waiting))
        if turn:
            self._last_turn_s = now_s
        return form_batch(now_s, decoding, waiting, self.cost, limits, turn=turn)
