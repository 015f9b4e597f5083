"""The HTTP side: refusals get their status, receipts their place, on every route.

One ASGI layer around SGLang's application. It holds a response back until its first event, because only then is it
known whether the request was refused (SGLang starts a native stream with status 200 before anything has been
checked), and it adds receipts to what the OpenAI-compatible routes answer. What goes on inside an exchange is
noted in an `Exchange` in the request's scope by the hooks. A response to a request without an SLO passes unchanged.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from slos_sglang.engine.wire import Refused

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
Receive = Callable[[], Awaitable[Message]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

_SCOPE_KEY = "slos_sglang.exchange"
_DATA = b"data: "


@dataclass
class Exchange:
    """What the hooks learn about one HTTP request: why it was refused, and its receipts by choice."""

    refused: Refused | None = None
    receipts: dict[int, dict[str, Any]] = field(default_factory=dict)


def exchange_of(request: Any) -> Exchange | None:
    """The exchange a Starlette request belongs to; None outside HTTP (offline engine, warm-up, gRPC)."""
    scope = getattr(request, "scope", None)
    return scope.get(_SCOPE_KEY) if isinstance(scope, MutableMapping) else None


class SLOMiddleware:
    """The ASGI layer; see the module."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT"):
            await self.app(scope, receive, send)
            return
        exchange = scope[_SCOPE_KEY] = Exchange()
        # Only OpenAI's objects have a `metadata`; the native route answers with `meta_info`.
        openai = scope["path"].startswith("/v1/") or scope["path"] == "/invocations"
        await self.app(scope, receive, _Response(send, exchange, with_receipts=openai).send)


class _Response:
    """One response on its way out: `start` is held until the first piece of the body."""

    def __init__(self, send: Send, exchange: Exchange, *, with_receipts: bool) -> None:
        self._send = send
        self._exchange = exchange
        self._with_receipts = with_receipts
        self._start: Message | None = None
        self._replaced = False
        self._json: bytes | None = None

    async def send(self, message: Message) -> None:
        if self._replaced:
            return
        if message["type"] == "http.response.start":
            self._start = message
            return
        if message["type"] == "http.response.body":
            if self._start is not None and self._exchange.refused is not None:
                await self._replace(self._exchange.refused)
                return
            if self._with_receipts and self._exchange.receipts and not await self._add_receipts(message):
                return
        await self._release()
        await self._send(message)

    async def _release(self) -> None:
        start, self._start = self._start, None
        if start is not None:
            await self._send(start)

    async def _replace(self, refused: Refused) -> None:
        self._replaced = True
        body = json.dumps(refused.body(), ensure_ascii=False).encode()
        headers = {"content-type": "application/json", "content-length": str(len(body)), **refused.headers()}
        # What inner layers added (CORS, request ids) stays.
        inner = (
            [pair for pair in self._start["headers"] if pair[0].lower() not in (b"content-type", b"content-length")]
            if self._start
            else []
        )
        own = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": refused.status_code, "headers": [*inner, *own]})
        await self._send({"type": "http.response.body", "body": body})

    async def _add_receipts(self, message: Message) -> bool:
        """Put the receipts into this piece of the body; False while the rest of a JSON body has to be awaited."""
        body = message.get("body", b"")
        if self._start is None and self._json is None:  # in the middle of a stream
            message["body"] = add_to_events(body, self._exchange.receipts)
            return True
        if self._json is None and _content_type(self._start) != b"application/json":
            message["body"] = add_to_events(body, self._exchange.receipts)
            return True
        self._json = (self._json or b"") + body
        if message.get("more_body"):
            return False
        message["body"] = add_to_answer(self._json, self._exchange.receipts)
        assert self._start is not None
        self._start["headers"] = [
            (name, str(len(message["body"])).encode() if name.lower() == b"content-length" else value)
            for name, value in self._start["headers"]
        ]
        return True


def _content_type(start: Message | None) -> bytes:
    headers: Iterable[tuple[bytes, bytes]] = start["headers"] if start else ()
    return next((value for name, value in headers if name.lower() == b"content-type"), b"").partition(b";")[0]


def summary(receipts: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """One receipt for an answer with several choices: the first that missed its targets, else the first."""
    ordered = [receipts[index] for index in sorted(receipts)]
    return next((receipt for receipt in ordered if not receipt.get("attained", True)), ordered[0])


def add_to_answer(body: bytes, receipts: dict[int, dict[str, Any]]) -> bytes:
    """A whole JSON answer of an OpenAI-compatible route with `metadata.slo`; anything else as it is."""
    answer = _object(body)
    if answer is None or ("error" in answer and answer["error"] is not None):
        return body
    _note(answer, summary(receipts))
    return _bytes(answer)


def add_to_events(body: bytes, receipts: dict[int, dict[str, Any]]) -> bytes:
    """Server-sent events with `metadata.slo` in those that end a choice or the whole answer."""
    return b"\n".join(_add_to_line(line, receipts) for line in body.split(b"\n"))


def _add_to_line(line: bytes, receipts: dict[int, dict[str, Any]]) -> bytes:
    event = _object(line[len(_DATA) :]) if line.startswith(_DATA) else None
    if event is None:
        return line
    if isinstance(event.get("response"), dict):  # /v1/responses: its last event carries the whole answer
        if event.get("type") not in ("response.completed", "response.incomplete"):
            return line
        _note(event["response"], summary(receipts))
    elif "choices" not in event:
        return line
    else:
        ended = [choice["index"] for choice in event["choices"] if choice.get("finish_reason")]
        shown = {index: receipts[index] for index in ended if index in receipts}
        if not event["choices"] and event.get("usage"):
            shown = receipts
        if not shown:
            return line
        _note(event, summary(shown))
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
