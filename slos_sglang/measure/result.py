"""What a run came to: one result object for simulator and live server (INTERFACES, section 6).

What must stay true: every program that was offered is in every denominator. One that failed, timed out, was
aborted or refused (HTTP 429) has not attained. Nothing here reads a clock or knows who produced the times.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from slos_sglang.measure.attainment import Targets, kept_mean_rule, kept_token_rule, mean_tpot_ms

Outcome = Literal["finished", "declined", "failed"]


@dataclass(frozen=True, kw_only=True)
class StageRecord:
    """What was observed of one stage.

    arrival_s, token_s  seconds on one clock: the request's arrival and the time of each output token
    think_tokens        how many of the tokens were thinking
    outcome             "finished": all its output came; "declined": refused with 429; "failed": anything else
    declined            the scheduler judged that it can't keep the targets (also where it then served it)
    best_effort         served without a guarantee
    """

    name: str
    targets: Targets
    arrival_s: float
    token_s: tuple[float, ...]
    think_tokens: int = 0
    outcome: Outcome = "finished"
    declined: bool = False
    best_effort: bool = False
    ended_s: float | None = None

    @property
    def attained(self) -> bool:
        """The token rule held and the stage came to its end."""
        return self._kept(kept_token_rule)

    @property
    def attained_mean_tpot(self) -> bool:
        """The mean rule held and the stage came to its end."""
        return self._kept(kept_mean_rule)

    def _kept(self, rule: Callable[[Targets, float, Sequence[float], int], bool]) -> bool:
        finished = self.outcome == "finished"
        return finished and rule(self.targets, self.arrival_s, self.token_s, self.think_tokens)


@dataclass(frozen=True, kw_only=True)
class ProgramRecord:
    """One offered program and the stages of it that were sent, in order.

    `completed` is False where a stage that should have followed never came.
    """

    id: str
    stages: tuple[StageRecord, ...]
    completed: bool = True

    @property
    def finished(self) -> bool:
        """All its stages came to their end."""
        return self.completed and all(stage.outcome == "finished" for stage in self.stages)

    @property
    def attained(self) -> bool:
        """All its stages kept the token rule."""
        return self.completed and all(stage.attained for stage in self.stages)

    @property
    def attained_mean_tpot(self) -> bool:
        """All its stages kept the mean rule."""
        return self.completed and all(stage.attained_mean_tpot for stage in self.stages)


class Percentiles(BaseModel):
    """Percentiles of a sample, in the unit the field's name ends in; None where the sample is empty."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    p50: float | None
    p90: float | None
    p99: float | None

    @classmethod
    def of(cls, sample: Sequence[float]) -> Percentiles:
        """Nearest-rank percentiles: each is a value of the sample."""
        ordered = sorted(sample)

        def rank(share: float) -> float | None:
            return ordered[max(math.ceil(share * len(ordered)), 1) - 1] if ordered else None

        return cls(p50=rank(0.50), p90=rank(0.90), p99=rank(0.99))


class RunResult(BaseModel):
    """One run of one policy under one workload; rates are programs a second, shares are of all offered.

    `declined` and `best_effort` count programs with at least one such stage; `attainment_admitted` is the share (token
    rule) of the programs without a best-effort stage, None where there is none. `stage_attainment` (token rule)
    and `stage_attainment_mean_tpot` are per stage name, over the stages that were sent. `tokens_per_s` counts
    output. `decisions` and `decision_us` are 0 and empty where the policy could not be observed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    policy: str
    scenario: str
    rate_req_s: float
    replicas: int = 1
    seed: int
    offered: int
    finished: int
    declined: int
    best_effort: int
    attainment: float
    attainment_mean_tpot: float
    attainment_admitted: float | None = None
    goodput_req_s: float
    ttft_ms: Percentiles
    tpot_ms: Percentiles
    stage_attainment: dict[str, float]
    stage_attainment_mean_tpot: dict[str, float]
    tokens_per_s: float
    decisions: int = 0
    decision_us: Percentiles = Percentiles(p50=None, p90=None, p99=None)
    wall_s: float
    config: dict[str, Any]


def summarize(
    programs: Sequence[ProgramRecord],
    *,
    policy: str,
    scenario: str,
    rate_req_s: float,
    seed: int,
    wall_s: float,
    replicas: int = 1,
    config: dict[str, Any] | None = None,
) -> RunResult:
    """The result of a run that offered `programs` and took `wall_s` seconds, first arrival to last token.

    Raises `ValueError` where nothing was offered or the duration is not positive.
    """
    if not programs:
        raise ValueError("programs must hold at least one offered program, not 0")
    if not wall_s > 0:
        raise ValueError(f"wall_s must be greater than 0, not {wall_s!r}")
    stages = [stage for program in programs for stage in program.stages]
    by_name: dict[str, list[StageRecord]] = {}
    for stage in stages:
        by_name.setdefault(stage.name, []).append(stage)
    attained = sum(program.attained for program in programs)
    admitted = [program for program in programs if not any(stage.best_effort for stage in program.stages)]
    tpots = [mean_tpot_ms(stage.token_s) for stage in stages]
    return RunResult(
        policy=policy,
        scenario=scenario,
        rate_req_s=rate_req_s,
        replicas=replicas,
        seed=seed,
        offered=len(programs),
        finished=sum(program.finished for program in programs),
        declined=sum(any(stage.declined for stage in program.stages) for program in programs),
        best_effort=sum(any(stage.best_effort for stage in program.stages) for program in programs),
        attainment=attained / len(programs),
        attainment_mean_tpot=sum(program.attained_mean_tpot for program in programs) / len(programs),
        attainment_admitted=_share([program.attained for program in admitted]) if admitted else None,
        goodput_req_s=attained / wall_s,
        ttft_ms=Percentiles.of([(s.token_s[0] - s.arrival_s) * 1e3 for s in stages if s.token_s]),
        tpot_ms=Percentiles.of([tpot for tpot in tpots if tpot is not None]),
        stage_attainment={n: _share([s.attained for s in sent]) for n, sent in sorted(by_name.items())},
        stage_attainment_mean_tpot={
            n: _share([s.attained_mean_tpot for s in sent]) for n, sent in sorted(by_name.items())
        },
        tokens_per_s=sum(len(stage.token_s) for stage in stages) / wall_s,
        wall_s=wall_s,
        config=config or {},
    )


def _share(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags)
