"""The command line as users meet it: quick to start, one clear line for wrong input, JSON alone on stdout."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from slos_sglang.cli.main import main

COMMANDS = ("tiny-model", "serve", "run", "demo", "doctor", "workload", "simulate", "capacity")


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
        (["tiny-model", "{tmp}/model", "--random", "--seed", "-1"], "-1"),
        (["tiny-model", "{tmp}/model", "--seed", "1"], "--random"),
        (["tiny-model", "{tmp}/model", "--seed", "one"], "--seed"),
        (["tiny-model", "{tmp}/other"], "other"),
        (["serve", "m", "--slo-config", "{tmp}/missing.yaml"], "missing.yaml"),
        (["serve", "m", "--slo-config", "{tmp}/bad.yaml"], "best_effort_max_wait_s"),
        (["run"], "PROGRAM"),
        (["run", "tool_agnet", "--endpoint", "http://127.0.0.1:1"], "tool_agent"),
        (["run", "tool_agent"], "--endpoint"),
        (["run", "tool_agent", "--endpoint", "localhost:1"], "localhost:1"),
        (["doctor", "--yaml"], "--yaml"),
        (["workload", "-o", "{tmp}/w.jsonl"], "exactly one of --scenario, --azure and --mooncake"),
        (["workload", "-o", "{tmp}/w.jsonl", "--scenario", "chat"], "'chat'"),
        (["workload", "-o", "{tmp}/w.jsonl", "--scenario", "toolllm", "--rate", "0"], "rate_req_s must be"),
        (["workload", "-o", "{tmp}/w.jsonl", "--scenario", "coder", "--data", "{tmp}/other"], "azure_2023_code"),
        (["workload", "-o", "{tmp}/w.jsonl", "--azure", "{tmp}/bad.yaml"], "bad.yaml, line 1: no column"),
        (["workload", "-o", "{tmp}/w.jsonl", "--mooncake", "{tmp}/bad.yaml"], "bad.yaml, line 1"),
        (["simulate", "--scenario", "toolllm"], "--policy"),
        (["simulate", "--scenario", "toolllm", "--policy", "fcfs"], "'fcfs'"),
        (["simulate", "--scenario", "toolllm", "--policy", "sarathi:budget=1"], "budget"),
        (["simulate", "--policy", "slos"], "exactly one of --workload and --scenario"),
        (["simulate", "--policy", "slos", "--workload", "{tmp}/w", "--cost-model", "opt-13b-h100"], "can't be read"),
        (["simulate", "--policy", "slos", "--workload", "{tmp}/late.jsonl"], "--cost-model is needed"),
        (["simulate", "--policy", "slos", "--workload", "{tmp}/late.jsonl", "--cost-model", "x"], "'x'"),
        (["simulate", "--policy", "slos", "--workload", "{tmp}/late.jsonl", "--cost-model", "{tmp}/bad.yaml"], "JSON"),
        (
            ["simulate", "--policy", "slos", "--workload", "{tmp}/late.jsonl", "--cost-model", "opt-13b-h100"],
            "late.jsonl, line 2: arrival_s",
        ),
        (
            ["simulate", "--policy", "slos", "--workload", "{tmp}/huge.jsonl", "--cost-model", "opt-13b-h100"],
            "huge.jsonl, line 1: stage 's': prompt_tokens 99999999",
        ),
        (["simulate", "--scenario", "toolllm", "--policy", "slos", "--lengths", "scaled:"], "'scaled:'"),
        (["simulate", "--scenario", "toolllm", "--policy", "slos", "--lengths", "scaled:-1"], "-1"),
        (["simulate", "--scenario", "toolllm", "--policy", "slos", "--duration", "0"], "duration"),
        (["simulate", "--scenario", "toolllm", "--policy", "slos", "--rate", "-2"], "-2"),
        (["simulate", "--scenario", "toolllm", "--policy", "slos", "--programs", "3", "--explain", "p"], "'p'"),
        (["capacity", "--scenario", "toolllm", "--policies", "slos", "--target", "1.5"], "target must be"),
        (["capacity", "--scenario", "toolllm", "--policies", "slos", "--rule", "both"], "'both'"),
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
    program = {"id": "a", "arrival_s": 2, "app": "x", "stages": [{"name": "s", "prompt_tokens": 9, "output_tokens": 2}]}
    lines = [program, {**program, "id": "b", "arrival_s": 1}]
    (tmp_path / "late.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    huge = json.dumps(program).replace("9", "99999999")
    (tmp_path / "huge.jsonl").write_text(f"{huge}\n", encoding="utf-8")
    assert invoke(monkeypatch, *(argument.format(tmp=tmp_path) for argument in arguments)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("slos-sglang: ")
    assert says in line


def test_json_is_alone_on_stdout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert invoke(monkeypatch, "tiny-model", str(tmp_path / "model"), "--random", "--seed", "3", "--json") == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["seed"] == 3
    assert "parameters" in err
    status = invoke(monkeypatch, "doctor", "--json")
    report = json.loads(capsys.readouterr().out)
    assert status == (0 if report["ok"] else 1)


def test_a_workload_is_written_simulated_and_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(tmp_path / "w.jsonl")
    arguments = ("workload", "--scenario", "toolllm", "--programs", "9", "--rate", "2", "-o", file, "--json")
    assert invoke(monkeypatch, *arguments) == 0
    assert json.loads(capsys.readouterr().out)["programs"] == 9
    given = ("simulate", "--workload", file, "--cost-model", "toolllama-7b-a100", "--policy", "slos", "--json")
    assert invoke(monkeypatch, *given, "--explain", "toolllm-0004") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["policy"], found["scenario"], found["offered"]) == ("slos", "w", 9)
    assert found["explain"][-1]["stage"] == "final"
    assert invoke(monkeypatch, *given, "--rate", "0.5") == 0
    assert json.loads(capsys.readouterr().out)["rate_req_s"] == pytest.approx(0.5)
    drawn = ("simulate", "--scenario", "toolllm", "--policy", "sarathi:budget_tokens=1024", "--rate", "2")
    assert invoke(monkeypatch, *drawn, "--duration", "4", "--lengths", "scaled:2", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["offered"], found["config"]["options"]) == (8, {"budget_tokens": "1024"})
    assert found["config"]["lengths"] == 2.0


def test_capacities_come_with_their_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("capacity", "--scenario", "toolllm", "--policies", "vllm,edf", "--programs", "12", "--seeds", "2")
    assert invoke(monkeypatch, *arguments, "--cache", str(tmp_path), "--json") == 0
    first = capsys.readouterr().out
    capacities = json.loads(first)["capacities"]
    assert [one["policy"] for one in capacities] == ["vllm", "edf"]
    for one in capacities:
        assert one["capacity"]["low_req_s"] <= one["capacity"]["rate_req_s"]
        assert one["kv_req_s"] < one["fluid_req_s"] > one["tier_req_s"]
        assert one["at_capacity"]["attainment"] >= 0.9
    assert invoke(monkeypatch, *arguments, "--cache", str(tmp_path), "--json") == 0
    assert capsys.readouterr().out == first
    assert invoke(monkeypatch, *arguments, "--cache", str(tmp_path)) == 0
    assert "capacity, programs a second per GPU" in capsys.readouterr().out
