"""A summary by map and reduce: every part is summarized in a fork of its own, then the parts' summaries are.

The forks share the program's system prompt (the server's prefix cache computes it once) and its deadline: `map_ms` of
the whole is planned for them, what they leave over the last step may use. A grammar ends every summary with a full
stop.
"""

from __future__ import annotations

import sglang as sgl

from slos_sglang import gen, presets, stage

SENTENCE = r"[A-Z][A-Za-z0-9 ,'()-]{10,120}\."
TEXT = """A program is one run of an annotated function: an agent from question to answer. A stage is one step of it
with targets of its own.

A budget is what is left of a deadline when a request is sent. It is a duration, so client and server need no common
clock.

A standard request was admitted with a guarantee. A best-effort request gets what is left over. A declined one is told
so at once.

A receipt says for each call what was promised, what was measured, and whether the promise was kept."""


@sgl.function
def main(s, text: str = TEXT, e2e_ms: float = 20_000.0, map_ms: float = 12_000.0):
    """Summarize a text, whose parts blank lines separate; see the module."""
    parts = [" ".join(part.split()) for part in text.split("\n\n") if part.strip()]
    if not parts:
        raise ValueError(f"text must not be empty, not {text!r}")
    s += sgl.system("Summarize what you are given in one sentence.")
    with stage("summary", e2e_ms=e2e_ms):
        with stage("map", e2e_ms=map_ms):
            forks = s.fork(len(parts))
            for fork, part in zip(forks, parts, strict=False):
                fork += sgl.user(part)
                fork += sgl.assistant(gen("part", max_tokens=160, regex=SENTENCE, slo=presets.SUMMARIZATION))
            summaries = [fork["part"] for fork, _ in zip(forks, parts, strict=False)]
        with stage("reduce"):
            s += sgl.user(" ".join(summaries))
            s += sgl.assistant(gen("summary", max_tokens=160, regex=SENTENCE, slo=presets.SUMMARIZATION))
