"""Names of the generation calls of a program, read from its source without running it.

Running or tracing a program to learn them would run its tools. What must stay true: `complete` is only claimed where
no other name can appear.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import sys
import textwrap
from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any

from sglang.lang.ir import SglFunction

_CALLS = {"gen", "gen_int", "gen_string", "select"}
_WITHOUT_GENS = sys.stdlib_module_names | {"sglang", "slos_sglang"}


def gen_names(body: Callable[..., Any]) -> tuple[set[str], bool]:
    """The literal names of generation calls in `body` and in the functions it calls, and whether those are all.

    They may not be all where a name is computed, a source is missing, or the state is handed to something unknown.
    """
    names: set[str] = set()
    complete = True
    seen: set[Callable[..., Any]] = set()
    todo = [body]
    while todo:
        function = inspect.unwrap(todo.pop())
        if function in seen:
            continue
        seen.add(function)
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        except (OSError, TypeError, SyntaxError):
            complete = False
            continue
        local = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            target = _resolve(call.func, function)
            if _is_gen(call.func, target):
                literal, sure = _name_of(call)
                names |= literal
                complete &= sure
            elif isinstance(target, SglFunction):
                todo.append(target.func)
            elif isinstance(target, FunctionType) and not _without_gens(target.__module__):
                todo.append(target)
            elif target is None and not (isinstance(call.func, ast.Name) and call.func.id in local):
                # A method, or something in a variable: harmless unless it gets the state.
                state = next(iter(inspect.signature(function).parameters), None)
                complete &= not any(isinstance(arg, ast.Name) and arg.id == state for arg in call.args)
    return names, complete


def _without_gens(module: str) -> bool:
    return module.split(".")[0] in _WITHOUT_GENS and not module.startswith("slos_sglang.programs")


def _is_gen(callee: ast.expr, target: Any) -> bool:
    written = callee.attr if isinstance(callee, ast.Attribute) else getattr(callee, "id", None)
    return (getattr(target, "__name__", None) if isinstance(target, FunctionType) else written) in _CALLS


def _name_of(call: ast.Call) -> tuple[set[str], bool]:
    """The call's literal name, if it has one, and whether that is certain."""
    given = [*call.args[:1], *(keyword.value for keyword in call.keywords if keyword.arg in ("name", None))]
    literal = {arg.value for arg in given if isinstance(arg, ast.Constant) and isinstance(arg.value, str)}
    return literal, len(literal) == len(given)


def _resolve(callee: ast.expr, function: Callable[..., Any]) -> Any:
    """What a callee stands for outside the function; else None. A program's methods (`run`) stand for the program."""
    if isinstance(callee, ast.Name):
        around = inspect.getclosurevars(function).nonlocals
        return around.get(callee.id, function.__globals__.get(callee.id, vars(builtins).get(callee.id)))
    if isinstance(callee, ast.Attribute):
        owner = _resolve(callee.value, function)
        if isinstance(owner, SglFunction):
            return owner
        return getattr(owner, callee.attr, None) if isinstance(owner, ModuleType) else None
    return None
