"""What earlier runs of a program showed: what remains after each of its calls, and when the next one comes.

A run of a program is known by its function, a call in it by its stage path and by how many calls of that path had
ended before it began. What remains is known for the whole run and for each stage around the call, because a budget may
be any of theirs. What must stay true: no clock in here, and a run that failed teaches nothing.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass

ENOUGH_RUNS = 3
"""Fewer are no estimate."""
MEMORY_RUNS = 32
"""So many of the latest count."""
ENOUGH_FOR = 0.9
"""The share of runs that the expected tokens suffice for."""

Key = tuple[str, str, int]


@dataclass(frozen=True, kw_only=True)
class CallDone:
    """A call that has ended: its stage path, when it was sent and answered (s, one clock), and its tokens.

    `scopes` are the run and the stages that it was in, outermost first, by any numbers that tell them apart;
    `prompt_tokens` are those that were new, found in no cache.
    """

    stage: str
    scopes: tuple[int, ...]
    sent_s: float
    ended_s: float
    prompt_tokens: int = 0
    output_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class Rest:
    """What comes after a call; the fields are those of the wire (`WireSLO`). `gap_ms` is None after the last one."""

    rest_calls: float = 0.0
    rest_prompt_tokens: float = 0.0
    rest_output_tokens: float = 0.0
    rest_gaps_ms: float = 0.0
    gap_ms: float | None = None

    def to_dict(self) -> dict[str, float]:
        """For the wire: rounded, without what is unknown."""
        return {key: round(value, 1) for key, value in asdict(self).items() if value is not None}


class History:
    """What remained after the calls of programs, in the latest runs; may be used by several threads."""

    def __init__(self) -> None:
        self._seen: dict[Key, deque[list[Rest]]] = {}
        self._lock = threading.Lock()

    def learn(self, function: str, calls: Sequence[CallDone]) -> None:
        """A run of `function` has ended, and these were its calls in the order in which they ended."""
        learned = [
            (
                (function, call.stage, _before(n, calls)),
                [rest_after(n, calls, depth) for depth in range(len(call.scopes))],
            )
            for n, call in enumerate(calls)
        ]
        with self._lock:
            for key, rest in learned:
                self._seen.setdefault(key, deque(maxlen=MEMORY_RUNS)).append(rest)

    def expect(self, function: str, stage: str, before: int, depth: int) -> Rest | None:
        """What remains after such a call, `before` of its stage having ended; None: too few were seen.

        Calls and gaps are means. Of tokens it is what sufficed in `ENOUGH_FOR` of the runs: time that is kept back for
        them and not needed flows on, time that is spent before they come is gone.

        `depth` says of what: 0 of the run, 1 of the stage in it that is around the call, and so on; deeper than all of
        them nothing remains.
        """
        with self._lock:
            runs = list(self._seen.get((function, stage, before), ()))
        if len(runs) < ENOUGH_RUNS:
            return None
        seen = [rests[depth] if depth < len(rests) else Rest(gap_ms=rests[0].gap_ms) for rests in runs]
        *columns, gaps = zip(*map(astuple, seen), strict=True)
        calls, _, _, all_gaps_ms = (sum(column) / len(seen) for column in columns)
        prompt, output = (sorted(column)[math.ceil(ENOUGH_FOR * len(seen)) - 1] for column in columns[1:3])
        known = [gap for gap in gaps if gap is not None]
        return Rest(
            rest_calls=calls,
            rest_prompt_tokens=prompt,
            rest_output_tokens=output,
            rest_gaps_ms=all_gaps_ms,
            gap_ms=sum(known) / len(known) if known else None,
        )


def rest_after(number: int, calls: Sequence[CallDone], depth: int = 0) -> Rest:
    """What was sent after call `number` of `calls`, which are in the order in which they ended, had been answered.

    Those count that share the call's scopes down to `depth`; the gap to the next call, whichever that is, always. A gap
    is a time in which none of them is under way.
    """
    call = calls[number]
    next_sent_s = min((c.sent_s for c in calls[number + 1 :] if c.sent_s >= call.ended_s), default=None)
    within = call.scopes[: depth + 1]
    others = [c for c in calls[number + 1 :] if c.scopes[: depth + 1] == within]
    later = sorted((c for c in others if c.sent_s >= call.ended_s), key=lambda c: (c.sent_s, c.ended_s))
    gaps_s = 0.0
    busy_until_s = max((c.ended_s for c in others if c.sent_s < call.ended_s), default=call.ended_s)
    for each in later:
        gaps_s += max(each.sent_s - busy_until_s, 0.0)
        busy_until_s = max(busy_until_s, each.ended_s)
    return Rest(
        rest_calls=len(later),
        rest_prompt_tokens=sum(c.prompt_tokens for c in later),
        rest_output_tokens=sum(c.output_tokens for c in later),
        rest_gaps_ms=gaps_s * 1000,
        gap_ms=None if next_sent_s is None else (next_sent_s - call.ended_s) * 1000,
    )


def _before(number: int, calls: Sequence[CallDone]) -> int:
    call = calls[number]
    return sum(c.stage == call.stage and c.ended_s <= call.sent_s for c in calls[:number])
