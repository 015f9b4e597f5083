"""Which promises can be kept together.

The processor demand test of earliest-deadline-first scheduling, on the cost model's milliseconds: at every deadline,
the work that is due by then must fit into the time until then. Work is prefill by TTFT deadline, decode tokens by
their pace, and the constant of every batch that the tightest pace forces (paper, section 2: demand below supply).
A decode population that could not be held for good is refused as well.

Requests are asked one by one, so that an earlier promise is never weighed against a later one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from slos_sglang.policy.batch_time import CostModel
from slos_sglang.policy.batches import Limits
from slos_sglang.policy.request import INF, Request


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The answer to one request; `reason` and `retry_after_s` say why not, and when it could be."""

    admitted: bool
    reason: str = ""
    retry_after_s: float = 0.0


ADMITTED = Verdict(admitted=True)


def judge(now_s: float, request: Request, promised: Sequence[Request], cost: CostModel, limits: Limits) -> Verdict:
    """Can `request` be promised its targets beside the `promised` ones (decoding and waiting)?"""
    if request.deadline_s <= now_s:
        return Verdict(admitted=False, reason="its budget is spent")
    everyone = [r for r in promised if not r.lost(now_s) and r is not request]
    everyone.append(request)
    margin = limits.admission_headroom
    share = _decode_share(everyone, cost) * margin
    if share > 1.0:
        return Verdict(
            admitted=False,
            reason=f"the decode rate promised would take {share:.0%} of the server",
            retry_after_s=_retry_after_s(everyone),
        )
    for at_s in sorted({r.due_s for r in everyone if r.uncached_tokens}):
        if at_s < request.due_s or at_s == INF:
            continue
        time_ms = (at_s - now_s) * 1e3 / margin
        work_ms = _demand_ms(at_s, now_s, everyone, cost, limits)
        if work_ms > time_ms:
            whose = "its own" if at_s == request.due_s else "an earlier promise's"
            return Verdict(
                admitted=False,
                reason=f"{work_ms:.0f} ms of work is due within {max(time_ms, 0):.0f} ms, {whose} first-token deadline",
                retry_after_s=max((work_ms - time_ms) / 1e3, 0.0),
            )
    return ADMITTED


def _tightest_pace_ms(requests: Sequence[Request]) -> float:
    """How long batches may last while all of these decode."""
    return min([r.pace_s * 1e3 for r in requests if r.pace_s < INF], default=INF)


def _decode_share(requests: Sequence[Request], cost: CostModel) -> float:
    """Share of the server's time that decoding all of them at their pace takes, with the constant of each batch."""
    step_ms = _tightest_pace_ms(requests)
    if step_ms == INF:
        return 0.0
    rate = sum(
        cost.decode_token_ms(r.context_tokens + r.uncached_tokens) / (r.pace_s * 1e3)
        for r in requests
        if r.pace_s < INF
    )
    return rate + cost.const_ms / step_ms


def _demand_ms(at_s: float, now_s: float, requests: Sequence[Request], cost: CostModel, limits: Limits) -> float:
    """Work due by `at_s`, ms."""
    step_ms = min(_tightest_pace_ms(requests), limits.max_batch_ms)
    work_ms = cost.const_ms * max(1.0, (at_s - now_s) * 1e3 / step_ms)
    for r in requests:
        due = r.due_s
        if due > at_s:
            continue
        if r.uncached_tokens:
            work_ms += cost.prefill_ms(r.uncached_tokens, prefix_tokens=r.context_tokens) - cost.const_ms
        if r.pace_s < INF:
            tokens = math.floor((at_s - due) / r.pace_s) + (0 if r.uncached_tokens else 1)
            work_ms += tokens * cost.decode_token_ms(r.context_tokens + r.uncached_tokens)
    return work_ms


def _retry_after_s(requests: Sequence[Request]) -> float:
    """A guess at when decode room appears: the shortest remaining output at its pace."""
    left = [
        min(r.max_tokens - r.output_tokens, 256) * r.pace_s
        for r in requests
        if not r.uncached_tokens and r.pace_s < INF
    ]
    return min(left, default=1.0)
