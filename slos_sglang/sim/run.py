"""The discrete-event simulation of a server, or several: programs in, what became of them out.

Time moves from event to event: a stage arrives, a client hangs up, a step ends. Events have a total order (time, kind,
number), and every source of chance has a seeded stream of its own: the same arguments give the same bytes. A policy
sees an output's length in `Request.left_tokens` only, and exactly only where lengths are known ("oracle").

What must stay true: when arrivals stop, everything drains; every call ends or is told why.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

from slos_sglang.measure.attainment import Targets
from slos_sglang.measure.result import ProgramRecord, StageRecord
from slos_sglang.policy.batch_time import CostModel
from slos_sglang.policy.lengths import LengthEstimator
from slos_sglang.policy.request import INF, Request
from slos_sglang.sim.memory import KVMemory
from slos_sglang.sim.replica import Call, Place, Policy, Replica, Step
from slos_sglang.sim.routing import RoundRobin, Route, Routed
from slos_sglang.slo import WireSLO
from slos_sglang.workloads.program import Program, Stage

# A bound on steps that no sane policy meets: what it takes to compute every token alone, this many times over.
_STEPS_PER_TOKEN = 10

Lengths = Literal["oracle", "estimated"] | float


@dataclass(frozen=True, kw_only=True)
class Abort:
    """The client of a program hangs up at `at_s`; what follows in the program never comes."""

    program: str
    at_s: float


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a simulation saw.

    programs    one record an offered program, in the order given; for `measure.result.summarize`
    calls       every stage that arrived, in order of arrival, with the policy's own account of it (`call.request`)
    start_s     first arrival; `end_s`: last event
    steps       every step that was run, where the run was traced
    decision_s  what each step's admission and batch formation took, where the run was timed; the only thing here that
                differs between two runs
    """

    programs: tuple[ProgramRecord, ...]
    calls: tuple[Call, ...]
    start_s: float
    end_s: float
    steps_run: int
    preemptions: int
    evicted_tokens: int
    steps: tuple[Step, ...] = ()
    decision_s: tuple[float, ...] = ()

    @property
    def wall_s(self) -> float:
        """Simulated time from the first arrival to the last event, s."""
        return self.end_s - self.start_s


class _Kind(IntEnum):
    """Events at the same time: tokens come first, then clients go, then others come."""

    STEP_ENDS = 0
    ABORT = 1
    ARRIVAL = 2


def _wire(program: Program, stage: Stage) -> WireSLO | None:
    slo = stage.wire(program.id)
    return slo if slo.constrained else None


def simulate(
    programs: Sequence[Program],
    policies: Sequence[Policy],
    true_cost: CostModel,
    *,
    memory_tokens: int,
    block_tokens: int = 16,
    lengths: Lengths = "oracle",
    noise: float = 0.0,
    seed: int = 0,
    aborts: Sequence[Abort] = (),
    route: Route | None = None,
    max_tokens: int = 1 << 30,
    wire: Callable[[Program, Stage], WireSLO | None] = _wire,
    trace: bool = False,
    timed: bool = False,
) -> Run:
    """Serve `programs` to their ends.

    policies       one a replica
    true_cost      what steps really take, times a log-normal factor of sigma `noise`; TTFT slowdowns refer to it too
    memory_tokens  KV of a replica, in blocks of `block_tokens`
    lengths        what policies know of output lengths: exactly, their own estimate, or the true length times a factor
    route          which replica a call goes to; by default the policies' own, or programs go round
    max_tokens     cap on the output that every call is sent with
    wire           the targets that a stage is sent with
    trace, timed   record every step and verdict; record what decisions took

    Raises `ValueError` where a stage could never fit into memory, or a program is aborted that is not offered.
    """
    return _Simulation(
        programs,
        [
            Replica(
                index,
                policy,
                true_cost,
                KVMemory(capacity_tokens=memory_tokens, block_tokens=block_tokens),
                lengths=LengthEstimator() if lengths == "estimated" else None,
                noise=noise,
                seed=seed,
                trace=trace,
                timed=timed,
            )
            for index, policy in enumerate(policies)
        ],
        lengths=lengths,
        route=route or (policies[0].route() if isinstance(policies[0], Routed) else RoundRobin()),
        max_tokens=max_tokens,
        wire=wire,
    ).run(aborts)


class _Simulation:
    def __init__(
        self,
        programs: Sequence[Program],
        replicas: Sequence[Replica],
        *,
        lengths: Lengths,
        route: Route,
        max_tokens: int,
        wire: Callable[[Program, Stage], WireSLO | None],
    ) -> None:
        self.programs, self.replicas = programs, replicas
        self.lengths, self.route, self.max_tokens, self.wire = lengths, route, max_tokens, wire
        self.calls: list[Call] = []
        self.events: list[tuple[float, _Kind, int, Replica | Program | tuple[Program, int]]] = []
        self.pushed = 0
        # The stage that each program is in, and the programs whose clients have gone.
        self.current: dict[str, Call] = {}
        self.gone: set[str] = set()
        self._check_sizes()
        work = sum(s.prompt_tokens + s.output_tokens for program in programs for s in program.stages)
        self.most_steps = _STEPS_PER_TOKEN * work

    def _check_sizes(self) -> None:
        memory = self.replicas[0].memory
        self.capacity_tokens = memory.capacity_blocks * memory.block_tokens
        for program in self.programs:
            for stage in program.stages:
                if memory.blocks(stage.prompt_tokens + stage.output_tokens) > memory.capacity_blocks:
                    raise ValueError(
                        f"prompt_tokens + output_tokens of program {program.id!r}, stage {stage.name!r} must fit into "
                        f"{self.capacity_tokens} KV tokens, "
                        f"not be {stage.prompt_tokens + stage.output_tokens}"
                    )

    def push(self, at_s: float, kind: _Kind, what: Replica | Program | tuple[Program, int]) -> None:
        heapq.heappush(self.events, (at_s, kind, self.pushed, what))
        self.pushed += 1

    def run(self, aborts: Sequence[Abort]) -> Run:
        for program in self.programs:
            self.push(program.arrival_s, _Kind.ARRIVAL, (program, 0))
        by_id = {program.id: program for program in self.programs}
        for abort in aborts:
            if abort.program not in by_id:
                raise ValueError(f"program {abort.program!r} of an abort is not among those offered")
            self.push(abort.at_s, _Kind.ABORT, by_id[abort.program])
        now_s = 0.0
        events = self.events
        while events:
            now_s = events[0][0]
            while events and events[0][0] == now_s:
                _, _, _, what = heapq.heappop(events)
                if isinstance(what, Replica):
                    self._step_ends(what, now_s)
                elif isinstance(what, Program):
                    self._abort(what)
                else:
                    self._arrive(*what, now_s)
            while awake := [r for r in self.replicas if r.awake and r.batch is None]:
                for replica in awake:
                    self._decide(replica, now_s)
        for call in self.calls:
            assert call.place is Place.ENDED, f"{call.request.rid} never ended: it is {call.place.name.lower()}"
        for replica in self.replicas:
            assert replica.memory.held_blocks == 0, f"replica {replica.index} holds KV of nobody"
        return self._report(now_s)

    # Events ------------------------------------------------------------------------------------------------------

    def _arrive(self, program: Program, number: int, now_s: float) -> None:
        if program.id in self.gone:
            return
        stage = program.stages[number]
        call = Call(
            program=program,
            number=number,
            request=Request(
                rid=f"{program.id}/{number}",
                seq=len(self.calls),
                arrival_s=now_s,
                slo=self.wire(program, stage),
                max_tokens=min(self.max_tokens, self.capacity_tokens - stage.prompt_tokens),
            ),
        )
        request = call.request
        request.handle = call
        self._tell_length(request, stage)
        self.calls.append(call)
        self.current[program.id] = call
        self.replicas[self.route.arrival(call, self.replicas)].arrive(call, now_s)

    def _tell_length(self, request: Request, stage: Stage) -> None:
        if self.lengths == "estimated":
            return
        factor = 1.0 if self.lengths == "oracle" else float(self.lengths)
        request.left_tokens = max(round(stage.output_tokens * factor), 1)
        request.sure_tokens = request.most_tokens = request.left_tokens
        if stage.think_tpot_ms is not None:
            request.think_tokens = max(round(stage.think_tokens * factor), 1)

    def _abort(self, program: Program) -> None:
        self.gone.add(program.id)
        call = self.current.pop(program.id, None)
        if call is not None:
            self.replicas[call.replica].abort(call)

    def _step_ends(self, replica: Replica, now_s: float) -> None:
        ended, prefilled = replica.finish(now_s)
        for call in prefilled:
            target = self.route.prefilled(call, self.replicas)
            if target != replica.index:
                replica.hand_over(call, self.replicas[target])
        for call in ended:
            self._ended(call, now_s)

    def _decide(self, replica: Replica, now_s: float) -> None:
        step_s, rejected = replica.decide(now_s)
        for call in rejected:
            self._ended(call, now_s)
        if step_s is not None:
            assert replica.step_count < self.most_steps, "steps go on and on, and nobody gets anywhere"
            self.push(now_s + step_s, _Kind.STEP_ENDS, replica)

    def _ended(self, call: Call, now_s: float) -> None:
        program, following = call.program, call.number + 1
        self.current.pop(program.id, None)
        if call.outcome == "finished" and following < len(program.stages):
            self.push(now_s + call.stage.after_s, _Kind.ARRIVAL, (program, following))

    # The report --------------------------------------------------------------------------------------------------

    def _report(self, end_s: float) -> Run:
        stages: dict[str, list[StageRecord]] = {program.id: [] for program in self.programs}
        for call in self.calls:
            stages[call.program.id].append(_record(call))
        return Run(
            programs=tuple(
                ProgramRecord(
                    id=program.id,
                    stages=tuple(stages[program.id]),
                    completed=len(stages[program.id]) == len(program.stages),
                )
                for program in self.programs
            ),
            calls=tuple(self.calls),
            start_s=min((program.arrival_s for program in self.programs), default=0.0),
            end_s=end_s,
            steps_run=sum(replica.step_count for replica in self.replicas),
            preemptions=sum(replica.preemptions for replica in self.replicas),
            evicted_tokens=sum(replica.memory.evicted_tokens for replica in self.replicas),
            steps=tuple(step for replica in self.replicas for step in replica.steps),
            decision_s=tuple(took_s for replica in self.replicas for took_s in replica.decision_s),
        )


def _record(call: Call) -> StageRecord:
    request, stage, slo = call.request, call.stage, call.request.slo
    assert call.outcome is not None
    return StageRecord(
        name=stage.name,
        targets=Targets(
            ttft_ms=None if request.ttft_s == INF else request.ttft_s * 1e3,
            tpot_ms=slo.tpot_ms if slo else None,
            think_tpot_ms=slo.think_tpot_ms if slo else None,
            e2e_ms=slo.budget_ms if slo else None,
        ),
        arrival_s=request.arrival_s,
        token_s=tuple(call.token_s),
        think_tokens=stage.think_tokens,
        outcome=call.outcome,
        declined=request.declined,
        best_effort=not request.standard,
    )
