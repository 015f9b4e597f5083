"""A program as a workload offers it: when it arrives, and the stages it goes through (INTERFACES, section 5).

What must stay true: a `Stage` or `Program` that exists is well formed; its lengths are facts for the server to find
out, never hints to a policy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from slos_sglang.slo import WireSLO

_TARGETS = ("ttft_ms", "ttft_slowdown", "tpot_ms", "think_tpot_ms")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One call of a program.

    prompt_tokens  the whole prompt; the first `cached_tokens` of it are what a prefix cache holds if nothing is evicted
    output_tokens  all output; the first `think_tokens` of it are paced by `think_tpot_ms`, the rest by `tpot_ms`
    ttft_slowdown  TTFT target relative to the zero-load prefill of the uncached tokens; at most one of it and `ttft_ms`
    value          what keeping its targets is worth relative to others
    after_s        from the end of this stage to the arrival of the next: the tool's time, s

    Raises `ValueError` naming field and value.
    """

    name: str
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int = 0
    think_tokens: int = 0
    ttft_ms: float | None = None
    ttft_slowdown: float | None = None
    tpot_ms: float | None = None
    think_tpot_ms: float | None = None
    value: float = 1.0
    after_s: float = 0.0

    def __post_init__(self) -> None:
        _check_text("name", self.name)
        _check_count("prompt_tokens", self.prompt_tokens, 1)
        _check_count("output_tokens", self.output_tokens, 1)
        _check_count("cached_tokens", self.cached_tokens, 0)
        _check_count("think_tokens", self.think_tokens, 0)
        if self.cached_tokens >= self.prompt_tokens:
            raise ValueError(
                f"cached_tokens must be less than prompt_tokens ({self.prompt_tokens}), not {self.cached_tokens}: "
                "at least one token is computed"
            )
        if self.think_tokens > self.output_tokens:
            raise ValueError(
                f"think_tokens must be at most output_tokens ({self.output_tokens}), not {self.think_tokens}"
            )
        for name in (*(target for target in _TARGETS if getattr(self, target) is not None), "value"):
            if not _number(name, getattr(self, name)) > 0:
                raise ValueError(f"{name} must be greater than 0, not {getattr(self, name)!r}")
        if self.ttft_ms is not None and self.ttft_slowdown is not None:
            raise ValueError(
                f"set at most one of ttft_ms ({self.ttft_ms!r}) and ttft_slowdown ({self.ttft_slowdown!r})"
            )
        if _number("after_s", self.after_s) < 0:
            raise ValueError(f"after_s must not be negative, not {self.after_s!r}")

    def wire(self, program: str) -> WireSLO:
        """The targets as a client of `program` would send them."""
        return WireSLO(
            program=program,
            stage=self.name,
            ttft_ms=self.ttft_ms,
            ttft_slowdown=self.ttft_slowdown,
            tpot_ms=self.tpot_ms,
            think_tpot_ms=self.think_tpot_ms,
            value=self.value,
        )


@dataclass(frozen=True, kw_only=True)
class Program:
    """One run of a program: its first stage arrives at `arrival_s`, each later one when the one before it has ended
    plus that one's `after_s`. `app` names the class of programs it belongs to. Raises `ValueError` like `Stage`.
    """

    id: str
    arrival_s: float
    app: str
    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        _check_text("id", self.id)
        _check_text("app", self.app)
        if _number("arrival_s", self.arrival_s) < 0:
            raise ValueError(f"arrival_s must not be negative, not {self.arrival_s!r}")
        if not self.stages:
            raise ValueError("stages must hold at least one stage, not []")


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} must be a non-empty text, not {value!r}")


def _check_count(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, not {value!r}")
    return value
