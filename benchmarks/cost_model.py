"""How well the scheduler knows how long a step takes, from the events file of a run.

    python benchmarks/cost_model.py              # runs the mixed load against a server of its own
    python benchmarks/cost_model.py EVENTS       # reads the file of another run

For every step the scheduler writes what it predicted before and what it measured after. Reported over the steps after
warm-up: the mean absolute error of single steps; that of the medians of like steps (same number of decoding requests
in bands, same prefill tokens and context in bands), which leaves out what the machine did; and the share of steps that
took more than 1.3 times the prediction, the ones that break promises.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated

import typer
from fleet import Arm, fleet
from workload import ZeroLoad, mixed_calls

from slos_sglang.measure.load import drive
from slos_sglang.telemetry.events import Step, read_events
from slos_sglang.tiny_model import make_tiny_model

OVERRUN = 1.3
MIN_LIKE_STEPS = 5
PROGRAMS, RATES_REQ_S = 300, (6.0, 10.0)
# Targets only shape the batches here; no answer is judged.
TYPICAL = ZeroLoad(ttft_const_ms=11.0, ttft_token_ms=0.13, tpot_ms=7.0)
PREFILL_BAND_TOKENS, CONTEXT_BAND_TOKENS = 32, 1024


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Errors are relative to the measured time; `overrun` is the share of steps over 1.3 times the prediction."""

    steps: int
    single_error: float
    groups: int
    grouped_steps: int
    median_error: float
    overrun: float


def events_of_a_run(directory: Path) -> Path:
    """The events file of the mixed load at two rates against a fresh server."""
    events, config, model = directory / "events.jsonl", directory / "slo.yaml", directory / "model"
    config.write_text(json.dumps({"events": str(events)}), encoding="utf-8")
    vocabulary = make_tiny_model(model).vocab_tokens
    arm = Arm(name="slos", scheduler="slos", config=config)
    with fleet(model, (arm,), directory) as servers, servers.awake(arm.name) as server:
        for seed, rate in enumerate(RATES_REQ_S):
            calls = mixed_calls(programs=PROGRAMS, rate_req_s=rate, seed=seed, zero_load=TYPICAL, vocabulary=vocabulary)
            asyncio.run(drive(server.url, calls, timeout_s=60))
    return events


def steps_of(path: Path) -> list[Step]:
    """The steps in an events file, in order; those without a prediction are left out."""
    return [e for e in read_events(path) if isinstance(e, Step) and e.predicted_ms and e.measured_ms > 0]


def fit_of(steps: Sequence[Step]) -> Fit:
    """The errors over `steps`. Raises `ValueError` where there are none, or no five alike."""
    if not steps:
        raise ValueError("no steps after warm-up")
    errors = [_error(_predicted(step), step.measured_ms) for step in steps]
    groups: dict[tuple[int, ...], list[Step]] = {}
    for step in steps:
        groups.setdefault(_likeness(step), []).append(step)
    like = [group for group in groups.values() if len(group) >= MIN_LIKE_STEPS]
    if not like:
        raise ValueError(f"no {MIN_LIKE_STEPS} like steps among {len(steps)}")
    grouped = sum(map(len, like))
    of_medians = [_error(median(_predicted(s) for s in g), median(s.measured_ms for s in g)) for g in like]
    return Fit(
        steps=len(steps),
        single_error=sum(errors) / len(steps),
        groups=len(like),
        grouped_steps=grouped,
        median_error=sum(error * len(group) for error, group in zip(of_medians, like, strict=True)) / grouped,
        overrun=sum(step.measured_ms > OVERRUN * _predicted(step) for step in steps) / len(steps),
    )


def _likeness(step: Step) -> tuple[int, ...]:
    decodes, prefill_tokens = len(step.decode), sum(step.prefill.values())
    return (
        decodes if decodes < 8 else 6 + decodes // 4,
        len(step.prefill),
        -(-prefill_tokens // PREFILL_BAND_TOKENS),
        step.context_tokens // CONTEXT_BAND_TOKENS,
    )


def _predicted(step: Step) -> float:
    assert step.predicted_ms is not None
    return step.predicted_ms


def _error(predicted_ms: float, measured_ms: float) -> float:
    return abs(predicted_ms - measured_ms) / measured_ms


def main(
    events: Annotated[
        Path | None, typer.Argument(help="events file of a run (`events` in the operator's config)")
    ] = None,
    warm_up_steps: Annotated[int, typer.Option(min=0)] = 500,
    out: Annotated[Path, typer.Option()] = Path("benchmarks/results/cost_model.json"),
) -> None:
    """The cost model's error over the steps of a run."""
    with tempfile.TemporaryDirectory(prefix="cost-model-") as directory:
        fit = fit_of(steps_of(events or events_of_a_run(Path(directory)))[warm_up_steps:])
    print(f"single steps          {fit.single_error:.1%} mean absolute error over {fit.steps} steps")
    print(
        f"medians of like steps {fit.median_error:.1%} over {fit.groups} groups ({fit.grouped_steps} steps), by steps"
    )
    print(f"over {OVERRUN}x predicted   {fit.overrun:.1%} of steps")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(asdict(fit), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
