"""Carries scopes through SGLang's frontend onto the wire, and receipts back: the only place that patches it.

SGLang's body thread builds and submits nodes, an executor thread runs them, and every request of its HTTP back end,
hidden ones included (a fork's and a select's prefix, a batch's common prefix), leaves through one function. So:
`submit` ties an expression to the scope of the body, `_execute` enters that scope on the executor thread,
`http_request` adds the annotation, `run_program` and `run_program_batch` take the scope across the threads they
start, and `select` brings back a receipt where SGLang drops it.

What must stay true: a request nothing was promised for leaves byte for byte as SGLang made it; an SGLang with other
definitions than the ones this was written for is refused at import.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import inspect
import math
from collections.abc import Callable
from typing import Any

from sglang.lang import interpreter
from sglang.lang.backend import runtime_endpoint
from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint
from sglang.lang.interpreter import ProgramState, StreamExecutor
from sglang.lang.ir import SglExprList, SglFunction, SglGen, SglSelect

from slos_sglang.lang import scope as scopes
from slos_sglang.lang.nodes import call_names, slo_of
from slos_sglang.lang.scope import Scope, current, entered, new_run

Wrapper = Callable[[Callable[..., Any]], Callable[..., Any]]


class Scoped(SglExprList):
    """An expression with the scope it was submitted in. (The node itself may be shared by several runs.)"""

    def __init__(self, scope: Scope, expr: Any):
        super().__init__([expr])
        self.scope = scope


def _submit(original: Callable[..., Any]) -> Callable[..., Any]:
    def submit(self: StreamExecutor, expr: Any) -> None:
        scope = current()
        if scope is not None:
            scope.saw(call_names(expr))
            expr = Scoped(scope, expr)
        original(self, expr)

    return submit


def _execute(original: Callable[..., Any]) -> Callable[..., Any]:
    def _execute(self: StreamExecutor, other: Any) -> None:
        # Without a scope of its own an expression came from a thread of the user's: it belongs to where its executor
        # was made, which is what this thread's context was copied from.
        scope = other.scope if isinstance(other, Scoped) else current()
        call = isinstance(other, SglGen | SglSelect)
        if isinstance(other, Scoped):
            scope.begin(getattr(self, "slos_idle_since_s", -math.inf))
        if call:
            scope = (scope or new_run(None)).call(other.name, slo_of(other))
        with entered(scope):
            original(self, other)
        if call:
            meta_info = self.meta_info.get(other.name) or {}
            scope.record(
                {
                    "stage": scope.path,
                    "prompt_tokens": meta_info.get("prompt_tokens"),
                    "output_tokens": meta_info.get("completion_tokens"),
                    "receipt": meta_info.get("slo"),
                }
            )
        self.slos_idle_since_s = scopes.clock()

    return _execute


def _http_request(original: Callable[..., Any]) -> Callable[..., Any]:
    def http_request(url: str, json: Any = None, *args: Any, **kwargs: Any) -> Any:
        scope = current()
        wire = None if scope is None or not url.endswith("/generate") else scope.wire()
        if wire is not None:
            params = json["sampling_params"]
            custom = {"slo": wire, **(params.get("custom_params") or {})}
            json = {**json, "sampling_params": {**params, "custom_params": custom}}
        return original(url, json, *args, **kwargs)

    return http_request


def _select(original: Callable[..., Any]) -> Callable[..., Any]:
    def select(self: RuntimeEndpoint, *args: Any, **kwargs: Any) -> Any:
        receipts: list[dict[str, Any]] = []
        listening = copy.copy(self)

        def _generate_http_request(s: StreamExecutor, data: Any) -> Any:
            answer = self._generate_http_request(s, data)
            for one in answer if isinstance(answer, list) else [answer]:
                if "slo" in one["meta_info"]:
                    receipts.append(one["meta_info"]["slo"])
            return answer

        listening._generate_http_request = _generate_http_request  # type: ignore[method-assign]
        decision = original(listening, *args, **kwargs)
        if receipts:
            # A select is as good as its worst request.
            worst = min(receipts, key=lambda r: (bool(r.get("attained")), -(r.get("ttft_ms") or 0)))
            decision.meta_info = {**(decision.meta_info or {}), "slo": worst}
        return decision

    return select


def _run_program(original: Callable[..., Any]) -> Callable[..., Any]:
    def run_program(program: SglFunction, *args: Any, **kwargs: Any) -> ProgramState:
        run = new_run(getattr(program, "slos_enclosing", current()))
        inside = copy.copy(program)
        # With stream=True the body runs on a thread that starts with an empty context.
        inside.func = entered(run)(program.func)
        with entered(run):
            state = original(inside, *args, **kwargs)
        state.slos_scope = run
        return state

    return run_program


def _run_program_batch(original: Callable[..., Any]) -> Callable[..., Any]:
    def run_program_batch(program: SglFunction, *args: Any, **kwargs: Any) -> Any:
        inside = copy.copy(program)
        inside.slos_enclosing = current()
        # The request for the common prefix is sent from here; each run gets a budget of its own later.
        prefix = new_run(current()).child(slo=getattr(program.func, "slos_program", None))
        with entered(prefix):
            return original(inside, *args, **kwargs)

    return run_program_batch


# Where, which attribute, what wraps it, and the fingerprint of the definition it was written for (SGLang 0.5.23).
PATCHED: tuple[tuple[Any, str, Wrapper, str], ...] = (
    (StreamExecutor, "submit", _submit, "5682ff730b159403"),
    (StreamExecutor, "_execute", _execute, "1780c775e388134e"),
    (runtime_endpoint, "http_request", _http_request, "437988c4bcbea7dc"),
    (RuntimeEndpoint, "select", _select, "75ed99dc296533fd"),
    (interpreter, "run_program", _run_program, "917f3a7185ec45d2"),
    (interpreter, "run_program_batch", _run_program_batch, "62ce8c0ac8e92d9b"),
)
# Left alone, but what the wrappers rely on.
RELIED_ON: tuple[tuple[Any, str, str], ...] = (
    (StreamExecutor, "__init__", "61486024da82441e"),
    (StreamExecutor, "fork", "d860e2868bf71102"),
    (StreamExecutor, "_init_var_event", "774a76fdf11c5230"),
    (StreamExecutor, "_execute_gen", "dc0f19a2f1008dfe"),
    (StreamExecutor, "_execute_select", "a4d5b1c0655a2580"),
    (RuntimeEndpoint, "generate", "829597b1117ed467"),
    (RuntimeEndpoint, "generate_stream", "a227a0275a4016e5"),
    (RuntimeEndpoint, "commit_lazy_operations", "05145db0c19a4bb5"),
    (RuntimeEndpoint, "cache_prefix", "4be35350666c392d"),
    (RuntimeEndpoint, "_generate_http_request", "8fa7dcd19b507426"),
    (interpreter, "run_internal", "ab92729c4b0a8cd2"),
    (interpreter, "cache_program", "daedf04d8d4953b4"),
)


def fingerprint(definition: Any) -> str:
    """Of a definition's source text."""
    return hashlib.sha256(inspect.getsource(definition).encode()).hexdigest()[:16]


def install() -> None:
    """Patch SGLang's frontend, once however often it is called.

    Raises `RuntimeError`, and patches nothing, where a definition is not the one this was written for.
    """
    if hasattr(StreamExecutor.submit, "slos_original"):
        return
    known = [(owner, name, mark) for owner, name, _, mark in PATCHED] + list(RELIED_ON)
    for owner, name, mark in known:
        definition = getattr(owner, name, None)
        if definition is None or fingerprint(definition) != mark:
            found = "is missing" if definition is None else f"has fingerprint {fingerprint(definition)}, not {mark}"
            raise RuntimeError(
                f"slos_sglang.lang can't annotate programs under this SGLang: {owner.__name__}.{name} {found}"
            )
    for owner, name, wrapper, _ in PATCHED:
        original = getattr(owner, name)
        wrapped = functools.wraps(original)(wrapper(original))
        wrapped.slos_original = original  # type: ignore[attr-defined]
        setattr(owner, name, wrapped)
