"""`slos-sglang serve` and `doctor` on the command line, up to the moment SGLang takes over."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from slos_sglang.cli.doctor import examine, lines
from slos_sglang.cli.main import main
from slos_sglang.cli.serve import with_defaults

MIXED = "--enable-mixed-chunk"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `serve` would turn into, and with which environment."""
    seen: dict[str, Any] = {}

    def execv(path: str, command: list[str]) -> None:
        seen.update(path=path, command=command, env=dict(os.environ))

    monkeypatch.setattr(os, "execv", execv)
    for name in ("SLOS_SGLANG", "SLOS_SGLANG_CONFIG", "SLOS_SGLANG_OPERATOR_MIXED", "SGLANG_PLUGINS"):
        monkeypatch.setenv(name, "")  # restored afterwards, whatever `serve` sets
        monkeypatch.delenv(name)
    return seen


def invoke(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["slos-sglang", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    code = ended.value.code
    return code if isinstance(code, int) else 1 if code else 0


def test_serve_hands_every_other_flag_on_in_order(
    started: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = tmp_path / "slo.yaml"
    config.write_text("default_slo: {tpot_ms: 100}\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    flags = ["m", "--tp", "2", "--slo-config", "slo.yaml", "--json-model-override-args", '{"a": 1}', "-x", MIXED]
    assert invoke(monkeypatch, "serve", *flags) == 0
    after = started["command"].index("serve")
    assert started["command"][after + 1 :] == ["m", "--tp", "2", *flags[5:]]
    assert started["env"]["SLOS_SGLANG"] == "1"
    assert started["env"]["SLOS_SGLANG_CONFIG"] == str(config)
    assert started["env"]["SLOS_SGLANG_OPERATOR_MIXED"] == "1"


def test_serve_adds_mixed_batches_and_says_that_it_did(
    started: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLOS_SGLANG_CONFIG", "/from/an/outer/shell")
    assert invoke(monkeypatch, "serve", "m") == 0
    assert started["command"][-2:] == ["m", MIXED]
    assert started["env"]["SLOS_SGLANG_OPERATOR_MIXED"] == "0"
    assert "SLOS_SGLANG_CONFIG" not in started["env"]


@pytest.mark.parametrize(
    ("flags", "added"),
    [
        ([], True),
        (["--chunked-prefill-size", "64"], True),
        (["--chunked-prefill-size", "-1"], False),
        (["--chunked-prefill-size=-1"], False),
        (["--speculative-algorithm", "EAGLE"], False),
        (["--speculative-algorithm=EAGLE"], False),
        ([MIXED], False),
    ],
)
def test_mixed_batches_only_where_sglang_takes_them(flags: list[str], added: bool) -> None:
    assert with_defaults(flags) == flags + [MIXED] * added


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({"SGLANG_PLUGINS": "torch_cpu"}, "SGLANG_PLUGINS='torch_cpu'"),
        ({"SGLANG_PLATFORM": "other"}, "SGLANG_PLATFORM='other'"),
    ],
)
def test_serve_never_starts_without_the_plugin(
    started: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    env: dict[str, str],
    says: str,
) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert invoke(monkeypatch, "serve", "m") == 2
    assert says in capsys.readouterr().err
    assert started == {}


@pytest.mark.parametrize("plugins", ["slos", "torch_cpu, slos"])
def test_a_whitelist_may_name_the_plugin(
    started: dict[str, Any], monkeypatch: pytest.MonkeyPatch, plugins: str
) -> None:
    monkeypatch.setenv("SGLANG_PLUGINS", plugins)
    assert invoke(monkeypatch, "serve", "m") == 0
    assert started


def test_a_wrong_config_ends_with_2_and_one_line(
    started: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = tmp_path / "slo.yaml"
    config.write_text("best_effort_max_wait_s: -1\n", encoding="utf-8")
    assert invoke(monkeypatch, "serve", "m", "--slo-config", str(config)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "best_effort_max_wait_s=-1" in error
    assert started == {}


def test_doctor_prints_one_json_object(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    before = {name for name in sys.modules if name.startswith("sglang")}
    assert invoke(monkeypatch, "doctor", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"]
    assert report["versions"]["sglang"]
    assert {seam["state"] for seam in report["seams"]} == {"ok"}
    assert {seam["process"] for seam in report["seams"]} == {"http", "scheduler", "client"}
    assert {name for name in sys.modules if name.startswith("sglang")} == before


def test_doctor_tells_people_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_PLUGINS", "torch_cpu")
    report = examine()
    assert not report["ok"]
    text = "\n".join(lines(report))
    assert "problem: SGLang would not load the plugin: SGLANG_PLUGINS='torch_cpu'" in text
    assert text.endswith("not ok")
