"""The sections of the results page on the policy by itself, from records made by hand."""

import importlib
from pathlib import Path

import pytest


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("policy_report")


def test_the_guarantee_and_its_curve(report) -> None:
    exact = {"seeds": 5000, "judged": 1200, "admitted": 1000, "kept_mean": 990, "misses": [{"seed": 7}]}
    point = {"belief": "online", "judged": 100, "admitted": 50, "seeds": 16}
    curve = [
        {**point, "error": error, "lengths": lengths, "share_kept": 1 - error / 10}
        for error in (0.0, 0.1)
        for lengths in ("estimated", 0.5)
    ]
    text = report.guarantee_section({"exact": exact, "curve": curve})
    assert "over 5,000 random loads" in text and "1,000 of 1,200" in text and "1 of them missed" in text
    assert "by the mean rule 10)" in text
    assert "| error | estimated | 0.5 x true |" in text and "| 10% | 99.0% (50%) | 99.0% (50%) |" in text
    assert "Cost model online" in text and "; 16 random loads each:" in text


def test_the_optimum(report) -> None:
    found = {"mean": 0.98, "min": 0.5, "below_80_percent": 3, "optimal": 0.9}
    text = report.optimum_section({"instances": 3000, "contested": 2000, "unsound": 0, "methods": {"dp": found}})
    assert "| dp | 98.00% | 50.0% | 3 | 90.0% |" in text


def test_decisions(report) -> None:
    quantiles = {"p50": 0.4, "p99": 0.9}
    data = {"waiting": 32, "moments": 300, "decision_ms": {"256": quantiles}, "burst_ms": {}, "dp_ms": {"6": quantiles}}
    text = report.decisions_section(data)
    assert "| step | 256 | 0.4 | 0.9 |" in text and "| program | 6 | 0.4 | 0.9 |" in text
