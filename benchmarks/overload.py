"""Past what the server sustains: are promises kept, and does the rest learn early that there is none?

    python benchmarks/overload.py --sustained 12

The mixed load at 1.5 and 3 times a rate that the server sustains (`--sustained`, programs a second; the mixed-load
benchmark finds it), each once with declined calls served as best effort and once with them refused (429). Reported:
the share of the admitted that attain, of all offered, when the refused were told (ms after they were sent), and
whether everybody was answered.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from fleet import Arm, fleet, host_use
from mixed_load import Bench
from workload import mixed_calls

from slos_sglang.measure.load import Call, drive
from slos_sglang.measure.result import Percentiles, StageRecord
from slos_sglang.tiny_model import make_tiny_model

FACTORS = (1.5, 3.0)
ANSWER_TIMEOUT_S = 120.0


def asking(calls: Sequence[Call], on_decline: str) -> list[Call]:
    """The same calls, saying what is to happen where they are declined."""
    return [replace(call, slo={**(call.slo or {}), "on_decline": on_decline}) for call in calls]


def outcome(records: Sequence[StageRecord]) -> dict[str, Any]:
    """What became of the calls."""
    admitted = [r for r in records if not r.declined and not r.best_effort]
    refused = [r for r in records if r.outcome == "declined"]
    return {
        "offered": len(records),
        "admitted": len(admitted),
        "attained_of_admitted": sum(r.attained for r in admitted) / max(len(admitted), 1),
        "attained_of_offered": sum(r.attained for r in records) / len(records),
        "refused": len(refused),
        "refused_after_ms": Percentiles.of(
            [(r.ended_s - r.arrival_s) * 1e3 for r in refused if r.ended_s is not None]
        ).model_dump(),
        "lost": sum(r.outcome == "failed" for r in records),
        "last_answer_s": max(r.ended_s or 0.0 for r in records),
    }


def main(
    sustained: Annotated[float, typer.Option(min=0.1, help="programs a second")] = 12.0,
    programs: Annotated[int, typer.Option(min=20)] = 300,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    out: Annotated[Path, typer.Option()] = Path("benchmarks/results/overload.json"),
) -> None:
    """Overload: the admitted, the refused, and the rest."""
    arm, runs = Arm(name="slos", scheduler="slos"), []
    logs = out.parent / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="overload-") as directory:
        model = Path(directory, "model")
        vocabulary = make_tiny_model(model).vocab_tokens
        bench = Bench(
            programs=programs,
            seed=1,
            vocabulary=vocabulary,
            hide_lengths=False,
            preferred=True,
            out=Path(directory, "x"),
        )
        with fleet(model, (arm,), logs) as servers:
            bench.calibrate(servers, arm)
            bench.warm_up(servers, (arm,))
            assert bench.zero_load is not None
            for repeat in range(repeats):
                for factor in FACTORS:
                    calls = mixed_calls(
                        programs=programs,
                        rate_req_s=sustained * factor,
                        seed=1 + repeat,
                        zero_load=bench.zero_load,
                        vocabulary=vocabulary,
                    )
                    for on_decline in ("best_effort", "reject"):
                        with servers.awake(arm.name) as server, host_use(server) as host:
                            sent = asking(calls, on_decline)
                            report = asyncio.run(drive(server.url, sent, timeout_s=ANSWER_TIMEOUT_S))
                        run = {"factor": factor, "on_decline": on_decline, "repeat": repeat, **outcome(report.records)}
                        run["failures"] = report.failures
                        runs.append(run | {"host": asdict(host[0])})
                        print(run, file=sys.stderr, flush=True)
    out.write_text(json.dumps({"sustained_req_s": sustained, "runs": runs}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
