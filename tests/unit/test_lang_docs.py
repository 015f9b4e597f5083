"""The Python in docs/programs.md runs as it stands."""

import re
from pathlib import Path

import pytest
import sglang as sgl
from stub_endpoint import stub_endpoint

from slos_sglang.slo import WIRE_KEYS

DOCS = Path(__file__).parents[2] / "docs" / "programs.md"


def test_every_key_of_the_wire_is_documented():
    wire = DOCS.read_text(encoding="utf-8").partition("## On the wire")[2].partition("## Limits")[0]
    assert [key for key in WIRE_KEYS if f"`{key}`" not in wire] == []


@pytest.mark.filterwarnings("error")
def test_examples(monkeypatch, capsys, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 6
    with stub_endpoint() as server:
        monkeypatch.setattr(sgl.global_config, "default_backend", sgl.RuntimeEndpoint(server.url))
        # SGLang and `annotate` read a function's source.
        path = tmp_path / "examples.py"
        path.write_text("\n".join(blocks), encoding="utf-8")
        namespace: dict = {"__name__": "examples"}
        exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), namespace)
        namespace["state"].sync()
    shown = capsys.readouterr().out
    assert "x {'tier': 'standard'" in shown
    assert "plan 1 {'tier'" in shown and "verdict None {'tier'" in shown
    by_stage = {slo["stage"]: slo for slo in server.slos if slo}
    assert by_stage["plan"]["ttft_ms"] == 200 and by_stage["final"]["tpot_ms"] == 40
    assert by_stage["solve/final"]["budget_ms"] < 20_000
