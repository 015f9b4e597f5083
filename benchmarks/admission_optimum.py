"""How much of what could be promised at best is promised, by each way to admit.

    python benchmarks/admission_optimum.py --instances 3000        about 3 minutes

Instances: `slos_sglang.sim.instances`, random moments with up to 6 running requests, 10 that ask, 3 TPOTs, values,
memory limits. The optimum is the best of all sets that the exact simulation keeps. Writes
benchmarks/results/admission_optimum.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import mean
from typing import Any

from slos_sglang.policy.admission import METHODS, Outlook
from slos_sglang.sim.instances import draw_instance, value_of

FILE = Path("benchmarks/results/admission_optimum.json")
TELL_EVERY = 500


def measure(instances: int) -> dict[str, Any]:
    """Shares of the optimum by method, over the instances of seeds 0, 1, ..."""
    shares: dict[str, list[float]] = {method: [] for method in METHODS}
    took_ms: dict[str, list[float]] = {method: [] for method in METHODS}
    unsound = contested = 0
    for seed in range(instances):
        instance = draw_instance(seed)
        best = instance.optimum()
        contested += best < value_of(instance.asking)
        for method in METHODS:
            start_s = time.perf_counter()
            outlook = Outlook(0.0, instance.promised, instance.asking, instance.cost, instance.limits, instance.memory)
            asking = sorted(instance.asking, key=lambda r: (r.due_s, r.seq))
            verdicts = outlook.judge(asking, method)
            took_ms[method].append((time.perf_counter() - start_s) * 1e3)
            admitted = [r for r, verdict in zip(asking, verdicts, strict=True) if verdict.admitted]
            unsound += not instance.keeps(admitted)
            shares[method].append(value_of(admitted) / best if best else 1.0)
        if (seed + 1) % TELL_EVERY == 0:
            print(f"{seed + 1}: " + ", ".join(f"{m} {mean(shares[m]):.4f}" for m in METHODS), file=sys.stderr)
    return {
        "instances": instances,
        "contested": contested,
        "unsound": unsound,
        "methods": {
            method: {
                "mean": round(mean(shares[method]), 5),
                "min": round(min(shares[method]), 4),
                "below_80_percent": sum(share < 0.8 for share in shares[method]),
                "optimal": round(mean(share > 1 - 1e-9 for share in shares[method]), 4),
                "ms": {"mean": round(mean(took_ms[method]), 3), "p99": round(_quantile(took_ms[method], 0.99), 3)},
            }
            for method in METHODS
        },
    }


def _quantile(values: list[float], share: float) -> float:
    return sorted(values)[int(share * (len(values) - 1))]


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--instances", type=int, default=3000)
    found = measure(parser.parse_args().instances)
    FILE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
