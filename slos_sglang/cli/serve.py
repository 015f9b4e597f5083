"""`slos-sglang serve`: SGLang's own server with the SLO scheduler switched on.

Everything that can be wrong is said before SGLang is imported, in one line; then this process *becomes* the stock
`sglang serve` (exec), so that signals, exit codes and child processes are SGLang's own.
"""

from __future__ import annotations

import os
import sys
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import typer

# `sglang serve`, through the console script's own function: the package has no runnable module for it.
_SGLANG = "import sys; from sglang.cli.main import main; sys.argv[0] = 'sglang'; main()"

PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True}
"""For `app.command("serve", context_settings=PASS_THROUGH)`: what is not ours goes to SGLang."""


def serve(
    context: typer.Context,
    slo_config: Annotated[
        Path | None, typer.Option("--slo-config", help="The operator's settings (YAML): bounds, default SLO, ageing.")
    ] = None,
) -> None:
    """Serve a model with the SLO scheduler; every flag of 'sglang serve' works here as it does there."""
    from slos_sglang.engine.config import CONFIG_ENV, load_config
    from slos_sglang.engine.plugin import OPERATOR_MIXED_ENV, SWITCH_ENV, left_out
    from slos_sglang.engine.seams import require
    from slos_sglang.patches import SEAMS

    load_config(slo_config)
    if left_out() is not None:
        raise ValueError(f"SGLang would not load the plugin: {left_out()}")
    require(seam for seam in SEAMS if seam.process != "client")
    flags = with_defaults(context.args)
    os.environ[SWITCH_ENV] = "1"
    os.environ[OPERATOR_MIXED_ENV] = "1" if flags == context.args else "0"
    if slo_config is not None:
        os.environ[CONFIG_ENV] = str(slo_config.resolve())
    else:
        os.environ.pop(CONFIG_ENV, None)
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-P", "-c", _SGLANG, "serve", *flags])


def with_defaults(flags: list[str]) -> list[str]:
    """SGLang's flags with mixed batches on, which the scheduler forms.

    Not where SGLang refuses them: chunked prefill off, or a speculative algorithm (one token a step there).
    """
    names = {flag.partition("=")[0] for flag in flags}
    chunks = next((value for value in _values(flags, "--chunked-prefill-size")), "1")
    if "--enable-mixed-chunk" in names or "--speculative-algorithm" in names or chunks.startswith(("-", "0")):
        return flags
    return [*flags, "--enable-mixed-chunk"]


def _values(flags: list[str], name: str) -> list[str]:
    apart = [value for flag, value in pairwise(flags) if flag == name]
    joined = [flag.partition("=")[2] for flag in flags if flag.startswith(f"{name}=")]
    return apart + joined
