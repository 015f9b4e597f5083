"""What leaves the client: every request of a program carries the promises around it, and nothing else changes."""

import json
import pkgutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import sglang as sgl
from sglang.lang.interpreter import StreamExecutor
from stub_endpoint import stub_endpoint

from slos_sglang import SLO, gen, patches, presets, select, stage
from slos_sglang.lang import carry, receipts, scope
from slos_sglang.slo import parse_wire

pytestmark = pytest.mark.filterwarnings("error")
LOOP = presets.TOOL_LOOP
CLIENT_SEAMS = [seam for seam in patches.SEAMS if seam.process == "client"]


def unpatch(monkeypatch):
    """SGLang's frontend as it comes, until the test ends."""
    for seam in CLIENT_SEAMS:
        target = seam.target.replace(":", ".")
        monkeypatch.setattr(target, pkgutil.resolve_name(seam.target).__wrapped__)
    assert not hasattr(StreamExecutor.submit, "__slos_seam__")


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


def test_a_gen_carries_its_targets_and_brings_back_the_receipt(server, backend):
    @sgl.function
    def program(s):
        s += "Q" + gen("act", max_tokens=4, slo=SLO(ttft_slowdown=3, think_tpot_ms=50, tpot_ms=100, value=2))

    state = program.run(backend=backend)
    assert state.get_meta_info("act")["slo"]["tier"] == "standard"
    (sent,) = server.slos
    assert parse_wire(sent)
    program_id = sent.pop("program")
    assert int(program_id, 16) >= 0 and len(program_id) == 12
    assert sent == {
        "stage": "act",
        "ttft_slowdown": 3,
        "tpot_ms": 100,
        "think_tpot_ms": 50,
        "think_end": "</think>",
        "value": 2,
        "on_decline": "best_effort",
    }
    assert server.requests[0]["sampling_params"]["max_new_tokens"] == 4


def test_each_run_has_its_own_id_and_its_calls_share_it(server, backend):
    @sgl.function
    def program(s):
        s += gen("a", slo=LOOP) + gen("b", slo=LOOP)

    for _ in range(2):
        program.run(backend=backend).sync()
    first, second, third, fourth = (slo["program"] for slo in server.slos)
    assert first == second != third == fourth


def test_ids_are_reproducible(server, backend):
    @sgl.function
    def program(s):
        s += gen("a", slo=LOOP)

    for _ in range(2):
        scope.ids.seed(7)
        program.run(backend=backend).sync()
    assert server.slos[0]["program"] == server.slos[1]["program"]


def test_a_budget_shrinks_and_ends_with_its_stage(server, backend, clock):
    @sgl.function
    def program(s):
        with stage("solve", e2e_ms=20_000) as solve:
            s += gen("act", slo=LOOP)
            s["act"]
            clock.pass_ms(1_500)
            assert solve.left_ms() == pytest.approx(18_500)
            s += sgl.gen("plain")
            s["plain"]
            clock.pass_ms(30_000)
            s += gen("late", slo=LOOP)
        s += sgl.gen("log_line")

    program.run(backend=backend).sync()
    assert server.slo("solve/act")["budget_ms"] == 20_000
    plain = server.slo("solve/plain")
    assert plain["budget_ms"] == 18_500
    assert "tpot_ms" not in plain and "ttft_slowdown" not in plain
    assert server.slo("solve/late")["budget_ms"] == -11_500
    assert server.slos[-1] is None


@pytest.mark.parametrize(
    "outer, inner, own, expected",
    [
        (1000, 5000, None, 1000),
        (5000, 1000, None, 1000),
        (5000, 1000, 300, 300),
        (5000, None, 9000, 5000),
        (None, None, 700, 700),
    ],
)
def test_a_deadline_is_the_minimum_of_those_around(server, backend, clock, outer, inner, own, expected):
    @sgl.function
    def program(s):
        with stage("outer", e2e_ms=outer), stage("inner", e2e_ms=inner):
            s += gen("act", slo=None if own is None else SLO(e2e_ms=own))

    program.run(backend=backend).sync()
    assert server.slo("outer/inner/act")["budget_ms"] == expected


def test_targets_are_not_inherited_by_a_later_call_of_the_same_name(server, backend):
    @sgl.function
    def program(s):
        with stage("a"):
            s += gen("act", slo=LOOP)
        s += sgl.gen("act")

    program.run(backend=backend).sync()
    assert server.slos[0]["tpot_ms"] == 50 and server.slos[1] is None


def test_stages_that_follow_each_other_do_not_share_a_clock(server, backend, clock):
    """The body runs ahead: both stages are entered before the first call has been answered."""
    entered_both = threading.Event()

    def answer(request):
        assert entered_both.wait(10)
        clock.pass_ms(400)
        return "x"

    server.answer = answer

    @sgl.function
    def program(s):
        with stage("first", e2e_ms=1000):
            s += sgl.gen("a")
        with stage("second", e2e_ms=1000):
            s += sgl.gen("b") + sgl.gen("c")
        entered_both.set()

    program.run(backend=backend).sync()
    assert [slo["budget_ms"] for slo in server.slos] == [1000, 1000, 600]


def test_a_fork_and_its_prefix_belong_to_the_stage(server, backend, clock):
    @sgl.function
    def program(s):
        s += "some text"
        s.sync()  # fork looks at the text that has been executed
        with stage("solve", e2e_ms=2000):
            forks = s.fork(3)
            forks += sgl.gen("branch")
            forks.join()

    program.run(backend=backend).sync()
    assert server.requests[0]["sampling_params"]["max_new_tokens"] == 0
    assert [slo["stage"] for slo in server.slos] == ["solve"] + ["solve/branch"] * 3
    assert {slo["budget_ms"] for slo in server.slos} == {2000}
    assert len({slo["program"] for slo in server.slos}) == 1


def test_forks_driven_by_the_users_own_threads_belong_to_the_stage(server, backend, clock):
    @sgl.function
    def program(s):
        with stage("solve", e2e_ms=2000):
            forks = s.fork(2)

            def work(fork):
                fork += gen("branch", slo=LOOP)
                fork.sync()

            with ThreadPoolExecutor(2) as pool:
                list(pool.map(work, [forks[0], forks[1]]))

    program.run(backend=backend).sync()
    assert [(slo["stage"], slo["budget_ms"]) for slo in server.slos] == [("solve/branch", 2000)] * 2


@pytest.mark.parametrize("how", ["select", "gen"])
def test_every_request_of_a_select_carries_its_promise(server, backend, clock, how):
    slo = SLO(ttft_ms=70, e2e_ms=500)

    @sgl.function
    def program(s):
        s += "Is it? "
        with stage("solve", e2e_ms=2000):
            if how == "select":
                s += select("choice", ["yes", "no"], slo=slo)
            else:
                s += gen("choice", choices=["yes", "no"], slo=slo)

    state = program.run(backend=backend)
    assert state["choice"] == "yes"
    assert [(s["stage"], s["ttft_ms"], s["budget_ms"]) for s in server.slos] == [("solve/choice", 70, 500)] * 2
    assert [r["text"] for r in server.requests] == ["Is it? ", ["Is it? yes", "Is it? no"]]
    # The worst of the receipts of its requests.
    assert state.get_meta_info("choice")["slo"]["attained"] is False


def test_a_plain_select_in_a_stage_carries_the_deadline(server, backend, clock):
    @sgl.function
    def program(s):
        with stage("solve", e2e_ms=2000):
            s += sgl.select("choice", ["yes", "no"])

    program.run(backend=backend).sync()
    assert [s["budget_ms"] for s in server.slos] == [2000] * 2


def test_the_budget_of_a_select_runs_through_all_its_requests(server, backend, clock):
    server.answer = lambda request: clock.pass_ms(200) or ""

    @sgl.function
    def program(s):
        s += select("choice", ["yes", "no"], slo=SLO(e2e_ms=500))

    program.run(backend=backend).sync()
    assert [s["budget_ms"] for s in server.slos] == [500, 300]


@pytest.mark.parametrize("num_threads", [1, 4])
def test_a_batch_inside_a_stage_carries_its_deadline(server, backend, clock, num_threads):
    @sgl.function
    def program(s, question):
        s += "A common prefix that is long enough for SGLang to send it ahead of the batch: " + question
        s += gen("answer", slo=LOOP)

    with stage("evaluation", e2e_ms=3000):
        states = program.run_batch([{"question": q} for q in "abc"], backend=backend, num_threads=num_threads)
    assert server.requests[0]["sampling_params"]["max_new_tokens"] == 0
    assert server.slos[0]["stage"] == "evaluation"
    assert {slo["budget_ms"] for slo in server.slos} == {3000}
    assert [slo["stage"] for slo in server.slos[1:]] == ["evaluation/answer"] * 3
    assert len({slo["program"] for slo in server.slos[1:]}) == 3
    assert all(len(receipts(state)) == 1 for state in states)


@pytest.mark.parametrize("generator_style", [False, True])
def test_a_batch_outside_any_stage_promises_only_what_it_says(server, backend, generator_style):
    @sgl.function
    def program(s, question):
        s += "A common prefix that is long enough for SGLang to send it ahead of the batch: " + question
        s += gen("answer", slo=LOOP)

    states = program.run_batch([{"question": q} for q in "ab"], backend=backend, generator_style=generator_style)
    assert [state["answer"] for state in states] == ["x", "x"]
    assert server.slos[0] is None
    assert all(slo["tpot_ms"] == 50 and "budget_ms" not in slo for slo in server.slos[1:])


@pytest.mark.parametrize("stream", [False, True])
def test_a_nested_program_is_a_part_of_the_run(server, backend, clock, stream):
    @sgl.function
    def helper(s):
        with stage("inside", e2e_ms=5000):
            s += sgl.gen("h")

    @sgl.function
    def program(s):
        s += gen("a", slo=LOOP)
        s["a"]
        with stage("solve", e2e_ms=2000):
            helper.run(backend=backend, stream=stream).sync()
            # With stream=True the helper's body runs on a thread of its own.
            while len(server.bodies) < 2:
                pass

    state = program.run(backend=backend)
    state.sync()
    own, nested = server.slos
    assert nested["stage"] == "solve/inside/h" and nested["budget_ms"] == 2000
    assert own["program"] == nested["program"]
    if not stream:
        assert [r["stage"] for r in receipts(state)] == ["a", "solve/inside/h"]


def test_streaming_has_the_same_annotation_and_receipt(server, backend):
    server.answer = lambda request: "streamed text"

    @sgl.function
    def program(s):
        s += gen("act", slo=LOOP)

    state = program.run(backend=backend, stream=True)
    assert "".join(state.text_iter("act")) == "streamed text"
    assert state.get_meta_info("act")["slo"]["tier"] == "standard"
    assert server.slo("act")["tpot_ms"] == 50


def test_without_an_executor_thread(server, backend, clock):
    @sgl.function
    def program(s):
        with stage("solve", e2e_ms=2000):
            s += sgl.gen("act")

    program.run(backend=backend, use_thread=False)
    assert server.slo("solve/act")["budget_ms"] == 2000


def test_an_exception_in_a_tool_leaves_the_stage(server, backend):
    @sgl.function
    def program(s, broken):
        with stage("solve", e2e_ms=2000):
            if broken:
                raise KeyError("tool")
        s += gen("after", slo=LOOP)

    with pytest.raises(KeyError):
        program.run(True, backend=backend)
    assert scope.current() is None
    program.run(False, backend=backend).sync()
    assert "budget_ms" not in server.slo("after")


def test_one_node_shared_by_concurrent_runs(server, backend):
    node = gen("act", slo=LOOP)

    @sgl.function
    def program(s, ms):
        with stage(f"s{ms}", e2e_ms=ms):
            s += node

    program.run_batch([{"ms": ms} for ms in range(1000, 9000, 1000)], backend=backend, num_threads=8)
    for ms in range(1000, 9000, 1000):
        assert 0 < server.slo(f"s{ms}/act")["budget_ms"] <= ms


def test_constrained_calls_keep_their_constraints(server, backend):
    @sgl.function
    def program(s):
        s += gen("r", regex="[a-z]+", slo=LOOP) + gen("i", dtype=int, slo=LOOP)
        s += gen("j", json_schema='{"type": "object"}', stop=["\n"], temperature=0, slo=LOOP)

    program.run(backend=backend).sync()
    regex, number, schema = (request["sampling_params"] for request in server.requests)
    assert regex["regex"] == "[a-z]+" and number["regex"].startswith("[-+]?[0-9]+")
    assert schema["json_schema"] == '{"type": "object"}' and schema["stop"] == ["\n"]
    assert len(server.slos) == 3 and all(server.slos)


def test_custom_params_of_the_users_own_are_kept(server, backend, monkeypatch):
    """As sent by a program that extends SGLang's parameters itself."""
    own = {"thinking_budget": 7}
    plain = sgl.lang.ir.SglSamplingParams.to_srt_kwargs
    monkeypatch.setattr(
        sgl.lang.ir.SglSamplingParams, "to_srt_kwargs", lambda self: {**plain(self), "custom_params": own}
    )

    @sgl.function
    def program(s):
        s += gen("act", slo=LOOP)

    program.run(backend=backend).sync()
    (request,) = server.requests
    assert request["sampling_params"]["custom_params"]["thinking_budget"] == 7
    assert server.slo("act") and own == {"thinking_budget": 7}


@sgl.function
def everything(s, question):
    s += sgl.system("You are terse. " * 10) + sgl.user(question)
    s += sgl.assistant(sgl.gen("a", max_tokens=4, regex="[a-z]+"))
    s.sync()
    forks = s.fork(2)
    forks += lambda i: sgl.gen(f"b{i}", dtype=int)
    forks.join()
    s += sgl.select("c", ["yes", "no"])
    with stage("no_budget"):
        s += sgl.gen("d", temperature=0)
    s += sgl.gen("e", choices=["u", "v"], choices_method=sgl.unconditional_likelihood_normalized)


def test_an_unannotated_program_sends_the_same_bytes_as_under_plain_sglang(server, backend, monkeypatch):
    def bodies():
        server.bodies.clear()
        for stream in (False, True):
            everything.run("Why?", backend=backend, stream=stream).sync()
            while threading.active_count() > before and stream:
                pass
        everything.run_batch([{"question": "x"}, {"question": "y"}], backend=backend, num_threads=1)
        return sorted(server.bodies)

    before = threading.active_count()
    ours = bodies()
    unpatch(monkeypatch)
    assert bodies() == ours
    assert len(ours) > 20 and b"custom_params" not in b"".join(ours)


def test_receipts_are_listed_in_order_with_repeats(server, backend):
    @sgl.function
    def program(s):
        for _ in range(2):
            with stage("solve"):
                s += gen("act", slo=LOOP)
        s += sgl.gen("free")

    listed = receipts(program.run(backend=backend))
    assert [entry["stage"] for entry in listed] == ["solve/act", "solve/act", "free"]
    assert [bool(entry["receipt"]) for entry in listed] == [True, True, False]
    assert listed[0]["output_tokens"] == 1 and listed[0]["prompt_tokens"] == 3


def test_a_server_without_receipts_is_fine(server, backend):
    server.receipts = False

    @sgl.function
    def program(s):
        s += gen("act", slo=LOOP) + select("c", ["a", "b"], slo=LOOP)

    state = program.run(backend=backend)
    assert [entry["receipt"] for entry in receipts(state)] == [None, None]
    assert "slo" not in state.get_meta_info("c")


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: gen("act", slo={"tpot_ms": 5}), "slo of 'act' must be an SLO, not {'tpot_ms': 5}"),
        (lambda: select("c", ["a"], slo=5), "slo of 'c' must be an SLO, not 5"),
        (lambda: gen("act", regex="("), "unterminated"),
        (lambda: stage("", e2e_ms=5).__enter__(), "stage name must be a non-empty text, not ''"),
        (lambda: stage("a", e2e_ms=0).__enter__(), "e2e_ms must be .* greater than 0, not 0"),
    ],
)
def test_wrong_values_are_refused_where_they_are_written(build, message):
    with pytest.raises(Exception, match=message):
        build()


def test_install_is_idempotent():
    before = [pkgutil.resolve_name(seam.target) for seam in CLIENT_SEAMS]
    carry.install()
    assert [pkgutil.resolve_name(seam.target) for seam in CLIENT_SEAMS] == before


def test_another_sglang_is_refused_and_left_alone(monkeypatch):
    unpatch(monkeypatch)
    module, _, name = CLIENT_SEAMS[-1].target.partition(":")
    last = replace(CLIENT_SEAMS[-1], fingerprints={module: {name: "0" * 16}})
    monkeypatch.setattr(patches, "SEAMS", (*CLIENT_SEAMS[:-1], last))
    with pytest.raises(RuntimeError, match=f"{last.target} has changed"):
        carry.install()
    assert not hasattr(StreamExecutor.submit, "__slos_seam__")


def test_wire_form_is_flat_json(server, backend):
    @sgl.function
    def program(s):
        with stage("solve", e2e_ms=1):
            s += gen("act", slo=presets.REASONING)

    program.run(backend=backend).sync()
    assert all(isinstance(value, str | float | int) for value in server.slo("solve/act").values())
    assert json.dumps(server.slo("solve/act"))
