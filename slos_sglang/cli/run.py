"""`slos-sglang run`: runs a program against a server and shows what it said and what was kept of the promises."""

from __future__ import annotations

import importlib
import importlib.util
import json
import pkgutil
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from sglang.lang.ir import SglFunction

TABLE_COLUMNS = 120
"""Width of the table where no terminal says how wide it is."""


def run(
    program: Annotated[str, typer.Argument(metavar="PROGRAM", help="a program's name, or the path of a .py file")],
    endpoint: Annotated[str, typer.Option(metavar="URL", help="the server, e.g. http://127.0.0.1:30000")],
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="an argument of the program; repeatable")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object on stdout")] = False,
) -> int:
    """Run an annotated program; print its transcript and a receipt for each of its calls."""
    if not endpoint.startswith(("http://", "https://")):
        raise ValueError(f"--endpoint must be an http:// or https:// address, not {endpoint!r}")
    # The error is a part of the report.
    warnings.filterwarnings("ignore", "Error in stream_executor")
    path = find(program)
    main = load(path)
    report = run_program(main, path.stem, endpoint, arguments(main, path.stem, settings or []))
    if as_json:
        print(json.dumps(report))
    else:
        _show(report)
    return 1 if report["error"] else 0


def find(program: str) -> Path:
    """The file of a program. Raises `ValueError` with the nearest name where there is none."""
    from slos_sglang import programs
    from slos_sglang.slo import nearest

    if program.endswith(".py"):
        if not Path(program).is_file():
            raise ValueError(f"no such file: {program}")
        return Path(program)
    names = tuple(sorted(module.name for module in pkgutil.iter_modules(programs.__path__)))
    if program not in names:
        near = nearest(program, names)
        hint = f"did you mean {near!r}?" if near else f"there are {', '.join(names)}"
        raise ValueError(f"no program named {program!r}; {hint}")
    return Path(programs.__path__[0]) / f"{program}.py"


def load(path: Path) -> SglFunction:
    """The `main` of a program's file. Raises `ValueError` where it has none."""
    from sglang.lang.ir import SglFunction

    main = getattr(_module(path), "main", None)
    if not isinstance(main, SglFunction):
        raise ValueError(f"{path} has no sgl.function named 'main'")
    return main


def _module(path: Path) -> ModuleType:
    from slos_sglang import programs

    if path.parent == Path(programs.__path__[0]):
        return importlib.import_module(f"{programs.__name__}.{path.stem}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None  # holds for any .py file
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def arguments(main: SglFunction, name: str, settings: list[str]) -> dict[str, Any]:
    """`key=value` settings as arguments of a program, read as the type of their default (a text without one).

    Raises `ValueError` naming the key where it is unknown, missing, or its value can't be read.
    """
    from slos_sglang.slo import nearest

    known = tuple(main.arg_names)
    defaults = dict(zip(known[len(known) - len(main.arg_defaults) :], main.arg_defaults, strict=True))
    given: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise ValueError(f"--set {setting}: must be KEY=VALUE")
        if key not in known:
            near = nearest(key, known)
            hint = f"did you mean {near!r}?" if near else f"it takes {', '.join(known) or 'none'}"
            raise ValueError(f"--set {setting}: program {name!r} has no argument {key!r}; {hint}")
        given[key] = _read(key, text, defaults.get(key, ""))
    missing = [key for key in known if key not in given and key not in defaults]
    if missing:
        raise ValueError(f"program {name!r} needs --set {missing[0]}=VALUE")
    return {**defaults, **given}


def _read(key: str, text: str, default: Any) -> Any:
    if isinstance(default, bool):
        if text.lower() not in ("true", "false"):
            raise ValueError(f"--set {key}={text}: must be true or false")
        return text.lower() == "true"
    for kind, what in ((int, "a whole number"), (float, "a number")):
        if isinstance(default, kind):
            try:
                return kind(text)
            except ValueError:
                raise ValueError(f"--set {key}={text}: must be {what}") from None
    return text


def run_program(main: SglFunction, name: str, endpoint: str, args: dict[str, Any]) -> dict[str, Any]:
    """One run: `program`, `endpoint`, `arguments`, `transcript`, `variables`, `calls` (see `lang.receipts`), `error`.

    `error` is None, or why the first call failed that did. Raises `ValueError` where nobody answers there, and
    what the program raises for reasons of its own.
    """
    import sglang as sgl

    from slos_sglang.lang.scope import Scope, entered

    try:
        backend = sgl.RuntimeEndpoint(endpoint.rstrip("/"))
    except (OSError, RuntimeError) as error:
        raise ValueError(f"--endpoint {endpoint}: no SGLang server answers there ({error})") from None
    around, transcript, variables = Scope(), "", {}
    try:
        with entered(around):
            # Bound, because `run` would take an argument that is named like a sampling parameter for one.
            state = main.bind(**args).run(backend=backend)
        transcript = state.text()
        variables = dict(state.stream_executor.variables)
    except KeyError:
        # The body read the output of a call that failed.
        if not around.failures():
            raise
    return {
        "program": name,
        "endpoint": endpoint,
        "arguments": args,
        "transcript": transcript,
        "variables": variables,
        "calls": around.receipts,
        "error": next(iter(around.failures()), None),
    }


def _show(report: dict[str, Any]) -> None:
    print(report["transcript"])
    if report["calls"]:
        _show_calls(report["calls"])
    if report["error"]:
        print(f"slos-sglang: a call failed: {report['error']}", file=sys.stderr)


def _show_calls(calls: list[dict[str, Any]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("call", "tokens in", "out", "TTFT / target ms", "TPOT / target ms", "slack ms", "tier", "attained"):
        table.add_column(heading, justify="left" if heading == "call" else "right", no_wrap=True)
    for call in calls:
        if "tool_ms" in call:
            table.add_row(call["stage"], "", "", f"tool: {_cell(call['tool_ms'])} ms")
            continue
        receipt = call["receipt"] or {}
        table.add_row(
            call["stage"],
            _cell(call["prompt_tokens"]),
            _cell(call["output_tokens"]),
            *(f"{_cell(receipt.get(f'{x}_ms'))} / {_cell(receipt.get(f'{x}_target_ms'))}" for x in ("ttft", "tpot")),
            _cell(receipt.get("slack_ms")),
            _cell(receipt.get("tier")),
            _cell(receipt.get("attained")),
        )
    Console(highlight=False, width=None if sys.stdout.isatty() else TABLE_COLUMNS).print(table)
    if not any(call["receipt"] for call in calls):
        print("No receipts: the server was not started with 'slos-sglang serve'.")


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.1f}"
    return "-" if value is None else str(value).replace("_", " ")
