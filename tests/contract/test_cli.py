"""The command line as users meet it: quick to start, one clear line for wrong input, JSON alone on stdout."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from slos_sglang.cli.main import main

COMMANDS = ("tiny-model", "serve", "run", "demo", "doctor")


def invoke(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit status of `slos-sglang ARGUMENTS`, in this process."""
    monkeypatch.setattr(sys, "argv", ["slos-sglang", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    code = ended.value.code
    assert code is None or isinstance(code, int)
    return code or 0


def test_importing_the_command_line_imports_neither_sglang_nor_torch() -> None:
    code = (
        "import sys, slos_sglang.cli.main\n"
        "heavy = {'sglang', 'torch', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_help_names_every_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(monkeypatch, "--help") == 0
    shown = capsys.readouterr().out
    assert all(command in shown for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert invoke(monkeypatch, command, "--help") == 0
    assert command in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["serv"], "serv"),
        (["--jsn"], "--jsn"),
        (["tiny-model"], "DIR"),
        (["tiny-model", "{tmp}/model", "--seed", "-1"], "-1"),
        (["tiny-model", "{tmp}/model", "--seed", "one"], "--seed"),
        (["tiny-model", "{tmp}/other"], "other"),
        (["serve", "m", "--slo-config", "{tmp}/missing.yaml"], "missing.yaml"),
        (["serve", "m", "--slo-config", "{tmp}/bad.yaml"], "best_effort_max_wait_s"),
        (["run"], "PROGRAM"),
        (["run", "tool_agnet", "--endpoint", "http://127.0.0.1:1"], "tool_agent"),
        (["run", "tool_agent"], "--endpoint"),
        (["run", "tool_agent", "--endpoint", "localhost:1"], "localhost:1"),
        (["doctor", "--yaml"], "--yaml"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input_ends_with_two_and_one_line(
    arguments: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "bad.yaml").write_text("best_effort_max_wait: 3\n", encoding="utf-8")
    assert invoke(monkeypatch, *(argument.format(tmp=tmp_path) for argument in arguments)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("slos-sglang: ")
    assert says in line


def test_json_is_alone_on_stdout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert invoke(monkeypatch, "tiny-model", str(tmp_path / "model"), "--seed", "3", "--json") == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["seed"] == 3
    assert "parameters" in err
    status = invoke(monkeypatch, "doctor", "--json")
    report = json.loads(capsys.readouterr().out)
    assert status == (0 if report["ok"] else 1)
