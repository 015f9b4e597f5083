"""The paper's evaluation in simulation: capacity per GPU of every policy on every scenario, and what it hangs on.

    python benchmarks/paper.py [--quick] [--seeds N] [--jobs N] [--only SECTION ..]

What is compared. Capacity is the highest rate at which 90 % of all offered programs attain, token rule, per GPU; a
conversation finds nothing cached (as in the paper), and Sarathi and DistServe are shown at the best of their settings.
Sections:

    capacity   every policy x scenario on the paper's servers, output lengths known; the scheduler also with estimates
    speculation  with a draft model, on servers that have one: the scheduler, and others at the best of their drafts
    mean       the same by the mean-TPOT rule, main policies
    models     OPT-6.7B on one A100 and OPT-30B on four
    held_out   windows, seeds and a server that nobody tuned on
    overload   attainment and goodput at shares of the scheduler's capacity, to three times it
    burst      ten times the sustainable rate for five seconds
    ablations  the scheduler without one of its ideas, and with wrong lengths
    noise      steps that vary: the scheduler, learning its cost model as on a server, and others, who know it
    replicas   two and four servers
    cache      tool programs with a prefix cache

Runs are kept in out/paper/ under everything they depend on, so that a second call makes only those that changed;
`--only` keeps what was found in other sections.
Writes benchmarks/results/paper.json and figures into docs/; `python benchmarks/report.py` writes the page.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from paper_figures import BURST_S, OVERLOADS, draw
from rich.console import Console
from rich.progress import Progress

from slos_sglang.measure.cache import RunCache
from slos_sglang.measure.capacity import Rule
from slos_sglang.measure.result import ProgramRecord
from slos_sglang.policy.cost_models import COST_MODELS
from slos_sglang.sim.experiment import Experiment
from slos_sglang.workloads.scenarios import COST_MODEL_OF, Draw, at_rates, scenario

CACHE, RESULT, FIGURES = Path("out/paper"), Path("benchmarks/results/paper.json"), Path("docs")
TARGET = 0.9
BUDGETS = (128, 256, 512, 1024, 2048, 4096)
ACCEPTANCE, OTHER_ACCEPTANCES = 0.7, (0.6, 0.8)
RATIOS = ((1, 1), (2, 1), (1, 2))
FACTORS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0)
NOISE = (0.05, 0.1, 0.2)
PROGRAMS = {"chatbot": 1000, "coder": 559, "summarizer": 600, "mixed": 1200, "toolllm": 600, "reasoning": 400}
# Reasoning needs long runs: a few programs that think for minutes fit onto any server.
QUICK_PROGRAMS = {"chatbot": 200, "coder": 200, "summarizer": 150, "mixed": 240, "toolllm": 80}
# Where searches look first, programs a second per GPU: about what vLLM does. Only the time they take depends on it.
HINTS = {"chatbot": 1.6, "coder": 0.4, "summarizer": 1.3, "mixed": 1.1, "toolllm": 0.7, "reasoning": 0.4}
BURST_FACTOR, CALM_FACTOR, BIN_S = 10.0, 0.7, 2.5
Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One piece of work for one process; `label` is what tables and figures call it.

    The rates are run with the first seed, those of them that are `again_req_s` with the others, too.
    """

    section: str
    label: str
    experiment: Experiment
    rule: Rule = "token"
    seeds: tuple[int, ...] = (0,)
    rates_req_s: tuple[float, ...] = ()
    again_req_s: tuple[float, ...] = ()

    def record(self, **found: Any) -> Record:
        """What was found, with what it was found for."""
        gpus = self.experiment.model.gpus * self.experiment.replicas
        about = {"section": self.section, "label": self.label, "scenario": self.experiment.scenario, "gpus": gpus}
        return {**about, "config": self.experiment.config(), **found}


def search(job: Job) -> Record:
    """Capacity, its bounds, and a run at capacity."""
    experiment, cache = job.experiment, RunCache(folder=CACHE)
    hint_req_s = HINTS[experiment.scenario] * experiment.model.gpus * experiment.replicas
    found = experiment.capacity(job.seeds, hint_req_s=hint_req_s, target=TARGET, rule=job.rule, cache=cache)
    bound = experiment.bound(target=TARGET)
    first = found.by_seed_req_s[0]
    at_capacity = experiment.result(first, job.seeds[0], cache).model_dump() if first else None
    return job.record(
        rule=job.rule,
        capacity=found.model_dump(),
        kv_req_s=bound.kv_req_s,
        tier_req_s=bound.tier_req_s,
        loss_req_s=bound.loss_req_s,
        at_capacity=at_capacity,
    )


def sweep(job: Job) -> Record:
    """Runs at given rates, and the bounds there."""
    experiment, cache = job.experiment, RunCache(folder=CACHE)
    first, *others = job.seeds
    return job.record(
        runs=[experiment.result(rate, first, cache).model_dump() for rate in job.rates_req_s],
        again=[experiment.result(rate, seed, cache).model_dump() for rate in job.again_req_s for seed in others],
        bounds=[experiment.attainment_bound(rate) for rate in job.rates_req_s],
    )


def burst(job: Job) -> Record:
    """What programs met by when they arrived, in bins of `BIN_S`."""
    run = job.experiment.simulate(None, job.seeds[0])
    admitted = [program for program in run.programs if not any(stage.best_effort for stage in program.stages)]
    return job.record(all=_bins(run.programs), admitted=_bins(admitted))


def _bins(programs: Sequence[ProgramRecord]) -> list[Record]:
    bins: dict[int, list[ProgramRecord]] = {}
    for program in programs:
        bins.setdefault(int(program.stages[0].arrival_s // BIN_S), []).append(program)
    return [
        {
            "at_s": number * BIN_S,
            "offered": len(found),
            "attainment": sum(program.attained for program in found) / len(found),
            "ttft_p99_ms": _p99([(s.token_s[0] - s.arrival_s) * 1e3 for p in found for s in p.stages if s.token_s]),
            "tpot_p99_ms": _p99([gap * 1e3 for p in found for s in p.stages for gap in _mean_gap_s(s.token_s)]),
        }
        for number, found in sorted(bins.items())
    ]


def _mean_gap_s(token_s: Sequence[float]) -> list[float]:
    return [(token_s[-1] - token_s[0]) / (len(token_s) - 1)] if len(token_s) > 1 else []


def _p99(sample: list[float]) -> float | None:
    return sorted(sample)[max(-(-99 * len(sample) // 100), 1) - 1] if sample else None


@dataclass(frozen=True, kw_only=True)
class Bench:
    """The whole plan; `quick` runs fewer programs, policies and points."""

    quick: bool
    seeds: tuple[int, ...]
    progress: Progress
    pool: ProcessPoolExecutor

    @property
    def programs(self) -> dict[str, int]:
        """How many programs of which scenario."""
        return QUICK_PROGRAMS if self.quick else PROGRAMS

    def experiment(self, name: str, policy: str, *, model: str | None = None, **changes: Any) -> Experiment:
        """A policy on a scenario on the paper's server, as in the paper but for `changes`."""
        replicas = changes.get("replicas", 1)
        programs = self.programs[name] * replicas
        given = {"draw": Draw(programs=programs, prefix_cache=False), "lengths": "oracle", **changes}
        return Experiment(policy=policy, scenario=name, model=COST_MODELS[model or COST_MODEL_OF[name]], **given)

    def policies(self, name: str, budgets: Sequence[int] = BUDGETS, **changes: Any) -> list[tuple[str, Experiment]]:
        """vLLM and Sarathi with each of these budgets."""
        sarathi = [("sarathi", {"budget_tokens": budget}) for budget in budgets]
        return [
            (policy, self.experiment(name, policy, options=options, **changes))
            for policy, options in [("vllm", {}), *sarathi]
        ]

    def run(self, title: str, work: Callable[[Job], Record], jobs: Iterable[Job]) -> list[Record]:
        """The records of all `jobs`, in their order."""
        listed = list(jobs)
        task = self.progress.add_task(title, total=len(listed))
        futures = [self.pool.submit(work, job) for job in listed]
        for future in futures:
            future.add_done_callback(lambda _: self.progress.advance(task))
        return [future.result() for future in futures]

    def capacity(self) -> list[Record]:
        jobs = []
        for name in self.programs:
            budgets = (512, 2048) if self.quick else BUDGETS
            found = self.policies(name, budgets)
            for policy in ("sglang", "qoserve", "edf", "slos", *(() if self.quick else ("vllm_v1", "sglang_mixed"))):
                found.append((policy, self.experiment(name, policy)))
            found.append(("slos, estimated", self.experiment(name, "slos", lengths="estimated")))
            for prefill, decode in RATIOS[:1] if self.quick else RATIOS:
                options = {"prefill": prefill, "decode": decode}
                found.append(
                    ("distserve", self.experiment(name, "distserve", options=options, replicas=prefill + decode))
                )
            jobs += [Job(section="capacity", label=label, experiment=e, seeds=self.seeds) for label, e in found]
        return self.run("capacity", search, jobs)

    def speculation(self) -> list[Record]:
        """Capacity with a draft model, and the scheduler at 1.5 times its own."""
        jobs = []
        for name in ("chatbot", "coder", "summarizer", "mixed"):
            tried: list[tuple[str, dict[str, Any], float]] = [("slos", {}, ACCEPTANCE)]
            tried += [("slos", {}, acceptance) for acceptance in OTHER_ACCEPTANCES]
            tried += [("vllm", {"drafts": drafts}, ACCEPTANCE) for drafts in (2, 3, 4)]
            for budget in (1024, 2048):
                tried += [("sarathi", {"budget_tokens": budget, "drafts": drafts}, ACCEPTANCE) for drafts in (1, 2, 3)]
            tried += [
                (policy, {"drafts": drafts}, ACCEPTANCE) for policy in ("qoserve", "edf", "sglang") for drafts in (2, 3)
            ]
            found = [
                (policy, self.experiment(name, policy, options=options, acceptance=acceptance))
                for policy, options, acceptance in tried
            ]
            found.append(("slos, estimated", self.experiment(name, "slos", lengths="estimated", acceptance=ACCEPTANCE)))
            jobs += [Job(section="speculation", label=label, experiment=e, seeds=self.seeds) for label, e in found]
        records = self.run("speculation", search, jobs)
        tops = {
            record["scenario"]: record["capacity"]["rate_req_s"]
            for record in records
            if (record["label"], record["config"]["acceptance"]) == ("slos", ACCEPTANCE)
        }
        over = [
            Job(
                section="speculation_overload",
                label="slos",
                experiment=self.experiment(name, "slos", acceptance=ACCEPTANCE),
                seeds=self.seeds,
                rates_req_s=(OVERLOADS[0] * top,),
                again_req_s=(OVERLOADS[0] * top,),
            )
            for name, top in tops.items()
        ]
        return records + self.run("speculation, overload", sweep, over)

    def mean(self) -> list[Record]:
        jobs = []
        for name in self.programs:
            found = self.policies(name, (256, 512, 1024, 2048))
            found += [(policy, self.experiment(name, policy)) for policy in ("sglang", "qoserve", "edf", "slos")]
            jobs += [Job(section="mean", label=a, experiment=e, rule="mean", seeds=self.seeds) for a, e in found]
        return self.run("mean-TPOT rule", search, jobs)

    def models(self) -> list[Record]:
        jobs = []
        for model in ("opt-6.7b-a100", "opt-30b-a100-tp4"):
            for name in ("chatbot", "coder", "summarizer", "mixed"):
                found = [
                    *self.policies(name, (512, 1024, 2048, 4096), model=model),
                    ("slos", self.experiment(name, "slos", model=model)),
                ]
                jobs += [Job(section="models", label=label, experiment=e) for label, e in found]
        return self.run("other models", search, jobs)

    def held_out(self) -> list[Record]:
        jobs = []
        for name, window_s, model in (
            ("coder", 600.0, None),
            ("chatbot", 1200.0, None),
            ("mixed", 600.0, None),
            ("summarizer", None, None),
            ("toolllm", None, None),
            ("reasoning", None, None),
            ("chatbot", 0.0, "llama-3.1-8b-a100"),
            ("coder", 0.0, "llama-3.1-8b-a100"),
        ):
            if name not in self.programs:
                continue
            draw = Draw(programs=self.programs[name], window_start_s=window_s, prefix_cache=False)
            changes: dict[str, Any] = {"draw": draw, "model": model}
            found = self.policies(name, (512, 1024, 2048, 4096), **changes)
            found.append(("slos", self.experiment(name, "slos", **changes)))
            jobs += [Job(section="held_out", label=label, experiment=e, seeds=(11,)) for label, e in found]
        return self.run("held out", search, jobs)

    def overload(self, capacities: Sequence[Record]) -> list[Record]:
        jobs = []
        for name in self.programs:
            top = best(capacities, name, "slos")["capacity"]["rate_req_s"]
            rates = tuple(top * factor for factor in (FACTORS[3::2] if self.quick else FACTORS))
            again = tuple(top * factor for factor in OVERLOADS)
            for policy in ("slos", "vllm", "sarathi", "sglang", "qoserve"):
                tuned = self.tuned(capacities, name, policy)
                at = {"seeds": self.seeds, "rates_req_s": rates, "again_req_s": again}
                jobs.append(Job(section="overload", label=policy, experiment=tuned, **at))
        return self.run("overload", sweep, jobs)

    def burst(self, capacities: Sequence[Record]) -> list[Record]:
        name = "chatbot"
        top = best(capacities, name, "slos")["capacity"]["rate_req_s"]
        calm = CALM_FACTOR * top
        phases = [(BURST_S[0], calm), (BURST_S[1] - BURST_S[0], BURST_FACTOR * top), (60.0, calm)]
        count = round(sum(seconds * rate for seconds, rate in phases))
        programs = tuple(at_rates(scenario(name, Draw(programs=count)), phases))
        jobs = []
        for policy in ("slos", "vllm", "sarathi", "sglang", "qoserve"):
            tuned = replace(self.tuned(capacities, name, policy), programs=programs)
            jobs.append(Job(section="burst", label=policy, experiment=tuned))
        return self.run("burst", burst, jobs)

    def ablations(self) -> list[Record]:
        jobs = []
        for name in ("chatbot", "coder", "toolllm"):
            found = {
                "all ideas": self.experiment(name, "slos"),
                "no admission": self.experiment(name, "slos_admits_all"),
                "batches of at most 512 tokens": self.experiment(name, "slos_fixed_batch"),
                "no best effort": self.experiment(name, "slos", rejects=True),
                "lengths estimated": self.experiment(name, "slos", lengths="estimated"),
                "lengths halved": self.experiment(name, "slos", lengths=0.5),
                "lengths doubled": self.experiment(name, "slos", lengths=2.0),
            }
            jobs += [Job(section="ablations", label=label, experiment=e) for label, e in found.items()]
        return self.run("ablations", search, jobs)

    def noise(self, capacities: Sequence[Record]) -> list[Record]:
        jobs = []
        for name in ("chatbot", "coder", "toolllm"):
            found = {
                "slos": self.experiment(name, "slos_learns_cost"),
                "slos, no margin": self.experiment(name, "slos"),
                "qoserve": self.experiment(name, "qoserve"),
                "edf": self.experiment(name, "edf"),
                "sarathi": self.tuned(capacities, name, "sarathi"),
            }
            jobs += [
                Job(section="noise", label=label, experiment=replace(e, noise=noise))
                for noise in NOISE
                for label, e in found.items()
            ]
        return self.run("steps that vary", search, jobs)

    def replicas(self) -> list[Record]:
        jobs = []
        for name in ("chatbot", "coder", "toolllm"):
            for count in (1, 2, 4):
                one = self.experiment(name, "slos", replicas=count)
                jobs.append(Job(section="replicas", label="slos", experiment=one))
        return self.run("replicas", search, jobs)

    def cache(self) -> list[Record]:
        draw = Draw(programs=self.programs["toolllm"])
        found = self.policies("toolllm", (512, 1024, 2048), draw=draw)
        found += [(policy, self.experiment("toolllm", policy, draw=draw)) for policy in ("qoserve", "slos")]
        return self.run("prefix cache", search, [Job(section="cache", label=label, experiment=e) for label, e in found])

    def tuned(self, capacities: Sequence[Record], name: str, policy: str) -> Experiment:
        """The policy with the options that gave it its best capacity."""
        options = {key: json.loads(value) for key, value in best(capacities, name, policy)["config"]["options"].items()}
        return self.experiment(name, policy, options=options)


def best(records: Sequence[Record], name: str, label: str) -> Record:
    """The record of the highest capacity per GPU on this scenario under this label."""
    found = [record for record in records if (record["scenario"], record["label"]) == (name, label)]
    return max(found, key=lambda record: record["capacity"]["rate_req_s"] / record["gpus"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few programs and policies, under 5 minutes")
    parser.add_argument("--seeds", type=int, default=2, help="seeds of the sections capacity, mean and overload")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--only", nargs="*", default=[], metavar="SECTION", help="these sections and capacity")
    given = parser.parse_args()
    if unknown := sorted(set(given.only) - {"capacity", *LATER}):
        parser.error(f"unknown section {unknown[0]!r}; known: capacity, {', '.join(LATER)}")
    wanted = given.only or (["overload", "burst"] if given.quick else list(LATER))
    sections = [section for section in LATER if section in wanted]
    with Progress(console=Console(stderr=True)) as progress, ProcessPoolExecutor(max_workers=given.jobs) as pool:
        seeds = tuple(range(1 if given.quick else given.seeds))
        bench = Bench(quick=given.quick, seeds=seeds, progress=progress, pool=pool)
        records = bench.capacity()
        for section in sections:
            records += LATER[section](bench, records)
    if given.only:
        records += _kept(given.quick, {record["section"] for record in records})
    command = "python benchmarks/paper.py" + " --quick" * given.quick
    result = {"quick": given.quick, "seeds": len(seeds), "command": command, "records": records}
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draw(result, FIGURES)


def _kept(quick: bool, measured: set[str]) -> list[Record]:
    """What the last call of the same kind found in other sections."""
    last = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {"quick": quick, "records": []}
    return [record for record in last["records"] if record["section"] not in measured and last["quick"] == quick]


def _only(records: Sequence[Record]) -> list[Record]:
    return [record for record in records if record["section"] == "capacity"]


LATER: dict[str, Callable[[Bench, Sequence[Record]], list[Record]]] = {
    "speculation": lambda bench, records: bench.speculation(),
    "mean": lambda bench, records: bench.mean(),
    "models": lambda bench, records: bench.models(),
    "held_out": lambda bench, records: bench.held_out(),
    "overload": lambda bench, records: bench.overload(_only(records)),
    "burst": lambda bench, records: bench.burst(_only(records)),
    "ablations": lambda bench, records: bench.ablations(),
    "noise": lambda bench, records: bench.noise(_only(records)),
    "replicas": lambda bench, records: bench.replicas(),
    "cache": lambda bench, records: bench.cache(),
}


if __name__ == "__main__":
    main()
