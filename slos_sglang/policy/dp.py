"""Which newcomers are worth most together: the dynamic program over deadlines (paper, section 2).

Prompts are taken in the order of their deadlines. From one accepted prompt to the next the prefill budget grows by PB*
beside the decoders there are by then and shrinks by the prompt; it must never be negative, KV must suffice for all to
their ends, and the decoders must be able to keep their pace for good. Newcomers may be skipped, promises may not.

What must stay true: `best` finds the most value that any set brings for which `feasible` holds. Both are estimates of
what batches will do (decoders never end here, phases are forgotten, paces are rounded down to four tiers): a proposal
for the exact simulation, not a promise.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from slos_sglang.policy import plan
from slos_sglang.policy.batch_time import CostModel, Piece
from slos_sglang.policy.batches import Limits, Memory
from slos_sglang.policy.prefill_budget import TOO_MANY, prefill_budgets
from slos_sglang.policy.request import Request
from slos_sglang.policy.state import World, world_of

MAX_TIERS = 4
# Looking at more states than this (some 10 us each) is not worth their time: the simulation alone decides.
MAX_STATES = 1000
# A prompt that nobody waits for is due by then.
HORIZON_MS = 10_000.0


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt to compute, by `due_ms` from now, and the decoder it becomes.

    tokens    of prefill, whatever else its row costs included     memory_tokens  KV at its end
    pace_ms   from one of its output tokens to the next; inf: any  mandatory      promised already
    """

    due_ms: float
    tokens: int
    memory_tokens: int
    pace_ms: float
    value: float = 1.0
    mandatory: bool = False


class _State(NamedTuple):
    """What a choice among the prompts so far leaves: `chosen` is the last of them, with the state before it."""

    value: float
    memory_tokens: int
    budget_tokens: int
    chosen: int = -1
    before: _State | None = None

    def covers(self, other: _State) -> bool:
        """Nothing that `other` can become is better than what this can."""
        return (
            self.value >= other.value
            and self.memory_tokens <= other.memory_tokens
            and self.budget_tokens >= other.budget_tokens
        )

    def set(self) -> tuple[int, ...]:
        """The numbers of all that were chosen."""
        return (*(self.before.set() if self.before else ()), self.chosen) if self.chosen >= 0 else ()


# The last accepted prompt's due time, and how many decode in each tier.
_Key = tuple[float, tuple[int, ...]]
# So much time, and so many decoding in each tier.
_Way = tuple[float, tuple[int, ...]]


@dataclass(kw_only=True)
class Choice:
    """Prompts to choose from beside `running` decoders (their paces, ms), who hold `held_tokens` of KV to their ends.

    context_tokens  KV that a decoder attends to, on average
    """

    prompts: Sequence[Prompt]
    running: Sequence[float]
    held_tokens: int
    context_tokens: int
    world: World
    _budgets: dict[_Way, int] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._order = sorted(range(len(self.prompts)), key=lambda number: (self.prompts[number].due_ms, number))
        self._tiers = tiers((*self.running, *(prompt.pace_ms for prompt in self.prompts)))
        self._paces_ms = np.array(self._tiers, dtype=np.float64)
        counts = [0] * len(self._tiers)
        for pace_ms in self.running:
            self._count(counts, pace_ms)
        self._first: _Key = (0.0, tuple(counts))

    def best(self, *, max_states: int = MAX_STATES) -> tuple[int, ...] | None:
        """The set of prompts of most value, the promised ones included; None where even those are too much, or where
        there are more than `max_states` to look at.
        """
        states = {self._first: [_State(0.0, self.held_tokens, 0)]}
        looked_at = 0
        for number in self._order:
            gathered: dict[_Key, list[_State]] = {}
            for (key, front), more_tokens in zip(states.items(), self._budgets_to(number, states), strict=True):
                looked_at += len(front)
                if taken := self._take(front, number, more_tokens):
                    gathered.setdefault(self._after(key, number), []).extend(taken)
            if looked_at > max_states:
                return None
            skipped = {} if self.prompts[number].mandatory else states
            states = {**skipped, **{key: _pareto((*skipped.get(key, ()), *some)) for key, some in gathered.items()}}
        lasts = self._budgets_of([(0.0, counts) for _, counts in states])
        ends = [s for front, lasting in zip(states.values(), lasts, strict=True) if lasting != TOO_MANY for s in front]
        if not ends:
            return None
        return tuple(sorted(max(ends, key=lambda s: (s.value, s.budget_tokens, -s.memory_tokens)).set()))

    def feasible(self, chosen: Iterable[int]) -> bool:
        """Can these prompts be promised together? The promised ones have to be among them."""
        wanted = set(chosen)
        if any(prompt.mandatory and number not in wanted for number, prompt in enumerate(self.prompts)):
            return False
        key, front = self._first, [_State(0.0, self.held_tokens, 0)]
        for number in self._order:
            if number in wanted:
                front = self._take(front, number, self._budgets_to(number, [key])[0])
                key = self._after(key, number)
        return bool(front) and self._budgets_of([(0.0, key[1])])[0] != TOO_MANY

    def _take(self, front: Iterable[_State], number: int, more_tokens: int) -> list[_State]:
        """The states of `front` with prompt `number` as well, where memory and time suffice; the budget has grown by
        `more_tokens` on the way to it.
        """
        if more_tokens == TOO_MANY:  # decoders could not keep their pace on the way
            return []
        prompt, capacity_tokens = self.prompts[number], self.world.memory_tokens
        more_tokens -= prompt.tokens
        return [
            _State(s.value + prompt.value, memory_tokens, s.budget_tokens + more_tokens, number, s)
            for s in front
            if s.budget_tokens + more_tokens >= 0
            and ((memory_tokens := s.memory_tokens + prompt.memory_tokens) <= capacity_tokens or capacity_tokens < 0)
        ]

    def _after(self, key: _Key, number: int) -> _Key:
        """Where prompt `number` leads from `key`."""
        prompt = self.prompts[number]
        counts = list(key[1])
        self._count(counts, prompt.pace_ms)
        return (_due_ms(prompt), tuple(counts))

    def _budgets_to(self, number: int, keys: Iterable[_Key]) -> list[int]:
        """PB* from each of `keys` to the due time of prompt `number`."""
        due_ms = _due_ms(self.prompts[number])
        return self._budgets_of([(due_ms - before_ms, counts) for before_ms, counts in keys])

    def _budgets_of(self, ways: Sequence[_Way]) -> list[int]:
        """PB* of each of `ways`, remembered: compiled code is worth calling for many."""
        new = [way for way in dict.fromkeys(ways) if way not in self._budgets]
        if new:
            within_ms = np.array([within for within, _ in new])
            counts = np.array([counts for _, counts in new], dtype=np.int64).reshape(len(new), len(self._tiers))
            found = prefill_budgets(within_ms, counts, self._paces_ms, self.context_tokens, self.world)
            self._budgets.update(zip(new, found.tolist(), strict=True))
        return [self._budgets[way] for way in ways]

    def _count(self, counts: list[int], pace_ms: float) -> None:
        if pace_ms < float("inf"):
            counts[bisect_right(self._tiers, pace_ms) - 1] += 1


def propose(
    now_s: float,
    promised: Sequence[Request],
    asking: Sequence[Request],
    world: World,
    *,
    max_states: int = MAX_STATES,
) -> list[Request] | None:
    """Who of `asking` to promise at `now_s`, by `Choice.best`."""
    decoding = [r for r in promised if not r.uncached_tokens]
    prompts = [*asking, *(r for r in promised if r.uncached_tokens)]
    total_tokens = sum(r.context_tokens + r.uncached_tokens for r in (*decoding, *prompts))
    choice = Choice(
        prompts=[_prompt(now_s, r, world, mandatory=number >= len(asking)) for number, r in enumerate(prompts)],
        running=[r.pace_s * 1e3 for r in decoding],
        held_tokens=sum(_memory_tokens(r, world) for r in decoding),
        context_tokens=total_tokens // max(len(decoding) + len(prompts), 1),
        world=world,
    )
    best = choice.best(max_states=max_states)
    return None if best is None else [prompts[number] for number in best if number < len(asking)]


def _prompt(now_s: float, request: Request, world: World, *, mandatory: bool) -> Prompt:
    # What its row and its cached prefix cost, in tokens.
    row_ms = world.requests_ms + world.context_ms * request.context_tokens
    return Prompt(
        due_ms=(request.due_s - now_s) * 1e3,
        tokens=request.uncached_tokens + int((row_ms / np.maximum(world.tokens_ms + world.context_ms, 1e-9)).max()),
        memory_tokens=_memory_tokens(request, world),
        pace_ms=request.pace_s * 1e3,
        value=request.worth,
        mandatory=mandatory,
    )


def _memory_tokens(request: Request, world: World) -> int:
    tokens = request.context_tokens + request.uncached_tokens + request.left_tokens
    return -(-tokens // world.block_tokens) * world.block_tokens


def _due_ms(prompt: Prompt) -> float:
    return min(max(prompt.due_ms, 0.0), HORIZON_MS)


def tiers(paces_ms: Iterable[float]) -> tuple[float, ...]:
    """At most `MAX_TIERS` paces to which all of `paces_ms` can be rounded down; unpaced ones (inf) are in none."""
    distinct = sorted({pace for pace in paces_ms if pace < float("inf")})
    count = min(len(distinct), MAX_TIERS)
    return tuple(distinct[len(distinct) * k // count] for k in range(count))


def compile_ahead() -> None:
    """Compile what the plan and this need (seconds, once a machine), so that no step of a server has to wait for it."""
    plan.compile_ahead()
    world = world_of(CostModel(Piece(const_ms=1.0)), Limits(), Memory())
    prefill_budgets(np.ones(1), np.ones((1, 1), dtype=np.int64), np.ones(1), 0, world)


def _pareto(states: Sequence[_State]) -> list[_State]:
    """Those that no other one covers."""
    if len(states) == 1:
        return [*states]
    front: list[_State] = []
    for state in sorted(states, key=lambda s: (-s.value, s.memory_tokens, -s.budget_tokens)):
        if not any(other.covers(state) for other in front):
            front.append(state)
    return front
