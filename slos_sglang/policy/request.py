"""What the policy knows of a request: its targets, its progress, and when its next token is due.

The engine and the simulator keep one `Request` a call and tell it what happened; the policy reads it. Times are
seconds on one monotonic clock, `inf` means unconstrained.

Two schedules run side by side. The *pace* starts at the first token and is what batches are planned by: when every
token is on pace, the mean TPOT holds, as serving benchmarks judge it. The slack of an early first token lends it some
credit, repaid by a faster pace within the tokens that it surely has. The *rule* starts at the later of TTFT target and
first token: by it a receipt says "attained" (token-deadline rule). The pace is never later.

What has to be done by a time (a budget, the first token after thinking) gives a pace too: what is left of the time over
the tokens there may still be, looked at anew as tokens come. It plans, it is no target: the time itself is.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from slos_sglang.policy.batch_time import CostModel
from slos_sglang.slo import Phase, WireSLO

INF = math.inf
# Token-deadline rule: 5 % tolerance, checked every 10 tokens and at the end.
TOLERANCE = 1.05
CHECK_EVERY_TOKENS = 10
# Of a call's slack in a budget, the prompt may use this share: a short one in a batch with others needs more of it than
# the tokens that follow, which have what it leaves.
PROMPT_SLACK = 0.25
# No pace that is derived from a budget is faster than that of a few decoders together, in times of one alone, and no
# prompt's is faster: whoever can't keep up would keep all prompts waiting, or be declined for a few ms.
FASTEST_PACE = 1.4

Tier = Literal["standard", "best_effort"]


def _seconds(ms: float | None) -> float:
    return INF if ms is None else ms / 1e3


def _rest_ms(slo: WireSLO, cost: CostModel, decode_ms: float) -> float:
    """What the calls that are said to follow take on an idle server, ms, a decode step of theirs as one of this."""
    if not slo.rest_calls:
        return 0.0
    prompt_ms = cost.prefill_ms(max(round(slo.rest_prompt_tokens or 0.0), 1)) - cost.const_ms
    return slo.rest_calls * cost.const_ms + prompt_ms + (slo.rest_output_tokens or 0.0) * decode_ms


def _first_token_ms(prefill_ms: float, here_ms: float, slowdown: float) -> float:
    """When the first token is due if prompt and tokens, `here_ms` on an idle server, may take `slowdown` times that."""
    more = slowdown - 1.0
    return prefill_ms + more * (max(prefill_ms, PROMPT_SLACK * here_ms) if more > 0 else prefill_ms)


@dataclass(slots=True, eq=False, kw_only=True)
class PhaseSeen:
    """What happened in one phase of the output; times on the scheduler's clock, s.

    tokens_before  output tokens before it        began_s  when the last of them was there; inf: none was
    first_s        its first token                ended_s  its last one so far, the last of its end text included
    """

    phase: Phase
    tokens_before: int = 0
    began_s: float = INF
    tokens: int = 0
    first_s: float = INF
    ended_s: float = INF

    @property
    def awaited(self) -> bool:
        """Its first token is to be there by a time, and is not there yet."""
        return self.phase.first_ms is not None and self.first_s == INF

    @property
    def tpot_s(self) -> float:
        """Mean time per token, the gap before its first one included where there is one; inf: no gap."""
        gaps = self.tokens - (self.began_s == INF)
        return (self.ended_s - (self.first_s if self.began_s == INF else self.began_s)) / gaps if gaps > 0 else INF


_C_TYPES: dict[str, Any] = {"int": ctypes.c_int64, "float": ctypes.c_double, "bool": ctypes.c_bool}


class Numbers(ctypes.Structure):
    """The numbers of a request, side by side in memory, so that those of many become an array as they lie.

    seq              arrival order, the last key of every sort
    max_tokens       cap on the output; a cap, not an estimate of its length
    left_tokens      output tokens still expected: an estimate, exact only where a run says that lengths are known
    sure_tokens      output tokens it has at least in most cases, from its first; as `left_tokens`
    most_tokens      output tokens it has at most in nearly all cases, from its first: deadlines are planned by them
    think_tokens     how many of `left_tokens` are thinking; no bound where nobody knows
    standard         its targets are promised
    constrained      it asks for some target
    thinking         a later phase is to come
    ttft_s, tpot_s   targets, seconds; `tpot_s` is the current phase's
    deadline_s       when the whole call must have ended (its budget), absolute
    uncached_tokens  prompt tokens still to be computed
    context_tokens   KV tokens that it holds, or will find cached
    started          it holds KV of its own: some of its prompt was computed
    served_s         when it last got a token or a chunk
    kept             False once a target was missed
    """

    seq: int
    arrival_s: float
    max_tokens: int
    left_tokens: int
    sure_tokens: int
    most_tokens: int
    think_tokens: int

    constrained: bool
    standard: bool
    kept: bool
    thinking: bool
    started: bool

    ttft_s: float
    tpot_s: float
    answer_tpot_s: float
    deadline_s: float
    # Until when the first token of a later phase must be there.
    phase_due_s: float

    uncached_tokens: int
    context_tokens: int
    output_tokens: int
    first_token_s: float
    served_s: float

    # The pace: TPOT that batches are planned with, and when the token last produced was due by it.
    pace_s: float
    answer_pace_s: float
    paced_s: float
    credit_s: float
    # While credit is repaid: tokens until it is, by how much faster each of them comes, and the pace from then on.
    repay_tokens: int
    repay_s: float
    full_pace_s: float
    # When the last token is to be there by plan (no later than the deadline), the time that a token takes at least, and
    # the pace that is needed for what has a time.
    aim_s: float
    least_s: float
    needed_s: float
    first_due_s: float
    # Until when the rule lets an early first token's slack count, and how far the pace is ahead of the rule.
    slack_until_s: float
    reserve_s: float
    # When the token last produced was due by the token rule.
    ruled_s: float
    # Output tokens in flight (overlap schedule), and when the next token is due by the pace.
    pending: int
    due_s: float

    _fields_ = [(name, _C_TYPES[kind]) for name, kind in __annotations__.items()]


_UNKNOWN_TOKENS = 1 << 30
_AT_FIRST: dict[str, Any] = {
    **dict.fromkeys(("max_tokens", "left_tokens", "sure_tokens", "most_tokens", "think_tokens"), _UNKNOWN_TOKENS),
    **dict.fromkeys(("ttft_s", "tpot_s", "answer_tpot_s", "deadline_s", "phase_due_s", "first_token_s"), INF),
    **dict.fromkeys(("pace_s", "answer_pace_s", "paced_s", "full_pace_s", "aim_s", "needed_s"), INF),
    **dict.fromkeys(("first_due_s", "ruled_s", "due_s"), INF),
    "slack_until_s": -INF,
    "kept": True,
}
_TABLE = np.dtype(Numbers)

Table = NDArray[Any]
"""Numbers of many requests: one entry a request, a field a number."""


def table_of(requests: Iterable[Request]) -> Table:
    """The numbers of `requests` as they are now."""
    return np.frombuffer(b"".join(requests), dtype=_TABLE)


def lost(table: Table, now_s: float) -> NDArray[np.bool_]:
    """`Request.lost` of many."""
    late = (table["output_tokens"] == 0) & (now_s > table["arrival_s"] + table["ttft_s"] * TOLERANCE)
    phase_limit_s = table["arrival_s"] + (table["phase_due_s"] - table["arrival_s"]) * TOLERANCE
    found: NDArray[np.bool_] = late | ~table["kept"] | (now_s > np.minimum(table["deadline_s"], phase_limit_s))
    return found


class Request(Numbers):
    """One generation call: its `Numbers`, and what is not one.

    handle           whatever the engine or simulator needs to find its own object again; the policy never looks at it
    favor            by what share its turn is worth more than a first call (see `programs`), after the
    invested_tokens  that were computed for its program before
    asks             how much KV memory it asks for, and for how many tokens; 0: nobody knows (see `demand`)
    """

    def __init__(
        self, *, rid: str, seq: int, arrival_s: float, slo: WireSLO | None = None, handle: Any = None, **numbers: int
    ) -> None:
        constrained = slo is not None and slo.constrained
        super().__init__(**{**_AT_FIRST, "seq": seq, "arrival_s": arrival_s, "constrained": constrained, **numbers})
        self.rid, self.slo, self.handle = rid, slo, handle
        self.targets_set = self.judged = self.announced = self.declined = False
        self.reason = ""
        self.preemptions = self.invested_tokens = 0
        self.favor = self.asks = 0.0
        self.seen: list[PhaseSeen] = []
        self.to_come: list[Phase] = []
        # What its prompt takes alone, the calls that are said to follow, and the gaps before them.
        self.prefill_ms = self.rest_ms = self.gaps_ms = self.delivery_s = 0.0

    @property
    def may_give_way(self) -> bool:
        """True where its promise does not bind yet: it is a program's first call, nothing of it was computed, and its
        client takes what is left over.
        """
        begun = self.started or self.output_tokens or self.favor
        return self.slo is not None and self.slo.on_decline == "best_effort" and not begun

    @property
    def worth(self) -> float:
        """What promising it is worth where not all can be."""
        return (self.slo.value if self.slo else 1.0) * (1.0 + self.favor)

    @property
    def program_ms(self) -> float:
        """What is left of it and all that is said to follow take at least, even alone; 0 where nothing is."""
        if not self.rest_ms:
            return 0.0
        tokens = max(min(self.sure_tokens, self.max_tokens) - self.output_tokens, 0)
        return self._prefill_left_ms + tokens * self.least_s * 1e3 + self.rest_ms + self.gaps_ms

    @property
    def _prefill_left_ms(self) -> float:
        return 0.0 if self.output_tokens else self.prefill_ms

    @property
    def tier(self) -> Tier:
        """The service tier."""
        return "standard" if self.standard else "best_effort"

    def undecided(self, now_s: float) -> bool:
        """True while admission is to be asked: it is new, or was declined and has lost nothing yet."""
        return self.constrained and not self.standard and (not self.judged or not self.lost(now_s))

    def lost(self, now_s: float) -> bool:
        """True once a target was missed, or can only be missed."""
        late = not self.output_tokens and now_s > self.arrival_s + self.ttft_s * TOLERANCE
        return late or not self.kept or now_s > self.deadline_s or now_s > self._phase_limit_s

    def hopeful(self, now_s: float) -> bool:
        """True where it was promised nothing, and could still be in time."""
        return self.constrained and not self.standard and not self.lost(now_s)

    def set_targets(
        self, cost: CostModel, *, min_ttft_ms: float | None = None, delivery_ms: float = 0.0, credit_share: float = 0.0
    ) -> None:
        """Turn the SLO into seconds, once `uncached_tokens` and `context_tokens` are known.

        A TTFT slowdown is relative to the zero-load prefill of the uncached tokens. A budget leaves time for the calls
        and gaps that are said to follow; the rest is this call's, and where nothing tighter is asked for, prefill and
        tokens (as many as there may be) are slowed down to fill it. So are prefill and thinking where the answer is to
        begin by a time; if they are known to take longer, the first token is due before it can be there. What
        must reach the client is planned `delivery_ms` early: so long is the way from the scheduler to there.
        `credit_share` of the expected output's time is what later tokens may be lent of an early first token's slack.
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
        phase, *self.to_come = slo.all_phases
        self._enter(phase)
        delivery_s = delivery_ms / 1e3
        decode_ms = cost.token_ms(self.uncached_tokens + self.context_tokens)
        self.least_s = decode_ms / 1e3
        self.first_due_s = self.arrival_s + self.ttft_s - delivery_s
        self.delivery_s, self.prefill_ms = delivery_s, prefill_ms
        if slo.budget_ms is not None:
            self.deadline_s = self.arrival_s + slo.budget_ms / 1e3
            self.rest_ms, self.gaps_ms = _rest_ms(slo, cost, decode_ms), slo.rest_gaps_ms or 0.0
            self._share_budget(self.arrival_s)
        if self.phase_due_s < INF:
            here_ms = prefill_ms + self._until_awaited() * decode_ms
            slowdown = (self.phase_due_s - self.arrival_s) * 1e3 / here_ms
            if self.think_tokens >= self._most_left():  # nobody knows how many there will be: it may be in time
                slowdown = max(slowdown, 1.0)
            first_ms = _first_token_ms(prefill_ms, here_ms, slowdown)
            self.first_due_s = min(self.first_due_s, self.arrival_s + first_ms / 1e3 - delivery_s)
        if self.ttft_s < INF:
            self.slack_until_s = self.arrival_s + self.ttft_s - delivery_s
        if self.tpot_s == INF:
            self.reserve_s = INF  # nothing rules the tokens one by one
        else:
            self.credit_s = credit_share * min(self.sure_tokens, self.max_tokens) * self.tpot_s
        self._need()
        self.due_s = min(self.first_due_s, self.deadline_s)

    def _share_budget(self, from_s: float) -> None:
        """What is left of the budget at `from_s`: its own work and the calls that follow are slowed down alike."""
        prefill_ms = self._prefill_left_ms
        here_ms = prefill_ms + self._most_left() * self.least_s * 1e3
        left_ms = (self.deadline_s - from_s) * 1e3
        slowdown = max((left_ms - self.gaps_ms) / (here_ms + self.rest_ms), 1.0)
        self.aim_s = min(from_s + slowdown * here_ms / 1e3, self.deadline_s) - self.delivery_s
        first_ms = _first_token_ms(prefill_ms, here_ms, max(slowdown, FASTEST_PACE))
        self.first_due_s = min(self.arrival_s + self.ttft_s, from_s + first_ms / 1e3) - self.delivery_s

    def share_again(self, now_s: float) -> None:
        """It is asked for and promised nothing so far: its budget's schedule starts at `now_s`, with what is left then.

        A turn of a program that was promised, which has no time left for what is said to follow, leaves nothing for it,
        and its output will be as long as is expected rather than as it may be: these are estimates, and to be served
        with what others leave over would lose the program for certain.
        """
        if self.deadline_s == INF or self.phase_due_s < INF or now_s >= self.deadline_s:
            return
        if self.favor and now_s + self.program_ms / 1e3 > self.deadline_s:
            self.rest_ms = self.gaps_ms = 0.0
            self.most_tokens = min(self.most_tokens, self.output_tokens + self.left_tokens)
        if self.output_tokens and self.tpot_s == INF:
            self.paced_s = now_s
        self._share_budget(now_s)
        self._need()
        paced_s = self.paced_s + self.pace_s if self.output_tokens else self.first_due_s
        self.due_s = min(paced_s, self.deadline_s)

    @property
    def timed(self) -> bool:
        """True where its pace hangs on how many tokens are to come."""
        return self.aim_s < INF or self.phase_due_s < INF

    def expect(self, most_tokens: int, think_tokens: int) -> None:
        """Other lengths are expected now: what has to be done by a time is paced by them."""
        self.most_tokens, self.think_tokens = most_tokens, think_tokens
        if self.output_tokens and self.kept:
            self._need()
            self.due_s = min(self.paced_s + self.pace_s, self.deadline_s)

    def _most_left(self) -> int:
        return max(min(self.most_tokens, self.max_tokens) - self.output_tokens, 1)

    def _need(self) -> None:
        """Look anew at the pace that is needed for what has a time; `foresee` goes by the one it finds."""
        if self.timed:
            from_s = self.paced_s if self.output_tokens else self.first_due_s
            if from_s == INF:  # no first token yet, and nothing says when it is due
                from_s = self.arrival_s
            left, until = self._most_left(), self._until_awaited()
            budget_s = max((self.aim_s - from_s) / left, FASTEST_PACE * self.least_s)
            self.needed_s = max(min(budget_s, (self.phase_due_s - from_s) / until), self.least_s)
        else:
            self.needed_s = INF
        self._set_pace()

    def _set_pace(self) -> None:
        """The pace: the phase's TPOT, or what is needed, and faster while credit is repaid."""
        self.full_pace_s = min(self.tpot_s, self.needed_s)
        self.pace_s = self.full_pace_s - self.repay_s
        self.answer_pace_s = min(self.answer_tpot_s, self.needed_s if self.aim_s < INF else INF)

    def _until_awaited(self) -> int:
        """Tokens up to the one that `phase_due_s` is for; all there may be where nobody knows."""
        if len(self.seen) > 1:
            return 1 if self.seen[-1].awaited else self._most_left()
        return min(max(self.think_tokens, 0), self._most_left()) + 1

    def _enter(self, phase: Phase) -> None:
        """`phase` paces from here on."""
        first = not self.seen
        self.seen.append(
            PhaseSeen(phase=phase, tokens_before=self.output_tokens, began_s=INF if first else self.served_s)
        )
        self.thinking = bool(self.to_come)
        self.tpot_s = _seconds(phase.tpot_ms)
        self.answer_tpot_s = min((_seconds(later.tpot_ms) for later in self.to_come), default=self.tpot_s)
        self._await_phase()

    def _await_phase(self) -> None:
        awaited = [self.seen[-1].phase] if self.seen[-1].awaited else self.to_come
        first_ms = next((phase.first_ms for phase in awaited if phase.first_ms is not None), None)
        self.phase_due_s = INF if first_ms is None else self.arrival_s + first_ms / 1e3

    @property
    def ttft_due_s(self) -> float:
        """When the first token is due."""
        return min(self.arrival_s + self.ttft_s, self.deadline_s)

    def admit(self) -> None:
        """Promise the targets."""
        self.judged, self.standard, self.declined, self.reason = True, True, False, ""

    def decline(self, reason: str = "") -> None:
        """Serve it with what is left over."""
        self.judged, self.standard, self.declined, self.reason = True, False, True, reason

    def token(self, now_s: float) -> None:
        """An output token was produced by `now_s`: check what was due, and set when the next one is."""
        # The hot spot of a simulation: each number is read and written once.
        tokens, pace_s = self.output_tokens + 1, self.pace_s
        self.output_tokens = tokens
        left_tokens = self.left_tokens
        self.left_tokens = left_tokens - 1 if left_tokens > 1 else 1
        self.think_tokens -= 1
        self.served_s = now_s
        if tokens == 1:
            self.first_token_s = now_s
            early_s = max(self.slack_until_s - now_s, 0.0)
            lent_s = min(early_s, self.credit_s)
            paced_s = now_s + lent_s
            self.repay_tokens = max(self.sure_tokens - 1, 1)
            self.repay_s = lent_s / self.repay_tokens
            self._set_pace()
            self.reserve_s += early_s - lent_s
            self.ruled_s = now_s if self.ttft_s == INF else max(now_s, self.arrival_s + self.ttft_s)
            self.kept &= now_s <= self.arrival_s + self.ttft_s * TOLERANCE
            pace_s = self.pace_s
        else:
            # Without a pace, and once the promise is lost, there is nothing to catch up with.
            paced_s = now_s if pace_s == INF or not self.kept else self.paced_s + pace_s
            tpot_s = self.tpot_s
            self.ruled_s = max(self.ruled_s, now_s) if tpot_s == INF else self.ruled_s + tpot_s
            repay_tokens = self.repay_tokens - 1
            self.repay_tokens = repay_tokens
            if repay_tokens == 0 and not self.thinking:
                pace_s = self.pace_s = self.full_pace_s
                self.repay_s = 0.0
            if tokens % CHECK_EVERY_TOKENS == 0:
                self._check(now_s)
        self.paced_s = paced_s
        if self.seen and self.seen[-1].first_s == INF:
            self._first_of_phase(now_s)
            pace_s = self.pace_s
        due_s, deadline_s = paced_s + pace_s, self.deadline_s
        self.due_s = due_s if due_s < deadline_s else deadline_s

    def _first_of_phase(self, now_s: float) -> None:
        awaited = self.seen[-1].awaited
        self.seen[-1].first_s = now_s
        if awaited:
            self.kept &= now_s <= self._phase_limit_s
            self._await_phase()
            self._need()

    @property
    def _phase_limit_s(self) -> float:
        return self.arrival_s + (self.phase_due_s - self.arrival_s) * TOLERANCE

    def finish(self, now_s: float) -> None:
        """The last token was produced by `now_s`: the end is checked too, and the budget."""
        if self.output_tokens > 1:
            self._check(now_s)
        self.kept &= now_s <= self.deadline_s
        self.kept &= self.phase_due_s == INF  # the token that was to be there by then never came
        self._end_phase()

    @property
    def phases(self) -> list[str]:
        """Names of the phases that the output has had."""
        return [seen.phase.name for seen in self.seen]

    def next_phase(self) -> None:
        """The text that ends the phase has appeared: the next token is the first of the next one."""
        if not self.to_come:
            return
        self._end_phase()
        self.repay_tokens, self.repay_s = 0, 0.0
        awaited = self.phase_due_s < INF
        self._enter(self.to_come.pop(0))
        self._need() if awaited else self._set_pace()
        self.due_s = min(self.paced_s + self.pace_s, self.deadline_s)

    def _end_phase(self) -> None:
        if self.seen:
            seen = self.seen[-1]
            seen.tokens, seen.ended_s = self.output_tokens - seen.tokens_before, self.served_s

    def _check(self, now_s: float) -> None:
        start_s = self.first_token_s if self.ttft_s == INF else max(self.first_token_s, self.arrival_s + self.ttft_s)
        self.kept &= now_s <= start_s + (self.ruled_s - start_s) * TOLERANCE
