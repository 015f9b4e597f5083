"""`annotate`: targets for a program that was written without any, its body untouched."""

from __future__ import annotations

import copy
import functools
import inspect
import warnings
from typing import Any

from sglang.lang.interpreter import ProgramState
from sglang.lang.ir import SglFunction

from slos_sglang.lang.names import gen_names
from slos_sglang.lang.scope import current, entered, new_run
from slos_sglang.slo import SLO, nearest


def annotate(function: SglFunction, /, *, e2e_ms: float | None = None, **targets: SLO) -> SglFunction:
    """A copy of a program with a budget for the whole run, ms, and targets by the names of its generation calls.

    Targets given here win over those in the body, and an outer `annotate` over an inner one; deadlines add up to the
    tightest. Where every name in the body can be read from its source, a name that isn't there raises `ValueError`
    at once; where names are computed, a name that a run never used is warned about when that run ends.
    """
    if not isinstance(function, SglFunction):
        raise ValueError(f"annotate takes an @sgl.function, not {function!r}")
    for name, slo in targets.items():
        if not isinstance(slo, SLO):
            raise ValueError(f"target of {name!r} must be an SLO, not {slo!r}")
    budget = None if e2e_ms is None else SLO(e2e_ms=e2e_ms)
    written, complete = gen_names(function.func)
    computed = [name for name in targets if name not in written]
    if computed and complete:
        raise ValueError(_unknown(function.func.__name__, computed[0], written))
    body = function.func

    @functools.wraps(body)
    def annotated_body(s: ProgramState, *args: Any, **kwargs: Any) -> Any:
        scope = (current() or new_run(None)).child(slo=budget, by_name=targets)
        with entered(scope):
            result = body(s, *args, **kwargs)
        for name in computed:
            if name not in scope.names:
                warnings.warn(_unknown(body.__name__, name, written | scope.names), stacklevel=2)
        return result

    # SGLang reads argument names from the function itself, without following wrappers.
    annotated_body.__signature__ = inspect.signature(body)  # type: ignore[attr-defined]
    if budget is not None:
        annotated_body.slos_program = budget  # type: ignore[attr-defined]
    annotated = copy.copy(function)
    annotated.func = annotated_body
    return annotated


def _unknown(program: str, name: str, known: set[str]) -> str:
    near = nearest(name, tuple(sorted(known)))
    hint = f"did you mean {near!r}?" if near else f"its calls: {', '.join(sorted(known)) or 'none has a name'}"
    return f"program {program!r} has no generation call named {name!r}; {hint}"
