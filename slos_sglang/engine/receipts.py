"""Receipts: what was promised, what was measured, and whether it was kept (wire form)."""

from __future__ import annotations

import math
from typing import Any

from slos_sglang.policy.request import INF, Request


def _ms(seconds: float) -> float | None:
    return round(seconds * 1e3, 3) if math.isfinite(seconds) else None


def receipt(request: Request, now_s: float) -> dict[str, Any]:
    """The receipt of a finished request.

    `ttft_ms` and `tpot_ms` are measured in the scheduler, TPOT as the mean over the tokens after the first; `slack_ms`
    is what was left of the budget, or else the time by which the last token was early (negative: late).
    Where the output has more than one phase, `by_phase` has each that began: `name`, `tokens` (with those of the text
    that ends it), `tpot_ms` (over all its tokens, the gap before its first one included), `first_ms` (its first
    token's time since the request was received) and the targets; `missing` is the text that was to end a phase and
    never came, if any. A declined request's has the `reason`.
    """
    count = request.output_tokens
    ttft_s = request.first_token_s - request.arrival_s if count else INF
    tpot_s = (request.served_s - request.first_token_s) / (count - 1) if count > 1 else INF
    slack_s = request.deadline_s - now_s if request.deadline_s < INF else request.ruled_s - request.served_s
    return {
        "tier": request.tier,
        "declined": request.declined,
        "attained": request.kept,
        "ttft_ms": _ms(ttft_s),
        "ttft_target_ms": _ms(request.ttft_s),
        "tpot_ms": _ms(tpot_s),
        "tpot_target_ms": _ms(request.tpot_s),
        "phases": ",".join(request.phases),
        **_phases(request),
        "slack_ms": _ms(slack_s),
        "preemptions": request.preemptions,
        **({"reason": request.reason} if request.declined else {}),
    }


def _phases(request: Request) -> dict[str, Any]:
    if not request.to_come and len(request.seen) < 2:
        return {}
    by_phase = [
        {
            "name": seen.phase.name,
            "tokens": seen.tokens,
            "tpot_ms": _ms(seen.tpot_s),
            "tpot_target_ms": seen.phase.tpot_ms,
            "first_ms": _ms(seen.first_s - request.arrival_s),
            "first_target_ms": seen.phase.first_ms,
        }
        for seen in request.seen
    ]
    missing = {"missing": request.seen[-1].phase.until} if request.to_come else {}
    return {"by_phase": by_phase, **missing}
