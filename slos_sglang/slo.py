"""Service-level objectives: what a stage asks for, in a program and on the wire.

An `SLO` is what a person writes beside a generation call. A `WireSLO` is the same promise as it travels
in `sampling_params.custom_params.slo`: one flat object of scalars, with the remaining *budget* (a duration)
in place of a deadline, so that client and server need no common clock.

This module imports nothing else of ours; every other room may import it.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from types import SimpleNamespace
from typing import Any, Literal

OnDecline = Literal["best_effort", "reject"]

DEFAULT_THINK_END = "</think>"
_POSITIVE = ("ttft_ms", "ttft_slowdown", "tpot_ms", "think_tpot_ms")


def _number(name: str, value: object) -> float:
    """`value`, if it is a finite number. Raises `ValueError` naming field and value."""
    # Comparing holds for NaN, infinities and integers too large for a float alike.
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not -sys.float_info.max <= value <= sys.float_info.max
    ):
        raise ValueError(f"slo.{name} must be a finite number, not {value!r}")
    return value


def _check_targets(slo: SLO | WireSLO) -> None:
    """Raise `ValueError`, naming field and value, unless the targets of `slo` make sense."""
    for name in (*_POSITIVE, "e2e_ms", "value"):
        value = getattr(slo, name, None)
        if value is None and name != "value":
            continue
        if _number(name, value) <= 0:
            raise ValueError(f"slo.{name} must be a finite number greater than 0, not {value!r}")
    if slo.ttft_ms is not None and slo.ttft_slowdown is not None:
        raise ValueError(
            f"slo.ttft_ms ({slo.ttft_ms!r}) and slo.ttft_slowdown ({slo.ttft_slowdown!r}) "
            "are two kinds of the same target: set at most one"
        )
    if slo.think_end is not None and (not isinstance(slo.think_end, str) or not slo.think_end):
        raise ValueError(f"slo.think_end must be a non-empty text, not {slo.think_end!r}")
    if slo.on_decline not in ("best_effort", "reject"):
        raise ValueError(f"slo.on_decline must be 'best_effort' or 'reject', not {slo.on_decline!r}")


@dataclass(frozen=True, kw_only=True)
class SLO:
    """Targets of one stage; `None` leaves a target open.

    ttft_ms        time to first token, ms from the server's receipt of the request
    ttft_slowdown  the same relative to the zero-load prefill time of the prompt's uncached tokens (paper, section 6)
    tpot_ms        time per output token after the first, ms
    think_tpot_ms  the same while the model thinks, until `think_end` appears in the output
    think_end      the text that ends thinking; `</think>` where only `think_tpot_ms` is given
    e2e_ms         the whole stage, ms
    value          what keeping this promise is worth relative to others
    on_decline     "best_effort" serves a declined request with what is left over, "reject" answers HTTP 429

    Raises `ValueError` naming the field and the value.
    """

    ttft_ms: float | None = None
    ttft_slowdown: float | None = None
    tpot_ms: float | None = None
    think_tpot_ms: float | None = None
    think_end: str | None = None
    e2e_ms: float | None = None
    value: float = 1.0
    on_decline: OnDecline = "best_effort"

    def __post_init__(self) -> None:
        if self.think_tpot_ms is not None and self.think_end is None:
            object.__setattr__(self, "think_end", DEFAULT_THINK_END)
        _check_targets(self)


@dataclass(frozen=True, kw_only=True)
class WireSLO:
    """The wire form of an SLO. `budget_ms` is what is left of the deadline when the request is sent.

    A spent budget (zero or negative) is well formed: the server declines it.
    """

    program: str | None = None
    stage: str | None = None
    ttft_ms: float | None = None
    ttft_slowdown: float | None = None
    tpot_ms: float | None = None
    think_tpot_ms: float | None = None
    think_end: str | None = None
    budget_ms: float | None = None
    value: float = 1.0
    on_decline: OnDecline = "best_effort"

    def __post_init__(self) -> None:
        if self.think_tpot_ms is not None and self.think_end is None:
            object.__setattr__(self, "think_end", DEFAULT_THINK_END)
        _check_targets(self)
        for name in ("program", "stage"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise ValueError(f"slo.{name} must be a text, not {value!r}")
        if self.budget_ms is not None:
            _number("budget_ms", self.budget_ms)

    @property
    def constrained(self) -> bool:
        """True where at least one target is set; an SLO without any is plain best effort."""
        return any(getattr(self, name) is not None for name in (*_POSITIVE, "budget_ms"))

    def to_dict(self) -> dict[str, Any]:
        """The flat object of scalars for `custom_params["slo"]`; unset targets are left out."""
        return {key: value for key, value in asdict(self).items() if value is not None}


WIRE_KEYS = tuple(field.name for field in fields(WireSLO))

# Header name -> wire key; milliseconds. Understood where the body has no SLO.
HEADERS: Mapping[str, str] = {
    "x-slo-ttft-ms": "ttft_ms",
    "x-slo-tpot-ms": "tpot_ms",
    "x-llm-d-slo-ttft-ms": "ttft_ms",
    "x-llm-d-slo-tpot-ms": "tpot_ms",
    "x-sgl-ttft-slo-ms": "ttft_ms",
}


def parse_wire(body: object) -> WireSLO:
    """Check what a client sent as `custom_params.slo`.

    Raises `ValueError` naming the field and the value, and for an unknown key the nearest known one.
    """
    if not isinstance(body, Mapping):
        raise ValueError(f"slo must be an object, not {body!r}")
    for key in body:
        if key not in WIRE_KEYS:
            near = "budget_ms" if key == "e2e_ms" else nearest(str(key), WIRE_KEYS)
            hint = f"; did you mean {near!r}?" if near else f"; known keys: {', '.join(WIRE_KEYS)}"
            raise ValueError(f"slo has an unknown key {key!r} (value {body[key]!r}){hint}")
    given = {key: value for key, value in body.items() if value is not None}
    return WireSLO(**given)


def parse_headers(headers: Mapping[str, str]) -> WireSLO | None:
    """The SLO that HTTP headers carry, or None where they carry none. Raises `ValueError` like `parse_wire`."""
    found: dict[str, Any] = {}
    for header, key in HEADERS.items():
        text = headers.get(header)
        if text is None or key in found:
            continue
        try:
            found[key] = getattr(parse_wire({key: float(text)}), key)
        except ValueError:
            raise ValueError(f"header {header} must be a positive number of milliseconds, not {text!r}") from None
    return WireSLO(**found) if found else None


def nearest(word: str, known: tuple[str, ...]) -> str | None:
    """The known word closest to `word`, or None where nothing is close."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return close[0] if close else None


# Application classes of the paper (section 6, table of targets).
presets = SimpleNamespace(
    SUMMARIZATION=SLO(ttft_slowdown=3, tpot_ms=100),
    CODING=SLO(ttft_slowdown=5, tpot_ms=50),
    CHATBOT=SLO(ttft_slowdown=5, tpot_ms=100),
    TOOL_LOOP=SLO(ttft_slowdown=3, tpot_ms=50),
    TOOL_FINAL=SLO(ttft_slowdown=3, tpot_ms=100),
    REASONING=SLO(ttft_slowdown=3, think_tpot_ms=50, tpot_ms=100),
)
