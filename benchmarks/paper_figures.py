"""Figures of the paper's evaluation, from benchmarks/results/paper.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slos_sglang.measure.plots import bars, curves, time_series

Record = dict[str, Any]
BURST_S = (20.0, 25.0)
# The overloads that are told in tables, in capacities of the scheduler.
OVERLOADS = (1.5, 3.0)
SPECULATING = ("vllm", "sarathi", "qoserve", "edf", "sglang")
MAIN = ("slos", "slos, estimated", "qoserve", "edf", "vllm", "sarathi", "sglang", "distserve")


def per_gpu(records: Sequence[Record], section: str, scenario: str, label: str) -> float | None:
    """The highest capacity per GPU in the section under this label; None where it was not measured."""
    found = [
        record["capacity"]["rate_req_s"] / record["gpus"]
        for record in records
        if (record["section"], record["scenario"], record["label"]) == (section, scenario, label)
    ]
    return max(found, default=None)


def draw(result: Mapping[str, Any], folder: Path) -> None:
    """Draw every figure whose section was measured."""
    records = result["records"]
    scenarios = list(dict.fromkeys(r["scenario"] for r in records if r["section"] == "capacity"))
    bars(
        folder / "capacity.png",
        scenarios,
        {label: [per_gpu(records, "capacity", name, label) for name in scenarios] for label in MAIN},
        title="Capacity at 90 % of all offered",
        unit="programs/s per GPU",
    )
    drafting = [record for record in records if record["section"] == "speculation"]
    if drafting:
        _draw_drafting(drafting, records, folder / "speculation.png")
    sweeps = [record for record in records if record["section"] == "overload"]
    if sweeps:
        for key, file, y in (
            ("attainment", "overload.png", "attainment"),
            ("goodput_req_s", "goodput.png", "attained/s"),
        ):
            curves(folder / file, _panels(sweeps, records, key), x="share of slos's capacity", y=y, mark_x=1.0)
    bursts = [record for record in records if record["section"] == "burst"]
    if bursts:
        _draw_burst(bursts, folder / "burst.png")


def usual_acceptance(drafting: Sequence[Record]) -> float:
    """The acceptance at which all policies were measured."""
    return float(next(record["config"]["acceptance"] for record in drafting if record["label"] == "vllm"))


def _draw_drafting(drafting: Sequence[Record], records: Sequence[Record], file: Path) -> None:
    """The scheduler with drafts and without, and others at the best of their drafts, all at the same acceptance."""
    usual = usual_acceptance(drafting)
    alike = [record for record in drafting if record["config"]["acceptance"] == usual]
    names = list(dict.fromkeys(record["scenario"] for record in alike))
    without = [per_gpu(records, "capacity", name, "slos") for name in names]
    drafted = {
        label: [per_gpu(alike, "speculation", name, label) for name in names] for label in ("slos", *SPECULATING)
    }
    bars(
        file,
        names,
        {**drafted, "slos without drafts": without},
        title=f"With a draft model: capacity at 90 % of all offered, {usual:g} of its tokens accepted",
        unit="programs/s per GPU",
    )


def _panels(
    sweeps: Sequence[Record], records: Sequence[Record], key: str
) -> dict[str, dict[str, list[tuple[float, float]]]]:
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for record in sweeps:
        name = record["scenario"]
        top = (per_gpu(records, "capacity", name, "slos") or 0.0) * record["gpus"]
        points = [(run["rate_req_s"] / top, run[key]) for run in record["runs"]]
        panels.setdefault(name, {})[record["label"]] = points
    return panels


def _draw_burst(bursts: Sequence[Record], file: Path) -> None:
    series = {record["label"]: record["all"] for record in bursts}
    series["slos, admitted"] = next(record["admitted"] for record in bursts if record["label"] == "slos")
    titles = {"attainment": "attainment", "ttft_p99_ms": "p99 TTFT, s", "tpot_p99_ms": "p99 TPOT, ms"}
    panels = {
        title: {
            label: [(one["at_s"], one[key] / (1e3 if "TTFT" in title else 1)) for one in bins if one[key] is not None]
            for label, bins in series.items()
        }
        for key, title in titles.items()
    }
    slow = ("p99 TTFT, s", "p99 TPOT, ms")
    time_series(file, panels, marks={"p99 TPOT, ms": 100.0}, log=slow, burst_s=BURST_S)
