"""Which promises can be made: those that the plan, run forward, keeps together with all that were made before.

Earliest-deadline-first forward simulation (paper, section 2; its test of demand below supply, on the very batches that
will run). Requests are asked one by one, the earliest deadline first: an earlier promise is never weighed against a
later one, and one that is already bound to be missed does not stand in anybody's way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from slos_sglang.policy import plan
from slos_sglang.policy.batch_time import CostModel
from slos_sglang.policy.batches import Limits, Memory
from slos_sglang.policy.request import Request


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The answer to one request; `reason` and `retry_after_s` say why not, and when it could be."""

    admitted: bool
    reason: str = ""
    retry_after_s: float = 0.0


ADMITTED = Verdict(admitted=True)


class Outlook:
    """The future of the `promised` requests, to which others may be added as long as it keeps everybody's targets.

    now_s  when the next batch starts; all `requests` that may be added are named at once
    """

    def __init__(
        self,
        now_s: float,
        promised: Sequence[Request],
        asking: Sequence[Request],
        cost: CostModel,
        limits: Limits,
        memory: Memory,
    ) -> None:
        self.now_s = now_s
        self._cost = cost
        self._requests = sorted((*promised, *asking), key=lambda r: r.seq)
        self._row = {id(r): row for row, r in enumerate(self._requests)}
        self._rows = plan.rows_of(self._requests)
        self._world = plan.world_of(cost, limits, memory, margin=cost.margin)
        self._left = self._rows.left.copy()
        for request in asking:
            self._rows.left[self._row[id(request)]] = 0
        self._excused = np.zeros(len(self._requests), dtype=np.bool_)
        self._baseline_known = False

    def _foresee(self, excused: np.ndarray) -> tuple[int, int, float, np.ndarray]:
        rows = plan.copy_of(self._rows)
        late = np.zeros(len(self._requests), dtype=np.bool_)
        code, row, when_s = plan.foresee(self.now_s, rows, self._world, excused, late)
        return code, row, when_s, late

    def _excuse_those_that_are_late_anyway(self) -> None:
        """Whoever would be late without any newcomer is not the newcomer's fault."""
        self._baseline_known = True
        *_, self._excused = self._foresee(np.ones_like(self._excused))

    def ask(self, request: Request) -> Verdict:
        """Add `request` if everybody's targets are kept with it."""
        if request.deadline_s <= self.now_s:
            return Verdict(admitted=False, reason="its budget is spent")
        if request.uncached_tokens:
            alone_ms = self._cost.prefill_ms(request.uncached_tokens, prefix_tokens=request.context_tokens)
            time_ms = (request.due_s - self.now_s) * 1e3
            if alone_ms > time_ms:
                time = f"{max(time_ms, 0):.0f} ms"
                return Verdict(
                    admitted=False, reason=f"its prefill takes {alone_ms:.0f} ms, its first token is due within {time}"
                )
        mine = self._row[id(request)]
        self._rows.left[mine] = self._left[mine]
        code, row, when_s, _ = self._foresee(self._excused)
        if code == plan.LATE and row != mine and not self._baseline_known:
            self._rows.left[mine] = 0
            self._excuse_those_that_are_late_anyway()
            self._rows.left[mine] = self._left[mine]
            if self._excused.any():
                code, row, when_s, _ = self._foresee(self._excused)
        if code == plan.KEPT:
            return ADMITTED
        self._rows.left[mine] = 0
        return Verdict(admitted=False, reason=self._reason(code, row, mine, when_s), retry_after_s=when_s - self.now_s)

    def _reason(self, code: int, row: int, mine: int, when_s: float) -> str:
        at = f"in {(when_s - self.now_s) * 1e3:.0f} ms"
        if code == plan.LATE:
            whose = "its own" if row == mine else f"that of {self._requests[row].rid}, promised before,"
            return f"a token would be late {at}: {whose} is due by then"
        if code == plan.NO_MEMORY:
            return f"the KV cache would be full {at}"
        return f"no end of the decode load is in sight {at}"
