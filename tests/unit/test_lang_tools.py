"""Tools are measured, and what earlier runs showed is announced with the next one's calls."""

import pytest
import sglang as sgl
from stub_endpoint import stub_endpoint

from slos_sglang import SLO, annotate, gen, stage
from slos_sglang.lang import receipts, scope
from slos_sglang.lang.history import ENOUGH_RUNS, MEMORY_RUNS, CallDone, History, Rest, rest_after
from slos_sglang.slo import WIRE_KEYS

pytestmark = pytest.mark.filterwarnings("error")
REST_KEYS = {"rest_calls", "rest_prompt_tokens", "rest_output_tokens", "rest_gaps_ms", "gap_ms"}


@pytest.fixture
def now_s(monkeypatch):
    now_s = [1000.0]
    monkeypatch.setattr(scope, "clock", lambda: now_s[0])
    monkeypatch.setattr(scope, "history", History())
    return now_s


@pytest.fixture
def server():
    with stub_endpoint() as server:
        yield server


@pytest.fixture
def backend(server):
    return sgl.RuntimeEndpoint(server.url)


def done(stage, sent_s, ended_s, prompt=10, output=4, scopes=(0,)):
    return CallDone(
        stage=stage, scopes=scopes, sent_s=sent_s, ended_s=ended_s, prompt_tokens=prompt, output_tokens=output
    )


CHAIN = [done("act", 0, 1), done("act", 3, 4, prompt=20), done("final", 4.5, 6, output=9)]


def test_what_remains_after_each_call_of_a_chain():
    assert rest_after(0, CHAIN) == Rest(
        rest_calls=2, rest_prompt_tokens=30, rest_output_tokens=13, rest_gaps_ms=2500, gap_ms=2000
    )
    assert rest_after(1, CHAIN) == Rest(
        rest_calls=1, rest_prompt_tokens=10, rest_output_tokens=9, rest_gaps_ms=500, gap_ms=500
    )
    assert rest_after(2, CHAIN) == Rest()


def test_calls_side_by_side_leave_no_gap():
    calls = [done("a", 0, 1), done("c", 2, 3), done("b", 0, 5), done("d", 6, 7)]
    rest = rest_after(0, calls)
    assert (rest.rest_calls, rest.rest_gaps_ms, rest.gap_ms) == (2, 1000, 1000)


def test_calls_of_a_loop_are_told_apart_by_how_many_came_before():
    history = History()
    for _ in range(ENOUGH_RUNS):
        assert history.expect("f", "act", 0, 0) is None
        history.learn("f", CHAIN)
    assert history.expect("f", "act", 0, 0) == rest_after(0, CHAIN)
    assert history.expect("f", "act", 1, 0) == rest_after(1, CHAIN)
    assert history.expect("f", "act", 2, 0) is history.expect("g", "act", 0, 0) is None


def test_what_remains_of_a_stage_and_of_a_call():
    """Two turns in stages of the same name, then an answer outside."""
    calls = [
        done("turn/a", 0, 1, scopes=(0, 1)),
        done("turn/b", 2, 3, scopes=(0, 1)),
        done("turn/a", 4, 5, scopes=(0, 2)),
        done("final", 6, 7, scopes=(0,)),
    ]
    history = History()
    for _ in range(ENOUGH_RUNS):
        history.learn("f", calls)
    whole, of_stage, of_call = (history.expect("f", "turn/a", 0, depth) for depth in range(3))
    assert whole is not None and of_stage is not None and of_call is not None
    assert (whole.rest_calls, whole.rest_gaps_ms) == (3, 3000)
    assert (of_stage.rest_calls, of_stage.rest_gaps_ms, of_stage.gap_ms) == (1, 1000, 1000)
    assert of_call == Rest(gap_ms=1000)
    last_of_stage = history.expect("f", "turn/b", 0, 1)
    assert last_of_stage == Rest(gap_ms=1000), "the program goes on, the stage does not"


def test_the_latest_runs_count_and_their_mean():
    history = History()
    for _ in range(MEMORY_RUNS):
        history.learn("f", [done("a", 0, 1)])
    assert history.expect("f", "a", 0, 0) == Rest()
    for number in range(MEMORY_RUNS):
        history.learn("f", [done("a", 0, 1), done("b", 2 + number % 2, 5)])
    rest = history.expect("f", "a", 0, 0)
    assert rest is not None and (rest.rest_calls, rest.gap_ms) == (1, 1500)


@sgl.function
def agent(s, turns=2):
    with stage("solve", e2e_ms=9000) as solve:
        for _ in range(turns):
            s += "Q" + gen("act", max_tokens=4)
            s["act"]
            with solve.tool("search"):
                scope.clock.pass_ms(700)
        s += gen("final")


class Clock:
    def __init__(self, now_s):
        self.now_s = now_s

    def __call__(self):
        return self.now_s[0]

    def pass_ms(self, ms):
        self.now_s[0] += ms / 1000


@pytest.fixture
def clock(now_s, monkeypatch):
    clock = Clock(now_s)
    monkeypatch.setattr(scope, "clock", clock)
    return clock


def test_a_tool_s_time_is_in_the_receipts_and_counts_against_the_budget(server, backend, clock):
    listed = receipts(agent.run(backend=backend))
    assert [entry["stage"] for entry in listed] == ["solve/act", "solve/search"] * 2 + ["solve/final"]
    assert [entry["tool_ms"] for entry in listed if "tool_ms" in entry] == [pytest.approx(700)] * 2
    assert server.slo("solve/final")["budget_ms"] == pytest.approx(9000 - 1400)


def test_a_tool_that_raises_is_listed_and_the_program_goes_on(server, backend, clock):
    @sgl.function
    def program(s):
        with stage("solve", e2e_ms=9000) as solve:
            with pytest.raises(OSError), solve.tool("fetch"):
                raise OSError("no such host")
            s += sgl.gen("final")

    listed = receipts(program.run(backend=backend))
    assert [(entry["stage"], entry["error"]) for entry in listed] == [
        ("solve/fetch", "OSError('no such host')"),
        ("solve/final", None),
    ]


@pytest.mark.parametrize("name", ["", None, 5])
def test_a_tool_has_a_name(name):
    with pytest.raises(ValueError, match="tool name must be a non-empty text"), stage("a") as a, a.tool(name):
        pass


def test_what_earlier_runs_showed_is_announced(server, backend, clock):
    for _ in range(ENOUGH_RUNS):
        agent.run(backend=backend).sync()
    assert all(not REST_KEYS & set(slo) for slo in server.slos)
    server.bodies.clear()
    agent.run(backend=backend).sync()
    first, second, final = server.slos
    assert {key: first[key] for key in REST_KEYS} == pytest.approx(
        {"rest_calls": 2, "rest_prompt_tokens": 6, "rest_output_tokens": 2, "rest_gaps_ms": 1400, "gap_ms": 700}
    )
    assert (second["rest_calls"], second["rest_gaps_ms"], final["rest_calls"]) == (1, 700, 0)
    assert "gap_ms" not in final and set(first) <= set(WIRE_KEYS)


def test_what_remains_is_that_of_the_budget_that_travels(server, backend, clock):
    @sgl.function
    def program(s, whole_ms):
        with stage("solve", e2e_ms=whole_ms):
            with stage("plan", e2e_ms=2000):
                s += gen("a") + gen("b")
            s += gen("own", slo=SLO(e2e_ms=100)) + gen("end")

    for _ in range(ENOUGH_RUNS):
        program.run(9000, backend=backend).sync()
    server.bodies.clear()
    program.run(9000, backend=backend).sync()
    program.run(1500, backend=backend).sync()
    assert [slo["rest_calls"] for slo in server.slos] == [1, 0, 0, 0, 3, 2, 0, 0]


def test_an_annotated_program_and_its_batch_share_the_history(server, backend, clock):
    fast = annotate(agent, e2e_ms=20_000, act=SLO(tpot_ms=50))
    fast.run_batch([{"turns": 1}] * ENOUGH_RUNS, backend=backend, num_threads=1)
    server.bodies.clear()
    agent.run(backend=backend).sync()
    assert server.slos[0]["rest_calls"] == 1


def test_a_nested_program_is_told_what_remains_of_the_whole(server, backend, clock):
    @sgl.function
    def helper(s):
        s += gen("h", slo=SLO(tpot_ms=50))

    @sgl.function
    def program(s):
        helper.run(backend=backend).sync()
        clock.pass_ms(100)
        s += gen("end", slo=SLO(tpot_ms=50))

    for _ in range(ENOUGH_RUNS + 1):
        program.run(backend=backend).sync()
    assert server.slos[-2]["rest_calls"] == 1 and server.slos[-2]["gap_ms"] == pytest.approx(100)


def test_a_run_that_failed_teaches_nothing(server, backend, clock):
    server.status = 429
    for _ in range(ENOUGH_RUNS):
        with pytest.warns(UserWarning, match="Error in stream_executor"), pytest.raises(KeyError):
            agent.run(backend=backend)
    server.status = 200
    agent.run(backend=backend).sync()
    assert not REST_KEYS & set(server.slos[-1])
