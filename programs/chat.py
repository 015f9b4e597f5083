"""A chat of several turns: each reply starts soon, comes at reading speed, and finds the conversation cached.

Between two turns the person reads and types; `pause_ms` stands for that time. It is measured like a tool's, and after
a few conversations the server is told when the next turn will come. A grammar ends every reply with a full stop, so
that a model of random weights takes turns too.
"""

from __future__ import annotations

import time

import sglang as sgl

from slos_sglang import gen, presets, stage

REPLY = r"[A-Z][A-Za-z0-9 ,'()-]{10,160}\."
QUESTIONS = "What is a deadline?|And what is a budget?|Which of the two travels to the server?"


@sgl.function
def main(s, questions: str = QUESTIONS, pause_ms: float = 200.0, max_tokens: int = 192):
    """Ask the `questions`, which `|` separates, one after the other; see the module."""
    turns = [question.strip() for question in questions.split("|") if question.strip()]
    if not turns:
        raise ValueError(f"questions must have at least one, not {questions!r}")
    s += sgl.system("You are a friendly assistant. Answer in one sentence.")
    for number, question in enumerate(turns):
        with stage(f"turn_{number + 1}") as turn:
            if number:
                with turn.tool("person"):
                    time.sleep(pause_ms / 1e3)
            s += sgl.user(question)
            s += sgl.assistant(gen("reply", max_tokens=max_tokens, regex=REPLY, slo=presets.CHATBOT))
            s["reply"]
