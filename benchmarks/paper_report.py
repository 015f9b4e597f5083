"""The section of docs/RESULTS.md on the paper's evaluation, from benchmarks/results/paper.json."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean
from typing import Any

from paper_figures import BURST_S, OVERLOADS, SPECULATING, usual_acceptance

Record = dict[str, Any]
COLUMNS = ("slos", "slos, estimated", "qoserve", "edf", "vllm", "vllm_v1", "sglang", "sglang_mixed", "distserve")
PLAIN_BUDGET = "512"


def paper_section(data: Record) -> str:
    """All subsections that were measured."""
    records = data["records"]
    head = (
        "Programs a second per GPU at 90 % of all offered, simulated; output lengths known to policies unless it says "
        "*estimated*; what each section compares is told in `benchmarks/paper.py`. "
        f"`{data['command']}`."
    )
    if data["quick"]:
        head += " **Quick run**: few programs, few policies; capacities are rough."
    parts = [head + "\n"]
    for name, title, section in SECTIONS:
        found = [record for record in records if record["section"] == name]
        if found:
            parts += [f"### {title}\n", section(found, records) + "\n"]
    return "\n".join(parts)


def _capacity(found: Sequence[Record], records: Sequence[Record]) -> str:
    shown = [label for label in COLUMNS if any(record["label"] == label for record in found)]
    rows = []
    for name in _scenarios(found):
        cells = [_number(_top(found, name, label)) for label in shown]
        tuned = _best(found, name, "sarathi")
        budget = tuned["config"]["options"]["budget_tokens"]
        plain = _top(found, name, "sarathi", budget=PLAIN_BUDGET)
        bound = _bound(tuned)
        ours = _top(found, name, "slos")
        fits = tuned["loss_req_s"] / tuned["gpus"] if tuned["kv_req_s"] < tuned["tier_req_s"] else None
        cells += [_number(plain), f"{_number(_per_gpu(tuned))} ({budget})", _number(fits), f"{bound:.2f}"]
        cells.append("–" if ours is None else f"{ours / bound:.0%}")
        rows.append([name, *cells])
    head = ["scenario", *shown, "sarathi 512", "sarathi tuned (budget)", "whoever fits", "bound", "slos of bound"]
    first = next(record for record in found if record["label"] == "slos")["capacity"]
    spread = ""
    if first["low_req_s"] is not None:
        width = max(
            (one["high_req_s"] - one["rate_req_s"]) / one["rate_req_s"]
            for one in (record["capacity"] for record in found if record["label"] == "slos")
        )
        spread = f" Mean of {len(first['by_seed_req_s'])} seeds; 95 % of slos within {width:.0%} or less."
    note = (
        "\n*Bound*: the smaller of what KV memory and what the tightest TPOT leave (`measure/bound.py`). "
        "*Whoever fits*: where that is the memory, what a server reaches that takes whoever finds room, at random "
        "arrivals." + spread
    )
    return _table(head, rows) + note + "\n\n" + _figure("capacity") + "\n" + _ratios(found)


def _ratios(found: Sequence[Record]) -> str:
    """slos over others, scenario by scenario, with geometric means."""

    others: dict[str, Callable[[str], float | None]] = {
        "vllm": lambda name: _top(found, name, "vllm"),
        "sarathi 512": lambda name: _top(found, name, "sarathi", budget=PLAIN_BUDGET),
        "better of vllm and tuned sarathi": lambda name: _rival(found, name),
        "qoserve": lambda name: _top(found, name, "qoserve"),
        "edf": lambda name: _top(found, name, "edf"),
        "sglang": lambda name: _top(found, name, "sglang"),
    }
    rows = []
    for label, other in others.items():
        ratios = [_over(_top(found, name, "slos"), other(name)) for name in _scenarios(found)]
        if any(ratios):
            rows.append([label, *(_times(ratio) for ratio in ratios), f"**{_times(_geometric(ratios))}**"])
    estimated = [_over(_top(found, n, "slos, estimated"), _top(found, n, "slos")) for n in _scenarios(found)]
    if any(estimated):
        rows.append(["(estimated over known lengths)", *map(_times, estimated), f"**{_times(_geometric(estimated))}**"])
    bounds = [_bound(next(r for r in found if r["scenario"] == name)) for name in _scenarios(found)]
    most = [_over(bound, _rival(found, name)) for bound, name in zip(bounds, _scenarios(found), strict=True)]
    rows.append(["(the bound over that better one)", *map(_times, most), f"**{_times(_geometric(most))}**"])
    return "slos over\n\n" + _table(["", *_scenarios(found), "geometric mean"], rows)


def _speculation(found: Sequence[Record], records: Sequence[Record]) -> str:
    plain = [record for record in records if record["section"] == "capacity"]
    over = {r["scenario"]: _runs_at(r, 0) for r in records if r["section"] == "speculation_overload"}
    chances = sorted({record["config"]["acceptance"] for record in found})
    usual = usual_acceptance(found)
    at = {chance: [record for record in found if record["config"]["acceptance"] == chance] for chance in chances}
    rows = []
    for name in _scenarios(found):
        ours = [_top(at[chance], name, "slos") for chance in chances]
        cells = [_top(plain, name, "slos"), *ours, _top(at[usual], name, "slos, estimated")]
        cells += [_top(found, name, label) for label in SPECULATING]
        bound = _bound(next(record for record in at[usual] if record["scenario"] == name))
        rows.append([name, *map(_number, cells), f"{bound:.2f}", _mean_attainment(over[name])])
    head = ["scenario", "slos without", *(f"slos {chance:g}" for chance in chances), "slos, estimated", *SPECULATING]
    text = (
        f"A draft model's token is accepted with {usual:g} where nothing else is said; which ones are is drawn, and no "
        "policy knows it. Others draft the same number in every step, the best of those tried; the scheduler chooses "
        "anew in each. *1.5x*: attainment of all offered at 1.5 times the capacity, slos. The servers of toolllm and "
        "reasoning have no draft model: these two are as above.\n\n"
    )
    table = _table([*head, "bound", "1.5x"], rows)

    def drafted(name: str, label: str) -> float | None:
        return _top(at[usual], name, label) or _top(plain, name, label)

    names = _scenarios(plain)
    others = {
        "vllm without": [_top(plain, name, "vllm") for name in names],
        "sarathi 512 without": [_top(plain, name, "sarathi", budget=PLAIN_BUDGET) for name in names],
        "better of vllm and tuned sarathi, without": [_rival(plain, name) for name in names],
        "better of vllm and tuned sarathi, with": [_rival(at[usual], name) or _rival(plain, name) for name in names],
        **{f"{label} with": [drafted(name, label) for name in names] for label in ("qoserve", "edf", "sglang")},
    }
    lines = []
    for label, values in others.items():
        ratios = [_over(drafted(name, "slos"), value) for name, value in zip(names, values, strict=True)]
        lines.append([label, *map(_times, ratios), f"**{_times(_geometric(ratios))}**"])
    table += "\n" + _figure("speculation")
    return text + table + "\nslos with speculation over\n\n" + _table(["", *names, "geometric mean"], lines)


def _mean(found: Sequence[Record], records: Sequence[Record]) -> str:
    labels = ("slos", "qoserve", "edf", "vllm", "sarathi", "sglang")
    rows = []
    for name in _scenarios(found):
        values = {label: _top(found, name, label) for label in labels}
        rival = max(filter(None, (value for label, value in values.items() if label != "slos")), default=None)
        rows.append([name, *(_number(value) for value in values.values()), _times(_over(values["slos"], rival))])
    return _table(["scenario", *labels[:4], "sarathi tuned", "sglang", "slos over the best"], rows)


def _models(found: Sequence[Record], records: Sequence[Record]) -> str:
    rows = [[_model(part[0]), name, *_rivals(part, name)] for part in _by(found, _model) for name in _scenarios(part)]
    return _table(["server", "scenario", *RIVALS], rows)


def _held_out(found: Sequence[Record], records: Sequence[Record]) -> str:
    tuned_on = [record for record in records if record["section"] == "capacity"]
    rows = []
    for part in _by(found, lambda record: (record["scenario"], _model(record))):
        name = part[0]["scenario"]
        seen = _over(_top(tuned_on, name, "slos"), _rival(tuned_on, name))
        start_s = part[0]["config"]["draw"]["window_start_s"]
        other = "another seed" if start_s is None else f"seconds from {start_s:.0f}"
        rows.append([name, _model(part[0]), other, *_rivals(part, name), _times(seen)])
    return _table(["scenario", "server", "load", *RIVALS, "on the tuning load"], rows)


def _overload(found: Sequence[Record], records: Sequence[Record]) -> str:
    tops = [record for record in records if record["section"] == "capacity"]
    labels = list(dict.fromkeys(record["label"] for record in found))
    parts = []
    for factor in OVERLOADS:
        rows = []
        for name in _scenarios(found):
            alike = {record["label"]: record for record in found if record["scenario"] == name}
            slos = alike["slos"]
            top = (_top(tops, name, "slos") or 0.0) * slos["gpus"]
            at = min(range(len(slos["runs"])), key=lambda n: abs(slos["runs"][n]["rate_req_s"] / top - factor))
            cells = [_mean_attainment(_runs_at(alike[label], at)) for label in labels]
            kept = min(run["attainment_admitted"] for run in _runs_at(slos, at))
            rows.append([name, *cells, f"{slos['bounds'][at]:.2f}", _number(kept)])
        parts.append(
            f"Attainment of all offered at {factor:g} times slos's capacity, mean of the seeds; the *bound* serves the "
            "cheapest ones only, and never waits for any:\n\n"
            + _table(["scenario", *labels, "bound", "slos, of the admitted"], rows)
        )
    return "\n".join([*parts, _figure("overload"), _figure("goodput", section="overload")])


def _runs_at(record: Record, at: int) -> list[Record]:
    """All runs at the rate of its `at`th."""
    run = record["runs"][at]
    return [run, *(other for other in record["again"] if other["rate_req_s"] == run["rate_req_s"])]


def _mean_attainment(runs: Sequence[Record]) -> str:
    return f"{fmean(run['attainment'] for run in runs):.2f}"


def _burst(found: Sequence[Record], records: Sequence[Record]) -> str:
    rows = []
    for record in found:
        rows.append([record["label"], *_during_and_after(record["all"])])
        if record["label"] == "slos":
            rows.append(["slos, admitted", *_during_and_after(record["admitted"])])
    head = ["policy", "attainment of those that came in the burst", "after it"]
    text = "Chatbot at 0.7 of slos's capacity, and ten times the capacity from second 20 to 25.\n\n"
    return text + _table(head, rows) + "\n" + _figure("burst")


def _ablations(found: Sequence[Record], records: Sequence[Record]) -> str:
    names = _scenarios(found)
    full = {name: _top(found, name, "all ideas") for name in names}
    rows = []
    for label in dict.fromkeys(record["label"] for record in found):
        values = {name: _top(found, name, label) for name in names}
        cells = [f"{_number(values[name])} ({_times(_over(values[name], full[name]))})" for name in names]
        kept = min(r["at_capacity"]["attainment_admitted"] for r in found if r["label"] == label and r["at_capacity"])
        rows.append([label, *cells, f"{kept:.3f}"])
    text = "*Kept*: at capacity, the share of the admitted that attained, where it is least.\n\n"
    return text + _table(["slos with", *names, "kept"], rows)


def _noise(found: Sequence[Record], records: Sequence[Record]) -> str:
    labels = list(dict.fromkeys(record["label"] for record in found))
    head = ["scenario", "steps vary by"]
    for label in labels:
        head += [label, "kept"] if label.startswith("slos") else [label]
    rows = []
    for name in _scenarios(found):
        for noise in sorted({record["config"]["noise"] for record in found}):
            alike = [record for record in found if record["config"]["noise"] == noise]
            cells = []
            for label in labels:
                record = _best(alike, name, label)
                cells.append(_number(record and _per_gpu(record)))
                if label.startswith("slos"):
                    run = record and record["at_capacity"]
                    cells.append(_number(run and run["attainment_admitted"]))
            rows.append([name, f"{noise:.0%}", *cells])
    text = (
        "How much a step's time varies (sigma of a log-normal factor) is known to nobody. The scheduler learns its "
        "cost model from the steps, as on a server, with a margin; the others know it. *Kept*: at capacity, the share "
        "of the admitted that attained.\n\n"
    )
    return text + _table(head, rows)


def _replicas(found: Sequence[Record], records: Sequence[Record]) -> str:
    rows = []
    for name in _scenarios(found):
        part = sorted((r for r in found if r["scenario"] == name), key=lambda record: record["gpus"])
        one = part[0]["capacity"]["rate_req_s"]
        rates = [record["capacity"]["rate_req_s"] for record in part]
        rows.append([name, *(f"{rate:.2f} ({_times(_over(rate, one))})" for rate in rates)])
    return "Programs a second, all replicas together.\n\n" + _table(["scenario", "1", "2", "4"], rows)


def _cache(found: Sequence[Record], records: Sequence[Record]) -> str:
    labels = ("slos", "qoserve", "vllm", "sarathi")
    cells = [_number(_top(found, "toolllm", label)) for label in labels]
    text = "Each turn of a conversation finds what is left of the turns before it.\n\n"
    return text + _table(["scenario", *labels], [["toolllm", *cells]])


SECTIONS: tuple[tuple[str, str, Callable[[Sequence[Record], Sequence[Record]], str]], ...] = (
    ("capacity", "Capacity", _capacity),
    ("speculation", "With speculation", _speculation),
    ("mean", "By the mean-TPOT rule", _mean),
    ("overload", "Overload", _overload),
    ("burst", "A burst", _burst),
    ("ablations", "What each idea is worth", _ablations),
    ("noise", "Steps that vary", _noise),
    ("models", "Other servers", _models),
    ("held_out", "Loads that nobody tuned on", _held_out),
    ("replicas", "Replicas", _replicas),
    ("cache", "With a prefix cache", _cache),
)
RIVALS = ("slos", "vllm", "sarathi 512", "sarathi tuned", "slos over the better")


def _rivals(found: Sequence[Record], name: str) -> list[str]:
    plain = _top(found, name, "sarathi", budget=PLAIN_BUDGET)
    values = [_top(found, name, "slos"), _top(found, name, "vllm"), plain, _top(found, name, "sarathi")]
    return [*(_number(value) for value in values), _times(_over(values[0], _rival(found, name)))]


def _rival(found: Sequence[Record], name: str) -> float | None:
    return max(filter(None, (_top(found, name, "vllm"), _top(found, name, "sarathi"))), default=None)


def _best(found: Sequence[Record], name: str, label: str, budget: str | None = None) -> Record | None:
    fitting = [
        record
        for record in found
        if (record["scenario"], record["label"]) == (name, label)
        and budget in (None, record["config"]["options"].get("budget_tokens"))
    ]
    return max(fitting, key=_per_gpu, default=None)


def _top(found: Sequence[Record], name: str, label: str, budget: str | None = None) -> float | None:
    record = _best(found, name, label, budget)
    return None if record is None else _per_gpu(record)


def _bound(record: Record) -> float:
    """What no scheduler passes on the scenario of `record`, per GPU."""
    return float(min(record["kv_req_s"], record["tier_req_s"]) / record["gpus"])


def _per_gpu(record: Record) -> float:
    return float(record["capacity"]["rate_req_s"] / record["gpus"])


def _scenarios(found: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(record["scenario"] for record in found))


def _model(record: Record) -> str:
    return str(record["config"]["cost_model"])


def _by(found: Sequence[Record], key: Callable[[Record], Any]) -> list[list[Record]]:
    return [[record for record in found if key(record) == one] for one in dict.fromkeys(map(key, found))]


def _during_and_after(bins: Sequence[Record]) -> list[str]:
    """Attainment of those that came in the burst, and of those that came after it."""
    start_s, end_s = BURST_S
    return [
        _attained(b for b in bins if low <= b["at_s"] < high) for low, high in ((start_s, end_s), (end_s, math.inf))
    ]


def _attained(found: Iterable[Record]) -> str:
    bins = list(found)
    offered = sum(one["offered"] for one in bins)
    return "–" if not offered else f"{sum(one['attainment'] * one['offered'] for one in bins) / offered:.2f}"


def _over(ours: float | None, other: float | None) -> float | None:
    return None if not ours or not other else ours / other


def _geometric(ratios: Iterable[float | None]) -> float | None:
    known = [ratio for ratio in ratios if ratio]
    return math.exp(sum(map(math.log, known)) / len(known)) if known else None


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _times(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.2f}x"


def _figure(name: str, *, section: str | None = None) -> str:
    return f"![{name}]({name}.png)\n\n`python benchmarks/paper.py --only {section or name}`\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"
