"""`gen`, `select`, `stage` and `annotate` on SGLang's own frontend, and receipts back into the state.

Importing this patches the frontend (see `carry`); programs that use none of it send the same bytes as before.
"""

from __future__ import annotations

from typing import Any

from sglang.lang.interpreter import ProgramState

from slos_sglang.lang.by_name import annotate
from slos_sglang.lang.carry import install, stop
from slos_sglang.lang.nodes import gen, select
from slos_sglang.lang.scope import stage

__all__ = ["annotate", "cancel", "gen", "receipts", "select", "stage"]

install()


def cancel(state: ProgramState) -> None:
    """End a run from another thread: nothing more is sent, and the server stops working on what was promised for it.

    The call under way ends with what it has; `state.error()` and the receipts then say that the run was cancelled.
    Requests without any promise run to their end. A run whose body raises is cancelled by itself.
    """
    stop(state.slos_scope)


def receipts(state: ProgramState) -> list[dict[str, Any]]:
    """What a run's generation calls came to, in order of completion, forks and nested programs included.

    Waits for the state's submitted work. Each entry has `stage` (its path), `prompt_tokens`, `output_tokens`,
    `receipt` (the server's, None where it sent none) and `error` (what the server said where it refused, else None).
    A call repeated under one name has an entry each time, where `state.get_meta_info(name)["slo"]` is the last one's.
    """
    state.sync()
    return list(state.slos_scope.receipts)
