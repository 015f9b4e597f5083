"""`slos-sglang workload`: write a workload file, from a scenario or from a published trace."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from slos_sglang.slo import SLO
    from slos_sglang.workloads.program import Program

# Options that `simulate` and `capacity` share with this command.
Data = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Folder with the published trace files (default: $SLOS_SGLANG_DATA)."),
]
Programs = Annotated[int | None, typer.Option(help="How many programs (default: the scenario's own number).")]
Seed = Annotated[int, typer.Option(help="Seed of everything random; 0 takes a trace as recorded.")]
Window = Annotated[
    float | None, typer.Option(metavar="S", help="Another part of the trace, from S seconds after its first call.")
]
PrefixCache = Annotated[
    bool, typer.Option(help="Whether a turn finds the conversation before it cached (the paper: no).")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


def workload(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The file to write.")],
    scenario: Annotated[str | None, typer.Option(help="One of the six scenarios.")] = None,
    azure: Annotated[Path | None, typer.Option(metavar="FILE", help="An Azure LLM inference trace (CSV).")] = None,
    mooncake: Annotated[Path | None, typer.Option(metavar="FILE", help="A Mooncake trace (JSON lines).")] = None,
    preset: Annotated[str, typer.Option(help="Targets of a trace's calls: one of slos_sglang.presets.")] = "chatbot",
    rate: Annotated[
        float | None, typer.Option(help="Programs a second (default: 1 for a scenario, a trace's own).")
    ] = None,
    programs: Programs = None,
    seed: Seed = 0,
    data: Data = None,
    window: Window = None,
    prefix_cache: PrefixCache = True,
    as_json: Json = False,
) -> None:
    """Write a workload file (JSON lines, one program a line) from a scenario or a published trace."""
    from slos_sglang.workloads.files import write_workload
    from slos_sglang.workloads.scenarios import Draw, at_rate, programs_of
    from slos_sglang.workloads.scenarios import scenario as make
    from slos_sglang.workloads.traces import read_azure, read_mooncake

    if sum(source is not None for source in (scenario, azure, mooncake)) != 1:
        raise ValueError("give exactly one of --scenario, --azure and --mooncake")
    made: list[Program]
    if scenario is not None:
        draw = Draw(programs=programs, seed=seed, data=data, window_start_s=window, prefix_cache=prefix_cache)
        made = at_rate(make(scenario, draw), 1.0 if rate is None else rate)
    else:
        calls = read_azure(azure) if azure else read_mooncake(mooncake) if mooncake else []
        made = programs_of(preset, calls[:programs], _preset(preset))
        if rate is not None:
            made = at_rate(made, rate * made[-1].arrival_s / len(made))
    write_workload(made, output)
    about = _about(made)
    if as_json:
        print(json.dumps({"file": str(output), **about}))
    else:
        print(f"{output}: " + ", ".join(f"{key} {value}" for key, value in about.items()), file=sys.stderr)


def _preset(name: str) -> SLO:
    from slos_sglang.slo import presets

    known: dict[str, SLO] = vars(presets)
    if name.upper() not in known:
        raise ValueError(f"preset must be one of {', '.join(key.lower() for key in known)}, not {name!r}")
    return known[name.upper()]


def _about(programs: list[Program]) -> dict[str, Any]:
    stages = [stage for program in programs for stage in program.stages]

    def mean(name: str) -> float:
        return round(statistics.fmean(getattr(stage, name) for stage in stages), 1)

    return {
        "programs": len(programs),
        "stages": len(stages),
        "span_s": round(programs[-1].arrival_s, 3),
        "mean_prompt_tokens": mean("prompt_tokens"),
        "mean_cached_tokens": mean("cached_tokens"),
        "mean_output_tokens": mean("output_tokens"),
    }
