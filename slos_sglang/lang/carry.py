"""Carries scopes through SGLang's frontend onto the wire, and receipts back: hooks of the seams `patches/lang_*`.

SGLang's body thread builds and submits nodes, an executor thread runs them, and every request of its HTTP back end,
hidden ones included (a fork's and a select's prefix, a batch's common prefix), leaves through one function. So:
`submit` ties an expression to the scope of the body, `execute` enters that scope on the executor thread,
`http_request` adds the annotation, `run_program` and `run_program_batch` take the scope across the threads they
start, and `select` brings back a receipt where SGLang drops it.

What must stay true: a request nothing was promised for leaves byte for byte as SGLang made it; an SGLang with other
definitions than the ones this was written for is refused at import.
"""

from __future__ import annotations

import copy
import functools
import math
import warnings
from collections.abc import Callable
from typing import Any

import requests
from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint
from sglang.lang.interpreter import ProgramState, StreamExecutor
from sglang.lang.ir import SglExprList, SglFunction, SglGen, SglSelect

from slos_sglang.engine import seams
from slos_sglang.lang import scope as scopes
from slos_sglang.lang.nodes import call_names, slo_of
from slos_sglang.lang.scope import Scope, current, entered, new_run

Original = Callable[..., Any]
_GENERATE = "/generate"
ABORT_TIMEOUT_S = 10.0


class Scoped(SglExprList):  # type: ignore[misc]  # SGLang is untyped
    """An expression with the scope it was submitted in. (The node itself may be shared by several runs.)"""

    def __init__(self, scope: Scope, expr: Any):
        super().__init__([expr])
        self.scope = scope


def submit(original: Original, self: StreamExecutor, expr: Any) -> None:
    """On the body's thread: tie the expression to the scope the body is in."""
    scope = current()
    if scope is not None:
        scope.saw(call_names(expr))
        scope.opened()
        expr = Scoped(scope, expr)
    original(self, expr)


def execute(original: Original, self: StreamExecutor, other: Any) -> None:
    """On the executor's thread: be in that scope; a generation call is a scope of its own and leaves a receipt.

    An expression without a scope came from a thread of the user's. It belongs to where its executor was made (a
    fork to its stage): this thread's context was copied from there.
    """
    if isinstance(other, Scoped):
        other.scope.begin(getattr(self, "slos_idle_since_s", -math.inf))
        try:
            with entered(other.scope):
                original(self, other)
        finally:
            other.scope.closed()
    elif isinstance(other, SglGen | SglSelect):
        scope = (current() or new_run(None)).call(other.name, slo_of(other))
        with scope.working():
            try:
                with entered(scope):
                    original(self, other)
            except (RuntimeError, OSError) as error:  # any status but 200, and no answer
                scope.record({}, error=str(error))
                raise
            scope.record(self.meta_info.get(other.name) or {}, error=scope.stopped())
            scope.check_going_on()
    else:
        original(self, other)
    self.slos_idle_since_s = scopes.clock()


def http_request(original: Original, url: str, json: Any = None, *args: Any, **kwargs: Any) -> Any:
    """Add the annotation to a request for tokens, and an id that it can be aborted by.

    Parameters the user sends along stay, an SLO among them too. Raises `Cancelled` in a run that was.
    """
    scope = current()
    if scope is None or not url.endswith(_GENERATE):
        return original(url, json, *args, **kwargs)
    scope.check_going_on()
    wire = scope.wire()
    if wire is not None:
        json = {"rid": scope.sending(url.removesuffix(_GENERATE), kwargs.get("api_key")), **json}
        params = json["sampling_params"]
        custom = {"slo": wire, **(params.get("custom_params") or {})}
        json = {**json, "sampling_params": {**params, "custom_params": custom}}
    return original(url, json, *args, **kwargs)


def select(original: Original, self: RuntimeEndpoint, *args: Any, **kwargs: Any) -> Any:
    """Put a receipt into the decision's meta info: a select is as good as the worst of its requests."""
    receipts: list[dict[str, Any]] = []
    listening = copy.copy(self)

    def listen(s: StreamExecutor, data: Any) -> Any:
        answer = self._generate_http_request(s, data)
        metas = [one["meta_info"] for one in (answer if isinstance(answer, list) else [answer])]
        receipts.extend(meta["slo"] for meta in metas if "slo" in meta)
        return answer

    listening._generate_http_request = listen
    decision = original(listening, *args, **kwargs)
    if receipts:
        worst = min(receipts, key=lambda r: (bool(r.get("attained")), -(r.get("ttft_ms") or 0)))
        decision.meta_info = {**(decision.meta_info or {}), "slo": worst}
    return decision


def run_program(original: Original, program: SglFunction, *args: Any, **kwargs: Any) -> ProgramState:
    """Run the body in the scope of a new run; with `stream=True` it has a thread with an empty context."""
    run = new_run(getattr(program, "slos_enclosing", current()))
    run.function = f"{program.func.__module__}.{program.func.__qualname__}"
    inside = copy.copy(program)
    inside.func = _to_its_end(run, program.func)
    with entered(run):
        state = original(inside, *args, **kwargs)
    state.slos_scope = run
    return state


def _to_its_end(run: Scope, body: Original) -> Original:
    """`body` in the scope of `run`. If it raises, nobody waits any more for what it has under way."""

    @functools.wraps(body)
    def inside(*args: Any, **kwargs: Any) -> Any:
        with run.working(), entered(run):
            try:
                return body(*args, **kwargs)
            except BaseException:
                stop(run)
                raise

    return inside


def stop(run: Scope) -> None:
    """End a run: nothing more is sent, and what the server works on for it is aborted there."""
    for rid, (base_url, api_key) in run.cancel().items():
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        try:
            requests.post(f"{base_url}/abort_request", json={"rid": rid}, headers=headers, timeout=ABORT_TIMEOUT_S)
        except requests.RequestException as error:
            warnings.warn(f"could not abort a request at {base_url}: {error}", stacklevel=2)


def run_program_batch(original: Original, program: SglFunction, *args: Any, **kwargs: Any) -> Any:
    """Hand the caller's scope to the runs on the pool's threads; the common prefix is sent ahead from this one."""
    inside = copy.copy(program)
    inside.slos_enclosing = current()
    prefix = new_run(current()).child(slo=getattr(program.func, "slos_program", None))
    with entered(prefix):
        return original(inside, *args, **kwargs)


def install() -> None:
    """Bind the seams of this process, once however often it is called.

    Raises `RuntimeError`, and binds nothing, where a definition is not the one this was written for.
    """
    try:
        seams.apply("client")
    except seams.SeamError as error:
        raise RuntimeError(str(error)) from None
