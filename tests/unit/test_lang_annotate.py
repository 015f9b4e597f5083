"""Targets by name: the body stays as it is, and a name that doesn't exist is an error as early as it can be known."""

import inspect
import threading

import pytest
import sglang as sgl
from stub_endpoint import stub_endpoint

import slos_sglang
from slos_sglang import SLO, annotate, presets, stage
from slos_sglang.lang import scope
from slos_sglang.lang.names import gen_names

pytestmark = pytest.mark.filterwarnings("error")
FAST = SLO(tpot_ms=40)


@pytest.fixture
def server():
    with stub_endpoint() as server:
        yield server


@pytest.fixture
def backend(server):
    return sgl.RuntimeEndpoint(server.url)


@pytest.fixture
def still(monkeypatch):
    monkeypatch.setattr(scope, "clock", lambda: 0.0)


def ask(s, name):
    s += sgl.gen(name)


def literal_helper(s):
    s += sgl.gen("from_helper")


@sgl.function
def planner(s, question, steps=2):
    s += question + sgl.gen("plan") + sgl.gen("act")
    with stage("closing", e2e_ms=9000):
        s += sgl.assistant(slos_sglang.gen("final", slo=presets.TOOL_FINAL))


def test_targets_and_budget_by_name(server, backend, still):
    fast = annotate(planner, e2e_ms=4_000, plan=SLO(ttft_ms=200), final=FAST)
    assert fast.run("Q", backend=backend)["final"] == "x"
    plan, act, final = server.slos
    assert plan["ttft_ms"] == 200 and plan["stage"] == "plan"
    assert "tpot_ms" not in act and act["stage"] == "act"
    # Targets by name win over those in the body.
    assert final["tpot_ms"] == 40 and "ttft_slowdown" not in final and final["stage"] == "closing/final"
    assert {slo["budget_ms"] for slo in server.slos} == {4000}


def test_the_program_itself_stays_as_it_was(server, backend):
    before = (planner.func, dict(planner.func.__dict__))
    annotate(planner, e2e_ms=4_000, plan=FAST)
    assert (planner.func, dict(planner.func.__dict__)) == before
    planner.run("Q", backend=backend).sync()
    assert server.slos[:2] == [None, None] and server.slos[2]["tpot_ms"] == 100


def test_annotated_programs_bind_batch_and_stream(server, backend, still):
    fast = annotate(planner, e2e_ms=4_000, plan=FAST)
    assert fast.bind(question="Q").run(backend=backend)["final"] == "x"
    assert [state["plan"] for state in fast.run_batch([("a",), ("b", 3)], backend=backend)] == ["x", "x"]
    state = fast.run("Q", backend=backend, stream=True)
    assert "".join(state.text_iter("plan")) == "x" and state["final"] == "x"
    assert {slo["budget_ms"] for slo in server.slos} == {4000}
    assert len({slo["program"] for slo in server.slos}) == 4


def test_the_common_prefix_of_an_annotated_batch_carries_the_budget(server, backend, still):
    @sgl.function
    def prefixed(s, question):
        s += "A common prefix that is long enough for SGLang to send it ahead of the batch: " + question
        s += sgl.gen("answer")

    states = annotate(prefixed, e2e_ms=700).run_batch([("a",), ("b",)], backend=backend, num_threads=1)
    assert [state["answer"] for state in states] == ["x", "x"]
    assert server.requests[0]["sampling_params"]["max_new_tokens"] == 0
    assert [slo["budget_ms"] for slo in server.slos] == [700] * 3
    assert len({slo["program"] for slo in server.slos[1:]}) == 2


def test_outer_annotations_win_and_deadlines_add_up(server, backend, still):
    inner = annotate(planner, e2e_ms=1_000, plan=SLO(tpot_ms=10), act=SLO(tpot_ms=20))
    annotate(inner, e2e_ms=4_000, plan=FAST).run("Q", backend=backend).sync()
    assert [slo.get("tpot_ms") for slo in server.slos] == [40, 20, 100]
    assert {slo["budget_ms"] for slo in server.slos} == {1000}


def test_each_run_has_the_whole_budget(server, backend, monkeypatch):
    now_s = [0.0]
    monkeypatch.setattr(scope, "clock", lambda: now_s[0])
    fast = annotate(planner, e2e_ms=500)
    for _ in range(2):
        fast.run("Q", backend=backend).sync()
        now_s[0] += 10
    assert {slo["budget_ms"] for slo in server.slos} == {500}


def test_an_unknown_name_is_refused_at_once_with_the_nearest():
    with pytest.raises(ValueError, match="'planner' has no generation call named 'pln'; did you mean 'plan'"):
        annotate(planner, pln=FAST)


def test_names_in_helpers_and_nested_programs_count(server, backend):
    @sgl.function
    def program(s):
        literal_helper(s)
        planner.run("Q", backend=backend).sync()
        s += sgl.select("choice", ["a", "b"])

    annotate(program, from_helper=FAST, act=FAST, choice=FAST).run().sync()
    sent = {slo["stage"]: slo["tpot_ms"] for slo in server.slos if slo and slo.get("tpot_ms") == 40}
    assert {"from_helper", "act"} <= set(sent)


@pytest.fixture(autouse=True)
def default_backend(backend, monkeypatch):
    monkeypatch.setattr(sgl.global_config, "default_backend", backend)


def test_a_computed_name_is_only_known_after_the_run(server):
    @sgl.function
    def program(s):
        for turn in range(2):
            s += sgl.gen(f"act_{turn}")

    annotate(program, act_1=FAST).run().sync()
    assert [slo and slo["tpot_ms"] for slo in server.slos] == [None, 40]
    with pytest.warns(UserWarning, match="has no generation call named 'act_7'; did you mean 'act_"):
        annotate(program, act_7=FAST).run().sync()


def test_a_branch_that_was_not_taken_is_no_error():
    @sgl.function
    def program(s, name):
        if name == "never":
            s += sgl.gen("rare")
        s += sgl.gen(name)

    annotate(program, rare=FAST).run("often").sync()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"plan": {"tpot_ms": 5}}, "target of 'plan' must be an SLO, not {'tpot_ms': 5}"),
        ({"plan": 5}, "target of 'plan' must be an SLO, not 5"),
        ({"e2e_ms": 0}, "e2e_ms must be a finite number greater than 0, not 0"),
        ({"e2e_ms": True}, "e2e_ms must be a finite number, not True"),
    ],
)
def test_wrong_values(arguments, message):
    with pytest.raises(ValueError) as error:
        annotate(planner, **arguments)
    assert message in str(error.value)


def test_only_programs_can_be_annotated():
    with pytest.raises(ValueError, match=r"annotate takes an @sgl\.function"):
        annotate(lambda s: s, e2e_ms=5)


def test_annotated_programs_can_be_traced():
    tracer = annotate(planner, e2e_ms=4_000).trace(question="Q")
    assert "plan" in tracer.variables


class TestGenNames:
    def test_aliases_and_keywords_are_understood(self):
        from sglang import gen as g

        def body(s):
            s += g("a") + sgl.gen(name="b") + sgl.gen() + sgl.gen_int("c") + sgl.assistant(slos_sglang.gen("d"))

        assert gen_names(body) == ({"a", "b", "c", "d"}, True)

    def test_forks_lambdas_tools_and_methods_are_complete(self):
        def tool(text):
            return text.strip()

        def body(s):
            forks = s.fork(2)
            forks += lambda i: sgl.gen("branch")
            forks.join()
            s += tool(str(threading.active_count())) + sgl.gen("end")

        assert gen_names(body) == ({"branch", "end"}, True)

    @pytest.mark.parametrize("how", ["helper", "parameter", "method", "keywords"])
    def test_incomplete_where_other_names_may_appear(self, how):
        class Agent:
            def step(self, s):
                s += sgl.gen("hidden")

        agent = Agent()

        def helper(s):
            ask(s, "computed")

        def parameter(s, step):
            step(s)

        def method(s):
            agent.step(s)

        def keywords(s, options):
            s += sgl.gen(**options)

        body = {"helper": helper, "parameter": parameter, "method": method, "keywords": keywords}[how]
        assert gen_names(body)[1] is False

    def test_without_source(self):
        namespace = {"sgl": sgl}
        exec("def body(s):\n    s += sgl.gen('a')", namespace)
        with pytest.raises(OSError):
            inspect.getsource(namespace["body"])
        assert gen_names(namespace["body"]) == (set(), False)
