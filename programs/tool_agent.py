"""A tool-calling agent: think of a call, run the tool, read its result, up to five times, then answer.

The turns of the loop have tight targets (somebody waits for the tool), the final answer is paced for reading, and one
budget holds for everything, tools included. A grammar makes every call well formed, so the loop is real even with a
model that has random weights; a capable model can do no more than these patterns allow. Decoding is greedy: a
call is no place for chance.
"""

from __future__ import annotations

import ast
import csv
import json
import operator
import re
import sqlite3
from collections.abc import Callable
from pathlib import Path

import sglang as sgl

from slos_sglang import gen, presets, stage

HERE = Path(__file__).resolve().parent
OPERATIONS: dict[type, Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def calculator(expression: str) -> str:
    """The value of a sum of products of numbers. Raises `ValueError` for anything else."""

    def value(node: ast.expr) -> float:
        match node:
            case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
                return number
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -value(operand)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATIONS:
                return OPERATIONS[type(op)](value(left), value(right))
        raise ValueError(f"{expression!r} is more than numbers and + - * /")

    try:
        return f"{value(ast.parse(expression, mode='eval').body):.10g}"
    except (SyntaxError, ZeroDivisionError) as error:
        raise ValueError(f"{expression!r}: {error}") from None


def _mountains() -> sqlite3.Connection:
    database = sqlite3.connect(":memory:", check_same_thread=False)
    database.execute("CREATE TABLE mountains (name TEXT PRIMARY KEY, range TEXT, country TEXT, height_m INTEGER)")
    with open(HERE / "data" / "mountains.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    database.executemany("INSERT INTO mountains VALUES (:name, :range, :country, :height_m)", rows)
    return database


MOUNTAINS = _mountains()


def lookup(query: str) -> str:
    """One mountain by its name, or the `highest N`. Raises `ValueError` for a name that isn't in the table."""
    columns = "SELECT name, range, country, height_m FROM mountains"
    if query.startswith("highest "):
        rows = MOUNTAINS.execute(f"{columns} ORDER BY height_m DESC LIMIT ?", (int(query.split()[1]),)).fetchall()
    else:
        rows = MOUNTAINS.execute(f"{columns} WHERE name = ?", (query,)).fetchall()
    if not rows:
        raise ValueError(f"no mountain named {query!r}")
    return "; ".join(f"{name} ({range_}, {country}): {height} m" for name, range_, country, height in rows)


def search(words: str) -> str:
    """The paragraph of this project's docs that has most of the words. Raises `ValueError` where none has any."""
    root = HERE.parent
    docs = [root / "README.md", *sorted(root.glob("docs/*.md"))] if (root / "pyproject.toml").is_file() else []
    texts = [doc.read_text(encoding="utf-8") for doc in [*docs, HERE / "data" / "about.md"] if doc.is_file()]
    wanted = set(words.lower().split())
    best, hits = "", 0
    for paragraph in (part for text in texts for part in text.split("\n\n")):
        found = len(wanted & set(re.findall(r"\w+", paragraph.lower())))
        if found > hits:
            best, hits = " ".join(paragraph.split()), found
    if not hits:
        raise ValueError(f"nothing about {words!r}")
    return best[:300]


TOOLS = {"calculator": calculator, "lookup": lookup, "search": search}
NUMBER = r"[0-9]{1,7}(\.[0-9]{1,3})?"
# Any, not only the table's: a model forced to look up another mountain would answer with that one's height.
NAME = r"[A-Z][A-Za-z0-9 '-]{0,39}"
ARGS = {
    "calculator": rf"{NUMBER}( [-+*/] {NUMBER}){{1,4}}",
    "lookup": rf"(highest [1-9]|{NAME})",
    "search": r"[a-z]{2,12}( [a-z]{2,12}){0,3}",
    "answer": "",
}
CALLS = {tool: rf'\{{"tool": "{tool}", "args": "{args}"\}}' for tool, args in ARGS.items()}
# Nothing is answered before a tool was asked.
FIRST_TURN = "|".join(call for tool, call in CALLS.items() if tool != "answer")
LATER_TURN = "|".join(CALLS.values())
ANSWER = r"[A-Z0-9]([A-Za-z0-9 ,'()-]|\.[0-9]){10,160}\."
SYSTEM = """Answer the question with the help of tools, one call at a time, as JSON.
{"tool": "calculator", "args": "12 * 3.5"}
{"tool": "lookup", "args": "NAME"} or {"tool": "lookup", "args": "highest 3"}: heights of mountains
{"tool": "search", "args": "WORDS"}: a text search over the documentation of this project
{"tool": "answer", "args": ""}: you know enough to answer"""


def call_tool(call: str) -> str | None:
    """The result of a call as the model wrote it; None where it is ready to answer."""
    try:
        asked = json.loads(call)
    except json.JSONDecodeError:
        return "error: the call was cut short"
    if asked["tool"] == "answer":
        return None
    try:
        return TOOLS[asked["tool"]](asked["args"])
    except ValueError as error:
        return f"error: {error}"


@sgl.function
def main(
    s,
    question: str = "How much higher is Mount Everest than Mont Blanc, in metres?",
    turns: int = 5,
    e2e_ms: float = 20_000.0,
):
    """An agent with a calculator, a table of mountains and a search; see the module."""
    s += sgl.system(SYSTEM) + sgl.user(question)
    with stage("agent", e2e_ms=e2e_ms):
        for turn in range(turns):
            grammar = LATER_TURN if turn else FIRST_TURN
            s += sgl.assistant(gen("act", max_tokens=128, temperature=0, regex=grammar, slo=presets.TOOL_LOOP))
            result = call_tool(s["act"])
            if result is None:
                break
            s += sgl.user(result)
        s += sgl.user("Now answer the question in one sentence.")
        s += sgl.assistant(gen("final", max_tokens=192, temperature=0, regex=ANSWER, slo=presets.TOOL_FINAL))
