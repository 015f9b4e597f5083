"""Service-level objectives: what a stage asks for, in a program and on the wire.

An `SLO` is what a person writes beside a generation call. A `WireSLO` is the same promise as it travels
in `sampling_params.custom_params.slo`: one flat object of scalars, with the remaining *budget* (a duration)
in place of a deadline, so that client and server need no common clock.

This module imports nothing else of ours; every other room may import it.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from types import SimpleNamespace
from typing import Any, Literal
from urllib.parse import parse_qsl, quote, urlencode

OnDecline = Literal["best_effort", "reject"]

DEFAULT_THINK_END = "</think>"
_POSITIVE = ("ttft_ms", "ttft_slowdown", "tpot_ms", "think_tpot_ms", "answer_ttft_ms")
# What a call of named phases says for each phase instead.
_OF_ONE_OR_TWO_PHASES = ("tpot_ms", "think_tpot_ms", "think_end", "answer_ttft_ms")
_REST = ("rest_calls", "rest_prompt_tokens", "rest_output_tokens", "rest_gaps_ms", "gap_ms")


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
    if slo.phase_list:
        _check_phases(slo.phase_list)
        for name in _OF_ONE_OR_TWO_PHASES:
            if getattr(slo, name) is not None:
                raise ValueError(
                    f"slo.{name} ({getattr(slo, name)!r}) is not for a call of named phases: give each its own"
                )
    if slo.on_decline not in ("best_effort", "reject"):
        raise ValueError(f"slo.on_decline must be 'best_effort' or 'reject', not {slo.on_decline!r}")


def _thinks(slo: SLO | WireSLO) -> bool:
    return slo.think_end is None and (slo.think_tpot_ms is not None or slo.answer_ttft_ms is not None)


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One phase of a call's output; `None` leaves a target open.

    name      what receipts call it: letters, digits, `_` and `-`
    tpot_ms   time per output token, ms
    first_ms  its first token, ms from the server's receipt of the request (the first phase's is the SLO's TTFT)
    until     the text that ends it; the last phase has none, and every other one must

    Raises `ValueError` naming the phase, the field and the value.
    """

    name: str
    tpot_ms: float | None = None
    first_ms: float | None = None
    until: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch(r"[\w-]+", self.name):
            raise ValueError(f"slo.phases: a name must be of letters, digits, _ and -, not {self.name!r}")
        for field in ("tpot_ms", "first_ms"):
            value = getattr(self, field)
            if value is not None and _number(f"phases: {self.name}: {field}", value) <= 0:
                raise ValueError(f"slo.phases: {self.name}: {field} must be greater than 0, not {value!r}")
        if self.until is not None and (not isinstance(self.until, str) or not self.until):
            raise ValueError(f"slo.phases: {self.name}: until must be a non-empty text, not {self.until!r}")


_PHASE_FIELDS = tuple(field.name for field in fields(Phase))


def _check_phases(phases: Sequence[Phase]) -> None:
    *earlier, last = phases
    for phase in phases:
        if not isinstance(phase, Phase):
            raise ValueError(f"slo.phases must be of Phase, not {phase!r}")
    for phase in earlier:
        if phase.until is None:
            raise ValueError(f"slo.phases: {phase.name}: until must say which text ends it, not None")
    if last.until is not None:
        raise ValueError(f"slo.phases: {last.name}: until must be None in the last phase, not {last.until!r}")
    if phases[0].first_ms is not None:
        raise ValueError(
            f"slo.phases: {phases[0].name}: first_ms must be None in the first phase, not {phases[0].first_ms!r}: "
            "its first token has the SLO's ttft_ms or ttft_slowdown"
        )
    names = [phase.name for phase in phases]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"slo.phases: a name must be there once, not {names.count(name)} times: {name!r}")


def encode_phases(phases: Sequence[Phase]) -> str:
    """Phases as one text: `name=think&tpot_ms=50&until=%3C%2Fthink%3E;name=answer&tpot_ms=100`.

    Each is a URL query, and `;` stands between them: it is percent-encoded inside.
    """
    given = [{key: value for key, value in asdict(phase).items() if value is not None} for phase in phases]
    return ";".join(urlencode(each, quote_via=quote, safe="") for each in given)


def decode_phases(text: object) -> tuple[Phase, ...]:
    """The phases that `encode_phases` wrote. Raises `ValueError` naming the phase, the field and the value."""
    if not isinstance(text, str) or not text:
        raise ValueError(f"slo.phases must be a non-empty text, not {text!r}")
    return tuple(_decode_phase(part) for part in text.split(";"))


def _decode_phase(text: str) -> Phase:
    try:
        given: dict[str, Any] = dict(parse_qsl(text, keep_blank_values=True, strict_parsing=True))
    except ValueError:
        raise ValueError(f"slo.phases: a phase must be written key=value&key=value, not {text!r}") from None
    for key, value in given.items():
        if key not in _PHASE_FIELDS:
            near = nearest(key, _PHASE_FIELDS)
            hint = f"; did you mean {near!r}?" if near else f"; known keys: {', '.join(_PHASE_FIELDS)}"
            raise ValueError(f"slo.phases has an unknown key {key!r} (value {value!r}){hint}")
        if key.endswith("_ms"):
            try:
                given[key] = float(value)
            except ValueError:
                raise ValueError(f"slo.phases: {key} must be a number, not {value!r}") from None
    return Phase(**{"name": "", **given})


@dataclass(frozen=True, kw_only=True)
class SLO:
    """Targets of one stage; `None` leaves a target open.

    ttft_ms        time to first token, ms from the server's receipt of the request
    ttft_slowdown  the same relative to the zero-load prefill time of the prompt's uncached tokens (paper, section 6)
    tpot_ms        time per output token after the first, ms
    think_tpot_ms  the same while the model thinks, until `think_end` appears in the output
    think_end      the text that ends thinking; `</think>` where another target of thinking is given
    answer_ttft_ms time to the first token after thinking, ms from the server's receipt of the request
    phase_list     targets of an output of more than two phases: see `phases`
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
    answer_ttft_ms: float | None = None
    phase_list: tuple[Phase, ...] = ()
    e2e_ms: float | None = None
    value: float = 1.0
    on_decline: OnDecline = "best_effort"

    def __post_init__(self) -> None:
        if _thinks(self):
            object.__setattr__(self, "think_end", DEFAULT_THINK_END)
        _check_targets(self)

    @classmethod
    def phases(cls, phases: Sequence[Phase], **targets: Any) -> SLO:
        """An SLO for an output of any number of phases, which follow each other as their end texts appear.

        `targets` are those of the whole call: `ttft_ms` or `ttft_slowdown`, `e2e_ms`, `value`, `on_decline`. Raises
        `ValueError` naming the phase, the field and the value.
        """
        if not phases:
            raise ValueError(f"slo.phases must be at least one, not {phases!r}")
        return cls(phase_list=tuple(phases), **targets)


@dataclass(frozen=True, kw_only=True)
class WireSLO:
    """The wire form of an SLO; what it has beside the targets:

    budget_ms           what is left of the deadline when the request is sent; a spent one (zero or negative) is well
                        formed: the server declines it
    phases              targets of more than two phases as one text (`encode_phases`)
    rest_calls          how many calls of the program are expected after this one; further estimates of them:
    rest_prompt_tokens  prompt tokens that are new in them
    rest_output_tokens  tokens they put out
    rest_gaps_ms        time in which the program waits for something else (tools), ms
    gap_ms              the first of these gaps: from the end of this call to the arrival of the next one
    """

    program: str | None = None
    stage: str | None = None
    ttft_ms: float | None = None
    ttft_slowdown: float | None = None
    tpot_ms: float | None = None
    think_tpot_ms: float | None = None
    think_end: str | None = None
    answer_ttft_ms: float | None = None
    phases: str | None = None
    budget_ms: float | None = None
    rest_calls: float | None = None
    rest_prompt_tokens: float | None = None
    rest_output_tokens: float | None = None
    rest_gaps_ms: float | None = None
    gap_ms: float | None = None
    value: float = 1.0
    on_decline: OnDecline = "best_effort"

    def __post_init__(self) -> None:
        if _thinks(self):
            object.__setattr__(self, "think_end", DEFAULT_THINK_END)
        _check_targets(self)
        for name in ("program", "stage"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise ValueError(f"slo.{name} must be a text, not {value!r}")
        if self.budget_ms is not None:
            _number("budget_ms", self.budget_ms)
        for name in _REST:
            value = getattr(self, name)
            if value is not None and _number(name, value) < 0:
                raise ValueError(f"slo.{name} must be a finite number, at least 0, not {value!r}")

    @property
    def phase_list(self) -> tuple[Phase, ...]:
        """The named phases; none where the output is of one, or of thinking and an answer."""
        return () if self.phases is None else decode_phases(self.phases)

    @property
    def all_phases(self) -> tuple[Phase, ...]:
        """The phases of the output, at least one."""
        if self.phases is not None:
            return self.phase_list
        answer = Phase(name="answer", tpot_ms=self.tpot_ms, first_ms=self.answer_ttft_ms)
        if self.think_end is None:
            return (answer,)
        return (Phase(name="think", tpot_ms=self.think_tpot_ms, until=self.think_end), answer)

    @property
    def constrained(self) -> bool:
        """True where at least one target is set; an SLO without any is plain best effort."""
        return any(getattr(self, name) is not None for name in (*_POSITIVE, "budget_ms")) or any(
            phase.tpot_ms is not None or phase.first_ms is not None for phase in self.phase_list
        )

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
