"""An experiment: a policy, a workload, a server; run at a rate it gives the result object that live servers give too.

What must stay true: an experiment is a value. Everything that its result depends on is in it or in the source text of
what it runs, so that `key` names a run for good.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from typing import Any

from slos_sglang.measure.bound import Bound, attainment_bound, capacity_bound
from slos_sglang.measure.cache import RunCache, source_digest
from slos_sglang.measure.capacity import Capacity, Rule, find_capacity
from slos_sglang.measure.result import Percentiles, RunResult, summarize
from slos_sglang.policy.cost_models import NamedCostModel
from slos_sglang.sim.ablations import ABLATIONS
from slos_sglang.sim.baselines import POLICIES
from slos_sglang.sim.baselines.distserve import DistServe
from slos_sglang.sim.replica import Policy
from slos_sglang.sim.run import Lengths, Run, simulate
from slos_sglang.slo import OnDecline, WireSLO
from slos_sglang.workloads.program import Program, Stage
from slos_sglang.workloads.scenarios import Draw, at_rate
from slos_sglang.workloads.scenarios import scenario as make

KNOWN: Mapping[str, Callable[..., Policy]] = {**POLICIES, **ABLATIONS}


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What is run.

    policy    its name, and `options` for it as keyword arguments
    scenario  a scenario's name with the `draw` (whose seed a run replaces), or what to call the `programs` given
    model     what a replica really does, and what its policy believes
    replicas  servers like the model; programs go round
    lengths   what policies know of output lengths (see `simulate`)
    noise     sigma of a log-normal factor on every step's time
    acceptance  probability that a token of the model's draft model is accepted; 0: nothing is drafted
    rejects   a declined stage is refused at once, instead of being served with what is left over
    """

    policy: str
    scenario: str
    model: NamedCostModel
    options: Mapping[str, Any] = field(default_factory=dict)
    draw: Draw = field(default_factory=Draw)
    programs: tuple[Program, ...] | None = None
    replicas: int = 1
    lengths: Lengths = "estimated"
    noise: float = 0.0
    acceptance: float = 0.0
    rejects: bool = False

    def __post_init__(self) -> None:
        if self.policy not in KNOWN:
            raise ValueError(f"policy must be one of {', '.join(KNOWN)}, not {self.policy!r}")
        if self.replicas < 1:
            raise ValueError(f"replicas must be at least 1, not {self.replicas!r}")
        if not 0 <= self.noise < 1:
            raise ValueError(f"noise must be at least 0 and less than 1, not {self.noise!r}")
        if not isinstance(self.lengths, str) and not 0 < self.lengths < float("inf"):
            raise ValueError(f"lengths must be scaled by more than 0, not {self.lengths!r}")
        policy = self.policies()[0]
        if isinstance(policy, DistServe) and self.replicas % (policy.prefill + policy.decode):
            raise ValueError(
                f"replicas must be a multiple of distserve's {policy.prefill} + {policy.decode}, not {self.replicas}"
            )

    def policies(self) -> list[Policy]:
        """A fresh policy for each replica. Raises `ValueError` for an option that the policy has not."""
        try:
            return [
                KNOWN[self.policy](cost=self.model.cost(self.acceptance), **self.options) for _ in range(self.replicas)
            ]
        except TypeError as error:
            raise ValueError(f"options of policy {self.policy!r}: {error}") from None

    def workload(self, rate_req_s: float | None, seed: int) -> list[Program]:
        """The programs, at this rate; None keeps the arrivals of given programs."""
        if self.programs is None:
            return at_rate(
                _made(self.scenario, replace(self.draw, seed=seed)), 1.0 if rate_req_s is None else rate_req_s
            )
        if rate_req_s is None:
            return list(self.programs)
        return at_rate(self.programs, rate_req_s / mean_rate_req_s(self.programs))

    def simulate(self, rate_req_s: float | None, seed: int = 0, *, trace: bool = False, timed: bool = False) -> Run:
        """Run it."""
        policies = self.policies()
        return simulate(
            self.workload(rate_req_s, seed),
            policies,
            self.model.cost(self.acceptance),
            memory_tokens=self.model.kv_tokens,
            lengths=self.lengths,
            noise=self.noise,
            seed=seed,
            wire=partial(_wire, on_decline="reject" if self.rejects else "best_effort"),
            route=policies[0].route() if isinstance(policies[0], DistServe) else None,
            trace=trace,
            timed=timed,
        )

    def summary(self, run: Run, rate_req_s: float | None, seed: int) -> RunResult:
        """The result object of `run`."""
        result = summarize(
            run.programs,
            policy=self.policy,
            scenario=self.scenario,
            rate_req_s=mean_rate_req_s(self.workload(None, seed)) if rate_req_s is None else rate_req_s,
            seed=seed,
            wall_s=run.wall_s,
            replicas=self.replicas,
            config=self.config(),
        )
        decision_us = Percentiles.of([took_s * 1e6 for took_s in run.decision_s])
        return result.model_copy(update={"decisions": run.steps_run, "decision_us": decision_us})

    def config(self) -> dict[str, Any]:
        """What it was run with, as JSON values."""
        draw = {name: value for name, value in asdict(self.draw).items() if name not in ("data", "seed")}
        return {
            "cost_model": self.model.name,
            "kv_tokens": self.model.kv_tokens,
            "gpus": self.model.gpus * self.replicas,
            "options": {name: repr(value) for name, value in sorted(self.options.items())},
            "draw": draw if self.programs is None else None,
            "lengths": self.lengths,
            "noise": self.noise,
            "acceptance": self.acceptance,
            "rejects": self.rejects,
        }

    def result(self, rate_req_s: float, seed: int, cache: RunCache | None = None) -> RunResult:
        """Run it, or take the result from `cache`."""

        def run() -> RunResult:
            return self.summary(self.simulate(rate_req_s, seed), rate_req_s, seed)

        return cache.get(self.key(rate_req_s, seed), run) if cache else run()

    def capacity(
        self,
        seeds: Sequence[int],
        *,
        hint_req_s: float | None = None,
        target: float = 0.9,
        rule: Rule = "token",
        cache: RunCache | None = None,
        progress: Callable[[RunResult], None] = lambda result: None,
    ) -> Capacity:
        """Search its capacity (see `find_capacity`), from a share of the bounds where there is no better hint.

        `progress` is told the result of every run.
        """

        def run(rate_req_s: float, seed: int) -> RunResult:
            result = self.result(rate_req_s, seed, cache)
            progress(result)
            return result

        if hint_req_s is None:
            bound = self.bound(target=target)
            # Runs below capacity take less time than runs above it.
            hint_req_s = 0.4 * min(bound.kv_req_s, bound.tier_req_s)
        return find_capacity(run, seeds, hint_req_s=hint_req_s, target=target, rule=rule)

    def bound(self, *, target: float = 0.9) -> Bound:
        """The upper bounds on its capacity, programs a second for all replicas together."""
        bound = capacity_bound(self.workload(None, 0), self.model, target=target, acceptance=self.acceptance)
        return Bound(**{name: value * self.replicas for name, value in asdict(bound).items()})

    def attainment_bound(self, rate_req_s: float) -> float:
        """The upper bound on its attainment at this rate."""
        workload, rate = self.workload(None, 0), rate_req_s / self.replicas
        return attainment_bound(workload, self.model, rate_req_s=rate, acceptance=self.acceptance)

    def key(self, rate_req_s: float, seed: int) -> dict[str, Any]:
        """What names this run: see `RunCache`."""
        workload = repr(self.workload(rate_req_s, seed)).encode()
        sources = sorted({type(policy).__module__ for policy in self.policies()})
        return {
            "policy": self.policy,
            "scenario": self.scenario,
            "config": self.config(),
            "model": self.model.to_json(),
            "replicas": self.replicas,
            "rate_req_s": rate_req_s,
            "seed": seed,
            "workload": hashlib.sha256(workload).hexdigest(),
            "sources": source_digest(simulate.__module__, summarize.__module__, *sources),
        }


def mean_rate_req_s(programs: Sequence[Program]) -> float:
    """Programs a second from 0 to the last arrival; their number where that is at 0."""
    return len(programs) / (programs[-1].arrival_s or 1.0)


def _wire(program: Program, stage: Stage, *, on_decline: OnDecline) -> WireSLO | None:
    slo = replace(stage.wire(program.id), on_decline=on_decline)
    return slo if slo.constrained else None


@lru_cache(maxsize=32)
def _made(name: str, draw: Draw) -> tuple[Program, ...]:
    return tuple(make(name, draw))
