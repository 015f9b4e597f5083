"""The shipped programs and `slos-sglang run`, against a stub that writes what a grammar would force."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from slos_sglang.programs import best_of_n, chat, coder, mixed, reasoning, summarizer, tool_agent
from stub_endpoint import stub_endpoint

from slos_sglang.cli import main as cli
from slos_sglang.cli import run as runner


@pytest.fixture
def server():
    with stub_endpoint() as server:
        yield server


def scripted(*texts):
    """Answers one after the other; each must fit the grammar of its request."""
    left = list(texts)

    def answer(request):
        text = left.pop(0)
        assert re.fullmatch(request["sampling_params"]["regex"], text), text
        return text

    return answer


def call(tool, args=""):
    return json.dumps({"tool": tool, "args": args})


AGENT = (
    call("lookup", "Mont Blanc"),
    call("search", "absolute time inherited"),
    call("calculator", "8849 - 4806"),
    call("answer"),
    "Mount Everest is 4043 metres higher.",
)


def run_cli(monkeypatch, *args):
    """Exit status of the command line; output is captured by the caller."""
    monkeypatch.setattr(sys, "argv", ["slos-sglang", *args])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code or 0


def test_tool_agent(server):
    server.answer = scripted(*AGENT)
    report = runner.run_program(tool_agent.main, "tool_agent", server.url, {"e2e_ms": 5000.0})
    assert report["error"] is None
    assert [c["stage"] for c in report["calls"]] == ["agent/act"] * 4 + ["agent/final"]
    assert report["variables"]["final"] == AGENT[-1]
    for result in ("Mont Blanc (Alps, France and Italy): 4806 m", "4043", "A budget is what is left"):
        assert f"USER:{result}" in report["transcript"]
    assert [slo["tpot_ms"] for slo in server.slos] == [50] * 4 + [100]
    assert all(0 < slo["budget_ms"] <= 5000 and slo["ttft_slowdown"] == 3 for slo in server.slos)
    assert len({slo["program"] for slo in server.slos}) == 1


def test_tool_agent_asks_a_tool_first_and_stops_after_its_turns(server):
    server.answer = scripted(*[call("lookup", "Fuji")] * 2, AGENT[-1])
    report = runner.run_program(tool_agent.main, "tool_agent", server.url, {"turns": 2})
    assert len(report["calls"]) == 3
    first, second, _ = (request["sampling_params"]["regex"] for request in server.requests)
    assert not re.fullmatch(first, call("answer")) and re.fullmatch(second, call("answer"))


@given(
    st.sampled_from(sorted(tool_agent.ARGS)).flatmap(
        lambda t: st.tuples(st.just(t), st.from_regex(tool_agent.ARGS[t], fullmatch=True))
    )
)
def test_every_call_the_grammar_allows_is_json_and_runs(tool_and_args):
    tool, args = tool_and_args
    text = f'{{"tool": "{tool}", "args": "{args}"}}'
    assert re.fullmatch(tool_agent.LATER_TURN, text)
    result = tool_agent.call_tool(text)
    assert (result is None) == (tool == "answer")
    assert result is None or result


def test_the_grammar_allows_every_name_of_the_table_and_others():
    names = [row.partition(" (")[0] for row in tool_agent.lookup("highest 99").split("; ")]
    for name in (*names, "Mount Doom", "Pik O'Neill-Ost 2", "highest 3"):
        assert re.fullmatch(tool_agent.LATER_TURN, call("lookup", name)), name
    for name in ("highest ", "highest 10", "Fuji; 1", "A" * 41, ""):
        assert not re.fullmatch(tool_agent.LATER_TURN, call("lookup", name)), name
    assert tool_agent.call_tool(call("lookup", "Mount Doom")) == "error: no mountain named 'Mount Doom'"


@pytest.mark.parametrize(
    "expression, value",
    [("1 + 2 * 3", "7"), ("10 / 4", "2.5"), ("-3 - 4", "-7"), ("(1 + 2) * 3", "9"), ("2.5 * 4", "10")],
)
def test_calculator(expression, value):
    assert tool_agent.calculator(expression) == value


@pytest.mark.parametrize("text", ["__import__('os')", "1 / 0", "2 ** 9 ** 9", "1 +", "'a' * 3", "x", "True + 1"])
def test_calculator_refuses_all_else(text):
    with pytest.raises(ValueError):
        tool_agent.calculator(text)


def test_lookup():
    assert len(tool_agent.lookup("highest 99").split("; ")) >= 30
    assert tool_agent.lookup("highest 2") == (
        "Mount Everest (Himalaya, Nepal and China): 8849 m; K2 (Karakoram, Pakistan and China): 8611 m"
    )
    with pytest.raises(ValueError, match="no mountain named 'Mount Doom'"):
        tool_agent.lookup("Mount Doom'; DROP TABLE mountains; --"[:10])


def test_search_falls_back_to_the_shipped_text(monkeypatch):
    assert "zero-load" in tool_agent.search("slowdown zero load prefill")
    with pytest.raises(ValueError, match="nothing about"):
        tool_agent.search("qqqq zzzz")
    monkeypatch.setattr(tool_agent, "HERE", tool_agent.HERE / "nowhere")
    with pytest.raises(ValueError):
        tool_agent.search("slowdown")


def test_a_call_that_was_cut_short_is_a_result():
    assert tool_agent.call_tool('{"tool": "calc').startswith("error")
    assert tool_agent.call_tool(call("calculator", "1 / 0")).startswith("error")


def test_reasoning(server):
    thought, answer = "3 and 5 and so on, at length", " It travels for 3 hours and 25 minutes."
    server.answer = scripted(f"{thought}</think>{answer}")
    report = runner.run_program(reasoning.main, "reasoning", server.url, {"tpot_ms": 80.0})
    assert report["variables"]["thinking"] == thought and report["variables"]["answer"] == answer.strip()
    (slo,) = server.slos
    assert (slo["think_tpot_ms"], slo["tpot_ms"], slo["think_end"]) == (50, 80, "</think>")


@pytest.mark.parametrize("name", ["think_chars", "answer_chars"])
def test_reasoning_refuses_bounds_that_leave_no_room(server, name):
    with pytest.raises(ValueError, match=f"{name} must be at least 20, not 5"):
        runner.run_program(reasoning.main, "reasoning", server.url, {name: 5})


CODE = "def solve(a, b):\n    return {}\n"


def test_the_coder_repairs_what_its_tests_say(server):
    server.answer = scripted(CODE.format("a - b"), CODE.format("a + b"))
    report = runner.run_program(coder.main, "coder", server.url, {"e2e_ms": 5000.0})
    assert report["variables"]["verdict"] == "passed" and report["error"] is None
    assert "AssertionError: solve(1, 2) is -1, not 3" in report["transcript"]
    assert [call["stage"] for call in report["calls"]] == [
        "code/write/code", "code/tests", "code/repair/code", "code/tests",
    ]  # fmt: skip
    first, second = server.slos
    assert first["tpot_ms"] == 50 and second["budget_ms"] < first["budget_ms"] - report["calls"][1]["tool_ms"]


def test_the_coder_gives_up_after_its_attempts(server):
    server.answer = lambda request: CODE.format("1")
    report = runner.run_program(coder.main, "coder", server.url, {"attempts": 2})
    assert report["variables"]["verdict"].endswith("solve(1, 2) is 1, not 3") and len(server.requests) == 2


@pytest.mark.parametrize(
    "code, says",
    [
        (CODE.format("a + b"), "passed"),
        (CODE.format("1 / (a - a)"), "ZeroDivisionError: division by zero"),
        ("while True: pass\n", "the tests took more than 0.3 s"),
        ("def solve(", "SyntaxError: '(' was never closed"),
    ],
)
def test_the_coder_s_tests_have_a_time_limit_and_say_what_is_wrong(code, says):
    assert coder.run_tests(code, coder.parse_checks("1,2=3"), 0.3 if "while" in code else 30) == says


def test_the_coder_s_checks_must_be_readable():
    assert coder.parse_checks(" 1 , -2=3;0,0=0") == [(1, -2, 3), (0, 0, 0)]
    with pytest.raises(ValueError, match="checks must be written A,B=RESULT; A,B=RESULT, not '1=2'"):
        coder.parse_checks("1,2=3; 1=2")


def test_a_chat_takes_turns_and_measures_the_person(server):
    server.answer = lambda request: "A very short reply."
    report = runner.run_program(chat.main, "chat", server.url, {"questions": "One?|Two? ", "pause_ms": 20.0})
    assert [call["stage"] for call in report["calls"]] == ["turn_1/reply", "turn_2/person", "turn_2/reply"]
    assert report["calls"][1]["tool_ms"] >= 20
    assert all((slo["tpot_ms"], slo["ttft_slowdown"]) == (100, 5) for slo in server.slos)
    with pytest.raises(ValueError, match="questions must have at least one"):
        runner.run_program(chat.main, "chat", server.url, {"questions": " | "})


def test_a_summary_maps_in_forks_and_reduces(server):
    server.answer = lambda request: "A" + " short" * 2 + "."
    report = runner.run_program(summarizer.main, "summarizer", server.url, {"text": "One.\n\nTwo\nlines.\n\n"})
    assert [call["stage"] for call in report["calls"]] == ["summary/map/part"] * 2 + ["summary/reduce/summary"]
    assert "USER:A short short. A short short." in report["transcript"]
    by_stage = {slo["stage"]: slo for slo in server.slos}
    assert by_stage["summary/map/part"]["budget_ms"] <= 12_000 < by_stage["summary/reduce/summary"]["budget_ms"]
    with pytest.raises(ValueError, match="text must not be empty"):
        runner.run_program(summarizer.main, "summarizer", server.url, {"text": " "})


def test_the_best_of_n_is_chosen_by_the_model(server):
    drafts = iter(["A first draft.", "A second draft."])
    server.answer = lambda request: next(drafts) if request["sampling_params"]["max_new_tokens"] else ""
    report = runner.run_program(best_of_n.main, "best_of_n", server.url, {"drafts": 2})
    assert report["variables"]["choice"] == "1" and report["variables"]["answer"].endswith("draft.")
    assert {slo["stage"] for slo in server.slos} >= {"answer/draft", "answer/choice"}
    with pytest.raises(ValueError, match="drafts must be 2 to 9, not 1"):
        runner.run_program(best_of_n.main, "best_of_n", server.url, {"drafts": 1})


def test_a_mixed_load_says_how_many_of_each_kept_all_their_promises(server):
    server.answer = lambda request: "A very short reply."
    args = {"programs": "chat,summarizer", "each": 2, "rate_req_s": 100.0}
    report = runner.run_program(mixed.main, "mixed", server.url, args)
    assert report["variables"]["attainment"] == {"chat": 1.0, "summarizer": 1.0}
    assert "chat         100% of 2 kept all their promises" in report["transcript"]
    assert len({slo["program"] for slo in server.slos}) == 4


def test_a_mixed_load_counts_refusals(server, recwarn):
    server.status = 429
    report = runner.run_program(mixed.main, "mixed", server.url, {"programs": "coder", "each": 2, "rate_req_s": 100.0})
    assert report["variables"]["attainment"] == {"coder": 0.0}
    with pytest.raises(ValueError, match=r"programs must be of .*tool_agent, not 'coders'"):
        runner.run_program(mixed.main, "mixed", server.url, {"programs": "coders"})


def test_the_arrivals_of_a_mixed_load_come_from_the_seed():
    planned = mixed.arrivals(["a", "b"] * 3, 2.0, 7)
    assert planned == mixed.arrivals(["a", "b"] * 3, 2.0, 7) != mixed.arrivals(["a", "b"] * 3, 2.0, 8)
    assert sorted(name for _, name in planned) == ["a"] * 3 + ["b"] * 3 and planned == sorted(planned)


def test_programs_are_short_and_documented():
    for module in (*mixed.MODULES, mixed):
        assert len(Path(module.__file__).read_text(encoding="utf-8").splitlines()) < 150
        assert module.__doc__ and module.main.func.__doc__


# The command line.


def test_run_prints_one_json_object(server, monkeypatch, capsys):
    server.answer = scripted(*AGENT)
    assert run_cli(monkeypatch, "run", "tool_agent", "--endpoint", server.url, "--json", "--set", "e2e_ms=7000") == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report) == {"program", "endpoint", "arguments", "transcript", "variables", "calls", "error"}
    assert report["arguments"]["e2e_ms"] == 7000.0
    assert report["calls"][0]["receipt"]["tier"] == "standard"


def test_run_prints_transcript_and_receipts(server, monkeypatch, capsys):
    server.answer = scripted(*AGENT)
    assert run_cli(monkeypatch, "run", "tool_agent", "--endpoint", server.url) == 0
    out = capsys.readouterr().out
    assert AGENT[2] in out and "agent/final" in out and "standard" in out and "5.0" in out


def test_run_says_where_receipts_are_missing(server, monkeypatch, capsys):
    server.answer, server.receipts = scripted(*AGENT), False
    assert run_cli(monkeypatch, "run", "tool_agent", "--endpoint", server.url) == 0
    assert "No receipts" in capsys.readouterr().out


def test_run_takes_a_file(server, monkeypatch, capsys, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "import sglang as sgl\n\n@sgl.function\ndef main(s, who, loud: bool = False, n: int = 1):\n"
        "    s += 'Hello ' + who * n + '!' * loud + sgl.gen('g')\n"
    )
    args = ("--endpoint", server.url, "--set", "who=a=b", "--set", "loud=true", "--set", "n=2")
    assert run_cli(monkeypatch, "run", str(path), *args, "--json") == 0
    assert json.loads(capsys.readouterr().out)["transcript"] == "Hello a=ba=b!x"
    assert run_cli(monkeypatch, "run", str(path), "--endpoint", server.url) == 2
    assert "program 'mine' needs --set who=VALUE" in capsys.readouterr().err


def test_a_refused_call_is_reported(server, monkeypatch, capsys):
    server.status = 429
    assert run_cli(monkeypatch, "run", "tool_agent", "--endpoint", server.url, "--json") == 1
    report = json.loads(capsys.readouterr().out)
    assert "declined" in report["error"] and report["calls"][0]["error"] == report["error"]
    assert run_cli(monkeypatch, "run", "reasoning", "--endpoint", server.url) == 1
    assert "a call failed: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "args, message",
    [
        (["tool_agnt"], "no program named 'tool_agnt'; did you mean 'tool_agent'?"),
        (["zzz"], "no program named 'zzz'; there are best_of_n, chat, coder, mixed, reasoning, summarizer, tool_agent"),
        (["nowhere.py"], "no such file: nowhere.py"),
        (["tool_agent", "--set", "turn=3"], "has no argument 'turn'; did you mean 'turns'?"),
        (["tool_agent", "--set", "turns"], "--set turns: must be KEY=VALUE"),
        (["tool_agent", "--set", "turns=many"], "--set turns=many: must be a whole number"),
        (["tool_agent", "--set", "e2e_ms=soon"], "--set e2e_ms=soon: must be a number"),
        (["tool_agent", "--set", "e2e_ms=-5"], "e2e_ms must be a finite number greater than 0, not -5.0"),
        (["tool_agent", "--endpoint", "ftp://x"], "--endpoint must be an http:// or https:// address, not 'ftp://x'"),
        (["tool_agent", "--endpoint", "http://127.0.0.1:9"], "--endpoint http://127.0.0.1:9: no SGLang server answers"),
    ],
)
def test_wrong_input_ends_with_2_and_one_line(server, monkeypatch, capsys, args, message):
    if "--endpoint" not in args:
        args = [*args, "--endpoint", server.url]
    assert run_cli(monkeypatch, "run", *args) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and message in captured.err
    assert len(captured.err.strip().splitlines()) == 1


def test_a_file_without_a_main_is_refused(server, monkeypatch, capsys, tmp_path):
    path = tmp_path / "empty.py"
    path.write_text("main = 5\n")
    assert run_cli(monkeypatch, "run", str(path), "--endpoint", server.url) == 2
    assert "has no sgl.function named 'main'" in capsys.readouterr().err


def test_installed_programs_bring_their_data(tmp_path):
    """Copied away from the repository they still find their table and a text to search."""
    shutil.copytree(tool_agent.HERE, tmp_path / "programs", ignore=shutil.ignore_patterns("__pycache__"))
    code = "from programs import tool_agent as t; print(t.lookup('K2'), t.search('budget'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "8611 m A budget is what is left" in done.stdout
