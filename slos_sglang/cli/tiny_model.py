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
    seed: Annotated[int, typer.Option(help="same seed, same files")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object on stdout")] = False,
) -> None:
    """Make a small Llama with tokenizer and chat template: random weights, no download."""
    from slos_sglang.tiny_model import make_tiny_model

    start_s = time.perf_counter()
    model = make_tiny_model(directory, seed=seed)
    elapsed_s = round(time.perf_counter() - start_s, 2)
    print(f"{model.parameters:,} parameters in {directory} ({elapsed_s} s)", file=sys.stderr)
    if as_json:
        print(json.dumps({**asdict(model), "elapsed_s": elapsed_s}))
