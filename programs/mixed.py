"""A mixed load: all programs of this folder at once, and how many of each kept all their promises.

Each run is a program of its own, on a thread of its own, as if that many people used the server. The order and the
arrival times come from one seed.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

import sglang as sgl
from sglang.lang.ir import SglFunction
from slos_sglang.programs import best_of_n, chat, coder, reasoning, summarizer, tool_agent

from slos_sglang.lang.scope import Scope, entered

MODULES = (best_of_n, chat, coder, reasoning, summarizer, tool_agent)
PROGRAMS = {module.__name__.rpartition(".")[2]: module.main for module in MODULES}


def run_one(program: SglFunction, backend: object) -> Scope:
    """One run to its end; the scope has its receipts, also where a call was refused and the program ended early."""
    around = Scope()
    with entered(around):
        try:
            program.run(backend=backend).sync()
        except KeyError:  # the output of a call that was refused
            if not around.failures():
                raise
    return around


def kept(run: Scope) -> bool:
    """Whether every call of the run was answered with all its targets kept."""
    calls = [entry for entry in run.receipts if "tool_ms" not in entry]
    return bool(calls) and not run.failures() and all((c["receipt"] or {}).get("attained", False) for c in calls)


def arrivals(names: list[str], rate_req_s: float, seed: int) -> list[tuple[float, str]]:
    """The programs in random order, with gaps as of independent people, s since the start."""
    rng = random.Random(f"{seed}/mixed")
    order = rng.sample(names, len(names))
    now_s, planned = 0.0, []
    for name in order:
        planned.append((now_s, name))
        now_s += rng.expovariate(rate_req_s)
    return planned


def start(planned: list[tuple[float, str]], run: Callable[[str], None]) -> None:
    """Start each at its time on a thread of its own; return when all have ended."""
    began_s, threads = time.monotonic(), []
    for at_s, name in planned:
        time.sleep(max(0.0, began_s + at_s - time.monotonic()))
        threads.append(threading.Thread(target=run, args=(name,)))
        threads[-1].start()
    for thread in threads:
        thread.join()


@sgl.function
def main(s, programs: str = ",".join(PROGRAMS), each: int = 3, rate_req_s: float = 2.0, seed: int = 0):
    """Run `each` of the `programs`, which commas separate, arriving at a rate; see the module."""
    names = [name.strip() for name in programs.split(",")]
    for name in names:
        if name not in PROGRAMS:
            raise ValueError(f"programs must be of {', '.join(PROGRAMS)}, not {name!r}")
    backend, runs = s.stream_executor.backend, []
    start(arrivals(names * each, rate_req_s, seed), lambda name: runs.append((name, run_one(PROGRAMS[name], backend))))
    s["attainment"] = {name: sum(kept(run) for which, run in runs if which == name) / each for name in sorted(names)}
    s["calls"] = {name: sum(len(run.receipts) for which, run in runs if which == name) for name in sorted(names)}
    for name in sorted(names):
        s += f"{name:12} {s['attainment'][name]:4.0%} of {each} kept all their promises ({s['calls'][name]} calls)\n"
