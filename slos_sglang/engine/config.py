"""The operator's configuration: one file, few settings, every one with a default that works."""

from __future__ import annotations

import os
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from slos_sglang.slo import Phase, WireSLO, encode_phases, nearest, parse_wire

CONFIG_ENV = "SLOS_SGLANG_CONFIG"


class SLOClass(BaseModel):
    """What clients of one class may ask for; the first class whose `stage` pattern matches applies.

    stage        shell pattern over the request's stage name ("" for a request that names none)
    min_ttft_ms  a tighter target for a first token (of all, or of a phase), ms, is raised to this
    min_tpot_ms  a tighter TPOT target (of any phase), ms, is raised to this
    max_value    a higher value is lowered to this
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    stage: str = "*"
    min_ttft_ms: float | None = Field(default=None, gt=0, strict=True)
    min_tpot_ms: float | None = Field(default=None, gt=0, strict=True)
    max_value: float | None = Field(default=None, gt=0, strict=True)

    def clamp(self, slo: WireSLO) -> dict[str, Any]:
        """The wire object of `slo` within the bounds of this class.

        A TTFT given as a slowdown is clamped where it is turned into milliseconds (the scheduler).
        """
        wire = slo.to_dict()
        for names, bound in (
            (("ttft_ms", "answer_ttft_ms"), self.min_ttft_ms),
            (("tpot_ms", "think_tpot_ms"), self.min_tpot_ms),
        ):
            for name in names:
                if bound is not None and name in wire:
                    wire[name] = max(wire[name], bound)
        if slo.phase_list:
            wire["phases"] = encode_phases([self._clamp_phase(phase) for phase in slo.phase_list])
        if self.max_value is not None:
            wire["value"] = min(slo.value, self.max_value)
        return wire

    def _clamp_phase(self, phase: Phase) -> Phase:
        def at_least(target: float | None, bound: float | None) -> float | None:
            return target if target is None or bound is None else max(target, bound)

        return replace(
            phase,
            tpot_ms=at_least(phase.tpot_ms, self.min_tpot_ms),
            first_ms=at_least(phase.first_ms, self.min_ttft_ms),
        )


class SLOConfig(BaseModel):
    """Settings of the SLO scheduler.

    default_slo             targets of a request that brings none; None: best effort
    classes                 bounds on what clients may ask for
    best_effort_max_wait_s  ageing bound: where best effort waits, it is served at least once in so long, the oldest
                            first; nothing new is promised until it had its turn
    admission               how newcomers are chosen: "auto", "dp" (dynamic program) or "edf_sim" (by deadline)
    late_commitment         a promise binds once its prompt has begun: until then a program's first call may give way to
                            one that takes much less work, and is served with what is left over; off: at once
    reserve_for_returns     share of what the next call of a program is expected to need for which room is kept while
                            its tool runs; 0: none
    hold_kv                 how long best effort leaves the KV of a conversation alone while its tool runs: "auto" (as
                            long as it is worth it), "never", or "always" (until its next call is given up)
    events                  a file that receives one JSON line a scheduler step and request (timelines); None: off.
                            Tensor-parallel rank 0 writes it; with `{rank}` in its name every rank writes its own
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    default_slo: dict[str, Any] | None = None
    classes: tuple[SLOClass, ...] = ()
    best_effort_max_wait_s: float = Field(default=5.0, gt=0, strict=True)
    admission: Literal["auto", "dp", "edf_sim"] = "auto"
    late_commitment: bool = Field(default=True, strict=True)
    reserve_for_returns: float = Field(default=0.0, ge=0, le=1, strict=True)
    hold_kv: Literal["auto", "never", "always"] = "auto"
    events: str | None = None

    @field_validator("default_slo")
    @classmethod
    def _default_is_an_slo(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        return None if value is None else parse_wire(value).to_dict()

    def events_of(self, rank: int) -> str | None:
        """The event file of a tensor-parallel rank, or None."""
        if self.events is None or "{rank}" in self.events:
            return self.events and self.events.replace("{rank}", str(rank))
        return self.events if rank == 0 else None

    def class_of(self, stage: str | None) -> SLOClass | None:
        """The first class that matches the stage name, or None."""
        return next((c for c in self.classes if fnmatchcase(stage or "", c.stage)), None)

    def effective(self, slo: WireSLO | None) -> dict[str, Any] | None:
        """The wire object the scheduler is to see: the default where the client sent none, within its class."""
        if slo is None:
            return self.default_slo
        bounds = self.class_of(slo.stage)
        return slo.to_dict() if bounds is None else bounds.clamp(slo)


def load_config(path: str | Path | None) -> SLOConfig:
    """Read a YAML (or JSON) file; None gives the defaults. Raises `ValueError` naming file, field and value."""
    if path is None:
        return SLOConfig()
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--slo-config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--slo-config {path}: not YAML: {' '.join(str(error).split())}") from None
    if data is None:
        return SLOConfig()
    if not isinstance(data, dict):
        raise ValueError(f"--slo-config {path}: must be a mapping of settings, not {data!r}")
    try:
        return SLOConfig.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        hint = ""
        if first["type"] == "extra_forbidden":
            near = nearest(field.split(".")[-1], tuple(SLOConfig.model_fields) + tuple(SLOClass.model_fields))
            hint = f"; did you mean {near!r}?" if near else ""
        raise ValueError(f"--slo-config {path}: {field}={first['input']!r}: {first['msg']}{hint}") from None


def config_from_env() -> SLOConfig:
    """The configuration of this server's processes, as `slos-sglang serve` handed it on."""
    return load_config(os.environ.get(CONFIG_ENV) or None)
