"""Did a stage keep its targets? Two rules, one answer for simulator and live server (INTERFACES, section 6).

The *token rule* asks for a token stream that never runs dry: the first token is due at arrival + TTFT,
output token n at t0 + (n - 1) TPOT with t0 the later of TTFT deadline and first token; durations get 5 %
tolerance; it is checked at every tenth token and at the last. The *mean rule* is the laxer one of serving
benchmarks: TTFT, and the mean TPOT over the stage, without tolerance.

What must stay true: both rules read nothing but targets and token times; a target that is None constrains
nothing; a stage that brought no token can't have kept a TTFT; both rules are indifferent to where the clock
starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from slos_sglang.policy.request import CHECK_EVERY_TOKENS, TOLERANCE

# Sums of binary fractions: a token exactly on its due time is on time. One microsecond, far below any target.
_EPSILON_S = 1e-6


@dataclass(frozen=True, kw_only=True)
class Targets:
    """Targets of one stage in milliseconds; None leaves a target open.

    `think_tpot_ms` paces the first `think_tokens` of a stage, `tpot_ms` the rest; `e2e_ms` bounds the whole.
    """

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    think_tpot_ms: float | None = None
    e2e_ms: float | None = None

    def __post_init__(self) -> None:
        for name in ("ttft_ms", "tpot_ms", "think_tpot_ms", "e2e_ms"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"targets.{name} must be greater than 0, not {value!r}")


def kept_token_rule(targets: Targets, arrival_s: float, token_s: Sequence[float], think_tokens: int = 0) -> bool:
    """True where every checked token came by its due time.

    `arrival_s` and `token_s` (the time of each output token, ascending) are seconds on one clock. Source: the
    measure of SLOs-Serve, extended by a thinking phase and a deadline for the whole.
    """
    if not token_s:
        return targets.ttft_ms is None and targets.e2e_ms is None
    first_s, last_s = token_s[0], token_s[-1]
    if not _within(first_s - arrival_s, targets.ttft_ms, TOLERANCE):
        return False
    if not _within(last_s - arrival_s, targets.e2e_ms, TOLERANCE):
        return False
    t0_s = first_s if targets.ttft_ms is None else max(first_s, arrival_s + targets.ttft_ms / 1e3)
    thinking = min(think_tokens, len(token_s))
    # The pace of the answer counts from the end of thinking where thinking itself has no pace.
    answer_t0_s, answer_after = t0_s, 1
    if thinking > 1:
        if targets.think_tpot_ms is None:
            answer_t0_s = max(t0_s, token_s[thinking - 1])
        else:
            answer_t0_s = t0_s + (thinking - 1) * targets.think_tpot_ms / 1e3 * TOLERANCE
        answer_after = thinking
    for n in checked_tokens(len(token_s)):
        if n <= thinking:
            start_s, steps, tpot_ms = t0_s, n - 1, targets.think_tpot_ms
        else:
            start_s, steps, tpot_ms = answer_t0_s, n - answer_after, targets.tpot_ms
        if tpot_ms is not None and token_s[n - 1] > start_s + steps * tpot_ms / 1e3 * TOLERANCE + _EPSILON_S:
            return False
    return True


def kept_mean_rule(targets: Targets, arrival_s: float, token_s: Sequence[float], think_tokens: int = 0) -> bool:
    """True where TTFT and the mean TPOT of each phase are within their targets, without tolerance.

    Same arguments as `kept_token_rule`. A phase without a gap between two tokens has no TPOT and keeps any.
    """
    if not token_s:
        return targets.ttft_ms is None and targets.e2e_ms is None
    thinking = min(think_tokens, len(token_s))
    return (
        _within(token_s[0] - arrival_s, targets.ttft_ms)
        and _within(token_s[-1] - arrival_s, targets.e2e_ms)
        and _within(_mean_gap_s(token_s[:thinking]), targets.think_tpot_ms)
        and _within(_mean_gap_s(token_s[max(thinking - 1, 0) :]), targets.tpot_ms)
    )


def checked_tokens(output_tokens: int) -> list[int]:
    """Which output tokens (from 1) the token rule checks: every tenth and the last."""
    checks = list(range(CHECK_EVERY_TOKENS, output_tokens + 1, CHECK_EVERY_TOKENS))
    if not checks or checks[-1] != output_tokens:
        checks.append(output_tokens)
    return checks


def mean_tpot_ms(token_s: Sequence[float]) -> float | None:
    """Mean time per output token after the first, ms; None for fewer than two tokens."""
    gap_s = _mean_gap_s(token_s)
    return None if gap_s is None else gap_s * 1e3


def _mean_gap_s(token_s: Sequence[float]) -> float | None:
    return None if len(token_s) < 2 else (token_s[-1] - token_s[0]) / (len(token_s) - 1)


def _within(took_s: float | None, target_ms: float | None, tolerance: float = 1.0) -> bool:
    return took_s is None or target_ms is None or took_s <= target_ms / 1e3 * tolerance + _EPSILON_S
