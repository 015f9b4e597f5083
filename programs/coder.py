"""A coder: write a function, run its tests in a subprocess with a time limit, and repair it with what they said.

All attempts share one budget, the test runs included; writing is paced tightly, because nobody reads along: the tests
wait for it. A grammar keeps to one function of arithmetic, which is safe to run and well formed with a model of random
weights too. For a capable model widen `CODE`, and run what it writes in a sandbox that deserves the name.
"""

from __future__ import annotations

import re
import subprocess
import sys

import sglang as sgl

from slos_sglang import gen, presets, stage

OPERAND = r"(a|b|[1-9][0-9]?)"
CODE = rf"def solve\(a, b\):\n    return {OPERAND}( [-+*] {OPERAND}){{0,3}}\n"
CHECK = re.compile(r"\s*(-?\d+)\s*,\s*(-?\d+)\s*=\s*(-?\d+)\s*")
SYSTEM = """Write the Python function the user asks for, and nothing else:
def solve(a, b):
    return a"""


def parse_checks(checks: str) -> list[tuple[int, int, int]]:
    """`1,2=3; 5,7=12` as arguments and results. Raises `ValueError` naming the check that is none."""
    found = []
    for check in checks.split(";"):
        match = CHECK.fullmatch(check)
        if match is None:
            raise ValueError(f"checks must be written A,B=RESULT; A,B=RESULT, not {check.strip()!r}")
        found.append((int(match[1]), int(match[2]), int(match[3])))
    return found


def run_tests(code: str, checks: list[tuple[int, int, int]], limit_s: float) -> str:
    """What the tests say of `code`: `passed`, or what went wrong first. They run in a process of their own."""
    tests = "".join(
        f"got = solve({a}, {b})\nassert got == {result}, f'solve({a}, {b}) is {{got}}, not {result}'\n"
        for a, b, result in checks
    )
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", f"{code}\n{tests}"], capture_output=True, text=True, timeout=limit_s
        )
    except subprocess.TimeoutExpired:
        return f"the tests took more than {limit_s:g} s"
    return "passed" if done.returncode == 0 else (done.stderr.strip() or "failed").splitlines()[-1]


@sgl.function
def main(
    s,
    task: str = "Return the sum of a and b.",
    checks: str = "1,2=3; 5,7=12",
    attempts: int = 3,
    limit_s: float = 5.0,
    e2e_ms: float = 30_000.0,
):
    """Write a function of two numbers that passes the `checks`; see the module."""
    wanted = parse_checks(checks)
    s += sgl.system(SYSTEM) + sgl.user(task)
    s["verdict"] = "not tried"
    with stage("code", e2e_ms=e2e_ms) as work:
        for attempt in range(attempts):
            with stage("repair" if attempt else "write"):
                s += sgl.assistant(gen("code", max_tokens=96, regex=CODE, slo=presets.CODING))
                code = s["code"]
            with work.tool("tests"):
                s["verdict"] = run_tests(code, wanted, limit_s)
            if s["verdict"] == "passed":
                break
            if attempt + 1 < attempts:
                s += sgl.user(f"The tests say: {s['verdict']}. Write it again.")
