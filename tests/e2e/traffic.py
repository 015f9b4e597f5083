"""Requests of three tiers for the tests of a real server, and what became of each."""

from __future__ import annotations

import asyncio
import json
import math
import random
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp

# The tightest can be kept only by holding the others back; the last brings no targets at all.
TIERS: tuple[dict[str, Any] | None, ...] = (
    {"ttft_ms": 400.0, "tpot_ms": 15.0},
    {"ttft_ms": 4000.0, "tpot_ms": 80.0},
    None,
)
ANSWER_S = 120
# Two tokens this close in log-probability are decided by rounding: another batch shape adds floats in another order.
TIE = 1e-3


@dataclass(frozen=True, kw_only=True)
class Answer:
    """How a request ended: the HTTP status, the output, and SGLang's word for why.

    finish  "stop", "length", "abort", or None where the client hung up or was refused
    """

    status: int
    output: tuple[int, ...] = ()
    finish: str | None = None
    receipt: dict[str, Any] | None = None
    message: str = ""
    meta: dict[str, Any] | None = None


def prompt(rng: random.Random, tokens: int) -> list[int]:
    """Random token ids of the tiny model, past its special ones."""
    return [rng.randrange(16, 2000) for _ in range(tokens)]


def request(ids: list[int], tokens: int, slo: dict[str, Any] | None = None, **sampling: Any) -> dict[str, Any]:
    """A body for `/generate`: greedy, exactly `tokens` long."""
    params = {"temperature": 0, "ignore_eos": True, "max_new_tokens": tokens, **sampling}
    if slo is not None:
        params["custom_params"] = {"slo": slo}
    return {"input_ids": ids, "sampling_params": params}


def tie(top: list[Any], token: int, other: int) -> bool:
    """Whether the two tokens are equally likely, by SGLang's `output_top_logprobs` of where `other` came."""
    logprobs = {token: logprob for logprob, token, *_ in top}
    gap = abs(logprobs.get(token, -math.inf) - logprobs[other])
    print(f"two tokens, log-probabilities {gap:.2g} apart")
    return gap < TIE


@asynccontextmanager
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    """An HTTP session without a limit on connections."""
    timeout = aiohttp.ClientTimeout(total=ANSWER_S)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        yield session


async def ask(
    session: aiohttp.ClientSession,
    url: str,
    body: dict[str, Any],
    *,
    wait_s: float = 0.0,
    hang_up_s: float | None = None,
) -> Answer:
    """Send `body` after `wait_s`; with `hang_up_s` the client disconnects that long after sending, if not answered."""
    await asyncio.sleep(wait_s)
    try:
        async with asyncio.timeout(hang_up_s), session.post(f"{url}/generate", json=body) as response:
            if response.status != 200:
                return Answer(status=response.status, message=await response.text())
            if not body.get("stream"):
                return _answer(await response.json())
            last: dict[str, Any] = {}
            async for line in response.content:
                if line.startswith(b"data: {"):
                    last = json.loads(line[6:])
            return _answer(last)
    except TimeoutError:
        assert hang_up_s is not None, "no answer came"
        return Answer(status=0)


def _answer(reply: dict[str, Any]) -> Answer:
    if "meta_info" not in reply:
        return Answer(status=200, message=json.dumps(reply))
    meta = reply["meta_info"]
    return Answer(
        status=200,
        output=tuple(reply.get("output_ids") or ()),
        finish=(meta.get("finish_reason") or {}).get("type"),
        receipt=meta.get("slo"),
        message=json.dumps(meta.get("finish_reason")),
        meta=meta,
    )


async def ask_all(
    url: str, bodies: Iterable[dict[str, Any]], *, waits_s: Iterable[float] | None = None
) -> list[Answer]:
    """Everything at once, or each after its wait."""
    listed = list(bodies)
    waits = list(waits_s) if waits_s is not None else [0.0] * len(listed)
    async with client() as session:
        return await asyncio.gather(
            *(ask(session, url, body, wait_s=wait_s) for body, wait_s in zip(listed, waits, strict=True))
        )
