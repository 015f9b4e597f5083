"""The plugin's entry point: SGLang calls `load` once in each of its processes.

Switched off (`SLOS_SGLANG` unset, empty or 0) it does nothing at all. Switched on it must never fail open: SGLang
logs an `Exception` from a plugin and starts without it, so every failure here leaves as a `SeamError` (a
`SystemExit`), which ends this process, and with it the server, with one line on stderr and a non-zero status.
Imports stay inside the guard for the same reason.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from importlib.metadata import entry_points
from types import TracebackType
from typing import Literal

SWITCH_ENV = "SLOS_SGLANG"
# "0" where `slos-sglang serve` added `--enable-mixed-chunk`, not the operator: traffic without SLOs is then not mixed.
OPERATOR_MIXED_ENV = "SLOS_SGLANG_OPERATOR_MIXED"
# By this key in its first message to the HTTP process a scheduler says that it is ours.
ANNOUNCED_KEY = "slos_sglang"


def switched_on() -> bool:
    """Whether this process is to run with the SLO scheduler."""
    return os.environ.get(SWITCH_ENV, "") not in ("", "0")


def left_out() -> str | None:
    """Why SGLang would start without this plugin, silently; None where it will load it."""
    if not entry_points(group="sglang.srt.plugins", name="slos"):
        return "its entry point is not installed (pip install slos-sglang)"
    chosen = os.environ.get("SGLANG_PLUGINS", "")
    if chosen.strip() and "slos" not in (name.strip() for name in chosen.split(",")):
        return f"SGLANG_PLUGINS={chosen!r} does not name 'slos'"
    selected = os.environ.get("SGLANG_PLATFORM")
    if selected and selected != "torch_cpu":
        return f"SGLANG_PLATFORM={selected!r} excludes packages that bring another platform"
    return None


def load() -> None:
    """Bind the seams of this process (entry point `slos` in the group `sglang.srt.plugins`). Raises `SystemExit`."""
    if not switched_on():
        return
    with _FailClosed():
        from slos_sglang.engine import seams

        for process in process_kinds():
            seams.apply(process)


def process_kinds() -> list[Literal["http", "scheduler"]]:
    """What this process may be among SGLang's, from how it was started and what it has imported by now.

    The process that serves HTTP (or holds an offline engine) was started by hand, or by a launcher that has imported
    the engine in a child of its own. A scheduler is always a child, and has imported its module. The detokenizer is
    neither. A process may look like both; then both are bound: what a process does not use changes nothing there.
    """
    child = multiprocessing.parent_process() is not None
    kinds: list[Literal["http", "scheduler"]] = []
    if not child or "sglang.srt.entrypoints.engine" in sys.modules:
        kinds.append("http")
    if child and "sglang.srt.managers.scheduler" in sys.modules:
        kinds.append("scheduler")
    return kinds


class _FailClosed:
    """Turns any `Exception` into a `SystemExit` that SGLang's plugin loader does not swallow."""

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception):
            raise SystemExit(f"slos-sglang: the SLO scheduler can't be loaded: {error}") from error
