"""The load generator against a stand-in for `/generate`: what it sends, and how it reads what comes back."""

import asyncio
import json

import pytest
from aiohttp import web

from slos_sglang.measure.attainment import Targets
from slos_sglang.measure.load import Call, drive


def call(name: str, output_tokens: int = 3, **about) -> Call:
    defaults = {"arrival_s": 0.0, "prompt": (1, 2, 3), "targets": Targets(ttft_ms=1000, tpot_ms=1000)}
    return Call(id=name, name=name, output_tokens=output_tokens, **(defaults | about))


def chunk(tokens: int, finish: object = None, **more) -> bytes:
    meta = {"completion_tokens": tokens, "finish_reason": finish, **more}
    return b"data: " + json.dumps({"text": "x" * tokens, "meta_info": meta}, separators=(",", ":")).encode() + b"\n\n"


END = {"type": "length", "length": 3}
DONE = b"data: [DONE]\n\n"


def drive_against(answers: dict[str, list[bytes | float]], calls: list[Call], status: int = 200, timeout_s: float = 5):
    """Run `calls` against a server that answers each by the pieces under its name (a float: a pause, seconds)."""
    bodies: dict[str, dict] = {}

    async def generate(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        name = body["rid"].partition("-")[2]  # after what tells runs apart
        bodies[name] = body
        if status != 200:
            return web.json_response({"error": "no"}, status=status)
        response = web.StreamResponse()
        await response.prepare(request)
        for piece in answers[name]:
            if isinstance(piece, float):
                await asyncio.sleep(piece)
            else:
                await response.write(piece)
        return response

    async def run():
        app = web.Application()
        app.router.add_post("/generate", generate)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        try:
            return await drive(f"http://127.0.0.1:{port}", calls, timeout_s=timeout_s)
        finally:
            await runner.cleanup()

    return asyncio.run(run()), bodies


def test_each_token_gets_the_time_of_the_chunk_that_brought_it():
    pieces = [chunk(1), 0.1, chunk(3, END), DONE]
    report, _ = drive_against({"a": pieces}, [call("a")])
    (record,) = report.records
    first, second, third = record.token_s
    assert record.outcome == "finished"
    assert second == third
    assert second - first > 0.08


def test_an_event_may_come_in_pieces_and_several_at_once():
    first = chunk(1)
    cuts = [first[:40], 0.02, first[40:], 0.1, chunk(2) + chunk(3, END) + DONE]
    report, _ = drive_against({"a": cuts}, [call("a")])
    (record,) = report.records
    assert record.outcome == "finished"
    assert len(record.token_s) == 3
    assert record.token_s[1] - record.token_s[0] > 0.08


def test_what_is_sent():
    calls = [
        call("plain"),
        call("slo", slo={"ttft_ms": 80.0}, priority=2),
        call("hidden", cap_tokens=256),
    ]
    answer = [chunk(3, END), DONE]
    _, bodies = drive_against({c.id: answer for c in calls}, calls)
    assert bodies["plain"]["input_ids"] == [1, 2, 3]
    assert bodies["plain"]["sampling_params"] == {"temperature": 0, "ignore_eos": True, "max_new_tokens": 3}
    assert "priority" not in bodies["plain"]
    assert bodies["slo"]["sampling_params"]["custom_params"] == {"slo": {"ttft_ms": 80.0}}
    assert bodies["slo"]["priority"] == 2
    assert bodies["hidden"]["sampling_params"]["max_new_tokens"] == 256


def test_a_hidden_length_ends_by_hanging_up():
    pieces = [chunk(1), 0.05, chunk(2), 0.05, chunk(3), 3.0, chunk(4)]
    report, _ = drive_against({"a": pieces}, [call("a", cap_tokens=256)])
    assert report.records[0].outcome == "finished"
    assert len(report.records[0].token_s) == 3
    assert report.wall_s < 2


def test_arrivals_do_not_wait_for_answers_and_times_count_from_them():
    answers = {"slow": [0.5, chunk(3, END), DONE], "next": [chunk(3, END), DONE]}
    report, _ = drive_against(answers, [call("slow"), call("next", arrival_s=0.2)])
    slow, following = report.records
    assert following.token_s[0] < slow.token_s[0]
    assert following.token_s[0] >= following.arrival_s == 0.2


@pytest.mark.parametrize(
    ("last", "outcome"),
    [
        (chunk(0, {"type": "abort", "status_code": 429, "message": "no"}), "declined"),
        (chunk(1, {"type": "abort", "status_code": 503}), "failed"),
        (chunk(2, END), "failed"),  # ended short
        (b'data: {"error":{"message":"no","code":429}}\n\n', "declined"),
        (b'data: {"error":{"message":"no","code":400}}\n\n', "failed"),
        (b"", "failed"),
    ],
)
def test_what_did_not_come_whole_has_not_finished(last, outcome):
    report, _ = drive_against({"a": [last, DONE]}, [call("a")])
    assert report.records[0].outcome == outcome
    assert not report.records[0].attained


@pytest.mark.parametrize(("status", "outcome"), [(429, "declined"), (400, "failed"), (500, "failed")])
def test_an_error_status(status, outcome):
    report, _ = drive_against({}, [call("a")], status=status)
    assert report.records[0].outcome == outcome
    assert report.records[0].declined == (status == 429)


def test_a_late_answer_is_cut_off():
    report, _ = drive_against({"a": [chunk(1), 2.0, chunk(3, END)]}, [call("a")], timeout_s=0.3)
    assert report.records[0].outcome == "failed"


def test_the_receipt_says_tier_and_decline():
    slo = {"tier": "best_effort", "declined": True}
    report, _ = drive_against({"a": [chunk(3, END, slo=slo), DONE]}, [call("a")])
    (record,) = report.records
    assert (record.best_effort, record.declined, record.outcome) == (True, True, "finished")
