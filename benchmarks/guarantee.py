"""Are promises kept? With an exact cost model and known lengths: always; with errors: how often.

    python benchmarks/guarantee.py --seeds 5000           every seed's random load in the simulator, about 10 minutes
    python benchmarks/guarantee.py --curve --seeds 8      the share kept over cost-model errors and wrong lengths

Loads: `slos_sglang.sim.promises`. The curve's errors are log-normal factors on every step's time, unknown to the
policy, which believes in the model's mean ("fixed") or corrects it by the steps it sees ("online"). Lengths are what
the policy knows of outputs: exactly times a factor, or its own estimate. Writes benchmarks/results/guarantee.json, each
run its part.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from slos_sglang.policy.batch_time import CostModel, OnlineCostModel
from slos_sglang.policy.scheduler import Scheduler
from slos_sglang.sim.promises import Kept, Load, broken, draw_load, kept
from slos_sglang.sim.run import Lengths

FILE = Path("benchmarks/results/guarantee.json")
ERRORS = (0.0, 0.05, 0.1, 0.2, 0.3)
LENGTHS: tuple[Lengths, ...] = ("estimated", 0.5, 1.0, 2.0)
# A client's cap on outputs: all that is known of them at first where lengths are estimated.
MAX_TOKENS = 512
TELL_EVERY = 250


def exact(seeds: int) -> dict[str, Any]:
    """The guarantee: every seed, an exact cost model, known lengths."""
    start_s, found, misses, steps = time.perf_counter(), [], [], 0
    for seed in range(seeds):
        load = draw_load(seed)
        run = load.run(Scheduler(cost=load.model.cost()))
        found.append(kept(run))
        steps += run.steps_run
        misses += [{"seed": seed, "request": call.request.rid} for call in broken(run)]
        if (seed + 1) % TELL_EVERY == 0:
            print(f"{seed + 1} seeds, {len(misses)} misses, {time.perf_counter() - start_s:.0f} s", file=sys.stderr)
    took_s = round(time.perf_counter() - start_s, 1)
    return {"seeds": seeds, **_sum(found), "misses": misses, "steps": steps, "wall_s": took_s}


def curve(seeds: int, programs: int) -> list[dict[str, Any]]:
    """The share of the admitted that attain, a point for each belief, error and knowledge of lengths."""
    cells = [(belief, error, lengths) for belief in BELIEFS for error in ERRORS for lengths in LENGTHS]
    with ProcessPoolExecutor() as pool:
        points = []
        for point in pool.map(partial(_point, seeds, programs), cells):
            points.append(point)
            print(json.dumps(point), file=sys.stderr)
    return points


def _point(seeds: int, programs: int, cell: tuple[str, float, Lengths]) -> dict[str, Any]:
    belief, error, lengths = cell
    found = []
    for seed in range(seeds):
        load = draw_load(seed, programs=programs)
        scheduler = Scheduler(cost=BELIEFS[belief](load))
        found.append(kept(load.run(scheduler, lengths=lengths, noise=error, max_tokens=MAX_TOKENS)))
    return {"belief": belief, "error": error, "lengths": lengths, "seeds": seeds, **_sum(found)}


def _fixed(load: Load) -> CostModel:
    return load.model.cost()


def _online(load: Load) -> CostModel:
    """A model that starts from the true first piece; a coefficient of 0 can not be corrected."""
    prior = load.model.pieces[0]
    floor = 1e-6
    return OnlineCostModel(
        prior=replace(
            prior,
            tokens_ms=max(prior.tokens_ms, floor),
            requests_ms=max(prior.requests_ms, floor),
            context_ms=max(prior.context_ms, floor),
            const_ms=max(prior.const_ms, floor),
        )
    )


BELIEFS: dict[str, Callable[[Load], CostModel]] = {"fixed": _fixed, "online": _online}


def _sum(found: Iterable[Kept]) -> dict[str, Any]:
    rows = [asdict(one) for one in found]
    total = {key: sum(row[key] for row in rows) for key in rows[0]}
    return {**total, "share_kept": round(total["kept"] / max(total["admitted"], 1), 5)}


def main() -> None:
    """Measure one part and write it beside the other."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5000)
    parser.add_argument("--curve", action="store_true", help="the curve over errors, not the guarantee")
    parser.add_argument("--programs", type=int, default=200, help="the most programs of a load of the curve")
    given = parser.parse_args()
    part = "curve" if given.curve else "exact"
    found = curve(given.seeds, given.programs) if given.curve else exact(given.seeds)
    data = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    data[part] = found
    FILE.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
