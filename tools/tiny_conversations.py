"""Conversations as the programs of `programs/` lead them, letter by letter, tool results included."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from slos_sglang.programs import tool_agent
from tiny_names import Mountain

THINK_SYSTEM = "Think first, then answer."
NOW_ANSWER = "Now answer the question in one sentence."
DONE = '{"tool": "answer", "args": ""}'


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What the program has said since the last turn, and the reply.

    A reply that is not `learned` is only context; one that does not end the turn is followed by no end token.
    """

    prompt: str
    reply: str
    learned: bool = True
    ends: bool = True


@dataclass(frozen=True, kw_only=True)
class Episode:
    """One question, asked of one program, and the conversation that answers it."""

    kind: str
    question: str
    turns: tuple[Turn, ...]

    @property
    def answer(self) -> str:
        """What is compared with the reply: the final sentence, without the thinking before it."""
        return self.turns[-1].reply.partition("</think>")[2] or self.turns[-1].reply


@dataclass(frozen=True, kw_only=True)
class Call:
    """A call of a tool and its result. One that is `forced` is there to be noticed, not to be learned."""

    tool: str
    args: str
    result: str
    forced: bool = False

    def __str__(self) -> str:
        return f'{{"tool": "{self.tool}", "args": "{self.args}"}}'


def agent(kind: str, question: str, calls: Sequence[Call], answer: str) -> Episode:
    """The tool agent's conversation."""
    said, turns = f"SYSTEM:{tool_agent.SYSTEM}\nUSER:{question}\nASSISTANT:", []
    for call in calls:
        turns.append(Turn(prompt=said, reply=str(call), learned=not call.forced))
        said = f"\nUSER:{call.result}\nASSISTANT:"
    turns.append(Turn(prompt=said, reply=DONE))
    turns.append(Turn(prompt=f"\nUSER:{NOW_ANSWER}\nASSISTANT:", reply=answer))
    return Episode(kind=kind, question=question, turns=tuple(turns))


def thinker(kind: str, question: str, thinking: str, answer: str) -> Episode:
    """The reasoning program's conversation."""
    prompt = f"SYSTEM:{THINK_SYSTEM}\nUSER:{question}\nASSISTANT:<think>"
    return Episode(kind=kind, question=question, turns=(Turn(prompt=prompt, reply=f"{thinking}</think>{answer}"),))


def calculate(expression: str) -> Call:
    """A call of the calculator."""
    return Call(tool="calculator", args=expression, result=tool_agent.calculator(expression))


def look_up(mountain: Mountain) -> Call:
    """A call for one row."""
    return Call(tool="lookup", args=mountain.name, result=str(mountain))
