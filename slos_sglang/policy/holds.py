"""How long the KV of a conversation is kept while its tool runs.

A call ends, its tool runs, and the next call begins with all that was said. Its KV takes room meanwhile that others
could use; computing it anew takes time. Kept for a second, a conversation costs its share of the memory for a second,
the more the fuller memory is; coming back to it saves its prefill. Together: it is worth waiting some times as long as
the whole memory takes to compute, times the chance that the call comes within that time, over the share that is in use.
When calls come back, and whether, is what earlier ones after that stage did, and what the client says (`gap_ms`).

What must stay true: nothing here is a promise. What is kept is free memory to those that were promised something.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Literal

from slos_sglang.policy.batch_time import CostModel
from slos_sglang.policy.request import INF, Request

Mode = Literal["auto", "never", "always"]

# Returns after a stage that make an estimate, the latest that count, and how much later than any of them one may come.
_ENOUGH, _LATEST, _LATER = 3, 64, 1.2
# An announced gap says nothing of its spread: it counts as three that were seen, so many times as long.
_ANNOUNCED = (0.5, 1.0, 2.0)
# A prefill that is saved is worth so many times what the memory would have been good for at most: somebody waits for
# it, and a server with less memory is seldom slower in proportion.
_WORTH = 4.0
# It is given up so many times after the longest gap that is known, and not before so many seconds.
_TOO_LATE, _AT_LEAST_S = 3.0, 60.0
# Conversations that are waited for; the oldest ones are forgotten.
_MOST = 1024
# The memory in use is looked at in so many steps.
_LEVELS = 16


@dataclass(frozen=True, kw_only=True)
class Over:
    """A conversation is waited for no more: it was kept for `held_s`, and its next call came after `gap_s` (INF: not
    while it was kept).
    """

    request: Request
    held_s: float
    gap_s: float


@dataclass(kw_only=True, slots=True)
class _Away:
    """A conversation between two calls: the last one, None once it is not kept any more, and what is known of the next.

    It is expected at `back_s`, kept until `until_s` where `level` parts of the memory are in use, and given up at
    `too_late_s`.
    """

    request: Request | None
    program: str
    stage: str
    tokens: int
    ended_s: float
    gaps_s: list[float]
    back_s: float
    too_late_s: float
    until_s: float = INF
    level: int = 0


def worth_waiting_s(gaps_s: Sequence[float], patience_s: float) -> float:
    """How long to keep what comes back after one of `gaps_s` (sorted; INF: never), where a return is worth `patience_s`
    of keeping it; 0 where it is not worth any.
    """
    best_s = hold_s = waited_s = 0.0
    for came, gap_s in enumerate(gaps_s, start=1):
        if gap_s == INF:
            break
        waited_s += gap_s
        gain_s = came * patience_s - waited_s - (len(gaps_s) - came) * gap_s
        if gain_s > best_s:
            best_s, hold_s = gain_s, gap_s
    return hold_s


@dataclass(kw_only=True)
class Holds:
    """The conversations whose next call may come.

    mode    "auto": kept as long as that is worth it, "always": until it is certain that nobody comes, "never"
    report  is told of each that was kept, when that is over
    """

    mode: Mode = "never"
    report: Callable[[Over], None] = lambda over: None
    _away: dict[int, _Away] = field(default_factory=dict)
    _held: dict[int, _Away] = field(default_factory=dict)
    _gaps: dict[str, deque[float]] = field(default_factory=dict)
    _number: int = 0

    @property
    def any(self) -> bool:
        """True while a conversation is kept."""
        return bool(self._held)

    def ended(self, request: Request, now_s: float) -> None:
        """A call has had its last token: its conversation is away from now on."""
        slo = request.slo
        if self.mode == "never" or slo is None or not slo.program:
            return
        self._give_up(now_s)
        stage, announced_s = slo.stage or "", None if slo.gap_ms is None else slo.gap_ms / 1e3
        gaps_s = self._expected(stage, announced_s)
        if announced_s is None and slo.rest_calls is not None and slo.rest_calls < 1:
            gaps_s = []  # the client says that none follows
        known = [gap_s for gap_s in gaps_s if gap_s < INF]
        away = _Away(
            request=request,
            program=slo.program,
            stage=stage,
            tokens=max(request.context_tokens, 1),
            ended_s=now_s,
            gaps_s=gaps_s,
            back_s=now_s + (median(known) if known else 0.0),
            too_late_s=now_s + max(_TOO_LATE * max(known, default=0.0), _AT_LEAST_S),
        )
        self._number += 1
        self._away[self._number] = away
        if known or self.mode == "always":
            self._held[self._number] = away
        else:
            away.request = None
        if len(self._away) > _MOST:
            oldest = next(iter(self._away))
            self._stop(oldest, now_s)
            del self._away[oldest]

    def arrived(self, request: Request) -> None:
        """A call came: its conversation is the one of its program that is most like what is cached of its prompt."""
        program = request.slo.program if request.slo else None
        mine = [number for number, away in self._away.items() if away.program == program] if program else []
        if not mine:
            return
        number = min(mine, key=lambda n: abs(self._away[n].tokens - request.context_tokens))
        away = self._away[number]
        gap_s = max(request.arrival_s - away.ended_s, 0.0)
        self._learn(away.stage, gap_s)
        self._stop(number, request.arrival_s, gap_s=gap_s)
        del self._away[number]

    def held(self, now_s: float, *, capacity_tokens: int, used_tokens: int, cost: CostModel) -> list[Request]:
        """The last calls of the conversations to keep, the next one to return last.

        `used_tokens` of the memory are in use or kept.
        """
        if not self._held:
            return []
        level = min(max(math.ceil(_LEVELS * used_tokens / capacity_tokens), 1), _LEVELS)
        for number, away in list(self._held.items()):
            if away.level != level:
                away.level = level
                away.until_s = self._until_s(away, capacity_tokens * _LEVELS / level, cost)
            if now_s > away.until_s:
                self._stop(number, max(away.until_s, away.ended_s))
        kept = sorted(self._held.values(), key=lambda away: -away.back_s)
        return [away.request for away in kept if away.request is not None]

    def _until_s(self, away: _Away, tokens: float, cost: CostModel) -> float:
        """When it is to be kept no longer; `tokens` are the memory's, over the share of it that is in use."""
        if self.mode == "always":
            return away.too_late_s
        patience_s = _WORTH * cost.prefill_ms(away.tokens) / 1e3 / away.tokens * tokens
        return away.ended_s + _LATER * worth_waiting_s(away.gaps_s, patience_s)

    def _expected(self, stage: str, announced_s: float | None) -> list[float]:
        """Gaps to reckon with, sorted; none where nothing is known."""
        seen = self._gaps.get(stage, deque())
        if announced_s is None:
            return sorted(seen) if len(seen) >= _ENOUGH else []
        mean_s = fmean([gap_s for gap_s in seen if gap_s < INF] or [0.0])
        scale = announced_s / mean_s if mean_s else 1.0
        return sorted([*(gap_s * scale for gap_s in seen), *(announced_s * times for times in _ANNOUNCED)])

    def _give_up(self, now_s: float) -> None:
        """Who was to be back by now teaches that some don't come; should it come after all, it teaches that, too."""
        for number, away in self._away.items():
            if now_s > away.too_late_s:
                away.too_late_s = INF
                self._learn(away.stage, INF)
                self._stop(number, now_s)

    def _stop(self, number: int, now_s: float, *, gap_s: float = INF) -> None:
        """Keep it no longer, where it still is."""
        away = self._held.pop(number, None)
        if away is not None and away.request is not None:
            self.report(Over(request=away.request, held_s=now_s - away.ended_s, gap_s=gap_s))
            away.request = None

    def _learn(self, stage: str, gap_s: float) -> None:
        self._gaps.setdefault(stage, deque(maxlen=_LATEST)).append(gap_s)
