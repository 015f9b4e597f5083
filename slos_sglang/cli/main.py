"""The `slos-sglang` command: one file a subcommand, each exposing one function that is registered here.

Importing this module must stay cheap (no SGLang, no torch): every subcommand imports what it needs when it runs.
"""

from __future__ import annotations

import sys

import typer

from slos_sglang.cli.capacity import capacity
from slos_sglang.cli.demo import demo
from slos_sglang.cli.doctor import doctor
from slos_sglang.cli.run import run
from slos_sglang.cli.serve import PASS_THROUGH, serve
from slos_sglang.cli.simulate import simulate
from slos_sglang.cli.tiny_model import tiny_model
from slos_sglang.cli.workload import workload

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Agents that keep their promises on SGLang.",
)


@app.callback()
def _commands() -> None:
    """Agents that keep their promises on SGLang."""


app.command("tiny-model")(tiny_model)
app.command("doctor")(doctor)
app.command("demo")(demo)
app.command("run")(run)
app.command("workload")(workload)
app.command("simulate")(simulate)
app.command("capacity")(capacity)
app.command("serve", context_settings=PASS_THROUGH)(serve)


def main() -> None:
    """Run the command line; wrong input ends with status 2 and one line on stderr."""
    try:
        status = app(standalone_mode=False)
    except (ValueError, typer.TyperException) as error:
        message = error.format_message() if isinstance(error, typer.TyperException) else str(error)
        print(f"slos-sglang: {message}", file=sys.stderr)
        sys.exit(2)
    except typer.Abort:
        sys.exit(130)
    sys.exit(status if isinstance(status, int) else 0)
