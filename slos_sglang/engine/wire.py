"""What a request asks for, as the HTTP process sees it: checked, bounded by the operator, written back.

Pure functions over SGLang's sampling parameters (plain dicts) and HTTP headers; a request without an SLO, where the
operator sets no default, is left exactly as it came.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from slos_sglang.engine.config import SLOConfig
from slos_sglang.slo import WireSLO, parse_headers, parse_wire


class Refused(ValueError):
    """A request that is not served: malformed (400) or declined (429).

    A `ValueError`, because that is what every SGLang route turns into an error answer; `status_code` is the name
    under which its native route looks for another status than 400.
    """

    def __init__(self, message: str, *, status: HTTPStatus, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.status_code = int(status)
        self.retry_after_s = retry_after_s

    def headers(self) -> dict[str, str]:
        """`Retry-After` in whole seconds, at least 1, where there is a time to retry (RFC 9110, 10.2.3)."""
        if self.retry_after_s is None:
            return {}
        return {"Retry-After": str(max(1, math.ceil(self.retry_after_s)))}

    def body(self) -> dict[str, Any]:
        """One JSON error object that OpenAI's, Anthropic's and SGLang's clients all read."""
        declined = self.status_code == HTTPStatus.TOO_MANY_REQUESTS
        error: dict[str, Any] = {
            "message": self.message,
            "type": "rate_limit_error" if declined else "invalid_request_error",
            "param": "slo",
            "code": self.status_code,
        }
        if self.retry_after_s is not None:
            error["retry_after_s"] = self.retry_after_s
        return {"type": "error", "error": error}


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where else than in its sampling parameters an HTTP request may carry its SLO, and when it was received."""

    headers: Mapping[str, str]
    body_slo: object = None
    received_s: float | None = None


NOWHERE = Source(headers={})
# Beside the SLO: when this server received the request. It may wait long for a batch to end before a scheduler sees it.
RECEIVED_KEY = "slo_received_s"


def admit(params: Any, source: Source, config: SLOConfig) -> Any:
    """The sampling parameters of a request (None, a dict, or a list of those) with the SLO the scheduler is to see.

    The SLO in the parameters counts first, then the one elsewhere in the body, then the headers, then the
    operator's default. Returns `params` itself where there is none. Raises `Refused` (400) naming field and value.
    """
    try:
        if not isinstance(params, list):
            return _admit_one(params, source, config)
        admitted = [_admit_one(each, source, config) for each in params]
    except ValueError as error:
        raise Refused(str(error), status=HTTPStatus.BAD_REQUEST) from None
    return params if all(new is old for new, old in zip(admitted, params, strict=True)) else admitted


def _admit_one(params: Any, source: Source, config: SLOConfig) -> Any:
    if not isinstance(params, Mapping | None):
        return params  # SGLang's own checks refuse it
    custom = (params or {}).get("custom_params") or {}
    if not isinstance(custom, Mapping):
        return params
    given = _first(custom.get("slo"), source.body_slo)
    slo: WireSLO | None = parse_headers(source.headers) if given is None else parse_wire(given)
    effective = config.effective(slo)
    if effective is None:
        return params
    stamp = {} if source.received_s is None else {RECEIVED_KEY: source.received_s}
    return {**(params or {}), "custom_params": {**custom, "slo": effective, **stamp}}


def carried(body: Mapping[str, Any]) -> object:
    """The SLO of a request's body: in `custom_params`, or where SGLang's gateway keeps it (it drops what it does not
    know): in `metadata` on the chat route, in `custom_labels` on the native one. There it may be a JSON text.

    Raises `Refused` (400) for a text that is no JSON.
    """
    for key in ("custom_params", "metadata", "custom_labels"):
        holder = body.get(key)
        slo = holder.get("slo") if isinstance(holder, Mapping) else None
        if isinstance(slo, str) and key != "custom_params":
            try:
                return json.loads(slo)
            except ValueError:
                raise Refused(f"{key}.slo must be a JSON object, not {slo!r}", status=HTTPStatus.BAD_REQUEST) from None
        if slo is not None:
            return slo
    return None


def _first(*values: object) -> object:
    return next((value for value in values if value is not None), None)


RETRY_KEY = "retry_after_ms"


def abort_reason(status: HTTPStatus, message: str, *, retry_after_s: float | None = None) -> dict[str, Any]:
    """The `finished_reason` of a scheduler's abort that becomes an HTTP error.

    The time travels as whole milliseconds: SGLang's messages between processes allow texts, integers and lists of
    integers here (`FinishReasonDict`); a float would kill the process that receives it.
    """
    reason: dict[str, Any] = {"type": "abort", "status_code": int(status), "message": message}
    if retry_after_s is not None:
        reason[RETRY_KEY] = max(0, math.ceil(retry_after_s * 1000))
    return reason


def declined(finish_reason: Mapping[str, Any] | None) -> Refused | None:
    """The refusal that an abort with a time to retry stands for; None for any other reason to finish."""
    if not finish_reason or RETRY_KEY not in finish_reason:
        return None
    return Refused(
        finish_reason["message"],
        status=HTTPStatus(finish_reason["status_code"]),
        retry_after_s=finish_reason[RETRY_KEY] / 1000,
    )
