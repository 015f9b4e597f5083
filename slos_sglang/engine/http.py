"""The HTTP side: refusals get their status, receipts their place, on every route.

One ASGI layer around SGLang's application. It holds a response back until it is known whether the request is
refused (SGLang starts a stream with status 200 before anything has been checked), and it adds receipts to what the
OpenAI-compatible routes answer. The hooks tell it through the `Exchange` in the request's scope. What must stay
true: a response to a request without an SLO passes unchanged and is not held longer than its check takes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from slos_sglang.engine.wire import Refused

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
Receive = Callable[[], Awaitable[Message]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]
Receipts = dict[int, dict[str, Any]]

_SCOPE_KEY = "slos_sglang.exchange"
_DATA = b"data: "


class SLOMiddleware:
    """The ASGI layer; see the module."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT"):
            await self.app(scope, receive, send)
            return
        # Only the answers of these routes have a `metadata`; the native one has its `meta_info`.
        with_receipts = scope["path"].startswith("/v1/") or scope["path"] == "/invocations"
        exchange = scope[_SCOPE_KEY] = Exchange(send, with_receipts=with_receipts)
        try:
            await self.app(scope, receive, exchange.send)
        except Refused as refused:
            if not await exchange.refuse(refused):
                raise


def exchange_of(request: Any) -> Exchange | None:
    """The exchange a Starlette request belongs to; None outside HTTP (offline engine, warm-up, gRPC)."""
    scope = getattr(request, "scope", None)
    return scope.get(_SCOPE_KEY) if isinstance(scope, MutableMapping) else None


class Exchange:
    """One request and its response on its way out.

    receipts    by choice, filled in as choices end
    received_s  when the request reached this server (`time.perf_counter`, which all processes of a machine share)
    """

    def __init__(self, send: Send, *, with_receipts: bool) -> None:
        self.receipts: Receipts = {}
        self.received_s = time.perf_counter()
        self._send = send
        self._with_receipts = with_receipts
        self._held: list[Message] = []
        self._whole = False  # the body is one JSON value: held until it is complete
        self._settled = False
        self._started = False
        self._replaced = False

    async def settle(self) -> None:
        """The request will be served: whatever has been held goes out."""
        self._settled = True
        if not self._whole:
            await self._release()

    async def refuse(self, refused: Refused) -> bool:
        """Answer with an error instead; False where the answer has begun already (its route then ends the stream)."""
        if self._settled and not self._whole:
            return False
        if not self._replaced:
            self._replaced = True
            await self._answer(refused)
        return True

    async def send(self, message: Message) -> None:
        """ASGI's `send` for the application inside."""
        if self._replaced:
            return
        if self._settled and not self._whole and not self.receipts and not self._held and self._started:
            await self._send(message)  # a stream without an SLO, or before its end
            return
        self._held.append(message)
        if message["type"] == "http.response.start":
            self._started = True
            self._whole = _header(message, b"content-type").partition(b";")[0] == b"application/json"
        last = message["type"] == "http.response.body" and not message.get("more_body", False)
        if last or (self._settled and not self._whole):
            await self._release()

    async def _release(self) -> None:
        held, self._held = self._held, []
        if self._with_receipts and self.receipts:
            held = self._with_whole(held) if self._whole else [self._with_events(each) for each in held]
        for message in held:
            await self._send(message)

    def _with_whole(self, held: list[Message]) -> list[Message]:
        body = add_to_answer(b"".join(each.get("body", b"") for each in held), self.receipts)
        start = held[0]
        start["headers"] = [
            (name, str(len(body)).encode() if name.lower() == b"content-length" else value)
            for name, value in start["headers"]
        ]
        return [start, {"type": "http.response.body", "body": body}]

    def _with_events(self, message: Message) -> Message:
        if message["type"] == "http.response.body":
            message["body"] = add_to_events(message.get("body", b""), self.receipts)
        return message

    async def _answer(self, refused: Refused) -> None:
        body = _bytes(refused.body())
        own = {"content-type": "application/json", "content-length": str(len(body)), **refused.headers()}
        headers = [(name.lower().encode(), value.encode()) for name, value in own.items()]
        await self._send({"type": "http.response.start", "status": refused.status_code, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})


def _header(start: Message, wanted: bytes) -> bytes:
    return next((value for name, value in start.get("headers", ()) if name.lower() == wanted), b"")


def summary(receipts: Receipts) -> dict[str, Any]:
    """One receipt for an answer with several choices: the first that missed its targets, else the first."""
    ordered = [receipts[index] for index in sorted(receipts)]
    return next((receipt for receipt in ordered if not receipt.get("attained", True)), ordered[0])


def add_to_answer(body: bytes, receipts: Receipts) -> bytes:
    """A whole JSON answer with `metadata.slo`; what is not an answer (an error, say) as it is."""
    answer = _object(body)
    if answer is None or answer.get("error"):
        return body
    _note(answer, summary(receipts))
    return _bytes(answer)


def add_to_events(body: bytes, receipts: Receipts) -> bytes:
    """Server-sent events with `metadata.slo` in those that end a choice or the whole answer."""
    return b"\n".join(_add_to_line(line, receipts) for line in body.split(b"\n"))


def _add_to_line(line: bytes, receipts: Receipts) -> bytes:
    event = _object(line[len(_DATA) :]) if line.startswith(_DATA) else None
    if event is None:
        return line
    if event.get("type") in ("response.completed", "response.incomplete"):  # /v1/responses: carries the answer
        _note(event["response"], summary(receipts))
        return _DATA + _bytes(event)
    choices = event.get("choices")
    if choices is None:
        return line
    ended = {choice["index"] for choice in choices if choice.get("finish_reason")}
    of_event = {index: receipt for index, receipt in receipts.items() if index in ended}
    if not choices and event.get("usage"):  # the last event, on request
        of_event = receipts
    if not of_event:
        return line
    _note(event, summary(of_event))
    return _DATA + _bytes(event)


def _note(answer: dict[str, Any], receipt: dict[str, Any]) -> None:
    answer["metadata"] = {**(answer.get("metadata") or {}), "slo": receipt}


def _object(text: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _bytes(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
