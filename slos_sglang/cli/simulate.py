"""`slos-sglang simulate`: one run of the simulator."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slos_sglang.cli.workload import Data, Json, PrefixCache, Programs, Seed, Window

if TYPE_CHECKING:
    from slos_sglang.measure.result import RunResult
    from slos_sglang.policy.cost_models import NamedCostModel
    from slos_sglang.workloads.program import Program

CostModelName = Annotated[
    str | None,
    typer.Option("--cost-model", metavar="NAME|FILE", help="A named cost model or a calibration file."),
]
Lengths = Annotated[
    str, typer.Option(metavar="oracle|estimated|scaled:X", help="What a policy knows of output lengths.")
]
Noise = Annotated[float, typer.Option(help="Sigma of a log-normal factor on every step's time.")]
Acceptance = Annotated[
    float,
    typer.Option(metavar="P", help="Chance that a token of the cost model's draft model is accepted; 0: none are."),
]
Replicas = Annotated[int, typer.Option(min=1, help="How many servers; programs go round.")]


def simulate(
    policy: Annotated[str, typer.Option(metavar="NAME[:OPTION=VALUE]", help="slos, or one of the baselines.")],
    workload: Annotated[Path | None, typer.Option(metavar="FILE", help="A workload file.")] = None,
    scenario: Annotated[str | None, typer.Option(help="One of the six scenarios.")] = None,
    rate: Annotated[
        float | None, typer.Option(help="Programs a second (default: 1 for a scenario, a file's own).")
    ] = None,
    cost_model: CostModelName = None,
    replicas: Replicas = 1,
    seed: Seed = 0,
    duration: Annotated[
        float | None, typer.Option(metavar="S", help="Offer programs for so many simulated seconds.")
    ] = None,
    lengths: Lengths = "estimated",
    noise: Noise = 0.0,
    acceptance: Acceptance = 0.0,
    explain: Annotated[
        str | None, typer.Option(metavar="ID", help="Show the verdicts and deadlines of this program.")
    ] = None,
    decision_times: Annotated[bool, typer.Option(help="Measure what each decision takes on this machine.")] = False,
    programs: Programs = None,
    data: Data = None,
    window: Window = None,
    prefix_cache: PrefixCache = True,
    as_json: Json = False,
) -> None:
    """Run a policy on a workload, in simulated time."""
    if (workload is None) == (scenario is None):
        raise ValueError("give exactly one of --workload and --scenario")
    if duration is not None and not 0 < duration < float("inf"):
        raise ValueError(f"duration must be greater than 0, not {duration}")

    from rich.console import Console

    from slos_sglang.sim import explain as explaining
    from slos_sglang.sim.experiment import Experiment
    from slos_sglang.workloads.scenarios import Draw

    model = read_cost_model(cost_model, scenario)
    name, options = parse_policy(policy)
    if scenario is not None:
        rate = 1.0 if rate is None else rate
        if duration is not None:
            programs = max(round(rate * duration), 1)
    experiment = Experiment(
        policy=name,
        scenario=scenario or (workload.stem if workload else ""),
        model=model,
        options=options,
        draw=Draw(programs=programs, data=data, window_start_s=window, prefix_cache=prefix_cache),
        programs=None if workload is None else tuple(_read(workload, model, rate, duration, programs)),
        replicas=replicas,
        lengths=parse_lengths(lengths),
        noise=noise,
        acceptance=acceptance,
    )
    # Programs of a file have been stretched as they were read.
    rate = rate if workload is None else None
    with Console(stderr=True).status(f"simulating {policy} on {experiment.scenario}"):
        run = experiment.simulate(rate, seed, trace=explain is not None, timed=decision_times)
    result = experiment.summary(run, rate, seed)
    explained = None if explain is None else explaining.explain(run, explain)
    if as_json:
        print(json.dumps(result.model_dump() | ({} if explained is None else {"explain": explained})))
    else:
        print("\n".join(summary_lines(result) + (explaining.lines(explained) if explained else [])))


def read_cost_model(name: str | None, scenario: str | None) -> NamedCostModel:
    """The model called `name`, else that in the file, else what the paper ran the scenario on."""
    from slos_sglang.policy.cost_models import COST_MODELS, parse_cost_model
    from slos_sglang.workloads.scenarios import COST_MODEL_OF

    name = name or COST_MODEL_OF.get(scenario or "")
    if name is None:
        raise ValueError("--cost-model is needed: a calibration file, or one of " + ", ".join(COST_MODELS))
    if name in COST_MODELS:
        return COST_MODELS[name]
    file = Path(name)
    if not file.is_file():
        raise ValueError(f"cost-model must be a file or one of {', '.join(COST_MODELS)}, not {name!r}")
    try:
        return parse_cost_model(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def parse_lengths(text: str) -> Any:
    """`oracle`, `estimated`, or the X of `scaled:X`."""
    if text in ("oracle", "estimated"):
        return text
    kind, _, factor = text.partition(":")
    try:
        if kind == "scaled":
            return float(factor)
    except ValueError:
        pass
    raise ValueError(f"lengths must be oracle, estimated or scaled:X, not {text!r}")


def parse_policy(text: str) -> tuple[str, dict[str, Any]]:
    """A policy and its options from NAME[:OPTION=VALUE ..], each value a number, true, false or a text."""
    name, *texts = text.split(":")
    options: dict[str, Any] = {}
    for option in texts:
        key, equals, value = option.partition("=")
        if not key or not equals:
            raise ValueError(f"policy must be NAME or NAME:OPTION=VALUE, not {text!r}")
        try:
            options[key] = json.loads(value)
        except json.JSONDecodeError:
            options[key] = value
    return name, options


def _read(
    file: Path, model: NamedCostModel, rate: float | None, duration: float | None, programs: int | None
) -> list[Program]:
    """The programs of a file, `programs` at most, at `rate`, as far as they arrive within `duration`."""
    from slos_sglang.sim.experiment import mean_rate_req_s
    from slos_sglang.workloads.files import read_workload
    from slos_sglang.workloads.scenarios import at_rate

    offered = read_workload(file, kv_tokens=model.kv_tokens)[:programs]
    if rate is not None:
        offered = at_rate(offered, rate / mean_rate_req_s(offered))
    if duration is not None:
        offered = [program for program in offered if program.arrival_s <= duration]
    if not offered:
        raise ValueError(f"{file}: no program arrives within duration {duration}")
    return offered


def summary_lines(result: RunResult) -> list[str]:
    """A result for people."""
    share = {"attainment": result.attainment, "by the mean-TPOT rule": result.attainment_mean_tpot}
    lines = [
        f"{result.policy} on {result.scenario}: {result.offered} programs at {result.rate_req_s:.3g} a second, "
        f"{result.wall_s:.1f} s simulated",
        "  "
        + ", ".join(f"{name} {value:.3f}" for name, value in share.items())
        + f", goodput {result.goodput_req_s:.3g} programs/s, {result.tokens_per_s:.0f} output tokens/s",
        f"  finished {result.finished}, declined {result.declined}, best effort {result.best_effort}",
    ]
    for name, found in (("TTFT", result.ttft_ms), ("mean TPOT", result.tpot_ms), ("decision", result.decision_us)):
        unit = "us" if name == "decision" else "ms"
        if found.p50 is not None:
            lines.append(f"  {name}: p50 {found.p50:.1f}, p90 {found.p90:.1f}, p99 {found.p99:.1f} {unit}")
    lines += [f"  stage {name!r}: attainment {value:.3f}" for name, value in result.stage_attainment.items()]
    return lines
