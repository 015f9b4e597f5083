"""Where in a program we are: program id, stage path and deadline, as a chain of scopes.

A scope is entered on the thread that runs the program's body (a context variable), and entered again on the
executor thread that sends the requests, where the body's context can't be seen. What must stay true: a deadline is
the minimum over the chain, only deadlines are inherited, and a budget is computed from the client's monotonic clock
in the moment a request is sent.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from slos_sglang.slo import SLO, WireSLO

clock = time.monotonic
ids = random.Random()
"""Source of program ids; seed it for reproducible ones."""

_current: ContextVar[Scope | None] = ContextVar("slos_scope", default=None)


@dataclass(kw_only=True, eq=False)
class Scope:
    """A program run, a stage in it, or one generation call.

    program    id of the run; None outside any run
    path       names of the enclosing stages, joined by "/"
    slo        its own targets; only `e2e_ms` reaches its children
    by_name    targets for generation calls of that name inside, as `annotate` was given them
    started_s  when its own budget began to run, on the client's monotonic clock
    names      names of the generation calls submitted inside so far
    receipts   what was sent and answered inside so far, in order of completion
    """

    program: str | None = None
    path: str = ""
    parent: Scope | None = None
    slo: SLO | None = None
    by_name: Mapping[str, SLO] = field(default_factory=lambda: MappingProxyType({}))
    started_s: float = field(default_factory=lambda: clock())
    names: set[str] = field(default_factory=set)
    receipts: list[dict[str, Any]] = field(default_factory=list)
    _begun: bool = False

    def child(self, name: str | None = None, slo: SLO | None = None, by_name: Mapping[str, SLO] | None = None) -> Scope:
        """A scope inside this one; without a name it shares the path."""
        path = "/".join(part for part in (self.path, name) if part)
        return Scope(program=self.program, path=path, parent=self, slo=slo, by_name=by_name or {})

    def call(self, name: str | None, slo: SLO | None) -> Scope:
        """The scope of one generation call. Targets given by name win over the call's own, outer over inner."""
        for scope in self._chain():
            slo = scope.by_name.get(name or "", slo)
        return self.child(name, slo)

    def begin(self, idle_since_s: float) -> None:
        """An executor reached the first expression in here; it was done with what came before at `idle_since_s`.

        A body runs ahead of its executor: without this, the budgets of stages that follow each other would all
        start when the first one does.
        """
        for scope in self._chain():
            if scope._begun:
                return
            scope._begun = True
            scope.started_s = max(scope.started_s, idle_since_s)

    def left_ms(self) -> float | None:
        """What is left of the tightest budget around here, ms (negative: overrun); None where there is none."""
        now_s = clock()
        return min(
            (
                (scope.started_s - now_s) * 1000 + scope.slo.e2e_ms
                for scope in self._chain()
                if scope.slo is not None and scope.slo.e2e_ms is not None
            ),
            default=None,
        )

    def wire(self) -> dict[str, Any] | None:
        """The object for `custom_params.slo` of a request sent now; None where nothing was promised."""
        left_ms = self.left_ms()
        if self.slo is None and left_ms is None:
            return None
        slo = self.slo or SLO()
        return WireSLO(
            program=self.program,
            stage=self.path or None,
            ttft_ms=slo.ttft_ms,
            ttft_slowdown=slo.ttft_slowdown,
            tpot_ms=slo.tpot_ms,
            think_tpot_ms=slo.think_tpot_ms,
            think_end=slo.think_end,
            budget_ms=None if left_ms is None else round(left_ms, 1),
            value=slo.value,
            on_decline=slo.on_decline,
        ).to_dict()

    def saw(self, names: Iterable[str]) -> None:
        """Note the names of submitted calls, here and in everything around."""
        names = set(names)
        for scope in self._chain():
            scope.names |= names

    def record(self, meta_info: Mapping[str, Any], error: str | None = None) -> None:
        """Note the end of this call, here and in everything around; `meta_info` is the server's."""
        receipt = {
            "stage": self.path,
            "prompt_tokens": meta_info.get("prompt_tokens"),
            "output_tokens": meta_info.get("completion_tokens"),
            "receipt": meta_info.get("slo"),
            "error": error,
        }
        for scope in self._chain():
            scope.receipts.append(receipt)

    def _chain(self) -> Iterator[Scope]:
        scope: Scope | None = self
        while scope is not None:
            yield scope
            scope = scope.parent


def current() -> Scope | None:
    """The scope this thread is in."""
    return _current.get()


def new_run(parent: Scope | None) -> Scope:
    """The scope of one run. A program run inside another one's is a part of it and shares its id."""
    inside = parent or Scope()
    run = inside.child()
    if run.program is None:
        run.program = f"{ids.getrandbits(48):012x}"
    return run


@contextmanager
def entered(scope: Scope | None) -> Iterator[None]:
    """Be in `scope` on this thread."""
    token = _current.set(scope)
    try:
        yield
    finally:
        _current.reset(token)


@contextmanager
def stage(name: str, *, e2e_ms: float | None = None) -> Iterator[Scope]:
    """A stage with an optional budget, ms, for everything inside: calls, forks, selects, nested programs, tools.

    The budget runs from the entry of the block, or from the end of the work submitted before it where the executor
    is still busy with that. Requests sent inside carry what is left of the tightest budget around them. Yields the
    scope: `left_ms()` is what is left now. Raises `ValueError` naming the field and the value.
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"stage name must be a non-empty text, not {name!r}")
    slo = None if e2e_ms is None else SLO(e2e_ms=e2e_ms)
    scope = (current() or Scope()).child(name, slo)
    with entered(scope):
        yield scope
