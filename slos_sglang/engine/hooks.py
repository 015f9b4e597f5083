"""The bodies of the seams in the HTTP process. Each takes the original first; each is a few lines.

What must stay true: a request without an SLO goes through as in SGLang; a refused one never reaches the scheduler's
queue (malformed) or leaves nothing behind (declined: SGLang's own handling has run by then).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import HTTPException
from sglang.srt.managers.io_struct import GenerateReqInput
from starlette.middleware import Middleware

from slos_sglang.engine.config import SLOConfig, config_from_env
from slos_sglang.engine.http import SLOMiddleware, exchange_of
from slos_sglang.engine.plugin import ANNOUNCED_KEY
from slos_sglang.engine.wire import NOWHERE, Refused, Source, admit, carried, declined

RECEIPT_KEY = "slo"


@functools.cache
def _config() -> SLOConfig:
    return config_from_env()


def serve_http(
    original: Callable[..., Any],
    server_args: Any,
    tokenizer_manager: Any,
    template_manager: Any,
    port_args: Any,
    scheduler_infos: list[dict[str, Any]],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Around `_setup_and_run_http_server`: the ASGI layer, and a last look at what can't be served.

    Raises `SystemExit` where requests would be scheduled by somebody else after all. (A data-parallel controller
    passes no announcements on.)
    """
    from sglang.srt.entrypoints.http_server import app
    from sglang.srt.managers.data_parallel_controller import SCHEDULER_PIDS_ARG

    if server_args.tokenizer_worker_num > 1:
        raise SystemExit("slos-sglang: --tokenizer-worker-num > 1 is not supported: SGLang's workers load no plugins")
    if any(ANNOUNCED_KEY not in info and SCHEDULER_PIDS_ARG not in info for info in scheduler_infos):
        raise SystemExit("slos-sglang: a scheduler is not ours: another plugin or launcher has replaced it")
    # Innermost: cross-origin headers and request metrics then see a refusal's own status.
    app.user_middleware.append(Middleware(SLOMiddleware))
    return original(server_args, tokenizer_manager, template_manager, port_args, scheduler_infos, *args, **kwargs)


async def generate_request(
    original: Callable[..., Any], manager: Any, obj: Any, request: Any = None
) -> AsyncIterator[Any]:
    """Around `TokenizerManager.generate_request`: check, bound, write back; report refusals and receipts."""
    exchange = exchange_of(request)
    try:
        generates = isinstance(obj, GenerateReqInput) and not _is_health_check(request)
        with_slo = generates and await _admit(obj, request)
        if exchange is not None and not with_slo:
            await exchange.settle()  # nothing is to be refused, nothing to be added
        async with contextlib.aclosing(original(manager, obj, request)) as outputs:
            async for out in outputs:
                if with_slo and exchange is not None:
                    await exchange.settle()
                    exchange.receipts.update(_receipts(out))
                yield out
    except Refused as refused:
        if exchange is not None:
            await exchange.refuse(refused)
        raise


async def _admit(obj: GenerateReqInput, request: Any) -> bool:
    """True where it has an SLO, which the scheduler will then find in its parameters."""
    try:
        params = admit(obj.sampling_params, await _source(obj, request), _config())
    except Refused:
        # The route's abort task looks for these when the answer is out; nothing was queued.
        obj.is_single, obj.rid = False, []
        raise
    with_slo = params is not obj.sampling_params
    obj.sampling_params = params
    return with_slo


def _receipts(out: dict[str, Any] | list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Choice -> receipt, of those in this output that have ended; an event of a stream names its choice."""
    outputs = out if isinstance(out, list) else [out]
    return {
        each.get("index", position): each["meta_info"][RECEIPT_KEY]
        for position, each in enumerate(outputs)
        if RECEIPT_KEY in each.get("meta_info", ())
    }


async def handle_abort(
    original: Callable[..., Any], manager: Any, out: dict[str, Any], state: Any, is_stream: bool
) -> Any:
    """Around `TokenizerManager._handle_abort_finish_reason`: a declined request raises `Refused`, streaming or not."""
    refused = declined(out["meta_info"]["finish_reason"])
    try:
        handled = await original(manager, out, state, is_stream)
    except HTTPException:
        if refused is None:
            raise
    if refused is not None:
        raise refused
    return handled


def update_request_meta_info(
    original: Callable[..., None],
    manager: Any,
    meta_info: dict[str, Any],
    state: Any,
    customized_info: dict[str, list[Any]],
    index: int,
    finish_reason: dict[str, Any] | None,
) -> None:
    """Around `TokenizerManager.update_request_meta_info`: the receipt goes in as the one object it is."""
    if RECEIPT_KEY not in customized_info:
        original(manager, meta_info, state, customized_info, index, finish_reason)
        return
    others = {key: values for key, values in customized_info.items() if key != RECEIPT_KEY}
    original(manager, meta_info, state, others, index, finish_reason)
    receipt = customized_info[RECEIPT_KEY][index]
    if receipt is not None:
        meta_info[RECEIPT_KEY] = receipt


def _is_health_check(request: Any) -> bool:
    """A probe is nobody's request: the operator's default SLO is not for it."""
    return str(getattr(request, "scope", {}).get("path", "")).startswith("/health")


async def _source(obj: GenerateReqInput, request: Any) -> Source:
    """Headers, and what the body carries beside the sampling parameters (SGLang's request models drop some of it)."""
    exchange = exchange_of(request)
    if exchange is None:
        return NOWHERE
    body: Any = {"custom_labels": obj.custom_labels}
    if request.url.path.startswith("/v1/") and "json" in request.headers.get("content-type", ""):
        body = await request.json()  # cached: FastAPI has parsed it already
    slo = carried(body) if isinstance(body, dict) else None
    return Source(headers=request.headers, body_slo=slo, received_s=exchange.received_s)
