"""`slos-sglang tiny-model`: writes the embedded default model."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer


def tiny_model(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="where to put the model")],
    random: Annotated[bool, typer.Option("--random", help="an untrained one, for load: it speaks gibberish")] = False,
    seed: Annotated[int | None, typer.Option(help="of --random: same seed, same files")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object on stdout")] = False,
) -> None:
    """Write a small Llama that drives the shipped programs, with tokenizer and chat template: no download."""
    from slos_sglang.tiny_model import make_tiny_model, write_tiny_agent

    if seed is not None and not random:
        raise ValueError(f"--seed {seed} is for --random only: the default model comes trained")
    start_s = time.perf_counter()
    model = make_tiny_model(directory, seed=seed or 0) if random else write_tiny_agent(directory)
    elapsed_s = round(time.perf_counter() - start_s, 2)
    print(f"{model.parameters:,} parameters in {directory} ({elapsed_s} s)", file=sys.stderr)
    if as_json:
        print(json.dumps({**asdict(model), "elapsed_s": elapsed_s}))
