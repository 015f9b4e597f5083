"""The demo, whole, with less load: a model, a server of its own, both programs, receipts, a picture, nothing left."""

from __future__ import annotations

import json
from pathlib import Path

import psutil
import pytest

from slos_sglang.cli import demo as module
from slos_sglang.telemetry.events import Arrive, read_events

pytestmark = pytest.mark.e2e


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(module, "WARM_UP_S", 1.0)
    monkeypatch.setattr(module, "LOAD_S", 2.0)
    before = {child.pid for child in psutil.Process().children(recursive=True)}

    status = module.demo(out=tmp_path, as_json=True)

    after = {child.pid for child in psutil.Process().children(recursive=True)}
    assert after <= before
    report = json.loads(capsys.readouterr().out)
    assert (status, report["ok"]) == (0, True)
    assert [run["program"] for run in report["programs"]] == [name for name, _, _ in module.RUNS]
    assert report["right"] >= 9, [run["arguments"]["question"] for run in report["programs"] if not run["right"]]
    for run in report["programs"]:
        assert run["transcript"]
        assert run["error"] is None
        for call in run["calls"]:
            assert call["receipt"]["tier"] in ("standard", "best_effort")
    assert report["beside"]["answered"] == report["beside"]["offered"] > 0
    assert Path(report["timeline"]).read_bytes().startswith(b"\x89PNG")

    arrived = [event for event in read_events(report["events"]) if isinstance(event, Arrive)]
    stages = [call["stage"] for run in report["programs"] for call in run["calls"]]
    # The events name every stage that has a receipt.
    assert sorted(event.stage for event in arrived if event.stage) == sorted(stages)
