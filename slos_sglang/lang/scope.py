"""Where in a program we are: program id, stage path and deadline, as a chain of scopes.

A scope is entered on the thread that runs the program's body (a context variable), and entered again on the
executor thread that sends the requests, where the body's context can't be seen. What must stay true: a deadline is
the minimum over the chain, only deadlines are inherited, and a budget is computed from the client's monotonic clock
in the moment a request is sent.

Stages with budgets of their own that follow each other inside a budget are a schedule: what one leaves over the next
may use, and what one overruns the next make up for. Stages side by side (forks) start with the same, and what the last
of them to end leaves goes on.
"""

from __future__ import annotations

import itertools
import random
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from slos_sglang.lang.history import CallDone, History, Rest
from slos_sglang.slo import SLO, WireSLO, encode_phases

clock = time.monotonic
ids = random.Random()
"""Source of program ids; seed it for reproducible ones."""

history = History()
"""What this process has seen of its programs."""

KEPT_SHARE = 0.5
"""However much the stages before it overran, a stage keeps this share of its own budget."""


class Cancelled(RuntimeError):
    """The run was cancelled: what it would still send isn't sent."""


_lock = threading.Lock()
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
    flexible   its budget is a part of the schedule of the budget around it; a call's own `e2e_ms` is not
    function   of a program run: what its history is kept by
    serial     a number that no other scope has
    done       of a program run: its calls so far
    cancelled  nothing is sent from in here any more
    under_way  requests sent from in here that may not have been answered, by id: where to, and the key for it
    """

    program: str | None = None
    path: str = ""
    parent: Scope | None = None
    slo: SLO | None = None
    by_name: Mapping[str, SLO] = field(default_factory=lambda: MappingProxyType({}))
    started_s: float = field(default_factory=lambda: clock())
    names: set[str] = field(default_factory=set)
    receipts: list[dict[str, Any]] = field(default_factory=list)
    flexible: bool = False
    function: str | None = None
    serial: int = field(default_factory=itertools.count().__next__)
    done: list[CallDone] = field(default_factory=list)
    cancelled: bool = False
    under_way: dict[str, tuple[str, str | None]] = field(default_factory=dict)
    _begun: bool = False
    # Blocks that are open and expressions that are not done, in here: at none it has ended.
    _open: int = 0
    # What the stages before it left of their budgets, s (negative: overrun), and what the last one in here left.
    _spare_s: float | None = None
    _passed_on_s: float = 0.0

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
            scope._spare_s = scope._spare()

    @contextmanager
    def working(self) -> Iterator[None]:
        """Something in here is going on. When nothing is any more, what is left of a budget goes to the next stages."""
        self.opened()
        try:
            yield
        finally:
            self.closed()

    def opened(self) -> None:
        """A block was entered, or an expression submitted."""
        with _lock:
            for scope in self._chain():
                scope._open += 1

    def closed(self) -> None:
        """A block was left, or an expression is done."""
        with _lock:
            if self._open == 1:
                for rid in list(self.under_way):
                    for scope in self._chain():
                        scope.under_way.pop(rid, None)
            for scope in self._chain():
                scope._open -= 1
                around = scope._budget_around()
                if scope._open == 0 and scope.flexible and around is not None and scope.budget_ms is not None:
                    around._passed_on_s = scope.started_s - clock() + scope.budget_ms / 1000 + scope._spare()
                if scope._open == 0 and scope.function is not None and not scope.failures():
                    history.learn(scope.function, scope.done)

    def failures(self) -> list[str]:
        """What the server said to calls in here that it refused. (What a tool raised is the program's own matter.)"""
        return [entry["error"] for entry in self.receipts if entry["error"] and "tool_ms" not in entry]

    @property
    def budget_ms(self) -> float | None:
        """The budget that was given to it, ms."""
        return None if self.slo is None else self.slo.e2e_ms

    def left_ms(self) -> float | None:
        """What is left of the tightest budget around here, ms (negative: overrun); None where there is none."""
        return self._tightest()[0]

    def _own_left_ms(self, now_s: float) -> float | None:
        if self.budget_ms is None:
            return None
        spare_ms = max(self._spare() * 1000, (KEPT_SHARE - 1) * self.budget_ms)
        return (self.started_s - now_s) * 1000 + self.budget_ms + spare_ms

    def _spare(self) -> float:
        if self._spare_s is not None:
            return self._spare_s
        around = self._budget_around() if self.flexible else None
        return 0.0 if around is None else around._passed_on_s

    def _budget_around(self) -> Scope | None:
        chain = self._chain()
        next(chain)
        return next((scope for scope in chain if scope.budget_ms is not None), None)

    def wire(self) -> dict[str, Any] | None:
        """The object for `custom_params.slo` of a request sent now; None where nothing was promised."""
        left_ms, budget_of = self._tightest()
        if self.slo is None and left_ms is None:
            return None
        slo = self.slo or SLO()
        rest = self._rest(budget_of)
        return WireSLO(
            program=self.program,
            stage=self.path or None,
            ttft_ms=slo.ttft_ms,
            ttft_slowdown=slo.ttft_slowdown,
            tpot_ms=slo.tpot_ms,
            think_tpot_ms=slo.think_tpot_ms,
            think_end=slo.think_end,
            answer_ttft_ms=slo.answer_ttft_ms,
            phases=encode_phases(slo.phase_list) if slo.phase_list else None,
            budget_ms=None if left_ms is None else round(left_ms, 1),
            value=slo.value,
            on_decline=slo.on_decline,
            **(rest.to_dict() if rest is not None else {}),
        ).to_dict()

    def _rest(self, budget_of: Scope | None) -> Rest | None:
        """What is expected to remain after this call of what its budget is for; of the whole run without a budget."""
        runs = [scope for scope in self._chain() if scope.function is not None]
        if not runs or runs[-1].function is None:
            return None
        inwards = self._inwards(runs[-1])
        depth = inwards.index(budget_of) if budget_of in inwards else 0
        before = sum(call.stage == self.path for call in runs[-1].done)
        return history.expect(runs[-1].function, self.path, before, depth)

    def _inwards(self, run: Scope) -> list[Scope]:
        """The scopes from `run` down to this one."""
        chain = list(self._chain())
        return chain[chain.index(run) :: -1]

    def _tightest(self) -> tuple[float | None, Scope | None]:
        """What is left of the tightest budget around here, ms, and whose that is; the outermost of equals."""
        now_s = clock()
        left = [
            (ms, -n, scope) for n, scope in enumerate(self._chain()) if (ms := scope._own_left_ms(now_s)) is not None
        ]
        return min(left)[::2] if left else (None, None)

    def stopped(self) -> str | None:
        """Why nothing is sent from here any more; None where something is."""
        return "the run was cancelled" if any(scope.cancelled for scope in self._chain()) else None

    def check_going_on(self) -> None:
        """Raise `Cancelled` where this scope, or one around it, was cancelled."""
        if (why := self.stopped()) is not None:
            raise Cancelled(why)

    def sending(self, base_url: str, api_key: str | None) -> str:
        """A request is about to be sent from here; the id that it is to have. Raises `Cancelled`."""
        rid = uuid.uuid4().hex
        with _lock:
            self.check_going_on()
            for scope in self._chain():
                scope.under_way[rid] = (base_url, api_key)
        return rid

    def cancel(self) -> dict[str, tuple[str, str | None]]:
        """Send nothing from in here any more; what is under way."""
        with _lock:
            self.cancelled = True
            return dict(self.under_way)

    def saw(self, names: Iterable[str]) -> None:
        """Note the names of submitted calls, here and in everything around."""
        names = set(names)
        for scope in self._chain():
            scope.names |= names

    def record(self, meta_info: Mapping[str, Any], error: str | None = None) -> None:
        """Note the end of this call, here and in everything around; `meta_info` is the server's."""
        prompt_tokens, output_tokens = meta_info.get("prompt_tokens"), meta_info.get("completion_tokens")
        call = CallDone(
            stage=self.path,
            scopes=(),
            sent_s=self.started_s,
            ended_s=clock(),
            prompt_tokens=max((prompt_tokens or 0) - (meta_info.get("cached_tokens") or 0), 0),
            output_tokens=output_tokens or 0,
        )
        self._note(
            {
                "stage": self.path,
                "prompt_tokens": prompt_tokens,
                "output_tokens": output_tokens,
                "receipt": meta_info.get("slo"),
                "error": error,
            },
            call,
        )

    def _note(self, entry: dict[str, Any], call: CallDone | None = None) -> None:
        for scope in self._chain():
            scope.receipts.append(entry)
            if call is not None and scope.function is not None:
                scopes = tuple(each.serial for each in self._inwards(scope)[:-1])
                scope.done.append(replace(call, scopes=scopes))

    @contextmanager
    def tool(self, name: str) -> Iterator[None]:
        """Something else than a generation call that the program waits for: its time goes into the receipts.

        The entry has `stage` (the path, ending in `name`), `tool_ms`, and in `error` what the tool raised, if it did;
        the exception passes on. Raises `ValueError` naming the value for a name that is none.
        """
        _check_name("tool", name)
        started_s, error = clock(), None
        with self.working():
            try:
                yield
            except BaseException as raised:
                error = repr(raised)
                raise
            finally:
                path = "/".join(part for part in (self.path, name) if part)
                tool_ms = round((clock() - started_s) * 1000, 3)
                self._note({"stage": path, "tool_ms": tool_ms, "receipt": None, "error": error})

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


def _check_name(what: str, name: object) -> None:
    if not isinstance(name, str) or not name:
        raise ValueError(f"{what} name must be a non-empty text, not {name!r}")


@contextmanager
def stage(name: str, *, e2e_ms: float | None = None) -> Iterator[Scope]:
    """A stage with an optional budget, ms, for everything inside: calls, forks, selects, nested programs, tools.

    The budget runs from the entry of the block, or from the end of the work submitted before it where the executor
    is still busy with that. Inside a budget it is longer by what the stage before it left over, and shorter by what
    that one overran, down to `KEPT_SHARE` of it. Requests sent inside carry what is left of the tightest budget around
    them. Yields the scope: `left_ms()` is what is left now. Raises `ValueError` naming the field and the value.
    """
    _check_name("stage", name)
    slo = None if e2e_ms is None else SLO(e2e_ms=e2e_ms)
    scope = (current() or Scope()).child(name, slo)
    scope.flexible = True
    with entered(scope), scope.working():
        yield scope
