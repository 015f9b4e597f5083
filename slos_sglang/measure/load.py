"""An open-loop load generator for a live server's streaming `/generate`, and what it saw as stage records.

It shares a small machine with the server it measures, so it does as little as possible while the load runs:
bodies are encoded before, bytes are stamped when they come and parsed after. Arrivals never wait for answers
(open loop), and times count from the *scheduled* arrival: a late client counts against the server, for every
policy alike.
"""

from __future__ import annotations

import asyncio
import gc
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from uuid import uuid4

import aiohttp
import orjson

from slos_sglang.measure.attainment import Targets
from slos_sglang.measure.result import Outcome, StageRecord

_COMPLETION_TOKENS = re.compile(rb'"completion_tokens":(\d+)')
_TOO_MANY_REQUESTS = 429


@dataclass(frozen=True, kw_only=True)
class Call:
    """One generation call to send.

    arrival_s      seconds after the start of the run
    output_tokens  the output ends here: by `max_new_tokens`, or, where `cap_tokens` is set, by hanging up
    cap_tokens     what is sent as `max_new_tokens` instead, so that the server can't know the length
    slo            the wire object for `custom_params.slo`, or None
    targets        what the answer is judged by
    """

    id: str
    name: str
    arrival_s: float
    prompt: tuple[int, ...]
    output_tokens: int
    targets: Targets
    slo: dict[str, Any] | None = None
    cap_tokens: int | None = None
    priority: int | None = None

    def body(self) -> bytes:
        """The request as JSON: token ids, greedy, never ending early."""
        sampling: dict[str, Any] = {
            "temperature": 0,
            "ignore_eos": True,
            "max_new_tokens": self.cap_tokens or self.output_tokens,
        }
        if self.slo is not None:
            sampling["custom_params"] = {"slo": self.slo}
        request: dict[str, Any] = {
            "rid": self.id,
            "input_ids": self.prompt,
            "stream": True,
            "sampling_params": sampling,
        }
        if self.priority is not None:
            request["priority"] = self.priority
        return orjson.dumps(request)


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What came back: one record a call, in the order of the calls.

    wall_s      from the start to the last byte
    late_ms     how much later than scheduled the client sent its most delayed call
    client_cpu  the generator's own share of one core
    failures    why calls failed, in their order
    """

    records: tuple[StageRecord, ...]
    failures: tuple[str, ...]
    wall_s: float
    late_ms: float
    client_cpu: float


@dataclass(kw_only=True)
class _Raw:
    """Bytes of one answer as they came, each with its time; parsed after the run."""

    call: Call
    chunks: list[tuple[float, bytes]]
    status: int | None = None
    sent_s: float = 0.0
    hung_up: bool = False
    broken: str = ""


async def drive(url: str, calls: Sequence[Call], *, timeout_s: float) -> LoadReport:
    """Send every call at its time to the server at `url` and return what was seen.

    An answer that is not complete `timeout_s` seconds after its call is cut off and counts as failed. Request ids are
    new in every run: SGLang aborts an id again two seconds after its stream has ended, whoever has it by then.
    """
    run = uuid4().hex[:8]
    calls = [replace(call, id=f"{run}-{call.id}") for call in calls]
    bodies = [call.body() for call in calls]
    raws = [_Raw(call=call, chunks=[]) for call in calls]
    connector = aiohttp.TCPConnector(limit=0, force_close=False)
    session_timeout = aiohttp.ClientTimeout(total=timeout_s)
    gc.collect()
    gc.disable()
    try:
        async with aiohttp.ClientSession(connector=connector, timeout=session_timeout) as session:
            start_s, cpu_s = time.monotonic(), time.process_time()
            await asyncio.gather(
                *(_send(session, f"{url}/generate", body, raw, start_s) for body, raw in zip(bodies, raws, strict=True))
            )
            wall_s, cpu_s = time.monotonic() - start_s, time.process_time() - cpu_s
    finally:
        gc.enable()
    records = tuple(_record(raw, start_s) for raw in raws)
    return LoadReport(
        records=records,
        failures=tuple(_failure(raw) for raw, seen in zip(raws, records, strict=True) if seen.outcome == "failed"),
        wall_s=wall_s,
        late_ms=max(raw.sent_s - start_s - raw.call.arrival_s for raw in raws) * 1e3,
        client_cpu=cpu_s / wall_s,
    )


async def _send(session: aiohttp.ClientSession, url: str, body: bytes, raw: _Raw, start_s: float) -> None:
    await asyncio.sleep(start_s + raw.call.arrival_s - time.monotonic())
    raw.sent_s = time.monotonic()
    try:
        async with session.post(url, data=body, headers={"Content-Type": "application/json"}) as response:
            raw.status = response.status
            async for chunk in response.content.iter_any():
                raw.chunks.append((time.monotonic(), chunk))
                if raw.call.cap_tokens is not None and _tokens_in(chunk) >= raw.call.output_tokens:
                    raw.hung_up = True
                    return
    except (aiohttp.ClientError, TimeoutError) as error:
        raw.status, raw.broken = None, repr(error)


def _failure(raw: _Raw) -> str:
    sent_at_s, last = raw.call.arrival_s, raw.chunks[-1][1][-300:].decode(errors="replace") if raw.chunks else "nothing"
    return f"{raw.call.id}, at {sent_at_s:.3f} s: {raw.broken or f'status {raw.status}'}; last came {last}"


def _tokens_in(chunk: bytes) -> int:
    found = _COMPLETION_TOKENS.findall(chunk)
    return int(found[-1]) if found else 0


def _record(raw: _Raw, start_s: float) -> StageRecord:
    call = raw.call
    token_s: list[float] = []
    meta: dict[str, Any] = {}
    code = raw.status
    for at_s, event in _events(raw.chunks):
        if "error" in event:
            code = event["error"].get("code", 500) if isinstance(event["error"], dict) else 500
            continue
        meta = event.get("meta_info", meta)
        new = min(meta.get("completion_tokens", 0), call.output_tokens) - len(token_s)
        token_s.extend([at_s - start_s] * max(new, 0))
    reason = meta.get("finish_reason") or {}
    if reason.get("type") == "abort":
        code = reason.get("status_code") or 500
    receipt = meta.get("slo") or {}
    outcome: Outcome = "failed"
    if code == _TOO_MANY_REQUESTS:
        outcome = "declined"
    elif code == 200 and len(token_s) == call.output_tokens and (raw.hung_up or reason):
        outcome = "finished"
    return StageRecord(
        name=call.name,
        targets=call.targets,
        arrival_s=call.arrival_s,
        token_s=tuple(token_s),
        outcome=outcome,
        declined=outcome == "declined" or bool(receipt.get("declined")),
        best_effort=receipt.get("tier") == "best_effort",
        ended_s=raw.chunks[-1][0] - start_s if raw.chunks else None,
    )


def _events(chunks: Sequence[tuple[float, bytes]]) -> list[tuple[float, dict[str, Any]]]:
    """The server-sent events in a stamped byte stream; an event's time is that of the bytes completing it."""
    events: list[tuple[float, dict[str, Any]]] = []
    rest = b""
    for at_s, chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n\n")
        for line in lines:
            data = line.removeprefix(b"data: ")
            if data.startswith(b"{"):
                events.append((at_s, orjson.loads(data)))
    return events
