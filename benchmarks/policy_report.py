"""Sections of docs/RESULTS.md on the policy by itself: promises kept, promises made, time to decide."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def guarantee_section(data: dict[str, Any]) -> str:
    """Promises kept: exactly, and over errors."""
    lines = []
    if exact := data.get("exact"):
        lines += [
            f"With an exact cost model and known lengths, over {exact['seeds']:,} random loads of 0.3 to 5 times what "
            f"the simulated server can carry: {exact['admitted']:,} of {exact['judged']:,} requests were admitted, "
            f"{len(exact['misses'])} of them missed a target (token rule; by the mean rule "
            f"{exact['admitted'] - exact['kept_mean']:,}).",
            "",
        ]
    if points := data.get("curve"):
        lines += [
            "Share of the admitted that attain (and share of all that were admitted), by the error of single steps "
            "(log-normal, unknown to the policy) and by what is known of lengths; "
            f"{points[0]['seeds']} random loads each:",
        ]
        for belief in dict.fromkeys(point["belief"] for point in points):
            lines += ["", f"Cost model {belief}:", "", *_curve([p for p in points if p["belief"] == belief])]
    return "\n".join(lines).rstrip() + "\n"


def _curve(points: Sequence[dict[str, Any]]) -> list[str]:
    lengths = list(dict.fromkeys(point["lengths"] for point in points))
    names = [known if isinstance(known, str) else f"{known:g} x true" for known in lengths]
    lines = ["| error | " + " | ".join(names) + " |", "| --- " * (len(lengths) + 1) + "|"]
    for error in dict.fromkeys(point["error"] for point in points):
        row = [next(p for p in points if p["error"] == error and p["lengths"] == known) for known in lengths]
        cells = [f"{p['share_kept']:.1%} ({p['admitted'] / p['judged']:.0%})" for p in row]
        lines.append(f"| {error:.0%} | " + " | ".join(cells) + " |")
    return lines


def optimum_section(data: dict[str, Any]) -> str:
    """Promises made, against the best set there is."""
    lines = [
        "Value of what is admitted over the value of the best set (all sets, exact simulation), on "
        f"{data['instances']:,} random moments with up to 10 that ask; on {data['contested']:,} of them not all could "
        f"be promised. {data['unsound']} times something was admitted that the exact simulation does not keep.",
        "",
        "| method | mean | least | below 80 % | optimal |",
        "| --- | --- | --- | --- | --- |",
    ]
    for method, found in data["methods"].items():
        lines.append(
            f"| {method} | {found['mean']:.2%} | {found['min']:.1%} | {found['below_80_percent']} | "
            f"{found['optimal']:.1%} |"
        )
    return "\n".join(lines) + "\n"


def decisions_section(data: dict[str, Any]) -> str:
    """Time of a decision by the number of running requests."""
    lines = [
        f"Admission and batch formation of one step, {data['waiting']} requests waiting, {data['moments']} random "
        "moments each. *Burst*: ten newcomers in one step. *Program*: the dynamic program alone, on ten newcomers.",
        "",
        "| | running | p50 ms | p99 ms |",
        "| --- | --- | --- | --- |",
    ]
    for name, key in (("step", "decision_ms"), ("burst", "burst_ms"), ("program", "dp_ms")):
        lines += [f"| {name} | {running} | {q['p50']:g} | {q['p99']:g} |" for running, q in data[key].items()]
    return "\n".join(lines) + "\n"
