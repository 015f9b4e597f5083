"""One budget for a whole program, or one for each of its calls? Tool agents beside a load that never ends.

    python benchmarks/program_budgets.py            # 100 programs of each kind, about 12 minutes on 2 cores

Each agent asks, runs a tool, asks again, and answers; how long its outputs and its tool take is drawn, and nobody
tells the server. Beside them so many people ask one long best-effort prompt after the other that the server is never
idle. Kinds of agents, which take turns:

    whole       one budget around everything (`stage(..., e2e_ms=)`); calls name no targets
    shares      the same total, split: each call has its share of it as a deadline of its own
    infeasible  a budget that the program can't have done with, even alone: is it told at its first call?

The budget is `--factor` times the median time of a program alone; a program is asked for only if alone it takes at most
`FEASIBLE` of that. Because a shared machine is slow for some minutes and then fast again, programs come in blocks: each
block's are measured alone, and then beside the load. "In time" is by the client's clock. The first programs teach the
frontend what comes after each call, and are not counted.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import requests
import sglang as sgl
import typer
from fleet import going_first

from slos_sglang import SLO, gen, stage
from slos_sglang.engine.launch import server
from slos_sglang.lang.scope import Scope, entered
from slos_sglang.tiny_model import make_tiny_model

KINDS = ("whole", "shares", "infeasible")
TURNS = 4
# Characters of an output: few, so that each grammar is compiled once.
CHARS = (30, 50, 80, 130, 200)
TOOL_MS = 150.0
LEARNING_RUNS = 10
BLOCK = 30
SETTLE_S = 3.0
INFEASIBLE = 0.6
FEASIBLE = 0.75
EVERY_S = 0.9


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a program will do: characters of its outputs, words of its tools' results, and their times."""

    chars: tuple[int, ...]
    words: tuple[int, ...]
    tool_ms: tuple[float, ...]


def draw_plan(rng: random.Random) -> Plan:
    """A plan; tools take `TOOL_MS` on average, now and then four times as long."""
    return Plan(
        chars=tuple(rng.choice(CHARS) for _ in range(TURNS + 1)),
        words=tuple(rng.randrange(10, 120) for _ in range(TURNS)),
        tool_ms=tuple(min(rng.expovariate(1 / TOOL_MS), 4 * TOOL_MS) for _ in range(TURNS)),
    )


@sgl.function
def agent(s, seed, plan, call_slo, e2e_ms):
    """The agent; `call_slo` is each call's own, or None."""
    rng = random.Random(seed)
    s += f"Task {seed}: " + " ".join(rng.choice(WORDS) for _ in range(60))
    with stage("agent", e2e_ms=e2e_ms) as work:
        for turn in range(TURNS):
            s += "\nCall: " + gen("act", max_tokens=192, regex=f"[a-z ]{{{plan.chars[turn]}}}", slo=call_slo)
            s["act"]
            with work.tool("tool"):
                time.sleep(plan.tool_ms[turn] / 1e3)
            s += "\nFound: " + " ".join(rng.choice(WORDS) for _ in range(plan.words[turn]))
        s += "\nAnswer: " + gen("final", max_tokens=192, regex=f"[a-z ]{{{plan.chars[TURNS]}}}", slo=call_slo)


WORDS = ("river", "mountain", "table", "number", "system", "question", "answer", "program", "short", "under")


def run_one(backend: Any, kind: str, number: int, budget_ms: float | None) -> dict[str, Any]:
    """One program to its end: how long it took by the client's clock, and what its first call was told."""
    plan = draw_plan(random.Random(f"{number}/plan"))
    share, whole_ms = None, budget_ms
    if kind == "shares" and budget_ms is not None:
        share, whole_ms = SLO(e2e_ms=(budget_ms - TURNS * TOOL_MS) / (TURNS + 1)), None
    around, began_s = Scope(), time.perf_counter()
    with entered(around):
        agent.run(f"{kind}-{number}", plan, share, whole_ms, backend=backend).sync()
    took_ms = (time.perf_counter() - began_s) * 1e3
    receipts = [entry["receipt"] for entry in around.receipts if entry["receipt"]]
    return {
        "kind": kind,
        "number": number,
        "took_ms": took_ms,
        "in_time": budget_ms is not None and took_ms <= budget_ms,
        "told": bool(receipts and receipts[0]["declined"]),
        "declined": [receipt["reason"] for receipt in receipts if receipt["declined"]],
    }


def ask_forever(url: str, seed: int) -> None:
    """A person of the background."""
    rng = random.Random(f"{seed}/background")
    while True:
        prompt = [rng.randrange(300, 2000) for _ in range(rng.randrange(200, 600))]
        params = {"max_new_tokens": rng.randrange(40, 80), "ignore_eos": True}
        requests.post(f"{url}/generate", json={"input_ids": prompt, "sampling_params": params}, timeout=300)


def people(url: str, count: int) -> None:
    """So many of them, until the process is ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for seed in range(count):
        threading.Thread(target=ask_forever, args=(url, seed), daemon=True).start()
    threading.Event().wait()


@contextmanager
def background(url: str, count: int) -> Iterator[None]:
    """The load, in a process of its own, while the context lasts."""
    process = multiprocessing.get_context("fork").Process(target=people, args=(url, count), daemon=True)
    process.start()
    try:
        yield
    finally:
        process.terminate()
        process.join()
        time.sleep(SETTLE_S)


def run_all(backend: Any, programs: Sequence[int], budgets_ms: Mapping[str, float]) -> list[dict[str, Any]]:
    """Those programs as each kind, one after the other in turns, each on a thread of its own."""
    done: list[dict[str, Any]] = []
    threads = []
    for number in programs:
        for kind in KINDS:
            thread = threading.Thread(
                target=lambda kind=kind, number=number: done.append(run_one(backend, kind, number, budgets_ms[kind]))
            )
            thread.start()
            threads.append(thread)
            time.sleep(EVERY_S)
    for thread in threads:
        thread.join()
    return done


def outcome(done: Sequence[dict[str, Any]], kind: str) -> dict[str, Any]:
    """What became of the programs of a kind."""
    runs = [run for run in done if run["kind"] == kind]
    times = sorted(run["took_ms"] for run in runs)
    return {
        "programs": len(runs),
        "in_time": sum(run["in_time"] for run in runs) / len(runs),
        "told_at_start": sum(run["told"] for run in runs) / len(runs),
        "declined_calls": sum(len(run["declined"]) for run in runs) / len(runs),
        "took_ms": {"p50": median(times), "p95": times[int(0.95 * (len(times) - 1))]},
    }


def main(
    programs: Annotated[int, typer.Option(min=1)] = 100,
    factor: Annotated[float, typer.Option(min=1.0, help="the budget, in times of a program alone")] = 1.8,
    count: Annotated[int, typer.Option("--people", min=0, help="of the background")] = 40,
    out: Annotated[Path, typer.Option(help="the JSON")] = Path("benchmarks/results/program_budgets.json"),
) -> None:
    """Measure; print and write what came of it."""
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        make_tiny_model(model)
        with server(model, log=Path(folder) / "server.log") as running, going_first(running.pid):
            backend = sgl.RuntimeEndpoint(running.url)
            for number in range(LEARNING_RUNS):  # compiles the grammars, and shows the server the lengths of stages
                run_one(backend, "alone", -1 - number, 1e6)
            blocks, done = [], []
            while (left := programs - len(done) // len(KINDS)) > 0:
                numbers = range(len(blocks) * BLOCK, (len(blocks) + 1) * BLOCK)
                took_ms = {n: run_one(backend, "alone", n, None)["took_ms"] for n in numbers}
                alone_ms = median(took_ms.values())
                budgets_ms = dict.fromkeys(KINDS, factor * alone_ms) | {"infeasible": INFEASIBLE * alone_ms}
                feasible = [n for n in numbers if took_ms[n] <= FEASIBLE * budgets_ms["whole"]][:left]
                with background(running.url, count):
                    time.sleep(SETTLE_S)
                    done += run_all(backend, feasible, budgets_ms)
                blocks.append({"alone_ms": alone_ms, "feasible": len(feasible)})
                print(blocks[-1], outcome(done, "whole"), file=sys.stderr, flush=True)
    report = {"alone_ms": median(block["alone_ms"] for block in blocks), "people": count, "factor": factor}
    report |= {"shorter": INFEASIBLE}
    report |= {kind: outcome(done, kind) for kind in KINDS}
    print(json.dumps(report, indent=2))
    out.parent.mkdir(parents=True, exist_ok=True)
    report |= {"command": sys.argv, "blocks": blocks, "runs": done}
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
