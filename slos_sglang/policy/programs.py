"""Programs between their calls: what was invested in them, and when they come back.

An agent's call ends, its tool runs, the next call comes. Where not all can be promised, a turn of a program that was
kept so far is worth more than a first call, up to twice as much. Room may be kept for its return, too: when it comes,
and with how much to compute, is what the calls after that stage have shown (or what the client says: `gap_ms`).

What must stay true: nothing here is a promise. It weighs newcomers, and may make them wait.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from slos_sglang.policy.request import Request

# Returns after a stage that make an estimate, the latest ones that count, how many gaps later one is given up, and how
# soon at the least, s.
_ENOUGH, _LATEST, _TOO_LATE, _AT_LEAST_S = 3, 64, 3.0, 0.1
# Returns are the latest in arrival order.
_LAST_SEQ = 1 << 40


@dataclass(frozen=True, kw_only=True, slots=True)
class _Return:
    """A call that came `gap_s` after another one of its program."""

    gap_s: float
    uncached_tokens: int
    left_tokens: int
    ttft_s: float
    pace_s: float


@dataclass(kw_only=True, slots=True)
class _Program:
    """A program whose last call ended at `ended_s`, in `stage`; `invested_tokens` were computed for promises kept."""

    invested_tokens: int = 0
    lost: bool = False
    stage: str = ""
    ended_s: float = 0.0
    until_s: float = 0.0
    coming: Request | None = None


@dataclass(kw_only=True)
class Programs:
    """What is known of programs that are away.

    reserve  share of what a return is expected to need for which room is kept; 0: none. Keeping it lets fewer programs
             begin: worth it where a program that began must not be let down, not where as many as can be are to be kept
    """

    reserve: float = 0.0
    _away: dict[str, _Program] = field(default_factory=dict)
    _after: dict[str, deque[_Return | None]] = field(default_factory=dict)
    _returns: int = 0

    def arrived(self, request: Request) -> None:
        """A call came, its targets are set: learn from it, and weigh it by what was invested in its program."""
        program = self._away.pop(_name(request), None)
        if program is None:
            return
        came = _Return(
            gap_s=max(request.arrival_s - program.ended_s, 0.0),
            uncached_tokens=request.uncached_tokens,
            left_tokens=request.left_tokens,
            ttft_s=request.ttft_due_s - request.arrival_s,
            pace_s=request.pace_s,
        )
        self._learn(program.stage, came)
        request.invested_tokens = program.invested_tokens
        if not program.lost:
            work_tokens = request.uncached_tokens + request.left_tokens
            request.favor = program.invested_tokens / (program.invested_tokens + work_tokens)

    def ended(self, request: Request, now_s: float) -> None:
        """A call ended: its program may come back."""
        name = _name(request)
        if not name:
            return
        assert request.slo is not None
        promised = request.standard or request.favor > 0
        program = _Program(stage=request.slo.stage or "", ended_s=now_s, lost=not (promised and request.kept))
        program.invested_tokens = request.invested_tokens + request.context_tokens
        after = self._after.get(program.stage, ())
        seen = [came for came in after if came is not None]
        gap_s = request.slo.gap_ms / 1e3 if request.slo.gap_ms is not None else _middle([s.gap_s for s in seen])
        program.until_s = now_s + max(_TOO_LATE * gap_s, _AT_LEAST_S)
        if self.reserve and len(seen) >= max(_ENOUGH, len(after) / 2) and not program.lost:
            program.coming = self._coming(name, seen, now_s + gap_s)
        self._away[name] = program

    def expected(self, now_s: float) -> list[Request]:
        """The returns to keep room for."""
        for name in [name for name, program in self._away.items() if now_s > program.until_s]:
            self._learn(self._away.pop(name).stage, None)
        return [program.coming for program in self._away.values() if program.coming is not None]

    def _learn(self, stage: str, came: _Return | None) -> None:
        self._after.setdefault(stage, deque(maxlen=_LATEST)).append(came)

    def _coming(self, name: str, seen: Sequence[_Return], arrival_s: float) -> Request:
        self._returns += 1
        request = Request(rid=f"the return of {name}", seq=_LAST_SEQ + self._returns, arrival_s=arrival_s)
        request.uncached_tokens = max(int(self.reserve * _middle([s.uncached_tokens for s in seen])), 1)
        request.left_tokens = request.sure_tokens = max(int(self.reserve * _middle([s.left_tokens for s in seen])), 1)
        request.first_due_s = request.due_s = arrival_s + seen[-1].ttft_s
        request.pace_s = request.full_pace_s = seen[-1].pace_s
        return request


def _name(request: Request) -> str:
    return (request.slo.program if request.slo else None) or ""


def _middle(values: Sequence[float]) -> float:
    return median(values) if values else 0.0
