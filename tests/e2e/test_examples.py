"""The notebooks run from top to bottom, as a newcomer would run them, and say what their text says."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from slos_sglang.engine.launch import Server

pytestmark = pytest.mark.e2e

EXAMPLES = Path(__file__).parents[2] / "examples"
CELL_TIMEOUT_S = 240


def executed(name: str, endpoint: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> str:
    """Everything that the cells of a notebook printed and showed, as text. A cell that raises fails the test."""
    monkeypatch.setenv("SLOS_SGLANG_ENDPOINT", endpoint)
    notebook = nbformat.read(EXAMPLES / name, as_version=4)
    NotebookClient(notebook, timeout=CELL_TIMEOUT_S, resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    shown = [output.get("text", "") + str(output.get("data", {}).get("text/plain", "")) for output in outputs]
    if any("image/png" in output.get("data", {}) for output in outputs):
        shown.append("<picture>")
    return "\n".join(shown)


def test_every_notebook_is_tested() -> None:
    assert sorted(path.name for path in EXAMPLES.glob("*.ipynb")) == [
        "1_first_agent.ipynb",
        "2_tool_loop_under_load.ipynb",
        "3_reasoning.ipynb",
    ]


def test_the_first_agent(slos_server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shown = executed("1_first_agent.ipynb", slos_server.url, monkeypatch, tmp_path)
    assert "'tier': 'standard'" in shown and "solve/look_up/act" in shown and "solve/final" in shown
    assert "'declined': True" in shown and "declined: " in shown
    assert "did you mean 'plan'?" in shown and "set at most one" in shown and "slo.tpot_ms must be" in shown


def test_a_tool_loop_under_load(slos_server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shown = executed("2_tool_loop_under_load.ipynb", slos_server.url, monkeypatch, tmp_path)
    assert "annotated calls kept all their targets" in shown and "<picture>" in shown
    assert "agent/search" in shown and "agent/final" in shown


def test_reasoning(slos_server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shown = executed("3_reasoning.ipynb", slos_server.url, monkeypatch, tmp_path)
    assert "think,answer" in shown and "plan" in shown and "'</thinking>'" in shown and "<picture>" in shown
