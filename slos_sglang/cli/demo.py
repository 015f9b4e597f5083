"""`slos-sglang demo`: everything once, on this machine, with a picture at the end.

A tiny model is written, a server started, two annotated programs answer ten questions beside other load. Their
transcripts, with right and wrong answers marked, and their receipts are printed, and the run is drawn. What must stay
true: the server is gone when the demo ends, however it ends; exit status 0 means that every call of every program came
back with a receipt, and every other request with its whole answer.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from sglang.lang.ir import SglFunction

    from slos_sglang.measure.load import Call

SEED = 2
# Program, question, and what the right answer says.
RUNS = (
    ("tool_agent", "How much higher is Mount Everest than Mont Blanc, in metres?", "4043 metres higher"),
    ("tool_agent", "How high are K2 and Kilimanjaro together, in metres?", "14506 metres"),
    ("tool_agent", "Which is higher, Elbrus or Aconcagua?", "Elbrus is lower"),
    ("tool_agent", "What are the three highest mountains?", "Mount Everest, K2 and Kangchenjunga"),
    ("tool_agent", "How high is Fuji in feet?", "12389.056 feet"),
    ("tool_agent", "What is 1248 / 16 + 5?", "83"),
    ("tool_agent", "Who painted the Mona Lisa?", "I don't know"),
    ("reasoning", "What is 347 + 285?", "632"),
    ("reasoning", "I have 48 apples and get 27 more. How many do I have?", "75"),
    ("reasoning", "Which is larger, 8091 or 8126?", "8126 is larger"),
)
WARM_UP_S, LOAD_S = 3.0, 8.0
AGENT_EVERY_S = 0.8
# Kind of load: bursts per second, requests a burst, prompt tokens, TTFT and TPOT targets in ms (None: best effort).
LOAD: Mapping[str, tuple[float, int, tuple[int, int], tuple[float, float] | None]] = {
    "chat": (1.6, 1, (40, 250), (500, 100)),
    "code": (0.6, 3, (60, 300), (400, 50)),
    "batch": (1.2, 1, (300, 900), None),
}
OUTPUT_TOKENS = (20, 60)
# Token ids that are words of the tiny model.
WORDS = range(330, 440)
ANSWER_TIMEOUT_S = 120.0
STEPS = 5


def demo(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="where everything goes")] = Path("out/demo"),
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object on stdout")] = False,
) -> int:
    """Serve a tiny model, ask two annotated agents ten questions under load; print receipts and draw a timeline."""
    from rich.console import Console

    progress = Console(stderr=True, highlight=False)
    try:
        report = _everything(out, progress)
    except RuntimeError as error:
        progress.print(f"the demo failed: {error}", markup=False, soft_wrap=True)
        return 1
    if as_json:
        print(json.dumps(report))
    else:
        _show(Console(highlight=False), report)
    return 0 if report["ok"] else 1


def _everything(out: Path, progress: Console) -> dict[str, Any]:
    """The demo's steps, and what came of them."""
    from slos_sglang.engine.launch import server
    from slos_sglang.tiny_model import write_tiny_agent

    began_s = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    config, events, picture = out / "slo-config.yaml", out / "events.jsonl", out / "timeline.png"
    config.write_text(json.dumps({"events": str(events.resolve())}) + "\n", encoding="utf-8")

    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(len(RUNS) + 1))
        with _step(progress, 1, f"a tiny model in {out / 'model'}"):
            write_tiny_agent(out / "model")
        with _step(progress, 2, f"a server, which logs to {out / 'server.log'}"):
            loading = pool.submit(_programs)  # takes as long as a server's start
            serving = server(out / "model", config=config, log=out / "server.log")
            url = stack.enter_context(serving).url
            programs = loading.result()
        with _step(progress, 3, "some requests first, to learn how long a batch takes"):
            _send(url, _load("warm-", WARM_UP_S))
        drawn_from_s = time.monotonic()
        with _step(progress, 4, f"{len(programs)} agents, beside other requests"):
            others = pool.submit(_send, url, _load("", LOAD_S))
            agents = [pool.submit(_run_later, AGENT_EVERY_S * n, url, *p) for n, p in enumerate(programs)]
            runs = [agent.result() for agent in agents]
            beside = others.result()
    with _step(progress, 5, f"a picture of it: {picture}"):
        _draw(events, picture, drawn_from_s)
    for run, (_, _, says) in zip(runs, RUNS, strict=True):
        run["right"] = says in run["variables"].get("answer", run["variables"].get("final", ""))
    return {
        "ok": _complete(runs, beside),
        "right": sum(run["right"] for run in runs),
        "programs": runs,
        "beside": beside,
        "timeline": str(picture),
        "events": str(events),
        "wall_s": round(time.monotonic() - began_s, 1),
    }


def _programs() -> list[tuple[SglFunction, str, dict[str, Any]]]:
    """Each of `RUNS`: the program, its name and its arguments."""
    from slos_sglang.cli.run import arguments, find, load

    mains = {name: load(find(name)) for name, _, _ in RUNS}
    return [(mains[name], name, arguments(mains[name], name, [f"question={q}"])) for name, q, _ in RUNS]


def _run_later(delay_s: float, url: str, main: SglFunction, name: str, args: dict[str, Any]) -> dict[str, Any]:
    from slos_sglang.cli.run import run_program

    time.sleep(delay_s)
    return run_program(main, name, url, args)


def _load(prefix: str, duration_s: float) -> list[Call]:
    """Bursts of requests in Poisson time; the same ones every time."""
    from slos_sglang.measure.attainment import Targets
    from slos_sglang.measure.load import Call

    rng = random.Random(f"{SEED}{prefix}")
    calls: list[Call] = []
    for kind, (bursts_per_s, burst, prompt_tokens, targets_ms) in LOAD.items():
        ttft_ms, tpot_ms = targets_ms or (None, None)
        arrival_s = rng.expovariate(bursts_per_s)
        while arrival_s < duration_s:
            for _ in range(burst):
                calls.append(
                    Call(
                        id=f"{prefix}{kind}-{len(calls):02d}",
                        name=kind,
                        arrival_s=arrival_s,
                        prompt=tuple(rng.choices(WORDS, k=rng.randint(*prompt_tokens))),
                        output_tokens=rng.randint(*OUTPUT_TOKENS),
                        targets=Targets(ttft_ms=ttft_ms, tpot_ms=tpot_ms),
                        slo={"ttft_ms": ttft_ms, "tpot_ms": tpot_ms} if targets_ms else None,
                    )
                )
            arrival_s += rng.expovariate(bursts_per_s)
    return calls


def _send(url: str, calls: list[Call]) -> dict[str, int]:
    """Send the calls at their times and count what came of them, as their client saw it."""
    from slos_sglang.measure.load import drive

    records = asyncio.run(drive(url, calls, timeout_s=ANSWER_TIMEOUT_S)).records
    promised = [record for call, record in zip(calls, records, strict=True) if call.slo is not None]
    return {
        "offered": len(records),
        "answered": sum(record.outcome == "finished" for record in records),
        "with_targets": len(promised),
        "attained": sum(record.attained for record in promised),
    }


def _complete(runs: Sequence[Mapping[str, Any]], beside: Mapping[str, int]) -> bool:
    """Every program made calls, every call has a receipt, and every other request its answer."""
    calls = [run["calls"] for run in runs]
    return all(calls) and all(c["receipt"] for c in chain(*calls)) and beside["answered"] == beside["offered"]


def _draw(events: Path, picture: Path, from_s: float) -> None:
    """Draw what came after `from_s`: this process and the scheduler read the same monotonic clock."""
    from slos_sglang.telemetry.events import read_events
    from slos_sglang.telemetry.timeline import draw_timeline

    draw_timeline([event for event in read_events(events) if event.t_s >= from_s], picture)


def _show(console: Console, report: Mapping[str, Any]) -> None:
    """Transcripts in brief, the receipts as a table, and what else was served."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, header_style="bold", padding=(0, 1, 0, 0))
    table.add_column("stage", no_wrap=True)
    table.add_column("tier", no_wrap=True)
    for heading in ("tokens\nin, out", "first token\nms", "a token\nms", "slack\nms"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("kept")
    for run in report["programs"]:
        question = run["arguments"]["question"]
        mark = "[green]right[/green]" if run["right"] else "[red]wrong[/red]"
        console.print(f"\n[bold]{run['program']}[/bold]", Text(question), mark)
        for line in run["transcript"].partition(question)[2].strip().replace("</think>", "</think>\n").splitlines():
            console.print(Text(f"  {line}"), no_wrap=True, overflow="ellipsis")
        table.add_row(f"[bold]{run['program']}[/bold]")
        for call in run["calls"]:
            table.add_row(f"  {call['stage']}", *_cells(call))
    console.print()
    console.print(table)
    beside = report["beside"]
    console.print(f"{report['right']} of {len(report['programs'])} questions answered right.")
    console.print(
        f"Beside them {beside['offered']} other requests, {beside['answered']} answered; of {beside['with_targets']} "
        f"with targets {beside['attained']} attained. Timeline: {report['timeline']} ({report['wall_s']} s in all)"
    )


def _cells(call: Mapping[str, Any]) -> list[str]:
    """A call's row in the table of receipts, after its name."""
    receipt = call["receipt"]
    if receipt is None:
        return ["[red]no receipt[/red]"]
    return [
        "declined" if receipt["declined"] else receipt["tier"].replace("_", " "),
        f"{call['prompt_tokens']}, {call['output_tokens']}",
        _of(receipt["ttft_ms"], receipt["ttft_target_ms"]),
        _of(receipt["tpot_ms"], receipt["tpot_target_ms"]),
        "" if receipt["slack_ms"] is None else f"{receipt['slack_ms']:,.0f}",
        "[green]yes[/green]" if receipt["attained"] else "[red]no[/red]",
    ]


def _of(measured_ms: float | None, target_ms: float | None) -> str:
    """A measured time and its target."""
    measured = "-" if measured_ms is None else f"{measured_ms:,.0f}"
    return measured if target_ms is None else f"{measured} of {target_ms:,.0f}"


@contextmanager
def _step(progress: Console, number: int, what: str) -> Iterator[None]:
    """One line of progress, and how long it took."""
    began_s = time.monotonic()
    line = f"[bold]{number}/{STEPS}[/bold] {what}"
    if not progress.is_terminal:
        progress.print(f"{line} ...")
    with progress.status(f"{line} ..."):
        yield
    progress.print(f"{line} [dim]({time.monotonic() - began_s:.1f} s)[/dim]")
