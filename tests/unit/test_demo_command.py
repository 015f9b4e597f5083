"""The demo's own parts: its verdict, its load, its table. The whole of it runs in tests/e2e/test_demo.py."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from slos_sglang.cli.demo import _complete, _load, _show

RECEIPT = {
    "tier": "standard",
    "declined": False,
    "attained": True,
    "ttft_ms": 27.1,
    "ttft_target_ms": 29.0,
    "tpot_ms": 11.2,
    "tpot_target_ms": None,
    "phases": "answer",
    "slack_ms": 19857.0,
    "preemptions": 0,
}
BESIDE = {"offered": 3, "answered": 3, "with_targets": 2, "attained": 1}


def run(*receipts: dict[str, Any] | None) -> dict[str, Any]:
    calls = [{"stage": "solve/act", "prompt_tokens": 9, "output_tokens": 4, "receipt": r} for r in receipts]
    return {
        "program": "tool_agent",
        "arguments": {"question": "How far?"},
        "transcript": "SYSTEM: secret\nUSER: How far?\nASSISTANT: [very] far\n",
        "calls": calls,
        "right": True,
    }


def test_complete_only_with_every_receipt_and_every_answer() -> None:
    assert _complete([run(RECEIPT, RECEIPT), run(RECEIPT)], BESIDE)
    assert not _complete([run(RECEIPT, None), run(RECEIPT)], BESIDE)
    assert not _complete([run(RECEIPT), run()], BESIDE)
    assert not _complete([run(RECEIPT)], {**BESIDE, "answered": 2})


def test_the_load_is_the_same_every_time_and_has_both_tiers() -> None:
    calls = _load("", 8.0)
    assert calls == _load("", 8.0)
    assert {call.name for call in calls} == {"chat", "code", "batch"}
    assert {call.name for call in calls if call.slo is None} == {"batch"}
    assert all(call.arrival_s < 8.0 for call in calls)
    assert not {call.id for call in calls} & {call.id for call in _load("warm-", 8.0)}


def test_the_table_shows_measured_beside_target_and_a_missing_receipt() -> None:
    text = io.StringIO()
    report = {"programs": [run(RECEIPT, None)], "right": 1, "beside": BESIDE, "timeline": "t.png", "wall_s": 80.1}
    _show(Console(file=text, width=80), report)
    lines = text.getvalue().splitlines()
    assert "tool_agent How far? right" in lines
    assert "1 of 1 questions answered right." in lines
    assert "  ASSISTANT: [very] far" in lines
    assert not any("secret" in line for line in lines)
    rows = [line.split() for line in lines if "solve/act" in line]
    assert rows == [
        ["solve/act", "standard", "9,", "4", "27", "of", "29", "11", "19,857", "yes"],
        ["solve/act", "no", "receipt"],
    ]
