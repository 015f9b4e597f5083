"""What the policy knows of a request: its targets, its progress, and when its next token is due.

The engine and the simulator keep one `Request` a call and tell it what happened; the policy reads it. Times are
seconds on one monotonic clock, `inf` means unconstrained.

Two schedules run side by side. The *pace* starts at the first token and is what batches are planned by: when every
token is on pace, the mean TPOT holds, as serving benchmarks judge it. The slack of an early first token lends it some
credit, repaid by a faster pace within the tokens that it surely has. The *rule* starts at the later of TTFT target and
first token: by it a receipt says "attained" (token-deadline rule). The pace is never later.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from slos_sglang.policy.batch_time import CostModel
from slos_sglang.slo import WireSLO

INF = math.inf
# Token-deadline rule: 5 % tolerance, checked every 10 tokens and at the end.
TOLERANCE = 1.05
CHECK_EVERY_TOKENS = 10

Tier = Literal["standard", "best_effort"]


def _seconds(ms: float | None) -> float:
    return INF if ms is None else ms / 1e3


@dataclass(slots=True, eq=False, kw_only=True)
class Request:
    """One generation call.

    seq              arrival order, the last key of every sort
    max_tokens       cap on the output; a cap, not an estimate of its length
    left_tokens      output tokens still expected: an estimate, exact only where a run says that lengths are known
    sure_tokens      output tokens it has at least in most cases, from its first; as `left_tokens`
    think_tokens     how many of `left_tokens` are thinking; no bound where nobody knows
    ttft_s, tpot_s   targets, seconds; `tpot_s` is the current phase's
    deadline_s       when the whole call must have ended (its budget), absolute
    uncached_tokens  prompt tokens still to be computed
    context_tokens   KV tokens that it holds, or will find cached
    started          it holds KV of its own: some of its prompt was computed
    served_s         when it last got a token or a chunk
    kept             False once a target was missed
    """

    rid: str
    seq: int
    arrival_s: float
    slo: WireSLO | None = None
    max_tokens: int = 1 << 30
    left_tokens: int = 1 << 30
    sure_tokens: int = 1 << 30
    think_tokens: int = 1 << 30
    # Whatever the engine or simulator needs to find its own object again; the policy never looks at it.
    handle: Any = None

    ttft_s: float = INF
    tpot_s: float = INF
    answer_tpot_s: float = INF
    deadline_s: float = INF

    tier: Tier = "best_effort"
    targets_set: bool = False
    judged: bool = False
    announced: bool = False
    declined: bool = False
    reason: str = ""
    thinking: bool = False
    started: bool = False
    uncached_tokens: int = 0
    context_tokens: int = 0
    output_tokens: int = 0
    first_token_s: float = INF
    served_s: float = 0.0
    kept: bool = True
    preemptions: int = 0
    phases: list[str] = field(default_factory=list)

    # The pace: TPOT that batches are planned with, and when the token last produced was due by it.
    pace_s: float = INF
    answer_pace_s: float = INF
    paced_s: float = INF
    credit_s: float = 0.0
    # While credit is repaid: tokens until it is, and the pace from then on.
    repay_tokens: int = 0
    full_pace_s: float = INF
    first_due_s: float = INF
    # Until when the rule lets an early first token's slack count, and how far the pace is ahead of the rule.
    slack_until_s: float = -INF
    reserve_s: float = 0.0
    # When the token last produced was due by the token rule.
    ruled_s: float = INF
    # Output tokens in flight (overlap schedule), and when the next token is due by the pace.
    pending: int = 0
    due_s: float = INF

    # True where it asks for some target.
    constrained: bool = field(init=False)

    def __post_init__(self) -> None:
        self.constrained = self.slo is not None and self.slo.constrained

    @property
    def standard(self) -> bool:
        """True where the targets are promised."""
        return self.tier == "standard"

    def undecided(self, now_s: float) -> bool:
        """True while admission is to be asked: it is new, or was declined and has lost nothing yet."""
        return self.constrained and not self.standard and (not self.judged or not self.lost(now_s))

    def lost(self, now_s: float) -> bool:
        """True once a target was missed, or can only be missed."""
        late = not self.output_tokens and now_s > self.arrival_s + self.ttft_s * TOLERANCE
        return late or not self.kept or now_s > self.deadline_s

    def hopeful(self, now_s: float) -> bool:
        """True where it was promised nothing, and could still be in time."""
        return self.constrained and not self.standard and not self.lost(now_s)

    def set_targets(
        self, cost: CostModel, *, min_ttft_ms: float | None = None, delivery_ms: float = 0.0, credit_share: float = 0.0
    ) -> None:
        """Turn the SLO into seconds, once `uncached_tokens` and `context_tokens` are known.

        A TTFT slowdown is relative to the zero-load prefill of the uncached tokens. A call with a budget and no TPOT is
        paced as if the whole of it, prefill and up to `max_tokens` decodes, were slowed down alike to fill the budget.
        The first token is planned `delivery_ms` early: what it takes from the scheduler to the client. `credit_share`
        of the expected output's time is what later tokens may be lent of an early first token's slack.
        """
        slo = self.slo
        if slo is None or not slo.constrained:
            return
        self.targets_set = True
        prefill_ms = cost.prefill_ms(max(self.uncached_tokens, 1), prefix_tokens=self.context_tokens)
        ttft_ms = slo.ttft_ms if slo.ttft_slowdown is None else slo.ttft_slowdown * prefill_ms
        if ttft_ms is not None and min_ttft_ms is not None:
            ttft_ms = max(ttft_ms, min_ttft_ms)
        self.ttft_s = _seconds(ttft_ms)
        self.answer_tpot_s = _seconds(slo.tpot_ms)
        self.thinking = slo.think_end is not None
        self.tpot_s = _seconds(slo.think_tpot_ms) if self.thinking else self.answer_tpot_s
        self.phases = ["think" if self.thinking else "answer"]
        self.pace_s, self.answer_pace_s = self.tpot_s, self.answer_tpot_s
        self.first_due_s = self.arrival_s + self.ttft_s
        if slo.budget_ms is not None:
            self.deadline_s = self.arrival_s + slo.budget_ms / 1e3
            decode_ms = cost.const_ms + cost.decode_token_ms(self.uncached_tokens + self.context_tokens)
            slowdown = max(slo.budget_ms / (prefill_ms + self.max_tokens * decode_ms), 1.0)
            self.pace_s = min(self.pace_s, slowdown * decode_ms / 1e3)
            self.answer_pace_s = min(self.answer_pace_s, slowdown * decode_ms / 1e3)
            self.first_due_s = min(self.first_due_s, self.arrival_s + slowdown * prefill_ms / 1e3)
        self.first_due_s -= delivery_ms / 1e3
        if self.ttft_s < INF:
            self.slack_until_s = self.arrival_s + self.ttft_s - delivery_ms / 1e3
        if self.tpot_s == INF:
            self.reserve_s = INF  # nothing rules the tokens one by one
        else:
            self.credit_s = credit_share * min(self.sure_tokens, self.max_tokens) * self.tpot_s
        self.due_s = min(self.first_due_s, self.deadline_s)

    @property
    def ttft_due_s(self) -> float:
        """When the first token is due."""
        return min(self.arrival_s + self.ttft_s, self.deadline_s)

    def admit(self) -> None:
        """Promise the targets."""
        self.judged, self.tier, self.declined, self.reason = True, "standard", False, ""

    def decline(self, reason: str = "") -> None:
        """Serve it with what is left over."""
        self.judged, self.tier, self.declined, self.reason = True, "best_effort", True, reason

    def token(self, now_s: float) -> None:
        """An output token was produced by `now_s`: check what was due, and set when the next one is."""
        self.output_tokens += 1
        self.left_tokens = max(self.left_tokens - 1, 1)
        self.think_tokens -= 1
        self.served_s = now_s
        if self.output_tokens == 1:
            self.first_token_s = now_s
            early_s = max(self.slack_until_s - now_s, 0.0)
            lent_s = min(early_s, self.credit_s)
            self.paced_s = now_s + lent_s
            self.full_pace_s, self.repay_tokens = self.pace_s, max(self.sure_tokens - 1, 1)
            self.pace_s -= lent_s / self.repay_tokens
            self.reserve_s += early_s - lent_s
            self.ruled_s = now_s if self.ttft_s == INF else max(now_s, self.arrival_s + self.ttft_s)
            self.kept &= now_s <= self.arrival_s + self.ttft_s * TOLERANCE
        else:
            # Without a pace, and once the promise is lost, there is nothing to catch up with.
            self.paced_s = now_s if self.pace_s == INF or not self.kept else self.paced_s + self.pace_s
            self.ruled_s = max(self.ruled_s, now_s) if self.tpot_s == INF else self.ruled_s + self.tpot_s
            self.repay_tokens -= 1
            if self.repay_tokens == 0 and not self.thinking:
                self.pace_s = self.full_pace_s
            if self.output_tokens % CHECK_EVERY_TOKENS == 0:
                self._check(now_s)
        self.due_s = min(self.paced_s + self.pace_s, self.deadline_s)

    def finish(self, now_s: float) -> None:
        """The last token was produced by `now_s`: the end is checked too, and the budget."""
        if self.output_tokens > 1:
            self._check(now_s)
        self.kept &= now_s <= self.deadline_s

    def end_thinking(self) -> None:
        """The end-of-thinking text has appeared: from the next token on the answer's TPOT paces."""
        if self.thinking:
            self.thinking = False
            self.tpot_s, self.pace_s, self.repay_tokens = self.answer_tpot_s, self.answer_pace_s, 0
            self.due_s = min(self.paced_s + self.pace_s, self.deadline_s)
            self.phases.append("answer")

    def _check(self, now_s: float) -> None:
        start_s = self.first_token_s if self.ttft_s == INF else max(self.first_token_s, self.arrival_s + self.ttft_s)
        self.kept &= now_s <= start_s + (self.ruled_s - start_s) * TOLERANCE
