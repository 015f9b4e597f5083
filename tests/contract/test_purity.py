"""The house rules that a machine can check: what a room may import, and what a decision may touch."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2] / "slos_sglang"
POLICY = sorted((ROOT / "policy").glob("*.py"))
FORBIDDEN_IN_POLICY = {"sglang", "torch", "time", "datetime", "asyncio", "zmq", "requests", "os", "random", "socket"}


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names


@pytest.mark.parametrize("path", POLICY, ids=lambda p: p.name)
def test_policy_is_pure(path: Path) -> None:
    found = imports(path)
    assert not {name.split(".")[0] for name in found} & FORBIDDEN_IN_POLICY
    ours = {name for name in found if name.startswith("slos_sglang")}
    assert all(name.startswith(("slos_sglang.policy", "slos_sglang.slo")) for name in ours)
    assert "open(" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", POLICY, ids=lambda p: p.name)
def test_no_decision_iterates_a_set(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.For | ast.comprehension):
            source = node.iter
            assert not isinstance(source, ast.Set | ast.SetComp), f"{path.name}:{source.lineno}"
            if isinstance(source, ast.Call) and isinstance(source.func, ast.Name):
                assert source.func.id not in {"set", "frozenset"}, f"{path.name}:{source.lineno}"


def test_slo_imports_nothing_of_ours() -> None:
    assert not {name for name in imports(ROOT / "slo.py") if name.startswith("slos_sglang")}


@pytest.mark.parametrize(
    ("room", "may_not"),
    [
        ("policy", ("engine", "sim", "cli", "lang", "measure", "telemetry")),
        ("sim", ("engine", "cli", "lang")),
        ("measure", ("engine", "cli", "lang", "sim")),
        ("workloads", ("engine", "cli", "lang", "sim", "measure", "policy", "telemetry")),
        ("lang", ("cli", "engine.scheduler", "sim")),
        ("engine", ("cli", "sim")),
        ("telemetry", ("cli", "engine", "sim")),
    ],
)
def test_arrows_run_one_way(room: str, may_not: tuple[str, ...]) -> None:
    for path in (ROOT / room).rglob("*.py"):
        wrong = [n for n in imports(path) if any(n.startswith(f"slos_sglang.{other}") for other in may_not)]
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"
