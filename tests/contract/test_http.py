"""The HTTP side without a server: what is admitted, how a refusal answers, where receipts go."""

import asyncio
import json
from http import HTTPStatus
from typing import Any

import pytest

from slos_sglang.engine.config import SLOConfig
from slos_sglang.engine.http import Exchange, SLOMiddleware, add_to_answer, add_to_events, summary
from slos_sglang.engine.wire import NOWHERE, RECEIVED_KEY, Refused, Source, abort_reason, admit, carried, declined

GOOD = {"tpot_ms": 50.0}
EFFECTIVE = {"tpot_ms": 50.0, "value": 1.0, "on_decline": "best_effort"}
RECEIPT = {"tier": "standard", "attained": True}
MISSED = {"tier": "standard", "attained": False}


def with_slo(slo: object, **custom: Any) -> dict[str, Any]:
    return {"temperature": 0, "custom_params": {"slo": slo, **custom}}


def slo_in(params: Any) -> object:
    return params["custom_params"]["slo"]


# Admission


@pytest.mark.parametrize(
    "params", [None, {}, {"custom_params": None}, {"custom_params": {"other": 1}}, [{}, None], "x"]
)
def test_without_an_slo_parameters_pass_as_the_same_object(params: Any) -> None:
    assert admit(params, NOWHERE, SLOConfig()) is params


def test_an_slo_is_written_back_in_full_beside_what_else_is_there() -> None:
    asked = with_slo(GOOD, thinking_budget=3)
    assert admit(asked, NOWHERE, SLOConfig()) == with_slo(EFFECTIVE, thinking_budget=3)
    assert slo_in(asked) == GOOD, "the caller's own object stays as it was"


def test_the_time_of_receipt_stands_beside_the_slo_and_is_the_servers_own() -> None:
    asked = with_slo(GOOD, **{RECEIVED_KEY: 1.0})
    assert admit(asked, Source(headers={}, received_s=12.5), SLOConfig())["custom_params"][RECEIVED_KEY] == 12.5
    assert admit({}, Source(headers={}, received_s=12.5), SLOConfig()) == {}


def test_a_batch_is_admitted_one_by_one() -> None:
    admitted = admit([{"n": 1}, with_slo(GOOD)], NOWHERE, SLOConfig())
    assert admitted[0] == {"n": 1}
    assert slo_in(admitted[1]) == EFFECTIVE


@pytest.mark.parametrize(
    "body",
    [
        {"custom_params": {"slo": GOOD}, "metadata": {"slo": {"tpot_ms": 60}}},
        {"custom_params": {"other": 1}, "metadata": {"slo": GOOD}},
        {"metadata": {"slo": '{"tpot_ms": 50.0}'}},
        {"custom_labels": {"slo": '{"tpot_ms": 50.0}'}},
    ],
)
def test_an_slo_is_found_where_a_gateway_keeps_it(body: dict[str, Any]) -> None:
    assert carried(body) == GOOD


@pytest.mark.parametrize("body", [{}, {"metadata": None}, {"metadata": {"user": "x"}}, {"custom_labels": {}}])
def test_a_body_without_an_slo_carries_none(body: dict[str, Any]) -> None:
    assert carried(body) is None


def test_a_label_that_is_no_json_is_refused() -> None:
    with pytest.raises(Refused, match="must be a JSON object, not '5 ms'"):
        carried({"custom_labels": {"slo": "5 ms"}})


def test_the_body_counts_before_the_headers_and_the_default() -> None:
    source = Source(headers={"x-slo-tpot-ms": "70"}, body_slo={"tpot_ms": 60})
    config = SLOConfig(default_slo={"tpot_ms": 80})
    assert slo_in(admit(with_slo(GOOD), source, config)) == EFFECTIVE
    assert slo_in(admit(None, source, config))["tpot_ms"] == 60
    assert slo_in(admit(with_slo(None), Source(headers=source.headers), config))["tpot_ms"] == 70
    assert slo_in(admit({}, NOWHERE, config))["tpot_ms"] == 80


@pytest.mark.parametrize(
    ("params", "headers", "says"),
    [
        (with_slo({"tpot_ms": -1}), {}, "slo.tpot_ms"),
        (with_slo({"tpot_ms": {"a": 1}}), {}, "slo.tpot_ms"),
        (with_slo({"tpt_ms": 1}), {}, "did you mean 'tpot_ms'"),
        (with_slo("fast"), {}, "slo must be an object, not 'fast'"),
        ([with_slo(GOOD), with_slo({"value": 0})], {}, "slo.value"),
        (None, {"x-slo-ttft-ms": "soon"}, "'soon'"),
    ],
)
def test_a_malformed_slo_is_refused(params: Any, headers: dict[str, str], says: str) -> None:
    with pytest.raises(Refused, match=says) as refused:
        admit(params, Source(headers=headers), SLOConfig())
    assert refused.value.status_code == 400


# Declines


@pytest.mark.parametrize(("retry_after_s", "header"), [(0.0, "1"), (0.3, "1"), (2.0, "2"), (2.001, "3")])
def test_a_decline_says_when_to_retry_in_whole_seconds(retry_after_s: float, header: str) -> None:
    refused = declined(abort_reason(HTTPStatus.TOO_MANY_REQUESTS, "declined: why", retry_after_s=retry_after_s))
    assert refused is not None
    assert refused.headers() == {"Retry-After": header}
    error = refused.body()["error"]
    assert (error["message"], error["code"], error["retry_after_s"]) == ("declined: why", 429, retry_after_s)


def test_other_endings_are_not_declines() -> None:
    for reason in (None, {"type": "length"}, abort_reason(HTTPStatus.SERVICE_UNAVAILABLE, "full")):
        assert declined(reason) is None


# The response on its way out


def exchanged(app: Any, path: str = "/v1/chat/completions", method: str = "POST") -> list[dict[str, Any]]:
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path}
    asyncio.run(SLOMiddleware(app)(scope, None, send))
    return sent


def exchange_in(scope: dict[str, Any]) -> Exchange:
    return scope["slos_sglang.exchange"]


def start(content_type: str = "text/event-stream", **headers: str) -> dict[str, Any]:
    pairs = {"content-type": content_type, **headers}
    return {
        "type": "http.response.start",
        "status": 200,
        "headers": [(name.encode(), value.encode()) for name, value in pairs.items()],
    }


def piece(body: bytes, more: bool = True) -> dict[str, Any]:
    return {"type": "http.response.body", "body": body, "more_body": more}


def body_of(sent: list[dict[str, Any]]) -> bytes:
    return b"".join(message.get("body", b"") for message in sent)


REFUSED = Refused("declined: why", status=HTTPStatus.TOO_MANY_REQUESTS, retry_after_s=2.5)


def test_a_stream_that_is_refused_after_its_head_answers_with_the_status() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(start())
        await send(piece(b"event: response.created\n\n"))
        assert await exchange_in(scope).refuse(REFUSED)
        await send(piece(b"data: {}\n\n"))
        await send(piece(b"", more=False))

    sent = exchanged(app)
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    assert sent[0]["status"] == 429
    headers = dict(sent[0]["headers"])
    assert headers[b"retry-after"] == b"3"
    assert headers[b"content-type"] == b"application/json"
    assert int(headers[b"content-length"]) == len(sent[1]["body"])
    assert json.loads(sent[1]["body"])["error"]["message"] == "declined: why"


def test_an_error_that_the_route_makes_of_a_refusal_is_replaced() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await exchange_in(scope).refuse(REFUSED)
        await send(start("application/json") | {"status": 400})
        await send(piece(b"{}", more=False))

    assert [message.get("status") for message in exchanged(app)] == [429, None]


def test_a_refusal_that_no_route_handles_answers_too() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise REFUSED

    assert exchanged(app, "/api/chat")[0]["status"] == 429


def test_a_refusal_in_the_middle_of_a_stream_is_the_routes_to_tell() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(start())
        await exchange_in(scope).settle()
        await send(piece(b"data: 1\n\n"))
        assert not await exchange_in(scope).refuse(REFUSED)
        await send(piece(b"data: error\n\n", more=False))

    sent = exchanged(app)
    assert sent[0]["status"] == 200
    assert body_of(sent) == b"data: 1\n\ndata: error\n\n"


def test_a_settled_stream_passes_piece_by_piece() -> None:
    passed = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(start())
        passed.append(len(sent))
        await exchange_in(scope).settle()
        passed.append(len(sent))
        await send(piece(b"data: 1\n\n"))
        passed.append(len(sent))
        await send(piece(b"", more=False))

    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(SLOMiddleware(app)({"type": "http", "method": "POST", "path": "/generate"}, None, send))
    assert passed == [0, 1, 2]


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_what_generates_nothing_passes_unchanged(method: str) -> None:
    messages = [start("text/plain"), piece(b"ok"), piece(b"", more=False)]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        for message in messages:
            await send(message)

    assert exchanged(app, "/flush_cache", method) == messages


def test_a_json_answer_gets_its_receipt_and_length() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await exchange_in(scope).settle()
        exchange_in(scope).receipts[0] = RECEIPT
        await send(start("application/json", **{"content-length": "15"}))
        await send(piece('{"text": "ä"'.encode()))
        await send(piece(b"}", more=False))

    sent = exchanged(app)
    assert json.loads(body_of(sent)) == {"text": "ä", "metadata": {"slo": RECEIPT}}
    assert int(dict(sent[0]["headers"])[b"content-length"]) == len(body_of(sent))


def test_the_native_route_keeps_its_body() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        exchange_in(scope).receipts[0] = RECEIPT
        await send(start("application/json"))
        await send(piece(b'{"text": 1}', more=False))

    assert body_of(exchanged(app, "/generate")) == b'{"text": 1}'


# Receipts


def test_the_summary_is_the_first_choice_that_missed() -> None:
    assert summary({1: RECEIPT, 0: RECEIPT | {"n": 0}}) == RECEIPT | {"n": 0}
    assert summary({0: RECEIPT, 1: MISSED}) == MISSED


def test_answers_keep_their_metadata_and_errors_get_none() -> None:
    assert json.loads(add_to_answer(b'{"metadata": {"a": 1}}', {0: RECEIPT}))["metadata"] == {"a": 1, "slo": RECEIPT}
    assert json.loads(add_to_answer(b'{"error": null}', {0: RECEIPT}))["metadata"] == {"slo": RECEIPT}
    for body in (b'{"error": {"code": 500}}', b"[1]", b"not json", b""):
        assert add_to_answer(body, {0: RECEIPT}) == body


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def noted(body: bytes) -> object:
    return json.loads(body.removeprefix(b"data: ")).get("metadata")


def test_events_that_end_something_carry_a_receipt() -> None:
    receipts = {0: RECEIPT, 1: MISSED}
    ended = event(choices=[{"index": 0, "finish_reason": "stop"}])
    assert noted(add_to_events(ended, receipts)) == {"slo": RECEIPT}
    assert noted(add_to_events(event(choices=[], usage={"total_tokens": 1}), receipts)) == {"slo": MISSED}
    completed = event(type="response.completed", response={"id": "r", "metadata": {}})
    assert json.loads(add_to_events(completed, receipts)[6:])["response"]["metadata"] == {"slo": MISSED}


@pytest.mark.parametrize(
    "body",
    [
        event(choices=[{"index": 0, "finish_reason": None}]),
        event(choices=[{"index": 7, "finish_reason": "stop"}]),
        event(choices=[], usage=None),
        event(type="response.created", response={}),
        event(error={"message": "x"}),
        b"data: [DONE]\n\n",
        b": ping\n\n",
        b'data: {"half',
    ],
)
def test_all_other_events_pass_byte_for_byte(body: bytes) -> None:
    assert add_to_events(body, {0: RECEIPT}) == body
