"""What earlier runs of a program showed: what remains after each of its calls, and when the next one comes.

A run of a program is known by its function, a call in it by its stage path and by how many calls of that path had
ended before it began. What must stay true: no clock in here, and a run that failed teaches nothing.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass

ENOUGH_RUNS = 3
"""Fewer are no estimate."""
MEMORY_RUNS = 32
"""So many of the latest count."""

Key = tuple[str, str, int]


@dataclass(frozen=True, kw_only=True)
class CallDone:
    """A call that has ended: its stage path, when it was sent and answered (s, one clock), and its tokens.

    `prompt_tokens` are those that were new, found in no cache.
    """

    stage: str
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
        self._seen: dict[Key, deque[Rest]] = {}
        self._lock = threading.Lock()

    def learn(self, function: str, calls: Sequence[CallDone]) -> None:
        """A run of `function` has ended, and these were its calls in the order in which they ended."""
        learned = [((function, c.stage, _before(n, calls)), rest_after(n, calls)) for n, c in enumerate(calls)]
        with self._lock:
            for key, rest in learned:
                self._seen.setdefault(key, deque(maxlen=MEMORY_RUNS)).append(rest)

    def expect(self, function: str, stage: str, before: int) -> Rest | None:
        """The mean of what remained after such a call, `before` of its stage having ended; None: too few were seen."""
        with self._lock:
            seen = list(self._seen.get((function, stage, before), ()))
        if len(seen) < ENOUGH_RUNS:
            return None
        *columns, gaps = zip(*map(astuple, seen), strict=True)
        calls, prompt, output, all_gaps_ms = (sum(column) / len(seen) for column in columns)
        known = [gap for gap in gaps if gap is not None]
        return Rest(
            rest_calls=calls,
            rest_prompt_tokens=prompt,
            rest_output_tokens=output,
            rest_gaps_ms=all_gaps_ms,
            gap_ms=sum(known) / len(known) if known else None,
        )


def rest_after(number: int, calls: Sequence[CallDone]) -> Rest:
    """What was sent after call `number` of `calls`, which are in the order in which they ended, had been answered.

    A gap is a time in which none of them is under way.
    """
    call, others = calls[number], calls[number + 1 :]
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
        gap_ms=(later[0].sent_s - call.ended_s) * 1000 if later else None,
    )


def _before(number: int, calls: Sequence[CallDone]) -> int:
    call = calls[number]
    return sum(c.stage == call.stage and c.ended_s <= call.sent_s for c in calls[:number])
