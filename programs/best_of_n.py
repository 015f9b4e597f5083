"""Best of n: several answers are drafted side by side, and the model chooses the one it finds the likeliest.

The drafts are forks of one conversation. They share its prefix and its deadline, and the choice waits for the last of
them: so all are paced alike, and one that is late holds up the others. The choice itself is a `select`, which only
computes prompts.
"""

from __future__ import annotations

import sglang as sgl

from slos_sglang import SLO, gen, select, stage

ANSWER = r"[A-Z][A-Za-z0-9 ,'()-]{10,120}\."


@sgl.function
def main(
    s,
    question: str = "Why do agents need deadlines?",
    drafts: int = 3,
    temperature: float = 0.9,
    e2e_ms: float = 15_000.0,
):
    """Draft so many answers, then choose; see the module."""
    if not 2 <= drafts <= 9:
        raise ValueError(f"drafts must be 2 to 9, not {drafts!r}")
    s += sgl.system("Answer in one sentence.") + sgl.user(question)
    with stage("answer", e2e_ms=e2e_ms):
        forks = s.fork(drafts)
        forks += sgl.assistant(
            gen("draft", max_tokens=160, temperature=temperature, regex=ANSWER, slo=SLO(ttft_slowdown=5, tpot_ms=100))
        )
        texts = [forks[number]["draft"] for number in range(drafts)]
        listed = "\n".join(f"{number + 1}. {text}" for number, text in enumerate(texts))
        s += sgl.user(f"These answers were given:\n{listed}\nWhich one is the best?")
        numbers = [str(number + 1) for number in range(drafts)]
        s += sgl.assistant("Number " + select("choice", numbers, slo=SLO(ttft_slowdown=5)))
    s["answer"] = texts[int(s["choice"]) - 1]
