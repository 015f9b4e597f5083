"""However a run ends, by itself, by an exception, cancelled: budgets stay right, receipts are complete, nothing is left
on the server."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import sglang as sgl
from stub_endpoint import stub_endpoint

from slos_sglang import gen, presets, stage
from slos_sglang.lang import cancel, receipts, scope

pytestmark = pytest.mark.filterwarnings("error")
LOOP = presets.TOOL_LOOP
CANCELLED = "the run was cancelled"


@pytest.fixture
def server():
    with stub_endpoint() as server:
        yield server


@pytest.fixture
def backend(server):
    return sgl.RuntimeEndpoint(server.url)


@pytest.fixture
def waiting(server):
    """The server answers once it is told to abort; the event is set when it was asked something."""
    asked = threading.Event()

    def answer(request):
        asked.set()
        assert server.an_abort.wait(10)
        return "cut"

    server.answer = answer
    return asked


@sgl.function
def two_calls(s):
    with stage("solve", e2e_ms=9000):
        s += gen("a", slo=LOOP) + gen("b", slo=LOOP)


@pytest.mark.parametrize("stream", [False, True])
def test_a_cancelled_run_is_aborted_on_the_server_and_sends_nothing_more(server, backend, waiting, stream):
    state = two_calls.run(backend=backend, stream=stream)
    assert waiting.wait(10)
    with pytest.warns(UserWarning, match="Error in stream_executor"):
        cancel(state)
        state.stream_executor.worker.join(10)
    (request,) = server.requests
    assert server.aborted == [request["rid"]]
    assert isinstance(state.error(), scope.Cancelled)
    (entry,) = receipts(state)
    assert (entry["stage"], entry["error"], bool(entry["receipt"])) == ("solve/a", CANCELLED, True)


def test_all_branches_of_a_cancelled_run_end(server, backend, waiting):
    forked = threading.Event()

    @sgl.function
    def program(s):
        forks = s.fork(3)
        forks += gen("branch", slo=LOOP) + gen("never", slo=LOOP)
        forked.set()
        forks.join()

    with ThreadPoolExecutor(1) as pool, pytest.warns(UserWarning, match="Error in stream_executor") as warned:
        future = pool.submit(program.run, backend=backend, stream=True)
        state = future.result()
        assert forked.wait(10) and waiting.wait(10)
        while len(server.requests) < 3:
            pass
        cancel(state)
        while len(entries := state.slos_scope.receipts) < 3 or len(warned) < 3:
            pass
    assert sorted(server.aborted) == sorted(request["rid"] for request in server.requests)
    assert [entry["error"] for entry in entries] == [CANCELLED] * 3 and len(server.requests) == 3


def test_cancelling_what_has_ended_does_nothing(server, backend):
    state = two_calls.run(backend=backend)
    state.sync()
    cancel(state)
    assert server.aborted == [] and [entry["error"] for entry in receipts(state)] == [None, None]


def test_another_run_goes_on(server, backend, waiting):
    state = two_calls.run(backend=backend)
    assert waiting.wait(10)
    with pytest.warns(UserWarning, match="Error in stream_executor"):
        cancel(state)
        state.stream_executor.worker.join(10)
    assert two_calls.run(backend=backend)["b"] == "cut"


def test_an_unreachable_server_is_warned_about(server, backend, waiting):
    state = two_calls.run(backend=backend)
    assert waiting.wait(10)
    (rid,) = state.slos_scope.under_way
    state.slos_scope.under_way["other"] = ("http://127.0.0.1:9", "key")
    with pytest.warns(UserWarning) as warned:
        cancel(state)
        state.stream_executor.worker.join(10)
    assert any("could not abort a request at http://127.0.0.1:9" in str(each.message) for each in warned)
    assert server.aborted == [rid]


def test_what_a_body_that_raises_has_under_way_is_aborted(server, backend, waiting):
    @sgl.function
    def program(s):
        with stage("solve", e2e_ms=9000) as solve:
            s += gen("a", slo=LOOP) + gen("b", slo=LOOP)
            assert waiting.wait(10)
            with solve.tool("broken"):
                raise OSError("no such host")

    around = scope.Scope()
    with pytest.warns(UserWarning, match="Error in stream_executor") as warned:
        with scope.entered(around), pytest.raises(OSError):
            program.run(backend=backend)
        while not len(warned):  # by the executor's thread, the last thing it does
            pass
    assert server.aborted == [server.requests[0]["rid"]] and len(server.requests) == 1
    assert [(entry["stage"], entry["error"]) for entry in around.receipts] == [
        ("solve/broken", "OSError('no such host')"),
        ("solve/a", CANCELLED),
    ]


def test_a_nested_program_that_raises_ends_alone(server, backend):
    @sgl.function
    def broken(s):
        s += gen("inner", slo=LOOP)
        s["inner"]
        raise KeyError("tool")

    @sgl.function
    def program(s):
        with stage("solve", e2e_ms=9000):
            with pytest.raises(KeyError):
                broken.run(backend=backend)
            s += gen("outer", slo=LOOP)

    listed = receipts(program.run(backend=backend))
    assert [(entry["stage"], entry["error"]) for entry in listed] == [("solve/inner", None), ("solve/outer", None)]
    assert server.aborted == []


@pytest.mark.parametrize("num_threads", [1, 3, "auto"])
def test_each_run_of_a_batch_has_its_budget_and_its_receipts(server, backend, num_threads):
    states = two_calls.run_batch([{}] * 3, backend=backend, num_threads=num_threads)
    for state in states:
        assert [entry["stage"] for entry in receipts(state)] == ["solve/a", "solve/b"]
    assert len(server.slos) == 6 and all(8000 < slo["budget_ms"] <= 9000 for slo in server.slos)
    assert len({slo["program"] for slo in server.slos}) == 3


def test_nothing_is_kept_of_requests_that_were_answered(server, backend):
    @sgl.function
    def program(s):
        s += "some text"
        s.sync()
        with stage("solve", e2e_ms=9000):
            forks = s.fork(2)
            forks += gen("branch", slo=LOOP)
            forks.join()
            s += gen("final", choices=["yes", "no"], slo=LOOP)

    state = program.run(backend=backend)
    state.sync()
    assert state.slos_scope.under_way == {} and len({request["rid"] for request in server.requests}) == 5


def test_an_unannotated_run_has_no_ids(server, backend):
    @sgl.function
    def program(s):
        s += sgl.gen("a")

    program.run(backend=backend).sync()
    assert "rid" not in server.requests[0]
