"""Tables out of the mixed load's runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

from workload import TIERS, TIGHT

Run = dict[str, Any]


def score(runs: Iterable[Run]) -> float:
    """How good an arm is: mean over its runs of tight-tier plus overall attainment, token rule."""
    values = [run["tiers"][TIGHT]["token"] + run["result"]["attainment"] for run in runs]
    return float(sum(values) / len(values))


def compact_table(runs: Sequence[Run], *, header: bool = True) -> str:
    """One line an arm and rate: token rule / mean rule of each tier, medians over the repeats."""
    lines = []
    if header:
        tiers = "".join(f"{tier.name + ' (first)':>20}" for tier in TIERS)
        rest = "".join(f"{name:>8}" for name in ("b.e.", "fail", "ttft99", "tpot99", "others", "late"))
        lines.append(f"{'rate':>5} {'arm':<24}{'all':>10}{tiers}{rest}")
    for rate in sorted({run["rate_req_s"] for run in runs}):
        for arm in dict.fromkeys(run["arm"] for run in runs):
            same = [run for run in runs if run["arm"] == arm and run["rate_req_s"] == rate]
            if same:
                lines.append(_line(rate, arm, same))
    return "\n".join(lines)


def _line(rate: float, arm: str, runs: Sequence[Run]) -> str:
    def mid(*path: str) -> float:
        values = []
        for run in runs:
            value: Any = run
            for key in path:
                value = value[key]
            values.append(value or 0.0)
        return median(values)

    cells = [f"{rate:>5.1f} {arm:<24}{mid('result', 'attainment'):>5.2f}/{mid('result', 'attainment_mean_tpot'):.2f}"]
    for tier in TIERS:
        token, mean, first = (mid("tiers", tier.name, key) for key in ("token", "mean", "first"))
        cells.append(f"{token:.2f}/{mean:.2f} ({first:.2f})".rjust(20))
    offered = mid("result", "offered")
    cells.append(f"{mid('result', 'best_effort') / offered:>8.2f}{1 - mid('result', 'finished') / offered:>8.2f}")
    cells.append(f"{mid('result', 'ttft_ms', 'p99'):>8.0f}{mid('result', 'tpot_ms', 'p99'):>8.0f}")
    cells.append(f"{mid('host', 'other'):>8.2f}{mid('client', 'late_ms'):>8.0f}")
    return "".join(cells)
