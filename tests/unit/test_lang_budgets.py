"""Budgets inside a budget are a schedule: what is left over flows on, an overrun is made up for."""

import threading

import pytest
import sglang as sgl
from stub_endpoint import stub_endpoint

from slos_sglang import SLO, annotate, gen, stage
from slos_sglang.lang import scope

pytestmark = pytest.mark.filterwarnings("error")


class Clock:
    """A monotonic clock that only moves when told."""

    def __init__(self):
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s

    def pass_ms(self, ms: float) -> None:
        self.now_s += ms / 1000


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(scope, "clock", clock)
    return clock


@pytest.fixture
def server():
    with stub_endpoint() as server:
        yield server


@pytest.fixture
def backend(server):
    return sgl.RuntimeEndpoint(server.url)


def taking(clock, server, **ms):
    """Each call takes the time given for it, by the last name in its stage path."""

    def answer(request):
        path = request["sampling_params"]["custom_params"]["slo"].get("stage", "")
        clock.pass_ms(ms.get(path.rpartition("/")[2], 0))
        return "x"

    server.answer = answer


def budgets(server):
    return {slo["stage"]: slo["budget_ms"] for slo in server.slos if slo and "stage" in slo}


@sgl.function
def three_stages(s):
    with stage("plan", e2e_ms=2000):
        s += sgl.gen("a")
    with stage("solve", e2e_ms=4000):
        s += sgl.gen("b")
    with stage("answer", e2e_ms=1000):
        s += sgl.gen("c")


@pytest.mark.parametrize("wait", [False, True])
@pytest.mark.parametrize(
    "first_ms, second_ms, solve, answer",
    [
        (500, 4000, 5500, 2500),  # 1.5 s left over, all of it still there for the last one
        (2000, 4000, 4000, 1000),  # as planned
        (3000, 2000, 3000, 2000),  # 1 s over, made up for and more
        (6000, 2500, 2000, 500),  # 4 s over: no stage has less than half of its own
        (500, 6000, 5500, 500),  # 1.5 s are not enough
    ],
)
def test_left_over_time_flows_on_and_an_overrun_tightens(
    server, backend, clock, wait, first_ms, second_ms, solve, answer
):
    """Whether the body runs ahead of its calls or waits for each."""
    taking(clock, server, a=first_ms, b=second_ms)

    def body(s):
        for name, ms, call in (("plan", 2000, "a"), ("solve", 4000, "b"), ("answer", 1000, "c")):
            with stage(name, e2e_ms=ms):
                s += sgl.gen(call)
                if wait:
                    s[call]

    annotate(sgl.function(body), e2e_ms=20_000).run(backend=backend).sync()
    assert budgets(server) == pytest.approx({"plan/a": 2000, "solve/b": solve, "answer/c": answer})


def test_the_budget_around_is_never_exceeded(server, backend, clock):
    taking(clock, server, a=100, b=2500)
    annotate(three_stages, e2e_ms=3000).run(backend=backend).sync()
    assert budgets(server) == pytest.approx({"plan/a": 2000, "solve/b": 2900, "answer/c": 400})


def test_without_a_budget_around_stages_are_independent(server, backend, clock):
    taking(clock, server, a=5000, b=100)
    three_stages.run(backend=backend).sync()
    assert budgets(server) == pytest.approx({"plan/a": 2000, "solve/b": 4000, "answer/c": 1000})


def test_time_between_stages_is_nobodys(server, backend, clock):
    @sgl.function
    def program(s):
        with stage("plan", e2e_ms=1000):
            s += sgl.gen("a")
            s["a"]
        clock.pass_ms(5000)
        with stage("solve", e2e_ms=1000):
            s += sgl.gen("b")

    taking(clock, server, a=600)
    annotate(program, e2e_ms=20_000).run(backend=backend).sync()
    assert budgets(server)["solve/b"] == pytest.approx(1400)


def test_a_tool_without_a_call_uses_its_stage_s_budget(server, backend, clock):
    @sgl.function
    def program(s):
        with stage("tool", e2e_ms=1000):
            clock.pass_ms(1300)
        with stage("solve", e2e_ms=1000):
            s += sgl.gen("b")

    annotate(program, e2e_ms=20_000).run(backend=backend).sync()
    assert budgets(server)["solve/b"] == pytest.approx(700)


def test_forks_share_the_deadline_and_the_join_waits_for_the_last(server, backend, clock):
    """Branches start with the same slack; what the last of them to end leaves goes on."""

    @sgl.function
    def program(s):
        with stage("plan", e2e_ms=1000):
            s += sgl.gen("a")
        s.sync()
        forks = s.fork(2)
        for number, fork in enumerate(forks):
            with stage(f"branch{number}", e2e_ms=2000):
                fork += sgl.gen("b")
                fork.sync()
        forks.join()
        with stage("answer", e2e_ms=1000):
            s += sgl.gen("c")

    taking(clock, server, a=800, b=500)
    annotate(program, e2e_ms=20_000).run(backend=backend).sync()
    # 200 ms from the plan; the second branch finds what the first one, which the body waited for, left.
    assert budgets(server) == pytest.approx({"plan/a": 1000, "branch0/b": 2200, "branch1/b": 3700, "answer/c": 4200})


def test_branches_side_by_side_start_with_the_same(server, backend, clock):
    all_there = threading.Barrier(3)

    def answer(request):
        if request["sampling_params"]["custom_params"]["slo"].get("stage") == "plan/a":
            clock.pass_ms(800)
        elif request["sampling_params"]["max_new_tokens"]:
            all_there.wait(10)
        return "x"

    server.answer = answer

    @sgl.function
    def program(s):
        with stage("plan", e2e_ms=1000):
            s += sgl.gen("a")
        s.sync()
        forks = s.fork(3)
        for number, fork in enumerate(forks):
            with stage(f"branch{number}", e2e_ms=2000):
                fork += sgl.gen("b")
        forks.join()

    annotate(program, e2e_ms=20_000).run(backend=backend).sync()
    assert budgets(server) == pytest.approx({"plan/a": 1000} | {f"branch{n}/b": 2200 for n in range(3)})


def test_nested_stages_have_schedules_of_their_own(server, backend, clock):
    @sgl.function
    def program(s):
        with stage("outer", e2e_ms=5000):
            with stage("one", e2e_ms=1000):
                s += sgl.gen("a")
            with stage("two", e2e_ms=1000):
                s += sgl.gen("b")
        with stage("last", e2e_ms=1000):
            s += sgl.gen("c")

    taking(clock, server, a=400, b=400)
    annotate(program, e2e_ms=20_000).run(backend=backend).sync()
    # The outer stage leaves 4.2 s, what its parts left is in there.
    assert budgets(server) == pytest.approx({"outer/one/a": 1000, "outer/two/b": 1600, "last/c": 5200})


def test_a_call_s_own_deadline_is_not_a_part_of_the_schedule(server, backend, clock):
    @sgl.function
    def program(s):
        for name in ("a", "b"):
            s += gen(name, slo=SLO(e2e_ms=700))

    taking(clock, server, a=100)
    annotate(program, e2e_ms=20_000).run(backend=backend).sync()
    assert budgets(server) == pytest.approx({"a": 700, "b": 700})


def test_an_exception_ends_the_stage(server, backend, clock):
    @sgl.function
    def program(s):
        try:
            with stage("tool", e2e_ms=1000):
                clock.pass_ms(200)
                raise OSError("no such host")
        except OSError:
            pass
        with stage("answer", e2e_ms=1000):
            s += sgl.gen("c")

    annotate(program, e2e_ms=20_000).run(backend=backend).sync()
    assert budgets(server) == pytest.approx({"answer/c": 1800})
