"""Annotated programs on a real server: receipts for every call, declines that say why, and stock servers unharmed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time

import pytest
import requests
import sglang as sgl
from slos_sglang.programs import reasoning, tool_agent

from slos_sglang import SLO, Phase, annotate, gen, presets, select, stage
from slos_sglang.cli import run as runner
from slos_sglang.engine.launch import Server
from slos_sglang.lang import cancel, receipts

pytestmark = pytest.mark.e2e

SLACK = SLO(ttft_ms=60_000, tpot_ms=5_000)


@pytest.fixture
def url(slos_server: Server) -> str:
    return slos_server.url


@pytest.fixture
def backend(url: str) -> sgl.RuntimeEndpoint:
    return sgl.RuntimeEndpoint(url)


def run_cli(*args: str) -> subprocess.CompletedProcess[str]:
    code = "from slos_sglang.cli.main import main; main()"
    return subprocess.run([sys.executable, "-c", code, "run", *args], capture_output=True, text=True, timeout=300)


def test_the_tool_agent_runs_and_every_call_has_a_receipt(url):
    done = run_cli("tool_agent", "--endpoint", url, "--set", "e2e_ms=120000", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    stages = [call["stage"] for call in report["calls"]]
    assert stages[:-1] == ["agent/act"] * (len(stages) - 1) and stages[-1] == "agent/final"
    assert 2 <= len(stages) <= 6
    assert all(call["receipt"]["tier"] in ("standard", "best_effort") for call in report["calls"])
    assert re.fullmatch(tool_agent.ANSWER, report["variables"]["final"])
    assert "error: the call was cut short" not in report["transcript"]


def test_reasoning_goes_through_both_phases(url):
    done = run_cli("reasoning", "--endpoint", url)
    assert done.returncode == 0, done.stderr
    assert "reply" in done.stdout and "</think>" in done.stdout
    assert "No receipts" not in done.stdout


def test_phases_are_in_the_receipt(backend):
    state = reasoning.main.run(backend=backend)
    receipt = state.get_meta_info("reply")["slo"]
    assert receipt["phases"] == "think,answer" and "missing" not in receipt
    think, answer = receipt["by_phase"]
    assert (think["name"], think["tpot_target_ms"]) == ("think", 50) and think["tokens"] > 5
    assert (answer["name"], answer["tpot_target_ms"]) == ("answer", 100) and answer["first_ms"] > think["first_ms"]
    assert think["tokens"] + answer["tokens"] == state.get_meta_info("reply")["completion_tokens"]
    assert state["thinking"] and state["answer"]


@sgl.function
def three_phases(s, grammar):
    slo = SLO.phases(
        [
            Phase(name="think", tpot_ms=5_000, until="</think>"),
            Phase(name="plan", tpot_ms=5_000, until=";", first_ms=60_000),
            Phase(name="answer", tpot_ms=5_000, first_ms=60_000),
        ],
        ttft_ms=60_000,
    )
    s += "Hello <think>" + gen("reply", max_tokens=64, regex=grammar, slo=slo)


def test_any_number_of_phases(backend):
    receipt = three_phases.run("[a-z]{5,9}</think>[a-z]{5,9};[a-z]{5,9}", backend=backend).get_meta_info("reply")["slo"]
    assert [phase["name"] for phase in receipt["by_phase"]] == ["think", "plan", "answer"]
    assert receipt["attained"] and receipt["tier"] == "standard"


def test_a_marker_that_never_comes_is_named(backend):
    receipt = three_phases.run("[a-z]{5,9}</think>[a-z]{5,9}", backend=backend).get_meta_info("reply")["slo"]
    assert receipt["phases"] == "think,plan" and receipt["missing"] == ";" and not receipt["attained"]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("chat", {"pause_ms": 20.0}),
        ("coder", {"attempts": 2, "e2e_ms": 120_000.0}),
        ("summarizer", {"e2e_ms": 120_000.0}),
        ("best_of_n", {"e2e_ms": 120_000.0}),
        ("mixed", {"programs": "chat,best_of_n", "each": 2, "rate_req_s": 4.0}),
    ],
)
def test_the_programs_to_copy_run_on_the_tiny_model(url, name, settings):
    report = runner.run_program(runner.load(runner.find(name)), name, url, settings)
    assert report["error"] is None
    assert all("tool_ms" in call or call["receipt"] for call in report["calls"])
    if name == "mixed":
        assert set(report["variables"]["attainment"]) == {"chat", "best_of_n"}


@sgl.function
def long_answer(s):
    s += "Hello" + gen("text", max_tokens=2000, ignore_eos=True, slo=SLACK) + gen("never", max_tokens=4, slo=SLACK)


def test_a_cancelled_run_frees_what_it_held(shared, backend):
    state = long_answer.run(backend=backend, stream=True)
    stream = state.text_iter("text")
    assert next(stream) is not None
    with pytest.warns(UserWarning, match="Error in stream_executor"):
        cancel(state)
        "".join(stream)
        state.stream_executor.worker.join(60)
    (entry,) = receipts(state)
    assert entry["error"] == "the run was cancelled" and entry["output_tokens"] < 2000
    shared.assert_nothing_is_left()


@sgl.function
def everything(s, question):
    s += "A common prefix that is long enough for SGLang to send it ahead of the batch: " + question
    s.sync()
    with stage("solve", e2e_ms=120_000):
        forks = s.fork(2)
        forks += gen("branch", max_tokens=8, slo=SLACK)
        forks.join()
        s += select("choice", ["yes", "no"], slo=SLO(ttft_ms=60_000))
        s += sgl.gen("plain", max_tokens=4) + gen("number", dtype=int, max_tokens=4, slo=SLACK)
    s += sgl.gen("log_line", max_tokens=4)


def test_forks_selects_batches_and_plain_calls(backend):
    states = everything.run_batch([{"question": q} for q in "abc"], backend=backend)
    for state in states:
        listed = receipts(state)
        assert [entry["stage"] for entry in listed] == [
            *["solve/branch"] * 2, "solve/choice", "solve/plain", "solve/number", "log_line",
        ]  # fmt: skip
        assert all(entry["error"] is None for entry in listed)
        assert all(entry["receipt"]["attained"] for entry in listed[:-1])
        assert all(entry["receipt"]["tier"] == "standard" for entry in listed[:-1])
        assert state["choice"] in ("yes", "no")


def test_streaming_brings_the_receipt_with_the_last_chunk(backend):
    state = everything.run("z", backend=backend, stream=True)
    assert "".join(state.text_iter("number"))
    assert state.get_meta_info("number")["slo"]["tier"] == "standard"
    assert state.error() is None


@sgl.function
def one_call(s):
    s += "Hello" + sgl.gen("a", max_tokens=4)


def test_a_spent_budget_is_declined_but_served(backend):
    state = annotate(one_call, e2e_ms=0.001).run(backend=backend)
    assert state["a"]
    receipt = state.get_meta_info("a")["slo"]
    assert receipt["declined"] and receipt["tier"] == "best_effort" and not receipt["attained"]


def test_a_declined_call_may_be_refused(backend):
    with pytest.warns(UserWarning, match="Error in stream_executor"):
        state = annotate(one_call, e2e_ms=0.001, a=SLO(tpot_ms=100, on_decline="reject")).run(backend=backend)
        assert state.error() is not None
    (entry,) = receipts(state)
    assert "budget" in entry["error"] and entry["receipt"] is None


def test_annotated_programs_run_on_a_stock_server(stock_server: Server) -> None:
    done = run_cli("tool_agent", "--endpoint", stock_server.url)
    assert done.returncode == 0, done.stderr
    assert "agent/final" in done.stdout and "No receipts" in done.stdout
    backend = sgl.RuntimeEndpoint(stock_server.url)
    listed = receipts(everything.run("a", backend=backend))
    assert len(listed) == 6 and all(entry["error"] is None for entry in listed)
    assert annotate(one_call, e2e_ms=0.001, a=presets.TOOL_LOOP).run(backend=backend)["a"]


def stream_two_phases(url, chars):
    """When the client saw each token, s, and the receipt."""
    slo = {"think_tpot_ms": 5_000, "tpot_ms": 5_000, "think_end": "</think>"}
    grammar = f"[a-z ]{{{chars}}}</think>[a-z ]{{{chars}}}"
    params = {"max_new_tokens": 600, "temperature": 0, "regex": grammar, "custom_params": {"slo": slo}}
    body = {"text": "Hello <think>", "sampling_params": params, "stream": True}
    seen: dict[int, float] = {}
    with requests.post(f"{url}/generate", json=body, stream=True, timeout=120) as response:
        for line in response.iter_lines(chunk_size=1):
            if line.startswith(b"data: {"):
                now_s = time.perf_counter()
                meta = json.loads(line[6:])["meta_info"]
                seen.setdefault(meta["completion_tokens"], now_s)
    return seen, meta["slo"]


def test_the_tpot_of_each_phase_is_what_the_client_sees(url):
    stream_two_phases(url, 20)  # the first answer of a route takes longer on its way
    seen, receipt = stream_two_phases(url, 400)
    think, answer = receipt["by_phase"]
    assert (think["name"], answer["name"]) == ("think", "answer")
    for phase, first in ((think, 1), (answer, think["tokens"] + 1)):
        assert phase["tokens"] > 50
        last = first + phase["tokens"] - 1
        client_ms = (seen[last] - seen[first]) * 1e3 / (last - first)
        assert phase["tpot_ms"] == pytest.approx(client_ms, rel=0.1)
