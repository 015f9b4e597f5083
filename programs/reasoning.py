"""Thinking, then an answer: two phases of one generation call, each with a pace of its own.

Nobody reads the thinking as it comes, but the answer waits for it, so it is paced tighter; the server switches when
`</think>` appears in the output. A grammar bounds the thinking, so that it ends, and an answer follows, with a model
of random weights too.
"""

from __future__ import annotations

import sglang as sgl

from slos_sglang import SLO, gen

THINK_END = "</think>"


def bounded(think_chars: int, answer_chars: int) -> str:
    """The grammar of a reply: so many characters of thinking at most, then an answer; neither has a `<` in it.

    To allow a `<` that no `/` follows would make the grammar ambiguous, and its mask take 100 ms a token.
    """
    for name, value in (("think_chars", think_chars), ("answer_chars", answer_chars)):
        if value < 20:
            raise ValueError(f"{name} must be at least 20, not {value!r}")
    return rf"[^<]{{20,{think_chars}}}{THINK_END}[^<]{{20,{answer_chars}}}"


@sgl.function
def main(
    s,
    question: str = "What is 347 + 285?",
    think_chars: int = 300,
    answer_chars: int = 150,
    think_tpot_ms: float = 50.0,
    tpot_ms: float = 100.0,
    ttft_slowdown: float = 3.0,
):
    """Think about a question, then answer it; see the module."""
    slo = SLO(ttft_slowdown=ttft_slowdown, think_tpot_ms=think_tpot_ms, tpot_ms=tpot_ms, think_end=THINK_END)
    s += sgl.system("Think first, then answer.") + sgl.user(question)
    s += sgl.assistant(
        "<think>"
        + gen(
            "reply",
            max_tokens=think_chars + answer_chars + len(THINK_END),
            temperature=0,
            regex=bounded(think_chars, answer_chars),
            slo=slo,
        )
    )
    thinking, _, answer = s["reply"].partition(THINK_END)
    s["thinking"], s["answer"] = thinking.strip(), answer.strip()
