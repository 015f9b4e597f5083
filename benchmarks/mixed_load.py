"""The mixed load against SLO scheduling and stock scheduling, on one machine, in one run.

    python benchmarks/mixed_load.py                                        # everything, about an hour on 2 cores
    python benchmarks/mixed_load.py --arms slos,stock-default --rates 8,10 --repeats 1     # a look while tuning

Arms: `slos` (this project's server), `stock-default`, `stock-mixed-N` (mixed chunks of N tokens), `stock-priority`
(priority by tightness), `stock-priority-mixed-N`. All run on the same platform (mended attention, overlap off) and
differ in scheduling alone. Without --arms the best mixed chunk is found first; without --rates the rates are: around
the one at which the best stock arm keeps the tight tier's targets for about 70 % of its calls, each the square root of
1.3 times the one before, so that every rate but the highest two has its 1.3-fold beside it.

Within a repeat all arms get the same calls, in segments of some seconds that take turns in an order that rotates, each
begun at a calm moment of the machine (`pace.py`); every repeat has its own seed. Medians over the repeats are reported
with their range, by both rules, with all offered calls in the denominator, and beside them what else the machine did.
The JSON holds every run.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import numpy as np
import typer
from fleet import Arm, Fleet, HostUse, fleet, going_first, host_use
from pace import Pace
from report import compact_table, score
from workload import TIERS, TIGHT, ZeroLoad, mixed_calls, with_priority

from slos_sglang.measure.attainment import Targets, mean_tpot_ms
from slos_sglang.measure.load import Call, LoadReport, drive
from slos_sglang.measure.result import ProgramRecord, StageRecord, summarize
from slos_sglang.tiny_model import make_tiny_model

CHUNK_TOKENS = (128, 256, 512, 1024, 2048)
TIGHT_TARGET = 0.70
SWEEP_RATE_REQ_S = 11.0
SEARCH_RATES_REQ_S = (5.0, 40.0)  # of slow machines and fast ones
SEARCH_STEPS = 6
SEGMENTS = 4
OVERLOAD = 1.3
STEPS_AROUND = (-1, 0, 1, 2)  # in square roots of it, from the rate that was found
WARM_UP_CALLS, WARM_UP_RATE_REQ_S = 60, 6.0
ANSWER_TIMEOUT_S = 60.0
Run = dict[str, Any]


def arm_of(name: str, config: Path | None = None) -> Arm:
    """The arm with this name. Raises `ValueError` for a name that is none."""
    if name == "slos":
        return Arm(name=name, scheduler="slos", config=config)
    kind, _, chunk = name.partition("mixed-")
    flags = {
        "stock-default": (),
        "stock-": (),
        "stock-priority": ("--enable-priority-scheduling",),
        "stock-priority-": ("--enable-priority-scheduling",),
    }.get(kind)
    if flags is None or kind.endswith("-") != chunk.isdecimal():
        raise ValueError(f"--arms has {name!r}, which is not slos, stock-[priority-]mixed-N, -default or -priority")
    if chunk:
        flags = (*flags, "--enable-mixed-chunk", "--chunked-prefill-size", chunk)
    return Arm(name=name, scheduler="stock", flags=flags)


@dataclass(kw_only=True)
class Bench:
    """One machine, one workload: runs arms under it and keeps every run.

    `preferred` says whether the servers run before everything else; `zero_load` comes from a calibration.
    """

    programs: int
    seed: int
    vocabulary: int
    hide_lengths: bool
    preferred: bool
    out: Path
    zero_load: ZeroLoad | None = None
    pace: Pace = field(default_factory=Pace)
    runs: list[Run] = field(default_factory=list)

    def compare(self, servers: Fleet, arms: Sequence[Arm], *, rate_req_s: float, repeat: int, part: str) -> list[Run]:
        """A run of each arm, all with the same calls, in `SEGMENTS` that take turns: the machine's mood changes within
        minutes. The first arm rotates with repeat and segment; each begins at a calm moment.
        """
        assert self.zero_load is not None
        calls = mixed_calls(
            programs=self.programs,
            rate_req_s=rate_req_s,
            seed=self.seed + repeat,
            zero_load=self.zero_load,
            vocabulary=self.vocabulary,
            hide_lengths=self.hide_lengths,
        )
        seen: dict[str, list[tuple[LoadReport, HostUse, dict[str, float]]]] = {arm.name: [] for arm in arms}
        for number, segment in enumerate(_segments(calls, SEGMENTS)):
            turn = (repeat + number) % len(arms)
            for arm in (*arms[turn:], *arms[:turn]):
                calm = self.pace.wait()
                with servers.awake(arm.name) as server, host_use(server) as host:
                    report = _drive(server.url, arm, segment)
                seen[arm.name].append((report, host[0], calm))
        return [self._run(arm, seen[arm.name], rate_req_s=rate_req_s, repeat=repeat, part=part) for arm in arms]

    def _run(
        self,
        arm: Arm,
        seen: Sequence[tuple[LoadReport, HostUse, dict[str, float]]],
        *,
        rate_req_s: float,
        repeat: int,
        part: str,
    ) -> Run:
        """What was seen of one arm in all segments, kept and saved."""
        reports = [report for report, _, _ in seen]
        records = [record for report in reports for record in report.records]
        result = summarize(
            [ProgramRecord(id=str(n), stages=(r,)) for n, r in enumerate(records)],
            policy=arm.name,
            scenario="mixed-cpu",
            rate_req_s=rate_req_s,
            seed=self.seed + repeat,
            wall_s=sum(report.wall_s for report in reports),
            config={"flags": arm.flags, "hide_lengths": self.hide_lengths},
        )
        run: Run = {
            "part": part,
            "arm": arm.name,
            "rate_req_s": rate_req_s,
            "repeat": repeat,
            "tiers": {tier.name: _tier(tier.name, records) for tier in TIERS},
            "host": {key: fmean(asdict(host)[key] for _, host, _ in seen) for key in asdict(seen[0][1])},
            "before": {key: max(calm[key] for _, _, calm in seen) for key in seen[0][2]},
            "client": {
                "late_ms": max(report.late_ms for report in reports),
                "cores": fmean(report.client_cpu for report in reports),
            },
            "result": result.model_dump(),
        }
        self.runs.append(run)
        self.save()
        print(compact_table([run], header=False), file=sys.stderr, flush=True)
        return run

    def calibrate(self, servers: Fleet, arm: Arm) -> None:
        """Zero-load times of the idle server: five prompt lengths, nine calls each, one at a time.

        Lower quartiles: what else runs on the machine only ever adds time.
        """
        sizes, rng = (40, 120, 230, 450, 900), random.Random(self.seed)
        ttft_ms: dict[int, list[float]] = {size: [] for size in sizes}
        tpot_ms = []
        with servers.awake(arm.name) as server:
            for number, size in enumerate(sizes * 9):
                prompt = tuple(rng.randrange(self.vocabulary) for _ in range(size))
                call = Call(
                    id=f"zero-{number}", name="zero", arrival_s=0, prompt=prompt, output_tokens=9, targets=Targets()
                )
                (record,) = asyncio.run(drive(server.url, [call], timeout_s=ANSWER_TIMEOUT_S)).records
                ttft_ms[size].append(record.token_s[0] * 1e3)
                tpot_ms.append(mean_tpot_ms(record.token_s) or 0.0)
        slope, const = np.polyfit(sizes, [np.quantile(ttft_ms[size], 0.25) for size in sizes], 1)
        self.zero_load = ZeroLoad(
            ttft_const_ms=float(const), ttft_token_ms=float(slope), tpot_ms=float(np.quantile(tpot_ms, 0.25))
        )
        print(f"zero load: {self.zero_load}", file=sys.stderr, flush=True)

    def warm_up(self, servers: Fleet, arms: Iterable[Arm]) -> None:
        """A short easy load for every arm, with calls of no later run; not kept."""
        assert self.zero_load is not None
        calls = mixed_calls(
            programs=WARM_UP_CALLS,
            rate_req_s=WARM_UP_RATE_REQ_S,
            seed=-1 - self.seed,
            zero_load=self.zero_load,
            vocabulary=self.vocabulary,
        )
        for arm in arms:
            with servers.awake(arm.name) as server:
                _drive(server.url, arm, calls)

    def save(self) -> None:
        """Write everything so far."""
        assert self.zero_load is not None
        self.out.parent.mkdir(parents=True, exist_ok=True)
        data = {
            "machine": {"cores": os.cpu_count(), "cpu": _cpu_name(), "preferred": self.preferred},
            "programs": self.programs,
            "hide_lengths": self.hide_lengths,
            "zero_load": asdict(self.zero_load),
            "tiers": [asdict(tier) for tier in TIERS],
            "runs": self.runs,
        }
        self.out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")


def _drive(url: str, arm: Arm, calls: Sequence[Call]) -> LoadReport:
    sent = with_priority(calls) if arm.sends_priority else calls
    return asyncio.run(drive(url, sent, timeout_s=ANSWER_TIMEOUT_S))


def _segments(calls: Sequence[Call], count: int) -> list[list[Call]]:
    """`calls` in `count` parts, one after the other, each beginning at 0."""
    size = -(-len(calls) // count)
    parts = [calls[start : start + size] for start in range(0, len(calls), size)]
    return [[replace(call, arrival_s=call.arrival_s - part[0].arrival_s) for call in part] for part in parts]


def _tier(name: str, seen: Sequence[StageRecord]) -> dict[str, float]:
    """Shares of a tier's calls: attained by both rules, first token in time, failed, best effort."""
    records = [record for record in seen if record.name == name]
    first = [replace(r, targets=Targets(ttft_ms=r.targets.ttft_ms)).attained for r in records]
    ends = {"failed": [r.outcome != "finished" for r in records], "best_effort": [r.best_effort for r in records]}
    kept = {"token": [r.attained for r in records], "mean": [r.attained_mean_tpot for r in records], "first": first}
    return {key: sum(flags) / len(flags) for key, flags in (kept | ends).items()}


def best_mixed_chunk(bench: Bench, model: Path, logs: Path) -> int:
    """The chunk size whose mixed batches do best, by tight tier and all calls together."""
    arms = tuple(arm_of(f"stock-mixed-{size}") for size in CHUNK_TOKENS)
    with fleet(model, arms, logs) as servers:
        if bench.zero_load is None:
            bench.calibrate(servers, arms[-1])
        bench.warm_up(servers, arms)
        for repeat in range(2):
            bench.compare(servers, arms, rate_req_s=SWEEP_RATE_REQ_S, repeat=repeat, part="sweep")
    best = max(arms, key=lambda arm: score(r for r in bench.runs if r["arm"] == arm.name))
    return int(best.flags[-1])


def find_rate(bench: Bench, servers: Fleet, stock: Sequence[Arm]) -> float:
    """About the rate at which the best stock arm keeps the tight tier for `TIGHT_TARGET`, by bisection of ratios."""
    low, high = SEARCH_RATES_REQ_S
    for step in range(SEARCH_STEPS):
        rate = round(math.sqrt(low * high), 1)
        runs = bench.compare(servers, stock, rate_req_s=rate, repeat=100 + step, part="search")
        best = max(run["tiers"][TIGHT]["token"] for run in runs)
        low, high = (rate, high) if best > TIGHT_TARGET else (low, rate)
    return round(math.sqrt(low * high), 1)


def main(
    arms: Annotated[str, typer.Option(help="comma-separated; empty: all, the best mixed chunk found first")] = "",
    rates: Annotated[str, typer.Option(help="programs a second, comma-separated; empty: found")] = "",
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    programs: Annotated[int, typer.Option(min=20)] = 300,
    out: Annotated[Path, typer.Option()] = Path("benchmarks/results/mixed_load.json"),
    config: Annotated[Path | None, typer.Option(help="--slo-config of the slos arm")] = None,
    hide_lengths: Annotated[bool, typer.Option(help="one max_new_tokens for all, the client hangs up")] = False,
    targets_from: Annotated[
        Path | None, typer.Option(help="an earlier JSON, for its targets instead of a calibration")
    ] = None,
    seed: Annotated[int, typer.Option(help="of the first repeat; the next ones count up")] = 1,
    quick: Annotated[bool, typer.Option(help="slos and stock-default, 60 programs, once: a smoke test")] = False,
) -> None:
    """Compare scheduling under the mixed load; prints a table and writes every run as JSON."""
    if quick:
        arms, rates, repeats, programs = arms or "slos,stock-default", rates or "8", 1, 60
    started_s = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no server is left behind
    with tempfile.TemporaryDirectory(prefix="mixed-load-") as directory, going_first(os.getpgrp()) as preferred:
        model, logs = Path(directory, "model"), out.parent / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        bench = Bench(
            programs=programs,
            seed=seed,
            vocabulary=make_tiny_model(model).vocab_tokens,
            hide_lengths=hide_lengths,
            preferred=preferred,
            out=out,
        )
        if targets_from is not None:
            bench.zero_load = ZeroLoad(**json.loads(targets_from.read_text(encoding="utf-8"))["zero_load"])
        if not arms:
            chunk = best_mixed_chunk(bench, model, logs)
            arms = f"slos,stock-default,stock-mixed-{chunk},stock-priority,stock-priority-mixed-{chunk}"
        chosen = tuple(arm_of(name, config) for name in arms.split(","))
        stock = [arm for arm in chosen if arm.scheduler == "stock"]
        with fleet(model, chosen, logs) as servers:
            if bench.zero_load is None:
                bench.calibrate(servers, (stock or list(chosen))[0])
            bench.warm_up(servers, chosen)
            if rates:
                wanted = [float(rate) for rate in rates.split(",")]
            else:
                rate = find_rate(bench, servers, stock)
                wanted = [round(rate * OVERLOAD ** (step / 2), 1) for step in STEPS_AROUND]
            for repeat in range(repeats):
                for rate in wanted:
                    bench.compare(servers, chosen, rate_req_s=rate, repeat=repeat, part="main")
    print(compact_table([run for run in bench.runs if run["part"] == "main"]))
    print(f"{len(bench.runs)} runs in {time.monotonic() - started_s:.0f} s -> {out}", file=sys.stderr)


if __name__ == "__main__":
    typer.run(main)
