"""Tables out of the benchmarks' JSON: a compact one for the terminal, and docs/RESULTS.md.

    python benchmarks/report.py

docs/RESULTS.md is written from benchmarks/results/ alone, so it never says what was not measured.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from paper_report import paper_section
from policy_report import decisions_section, guarantee_section, optimum_section
from workload import TIERS, TIGHT

RESULTS, PAGE = Path("benchmarks/results"), Path("docs/RESULTS.md")
NOT_YET = "Not measured yet.\n"
Run = dict[str, Any]


def score(runs: Iterable[Run]) -> float:
    """How good an arm is: mean over its runs of tight-tier plus overall attainment, token rule."""
    values = [run["tiers"][TIGHT]["token"] + run["result"]["attainment"] for run in runs]
    return float(sum(values) / len(values))


def compact_table(runs: Sequence[Run], *, header: bool = True) -> str:
    """One line an arm and rate, medians over the repeats: token rule / mean rule (first tokens in time)."""
    lines = []
    if header:
        tiers = "".join(f"{tier.name + ' (first)':>20}" for tier in TIERS)
        rest = "".join(f"{name:>8}" for name in ("b.e.", "fail", "ttft99", "tpot99", "others", "late"))
        lines.append(f"{'rate':>5} {'arm':<26}{'all':>10}{tiers}{rest}")
    return "\n".join([*lines, *(_line(rate, arm, same) for rate, arm, same in _by_rate_and_arm(runs))])


def _line(rate: float, arm: str, runs: Sequence[Run]) -> str:
    def mid(*path: str) -> float:
        return median(_values(runs, *path))

    cells = [f"{rate:>5.1f} {arm:<26}{mid('result', 'attainment'):>5.2f}/{mid('result', 'attainment_mean_tpot'):.2f}"]
    for tier in TIERS:
        token, mean, first = (mid("tiers", tier.name, key) for key in ("token", "mean", "first"))
        cells.append(f"{token:.2f}/{mean:.2f} ({first:.2f})".rjust(20))
    offered = mid("result", "offered")
    cells.append(f"{mid('result', 'best_effort') / offered:>8.2f}{1 - mid('result', 'finished') / offered:>8.2f}")
    cells.append(f"{mid('result', 'ttft_ms', 'p99'):>8.0f}{mid('result', 'tpot_ms', 'p99'):>8.0f}")
    cells.append(f"{mid('host', 'other'):>8.2f}{mid('client', 'late_ms'):>8.0f}")
    return "".join(cells)


def mixed_load_section(data: dict[str, Any]) -> str:
    """The mixed load: a table a rate, each cell token rule / mean rule with the range of the token rule."""
    zero, machine = data["zero_load"], data["machine"]
    runs = [run for run in data["runs"] if run["part"] == "main"]
    lines = [
        f"{data['programs']} programs a run on {machine['cores']} cores ({machine['cpu']}). Zero-load TTFT is "
        f"{zero['ttft_const_ms']:.1f} ms + {zero['ttft_token_ms']:.3f} ms a prompt token, "
        f"TPOT {zero['tpot_ms']:.1f} ms.",
        "",
        "| tier | share | TTFT target | TPOT target |",
        "| --- | --- | --- | --- |",
    ]
    for tier in data["tiers"]:
        lines.append(f"| {tier['name']} | {tier['share']:.0%} | {tier['ttft_slowdown']:g}x | {tier['tpot_ms']:g} ms |")
    lines += [
        "",
        "Each cell: median attainment by the token rule / by the mean-TPOT rule (range of the token rule over the "
        "repeats). All offered programs are in the denominator. *Others*: cores used by something else on the machine. "
        f"{_calm(runs)}",
    ]
    for rate in sorted({run["rate_req_s"] for run in runs}):
        names = [tier["name"] for tier in data["tiers"]]
        lines += [
            "",
            f"{rate:g} programs a second:",
            "",
            "| arm | all | " + " | ".join(names) + " | best effort | others |",
        ]
        lines.append("| --- " * (len(names) + 4) + "|")
        for _, arm, same in _by_rate_and_arm([run for run in runs if run["rate_req_s"] == rate]):
            cells = [_cell(same, ("result", "attainment"), ("result", "attainment_mean_tpot"))]
            cells += [_cell(same, ("tiers", name, "token"), ("tiers", name, "mean")) for name in names]
            best_effort = median(run["result"]["best_effort"] / run["result"]["offered"] for run in same)
            cells += [f"{best_effort:.2f}", f"{median(_values(same, 'host', 'other')):.2f}"]
            lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _calm(runs: Sequence[Run]) -> str:
    """How calm the machine was when they began; nobody knows what it was during them."""
    slowness = max(run["before"]["slowness"] for run in runs)
    waited_s = max(run["before"]["waited_s"] for run in runs)
    return (
        f"Segments began when a fixed piece of work took what it takes at best, at the most {slowness:.2f} times that; "
        f"up to {waited_s:.0f} s were waited for such a moment."
    )


def throughput_section(data: dict[str, Any]) -> str:
    """Throughput without SLOs, ours over stock."""
    lines = ["| | ours / stock, median | range | pairs |", "| --- | --- | --- | --- |"]
    for name, found in data["ours_over_stock"].items():
        spread = f"{found['min']:.3f} to {found['max']:.3f}"
        lines.append(f"| {name.replace('_', ' ')} | {found['median']:.3f} | {spread} | {len(data['runs']) // 2} |")
    return "\n".join(lines) + "\n"


def cost_model_section(data: dict[str, Any]) -> str:
    """The cost model's error."""
    return (
        f"Mean absolute error {data['single_error']:.1%} over {data['steps']} single steps, {data['median_error']:.1%} "
        f"over the medians of {data['groups']} groups of like steps ({data['grouped_steps']} steps); "
        f"{data['overrun']:.1%} of the steps took more than 1.3 times the prediction.\n"
    )


def overload_section(data: dict[str, Any]) -> str:
    """Past what the server sustains: the admitted, the refused, the rest."""
    lines = [
        f"{data['sustained_req_s']:g} programs a second are what it sustains. Medians over the repeats; *told* is when "
        "the refused had their 429, ms after they were sent (median of the 99 % quantiles).",
        "",
        "| load | declined are | admitted | of these attained | of all attained | told | lost |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    names = {"best_effort": "best effort", "reject": "refused"}
    for factor, on_decline in dict.fromkeys((run["factor"], run["on_decline"]) for run in data["runs"]):
        same = [run for run in data["runs"] if (run["factor"], run["on_decline"]) == (factor, on_decline)]
        told = [run["refused_after_ms"]["p99"] for run in same if run["refused_after_ms"]["p99"] is not None]
        cells = [
            f"{median(run['admitted'] / run['offered'] for run in same):.0%}",
            f"{median(_values(same, 'attained_of_admitted')):.1%}",
            f"{median(_values(same, 'attained_of_offered')):.0%}",
            f"{median(told):.0f} ms" if told else "–",
            f"{sum(run['lost'] for run in same)}",
        ]
        lines.append(f"| {factor:g}x | {names[on_decline]} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def budgets_section(data: dict[str, Any]) -> str:
    """One budget for a program, or one for each of its calls."""
    names = {"whole": "one, for the program", "shares": "each call its share", "infeasible": "one, too short"}
    shorter = data["shorter"]
    lines = [
        f"Tool agents of {data['alone_ms']:.0f} ms (median, alone) beside {data['people']} people who ask best-effort "
        f"prompts without end; the budget is {data['factor']:g} times that, the short one {shorter:.1f} times.",
        "",
        "| budget | programs | in time | told at the start | calls declined | took, p50 | took, p95 |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for kind, name in names.items():
        seen = data[kind]
        lines.append(
            f"| {name} | {seen['programs']} | {seen['in_time']:.0%} | {seen['told_at_start']:.0%} | "
            f"{seen['declined_calls']:.2f} | {seen['took_ms']['p50']:.0f} ms | {seen['took_ms']['p95']:.0f} ms |"
        )
    return "\n".join(lines) + "\n"


def tool_gaps_section(data: dict[str, Any]) -> str:
    """Conversations that are kept while their tools run."""
    runs = data["runs"]
    lines = [
        f"Tool agents, one each {data['every_s']:g} s, beside {data['people']} people who ask best-effort prompts "
        f"without end, in a memory of {data['memory_tokens']} tokens. Medians over {len(runs) // 3} repeats. *Found*: "
        "share of what the returning calls could have found; *while kept*: of those that came in time.",
        "",
        "| `hold_kv` | found | "
        + " | ".join(f"gap to {bound} s" for bound in runs[0]["found_by_gap"])
        + " | returns in time | found while kept | kept, p50 | p95 | for nothing | best effort |",
        "| --- " * (8 + len(runs[0]["found_by_gap"])) + "|",
    ]
    for arm in dict.fromkeys(run["arm"] for run in runs):
        same = [run for run in runs if run["arm"] == arm]
        keeps = any(run["returns_while_kept"] for run in same)
        cells = [f"{median(_values(same, 'found')):.0%}"]
        cells += [f"{median(_values(same, 'found_by_gap', bound)):.0%}" for bound in same[0]["found_by_gap"]]
        if keeps:
            in_time = median(run["returns_while_kept"] / run["returns"] for run in same)
            cells += [f"{in_time:.0%}", f"{median(_values(same, 'found_while_kept')):.1%}"]
            cells += [f"{median(_values(same, 'kept_ms', q)) / 1e3:.1f} s" for q in ("p50", "p95")]
            cells += [f"{median(_values(same, 'kept_for_nothing')):.0%}"]
        else:
            cells += ["–"] * 5
        cells += [f"{median(_values(same, 'best_effort_tokens_s')):.0f} tokens/s"]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


SECTIONS = (
    ("Mixed load against stock scheduling", "mixed_load", mixed_load_section),
    ("Mixed load on a faster machine", "mixed_load-faster_machine", mixed_load_section),
    ("Overload", "overload", overload_section),
    ("One budget for a program, or one for each call", "program_budgets", budgets_section),
    ("Conversations kept while tools run", "tool_gaps", tool_gaps_section),
    ("Throughput without SLOs", "throughput", throughput_section),
    ("Cost model", "cost_model", cost_model_section),
    ("The paper's evaluation, simulated", "paper", paper_section),
    ("Promises kept, simulated", "guarantee", guarantee_section),
    ("Promises made, against the optimum", "admission_optimum", optimum_section),
    ("Time to decide", "decisions", decisions_section),
)


def page(results: Path) -> str:
    """The text of docs/RESULTS.md from the JSON files in `results`."""
    parts = [
        "# Results\n",
        "Written by `python benchmarks/report.py` from benchmarks/results/; `make bench` measures again what runs on a "
        "server, `make bench-policy` and `make bench-paper` what is simulated. What is compared and why is told at the "
        "top of each benchmark's file.\n",
    ]
    for title, name, section in SECTIONS:
        file = results / f"{name}.json"
        text = section(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else NOT_YET
        parts += [f"## {title}\n", f"`benchmarks/{name.partition('-')[0]}.py`\n", text]
    return "\n".join(parts)


def _by_rate_and_arm(runs: Sequence[Run]) -> Iterable[tuple[float, str, list[Run]]]:
    for rate in sorted({run["rate_req_s"] for run in runs}):
        for arm in dict.fromkeys(run["arm"] for run in runs):
            same = [run for run in runs if run["arm"] == arm and run["rate_req_s"] == rate]
            if same:
                yield rate, arm, same


def _values(runs: Sequence[Run], *path: str) -> list[float]:
    values = []
    for run in runs:
        value: Any = run
        for key in path:
            value = value[key]
        values.append(float(value or 0.0))
    return values


def _cell(runs: Sequence[Run], token: tuple[str, ...], mean: tuple[str, ...]) -> str:
    values = _values(runs, *token)
    return f"{median(values):.2f} / {median(_values(runs, *mean)):.2f} ({min(values):.2f}–{max(values):.2f})"


if __name__ == "__main__":
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(page(RESULTS), encoding="utf-8")
