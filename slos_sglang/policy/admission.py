"""Which promises can be made: those that the plan, run forward, keeps together with all that were made before.

Whatever proposes a set of newcomers, forward simulation disposes (paper, section 2; its test of demand below supply, on
the very batches that will run): nobody is admitted but by `Outlook`. One already bound to be missed does not stand in
anybody's way. A promise binds when its prompt begins: until then the first call of a program may give way to one that
takes much less work (`Outlook.gave_way`; off by choice). Three ways to propose:

    edf_sim  the earliest deadline first, one by one; an earlier promise is never weighed against a later one
    dp       the dynamic program's set, cut down until it holds; then the others, one by one
    auto     everybody; else the best set there is where trying all of them takes no more than `LOOK_AHEADS`; else the
             best of edf_sim's set, the dynamic program's (while its states are few) and everybody cut down, or what is
             found in so many to hold and to be worth more
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from operator import attrgetter
from typing import Literal, NamedTuple, get_args

import numpy as np

from slos_sglang.policy import dp, plan
from slos_sglang.policy.batch_time import CostModel
from slos_sglang.policy.batches import Limits, Memory
from slos_sglang.policy.request import Request, table_of
from slos_sglang.policy.state import Flags, Rows, World, copy_of, rows_of, world_of

Method = Literal["auto", "dp", "edf_sim"]
METHODS: tuple[Method, ...] = get_args(Method)

# How many futures `auto` may look at in one step, times the requests in each; and sets of how many it tries all of.
LOOK_AHEADS = 6144
MOST_TRIED = 10
# A promise may give way to a call that takes so many times less work, if it is among so many that take the most.
MUCH_MORE, MOST_MOVED = 1.3, 4
# How many states of the dynamic program `auto` looks at.
FEW_STATES = 200
# A token exactly on its due time is on time, as in the plan.
_EPSILON_MS = 1e-4


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The answer to one request; `reason` and `retry_after_s` say why not, and when it could be."""

    admitted: bool
    reason: str = ""
    retry_after_s: float = 0.0


ADMITTED = Verdict(admitted=True)
GAVE_WAY = Verdict(admitted=False, reason="it gave way to a call that takes much less work, before its prompt began")


class _Future(NamedTuple):
    """How a future ends (a code of `plan.foresee`), for which row first, and when; and whether its batches lend."""

    code: int
    row: int
    when_s: float
    lends: bool


class Outlook:
    """The future of the `promised` requests, to which others may be added as long as it keeps everybody's targets.

    now_s            when the next batch starts; all `requests` that may be added are named at once
    late_commitment  whether promises whose prompt has not begun may give way: `gave_way` are those that did
    """

    def __init__(
        self,
        now_s: float,
        promised: Sequence[Request],
        asking: Sequence[Request],
        cost: CostModel,
        limits: Limits,
        memory: Memory,
        *,
        late_commitment: bool = False,
    ) -> None:
        self.now_s = now_s
        self.gave_way: list[Request] = []
        self._cost = cost
        self._promised, self._asking = promised, asking
        self._requests = sorted((*promised, *asking), key=attrgetter("seq"))
        self._late_commitment = late_commitment
        self._world = world_of(cost, limits, memory, margin=cost.margin)
        self._lending = self._world._replace(lends=True)
        self._excused = np.zeros(len(self._requests), dtype=np.bool_)
        self._baseline_known = False
        self._admitted: frozenset[int] = frozenset()
        self._seen: dict[frozenset[int], _Future] = {}

    @cached_property
    def _row(self) -> dict[int, int]:
        """By the id of a request that asks, its row."""
        seqs = [r.seq for r in self._requests]
        return {id(r): bisect_left(seqs, r.seq) for r in self._asking}

    @cached_property
    def _all_rows(self) -> Rows:
        """Everybody; built when the first future is asked for."""
        return rows_of(table_of(self._requests))

    @cached_property
    def _nobody_added(self) -> Rows:
        """The promised ones; those who ask are not there yet."""
        rows = self._all_rows._replace(left=self._all_rows.left.copy())
        for request in self._asking:
            rows.left[self._row[id(request)]] = 0
        return rows

    def judge(self, asking: Sequence[Request], method: Method = "auto") -> list[Verdict]:
        """Promise what `method` finds best among those that are asked for the first time; then ask the rest in turn."""
        new = [r for r in asking if not r.judged and not self._hopeless(r)]
        if method != "edf_sim" and len(new) > 1:
            self._admitted = self._best(new, method)
        granted = {id(self._requests[row]) for row in self._admitted}
        verdicts = [ADMITTED if id(r) in granted else self.ask(r) for r in asking]
        if self._late_commitment:
            for n, request in enumerate(asking):
                if not verdicts[n].admitted and not request.judged and self._takes_a_place(request):
                    verdicts[n] = ADMITTED
        return verdicts

    def ask(self, request: Request) -> Verdict:
        """Add `request` if everybody's targets are kept with it."""
        reason = self._hopeless(request)
        if reason:
            return Verdict(admitted=False, reason=reason)
        mine = self._row[id(request)]
        future = self._future(self._admitted | {mine})
        if future.code == plan.KEPT:
            self._admitted |= {mine}
            return ADMITTED
        return Verdict(admitted=False, reason=self._reason(future, mine), retry_after_s=future.when_s - self.now_s)

    @property
    def lends(self) -> bool:
        """Whether it takes batches that lend to keep everybody's targets."""
        return self._future(self._admitted).lends

    def _takes_a_place(self, request: Request) -> bool:
        """Let a promise give way that takes much more work than `request`, and is worth no more, if that is enough."""
        if self._hopeless(request):
            return False
        mine = self._row[id(request)]
        much_ms = MUCH_MORE * self._work_ms(mine)
        added, left = self._admitted | {mine}, self._nobody_added.left
        for row, work_ms in self._heaviest:
            if left[row] and work_ms > much_ms and self._worth(row) <= request.worth:
                tokens, left[row] = left[row], 0
                future = self._foresee(added)
                if future.code == plan.KEPT:
                    self._admitted, self._seen = added, {added: future}
                    self.gave_way.append(self._requests[row])
                    return True
                left[row] = tokens
        return False

    @cached_property
    def _heaviest(self) -> list[tuple[int, float]]:
        """Of the promises that may give way those that take the most work: their rows, and how much."""
        rows = [n for n, request in enumerate(self._requests) if request.standard and request.may_give_way]
        return sorted(((row, self._work_ms(row)) for row in rows), key=lambda each: -each[1])[:MOST_MOVED]

    def _hopeless(self, request: Request) -> str:
        """Why its targets can't be met even by a server of its own, if so."""
        if request.deadline_s <= self.now_s:
            return "its budget is spent"
        left_ms = (request.deadline_s - self.now_s) * 1e3
        if request.program_ms > left_ms:
            return f"its program needs {request.program_ms:.0f} ms even alone, {left_ms:.0f} ms are left"
        if request.uncached_tokens:
            alone_ms = self._cost.prefill_ms(request.uncached_tokens, prefix_tokens=request.context_tokens)
            time_ms = (request.due_s - self.now_s) * 1e3
            if alone_ms > time_ms + _EPSILON_MS:
                time = f"{max(time_ms, 0):.0f} ms"
                return f"its prefill takes {alone_ms:.0f} ms, its first token is due within {time}"
        return ""

    # The future ---------------------------------------------------------------------------------------------------

    def _future(self, added: frozenset[int]) -> _Future:
        """What becomes of everybody if the rows `added` are promised; remembered."""
        if added not in self._seen:
            future = self._foresee(added)
            if future.code == plan.LATE and future.row not in added and not self._baseline_known:
                # Whoever would be late without any newcomer is not the newcomer's fault.
                self._baseline_known = True
                self._excused = self._late_anyway()
                if self._excused.any():
                    self._seen.clear()
                    future = self._foresee(added)
            self._seen[added] = future
        return self._seen[added]

    def _foresee(self, added: frozenset[int]) -> _Future:
        """The future with the rows `added`; with batches that lend, where only these keep everybody's targets."""
        future, _ = self._run(added, self._world, self._excused)
        if future.code == plan.LATE:
            lent, _ = self._run(added, self._lending, self._excused)
            if lent.code == plan.KEPT:
                return lent
        return future

    def _late_anyway(self) -> Flags:
        """Who is late without any newcomer: the fewest that it can be."""
        everybody = np.ones_like(self._excused)
        worlds = (self._world, self._lending)
        return min((self._run(frozenset(), world, everybody)[1] for world in worlds), key=np.count_nonzero)

    def _run(self, added: frozenset[int], world: World, excused: Flags) -> tuple[_Future, Flags]:
        rows = copy_of(self._nobody_added)
        for row in added:
            rows.left[row] = self._all_rows.left[row]
        late = np.zeros_like(excused)
        return _Future(*plan.foresee(self.now_s, rows, world, excused, late), lends=world.lends), late

    def _holds(self, added: frozenset[int]) -> bool:
        return self._future(added).code == plan.KEPT

    def _reason(self, future: _Future, mine: int) -> str:
        at = f"in {(future.when_s - self.now_s) * 1e3:.0f} ms"
        if future.code == plan.LATE:
            whose = "its own" if future.row == mine else f"that of {self._requests[future.row].rid}, promised before,"
            return f"a token would be late {at}: {whose} is due by then"
        if future.code == plan.NO_MEMORY:
            return f"the KV cache would be full {at}"
        return f"no end of the decode load is in sight {at}"

    # Several at once ----------------------------------------------------------------------------------------------

    def _best(self, new: Sequence[Request], method: Method) -> frozenset[int]:
        """The most valuable set of `new` that `method` finds, as rows; it holds."""
        everybody = self._rows_of(new)
        if method == "auto" and self._holds(everybody):
            return everybody
        if method == "auto" and len(self._requests) << len(new) <= LOOK_AHEADS:
            return self._improved(self._extended(frozenset(), new), new)
        max_states = FEW_STATES if method == "auto" else dp.MAX_STATES
        chosen = dp.propose(self.now_s, self._promised, new, self._world, max_states=max_states)
        proposal = self._cut_down(self._rows_of(chosen or ()))
        if method == "dp":
            return proposal
        by_value = sorted(new, key=lambda r: (-self._worth(self._row[id(r)]), self._work_ms(self._row[id(r)]), r.seq))
        proposals = [self._extended(some, by_value) for some in (proposal, self._cut_down(everybody))]
        return self._improved(max(self._extended(frozenset(), new), *proposals, key=self._value), new)

    def _cut_down(self, added: frozenset[int]) -> frozenset[int]:
        """`added` without the heaviest for their value, each time of those due before the first that is late (as Moore
        and Hodgson do on one machine), until it holds or nobody is left.
        """
        while added and not self._holds(added):
            code, row, when_s, _ = self._future(added)
            due_s = max(self._requests[row].due_s, when_s) if code == plan.LATE else np.inf
            early = [row for row in sorted(added) if self._requests[row].due_s <= due_s]
            added -= {max(early or added, key=lambda row: (self._work_ms(row) / self._worth(row), row))}
        return added

    def _extended(self, added: frozenset[int], others: Sequence[Request]) -> frozenset[int]:
        """`added` and who else of `others` can be promised, the first ones first."""
        for row in (self._row[id(r)] for r in others):
            if row not in added and self._holds(added | {row}):
                added |= {row}
        return added

    def _improved(self, added: frozenset[int], new: Sequence[Request]) -> frozenset[int]:
        """A set that is worth more than `added` and holds, the least such ones tried first; else `added`."""
        if len(new) > MOST_TRIED:
            return added
        rows = np.array([self._row[id(r)] for r in new])
        members = _subsets(len(new))
        values = members @ np.array([self._worth(row) for row in rows])
        value = self._value(added)
        for number in np.argsort(values, kind="stable"):
            if len(self._seen) * len(self._requests) >= LOOK_AHEADS:
                break
            if values[number] > value:
                some = frozenset(rows[members[number]].tolist())
                if self._holds(some):
                    added, value = some, values[number]
        return added

    def _rows_of(self, requests: Sequence[Request]) -> frozenset[int]:
        return frozenset(self._row[id(r)] for r in requests)

    def _worth(self, row: int) -> float:
        return self._requests[row].worth

    def _value(self, added: frozenset[int]) -> float:
        return sum(self._worth(row) for row in sorted(added))

    def _work_ms(self, row: int) -> float:
        """What serving it takes, alone."""
        request, cost = self._requests[row], self._cost
        prefill_ms = cost.prefill_ms(max(request.uncached_tokens, 1), prefix_tokens=request.context_tokens)
        decode_ms = cost.decode_token_ms(request.context_tokens + request.uncached_tokens)
        return prefill_ms + int(self._all_rows.left[row]) * decode_ms


@lru_cache(maxsize=MOST_TRIED)
def _subsets(count: int) -> Flags:
    """Every subset of `count` things, a row each."""
    return (np.arange(1 << count)[:, None] >> np.arange(count) & 1).astype(np.bool_)
