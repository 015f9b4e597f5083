"""The wire on every route of a real server: 400 and 429 with their status, receipts in their place, bounds applied."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
import requests

from slos_sglang.engine.launch import Server, server
from slos_sglang.telemetry.events import Arrive, read_events

pytestmark = pytest.mark.e2e

GOOD = {"stage": "good", "ttft_ms": 60_000, "tpot_ms": 5_000}
SPENT = {"stage": "spent", "budget_ms": 0, "on_decline": "reject"}
RECEIPT_KEYS = {
    "tier", "declined", "attained", "ttft_ms", "ttft_target_ms", "tpot_ms", "tpot_target_ms", "phases", "slack_ms",
    "preemptions",
}  # fmt: skip


@dataclass(frozen=True)
class Running:
    """The server and what it writes."""

    server: Server
    model: str
    events: Path

    def post(self, path: str, body: dict[str, Any], **headers: str) -> requests.Response:
        return requests.post(self.server.url + path, json=body, headers=headers, timeout=120)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Running]:
    """A server of its own: with bounds, and with a log in which refusals may be found."""
    folder = tmp_path_factory.mktemp("wire")
    config = folder / "slo.yaml"
    config.write_text(
        json.dumps(
            {
                "events": str(folder / "events.jsonl"),
                "classes": [{"stage": "bounded*", "min_ttft_ms": 50_000, "min_tpot_ms": 7_000, "max_value": 2}],
            }
        ),
        encoding="utf-8",
    )
    with server(tiny_model, config=config, log=folder / "server.log") as started:
        yield Running(server=started, model=str(tiny_model), events=folder / "events.jsonl")


@dataclass(frozen=True)
class Route:
    """One way to ask for four tokens; `slo` goes where a client of that route puts it."""

    name: str
    path: str
    body: dict[str, Any]
    native: bool = False

    def ask(self, model: str, slo: object = None, *, stream: bool = False) -> dict[str, Any]:
        custom = {} if slo is None else {"custom_params": {"slo": slo}}
        if self.native:
            sampling = {"max_new_tokens": 4, **self.body.get("sampling_params", {}), **custom}
            return {**self.body, "stream": stream, "sampling_params": sampling}
        return {"model": model, "stream": stream, **self.body, **custom}


MESSAGES = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
SINGLE = [
    Route("native", "/generate", {"text": "hi"}, native=True),
    Route("chat", "/v1/chat/completions", MESSAGES),
    Route("completions", "/v1/completions", {"prompt": "hi", "max_tokens": 4}),
    Route("responses", "/v1/responses", {"input": "hi", "max_output_tokens": 4}),
    Route("messages", "/v1/messages", MESSAGES),
]
SEVERAL = [
    Route("native n=2", "/generate", {"text": "hi", "sampling_params": {"n": 2}}, native=True),
    Route("native batch", "/generate", {"text": ["hi", "ho"]}, native=True),
    Route("chat n=2", "/v1/chat/completions", {**MESSAGES, "n": 2}),
    Route("completions batch", "/v1/completions", {"prompt": ["hi", "ho"], "max_tokens": 4}),
]
OLLAMA = [Route("ollama", "/api/generate", {"prompt": "hi", "options": {"num_predict": 4}})]

each_stream = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])


def each(routes: list[Route]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("route", routes, ids=lambda route: route.name)


def error_of(response: requests.Response) -> dict[str, Any]:
    assert response.headers["content-type"] == "application/json"
    return response.json()["error"]


@each(SINGLE + SEVERAL)
@each_stream
@pytest.mark.parametrize(
    ("slo", "says"),
    [
        ({"stage": "malformed", "tpot_ms": -1}, "slo.tpot_ms must be a finite number greater than 0, not -1"),
        ({"stage": "malformed", "tpot_mss": 5}, "'tpot_mss' (value 5); did you mean 'tpot_ms'?"),
        ({"stage": "malformed", "tpot_ms": {"a": 1}}, "slo.tpot_ms must be a finite number, not {'a': 1}"),
        ("fast", "slo must be an object, not 'fast'"),
    ],
    ids=["value", "key", "nested", "no object"],
)
def test_a_malformed_slo_is_a_400(running: Running, route: Route, stream: bool, slo: object, says: str) -> None:
    response = running.post(route.path, route.ask(running.model, slo, stream=stream))
    assert response.status_code == 400
    error = error_of(response)
    assert says in error["message"]
    assert (error["type"], error["code"]) == ("invalid_request_error", 400)


@each(SINGLE + SEVERAL + OLLAMA)
@each_stream
def test_a_malformed_header_is_a_400(running: Running, route: Route, stream: bool) -> None:
    headers = {"x-slo-tpot-ms": "soon"}
    response = running.post(route.path, route.ask(running.model, stream=stream), **headers)
    assert response.status_code == 400
    assert "x-slo-tpot-ms" in error_of(response)["message"]
    assert "'soon'" in error_of(response)["message"]


def test_a_malformed_slo_anywhere_in_a_batch_refuses_the_batch(running: Running) -> None:
    params = [{"max_new_tokens": 4}, {"max_new_tokens": 4, "custom_params": {"slo": {"value": 0}}}]
    response = running.post("/generate", {"text": ["hi", "ho"], "sampling_params": params, "stream": True})
    assert response.status_code == 400
    assert "slo.value" in error_of(response)["message"]


@each(SINGLE + SEVERAL)
@each_stream
def test_a_declined_request_is_a_429_that_says_when(running: Running, route: Route, stream: bool) -> None:
    response = running.post(route.path, route.ask(running.model, SPENT, stream=stream))
    assert response.status_code == 429
    assert int(response.headers["retry-after"]) >= 1
    error = error_of(response)
    assert error["type"] == "rate_limit_error"
    assert "declined" in error["message"]
    assert error["retry_after_s"] >= 0


def test_a_spent_budget_is_served_with_what_is_left_where_the_client_takes_that(running: Running) -> None:
    route = SINGLE[0]
    answer = running.post(route.path, route.ask(running.model, {**SPENT, "on_decline": "best_effort"})).json()
    receipt = answer["meta_info"]["slo"]
    assert (receipt["tier"], receipt["declined"], receipt["attained"]) == ("best_effort", True, False)


def events_of(response: requests.Response) -> list[dict[str, Any]]:
    lines = [line for line in response.text.split("\n") if line.startswith("data: {")]
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def receipts_in(route: Route, response: requests.Response, *, stream: bool) -> list[dict[str, Any]]:
    """Every receipt, from wherever that route has its own."""
    answers = events_of(response) if stream else response.json()
    answers = answers if isinstance(answers, list) else [answers]
    if route.native:
        found = [answer["meta_info"].get("slo") for answer in answers]
    else:
        found = [((answer.get("response") or answer).get("metadata") or {}).get("slo") for answer in answers]
    return [receipt for receipt in found if receipt is not None]


@each([route for route in SINGLE if route.name != "messages"])
@each_stream
def test_one_receipt_is_one_object(running: Running, route: Route, stream: bool) -> None:
    response = running.post(route.path, route.ask(running.model, GOOD, stream=stream))
    assert response.status_code == 200
    (receipt,) = receipts_in(route, response, stream=stream)
    assert set(receipt) >= RECEIPT_KEYS
    assert (receipt["tier"], receipt["declined"], receipt["attained"]) == ("standard", False, True)
    assert (receipt["ttft_target_ms"], receipt["tpot_target_ms"]) == (60_000, 5_000)
    assert 0 < receipt["ttft_ms"] < 60_000


@each(SEVERAL)
@each_stream
def test_several_choices_have_their_receipts(running: Running, route: Route, stream: bool) -> None:
    response = running.post(route.path, route.ask(running.model, GOOD, stream=stream))
    assert response.status_code == 200
    receipts = receipts_in(route, response, stream=stream)
    assert len(receipts) == (2 if route.native or stream else 1)
    assert all(receipt["attained"] for receipt in receipts)


@each(SINGLE + SEVERAL)
@each_stream
def test_without_an_slo_nothing_is_added(running: Running, route: Route, stream: bool) -> None:
    response = running.post(route.path, route.ask(running.model, stream=stream))
    assert response.status_code == 200
    assert not re.search(r'"slo"\s*:', response.text)


def test_headers_ask_where_the_body_does_not(running: Running) -> None:
    route = SINGLE[0]
    headers = {"x-llm-d-slo-tpot-ms": "900", "x-slo-ttft-ms": "9000"}
    asked = running.post(route.path, route.ask(running.model), **headers).json()["meta_info"]["slo"]
    assert (asked["ttft_target_ms"], asked["tpot_target_ms"]) == (9000, 900)
    both = running.post(route.path, route.ask(running.model, GOOD), **headers).json()["meta_info"]["slo"]
    assert (both["ttft_target_ms"], both["tpot_target_ms"]) == (60_000, 5_000)


def test_the_operator_bounds_what_a_class_asks_for(running: Running) -> None:
    route = SINGLE[0]
    slo = {"stage": "bounded/act", "ttft_ms": 10, "tpot_ms": 10}
    receipt = running.post(route.path, route.ask(running.model, slo)).json()["meta_info"]["slo"]
    assert (receipt["ttft_target_ms"], receipt["tpot_target_ms"]) == (50_000, 7_000)


def test_openais_client_reads_receipts_and_errors(running: Running) -> None:
    client = openai.OpenAI(base_url=f"{running.server.url}/v1", api_key="none", max_retries=0)

    def create(slo: dict[str, Any], **more: Any) -> Any:
        return client.chat.completions.create(
            model=running.model, **MESSAGES, extra_body={"custom_params": {"slo": slo}}, **more
        )

    assert create(GOOD).metadata["slo"]["attained"]
    chunks = list(create(GOOD, stream=True, stream_options={"include_usage": True}))
    with_receipt = [chunk for chunk in chunks if (chunk.model_extra or {}).get("metadata")]
    assert [bool(chunk.choices) for chunk in with_receipt] == [True, False], "the end of the choice, and the usage"
    assert all(chunk.model_extra["metadata"]["slo"]["attained"] for chunk in with_receipt)
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="tpot_ms"):
            create({"tpot_ms": 0}, stream=stream)
        with pytest.raises(openai.RateLimitError, match="declined") as declined:
            create(SPENT, stream=stream)
        assert int(declined.value.response.headers["retry-after"]) >= 1


def test_a_refusal_keeps_what_other_layers_add(running: Running) -> None:
    route = SINGLE[0]
    response = running.post(route.path, route.ask(running.model, SPENT), Origin="http://a.page")
    assert response.status_code == 429
    assert response.headers["access-control-allow-origin"]


def test_nothing_malformed_was_queued_and_nothing_broke(running: Running) -> None:
    """Last: looks at what all of the above left behind."""
    route = SINGLE[0]
    running.post(route.path, route.ask(running.model, {**GOOD, "stage": "marker"}))
    stages = {event.stage for event in read_events(running.events) if isinstance(event, Arrive)}
    assert {"good", "spent", "marker"} <= stages
    assert "malformed" not in stages
    assert requests.post(f"{running.server.url}/flush_cache", timeout=60).ok, "flushing needs an idle server"
    log = running.server.log_path.read_text(encoding="utf-8", errors="replace")
    before = [log[: match.start()].rstrip().splitlines()[-1] for match in re.finditer("Traceback", log)]
    # SGLang itself logs every error that ends a stream of this route.
    assert [line for line in before if "Error while streaming /v1/responses" not in line] == []
