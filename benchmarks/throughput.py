"""What SLO scheduling costs when nobody asks for it: throughput without SLOs, against stock scheduling.

    python benchmarks/throughput.py

SGLang's own `bench_serving` (random-ids, all requests at once, 32 at a time) runs against both servers in pairs, one
right after the other, the order alternating and both with the pair's seed. Reported is the median over the pairs of
ours / stock. Neither the data set nor the tokenizer is downloaded.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from fleet import Arm, Fleet, fleet, host_use

from slos_sglang.tiny_model import make_tiny_model

OURS, STOCK = Arm(name="slos", scheduler="slos"), Arm(name="stock-default", scheduler="stock")
LOAD = (
    *("--backend", "sglang"),
    *("--dataset-name", "random-ids", "--random-range-ratio", "0.5"),
    *("--random-input-len", "256", "--random-output-len", "64"),
    *("--request-rate", "inf", "--max-concurrency", "32"),
    *("--disable-tqdm", "--flush-cache"),
)
RATES = ("total_throughput", "output_throughput")


def bench_serving(servers: Fleet, arm: Arm, model: Path, *, prompts: int, seed: int) -> dict[str, Any]:
    """One run of SGLang's benchmark against one arm: its throughputs, tokens a second, and the machine's use."""
    with tempfile.TemporaryDirectory() as directory, servers.awake(arm.name) as server, host_use(server) as host:
        out = Path(directory, "result.jsonl")
        command = [sys.executable, "-m", "sglang.bench_serving", *LOAD, "--base-url", server.url]
        command += ["--model", str(model), "--tokenizer", str(model), "--output-file", str(out)]
        command += ["--num-prompts", str(prompts), "--seed", str(seed)]
        offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "SGLANG_PLUGINS": "torch_cpu"}
        subprocess.run(command, env=offline, check=True, stdout=sys.stderr)
        result = json.loads(out.read_text(encoding="utf-8").splitlines()[-1])
    if result["completed"] != prompts:
        raise RuntimeError(f"{arm.name} answered {result['completed']} of {prompts} requests")
    return {"arm": arm.name, "seed": seed, **{key: result[key] for key in RATES}, "host": asdict(host[0])}


def main(
    pairs: Annotated[int, typer.Option(min=1)] = 5,
    prompts: Annotated[int, typer.Option(min=1)] = 200,
    out: Annotated[Path, typer.Option()] = Path("benchmarks/results/throughput.json"),
) -> None:
    """Throughput without SLOs, ours over stock."""
    runs: list[dict[str, Any]] = []
    ratios: dict[str, list[float]] = {key: [] for key in RATES}
    logs = out.parent / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="throughput-") as directory:
        model = Path(directory, "model")
        make_tiny_model(model)
        with fleet(model, (OURS, STOCK), logs) as servers:
            for arm in (OURS, STOCK):
                bench_serving(servers, arm, model, prompts=32, seed=0)  # warm-up
            for seed in range(1, pairs + 1):
                order = (OURS, STOCK) if seed % 2 else (STOCK, OURS)
                pair = {arm: bench_serving(servers, arm, model, prompts=prompts, seed=seed) for arm in order}
                runs += [pair[OURS], pair[STOCK]]
                for key in RATES:
                    ratios[key].append(pair[OURS][key] / pair[STOCK][key])
                print(f"pair {seed}: " + ", ".join(f"{k} {v[-1]:.3f}" for k, v in ratios.items()), file=sys.stderr)
    summary = {key: {"median": median(ratios[key]), "min": min(ratios[key]), "max": max(ratios[key])} for key in RATES}
    out.write_text(json.dumps({"ours_over_stock": summary, "runs": runs}, indent=1) + "\n", encoding="utf-8")
    for key, found in summary.items():
        print(f"{key}: ours / stock {found['median']:.3f} ({found['min']:.3f} to {found['max']:.3f}), {pairs} pairs")


if __name__ == "__main__":
    typer.run(main)
