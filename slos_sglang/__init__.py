"""Agents that keep their promises on SGLang.

`SLO` and `presets` are plain data. `gen`, `select`, `stage` and `annotate` stand on SGLang's frontend and are
imported on first use, because importing SGLang takes seconds.
"""

from typing import TYPE_CHECKING, Any

from slos_sglang.slo import SLO, Phase, presets

if TYPE_CHECKING:
    from slos_sglang.lang import annotate, gen, select, stage

__all__ = ["SLO", "Phase", "annotate", "gen", "presets", "select", "stage"]


def __getattr__(name: str) -> Any:
    if name in ("annotate", "gen", "select", "stage"):
        from slos_sglang import lang

        return getattr(lang, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
