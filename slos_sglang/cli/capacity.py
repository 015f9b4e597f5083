"""`slos-sglang capacity`: how many programs a second each policy can be offered on each scenario."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slos_sglang.cli.simulate import Acceptance, CostModelName, Lengths, Noise, Replicas, parse_lengths, parse_policy
from slos_sglang.cli.simulate import read_cost_model as read_model
from slos_sglang.cli.workload import Data, Json, PrefixCache, Programs, Window

if TYPE_CHECKING:
    from rich.table import Table

    from slos_sglang.sim.experiment import Experiment


def capacity(
    scenario: Annotated[str, typer.Option(metavar="NAME[,..]", help="Scenarios.")],
    policies: Annotated[str, typer.Option(metavar="NAME[:OPTION=VALUE][,..]", help="Policies.")],
    cost_model: CostModelName = None,
    target: Annotated[float, typer.Option(help="Share of all offered programs that must attain.")] = 0.9,
    rule: Annotated[str, typer.Option(metavar="token|mean", help="Which attainment rule counts.")] = "token",
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds to search, from 0.")] = 1,
    replicas: Replicas = 1,
    lengths: Lengths = "estimated",
    noise: Noise = 0.0,
    acceptance: Acceptance = 0.0,
    programs: Programs = None,
    data: Data = None,
    window: Window = None,
    prefix_cache: PrefixCache = True,
    cache: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep runs here and use those that are there.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Find the highest rate at which the target share of all offered programs attains."""
    if rule not in ("token", "mean"):
        raise ValueError(f"rule must be token or mean, not {rule!r}")

    from rich.console import Console

    from slos_sglang.sim.experiment import Experiment
    from slos_sglang.workloads.scenarios import Draw

    draw = Draw(programs=programs, data=data, window_start_s=window, prefix_cache=prefix_cache)
    experiments = []
    for one in scenario.split(","):
        for policy in policies.split(","):
            name, options = parse_policy(policy)
            experiments.append(
                Experiment(
                    policy=name,
                    scenario=one,
                    model=read_model(cost_model, one),
                    options=options,
                    draw=draw,
                    replicas=replicas,
                    lengths=parse_lengths(lengths),
                    noise=noise,
                    acceptance=acceptance,
                )
            )
    found = [_search(experiment, seeds, target, rule, cache) for experiment in experiments]
    if as_json:
        print(json.dumps({"target": target, "rule": rule, "capacities": found}))
    else:
        Console().print(_table(found))


def _search(experiment: Experiment, seeds: int, target: float, rule: Any, cache: Path | None) -> dict[str, Any]:
    """Capacity and bounds of one experiment, programs a second for all replicas together, and a run at capacity."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from slos_sglang.measure.cache import RunCache
    from slos_sglang.measure.result import RunResult

    runs = RunCache(folder=cache) if cache else None
    # The bounds come first: they need the workload, so that what is wrong with it shows before anything runs.
    bound = experiment.bound(target=target)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"{experiment.scenario} {experiment.policy}", total=None)

        def tell(result: RunResult) -> None:
            attained = f"attainment {result.attainment:.3f} at {result.rate_req_s:.3g}/s, seed {result.seed}"
            progress.update(task, description=f"{experiment.scenario} {experiment.policy}: {attained}")

        found = experiment.capacity(range(seeds), target=target, rule=rule, cache=runs, progress=tell)
        at_capacity = experiment.result(found.by_seed_req_s[0], 0, runs) if found.by_seed_req_s[0] else None
    return {
        "policy": experiment.policy,
        "scenario": experiment.scenario,
        "gpus": experiment.model.gpus * experiment.replicas,
        "capacity": found.model_dump(),
        "fluid_req_s": bound.fluid_req_s,
        "kv_req_s": bound.kv_req_s,
        "tier_req_s": bound.tier_req_s,
        "config": experiment.config(),
        "at_capacity": at_capacity.model_dump() if at_capacity else None,
    }


def _table(found: list[dict[str, Any]]) -> Table:
    from rich.table import Table

    table = Table(title="capacity, programs a second per GPU", box=None, title_justify="left")
    table.add_column("scenario", no_wrap=True)
    table.add_column("policy", no_wrap=True)
    for column in ("capacity", "95 %", "of the bound", "bound (KV)", "(tier)", "(fluid)"):
        table.add_column(column, justify="right", no_wrap=True)
    for one in found:
        gpus, capacity = one["gpus"], one["capacity"]
        low, high = capacity["low_req_s"], capacity["high_req_s"]
        table.add_row(
            one["scenario"],
            ":".join([one["policy"], *(f"{key}={value}" for key, value in one["config"]["options"].items())]),
            f"{capacity['rate_req_s'] / gpus:.3f}",
            "" if low is None else f"{low / gpus:.3f} .. {high / gpus:.3f}",
            f"{capacity['rate_req_s'] / one['kv_req_s']:.0%}",
            f"{one['kv_req_s'] / gpus:.2f}",
            f"{one['tier_req_s'] / gpus:.2f}",
            f"{one['fluid_req_s'] / gpus:.2f}",
        )
    return table
