"""The embedded trained model through a real server: it answers right, and says what it says without a server."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from slos_sglang.programs import reasoning, tool_agent

from slos_sglang.engine.launch import server
from slos_sglang.tiny_model import TRAINED, write_tiny_agent

pytestmark = pytest.mark.e2e

SEED, EACH = 5, 4


@pytest.fixture(scope="module")
def judge() -> Iterator[ModuleType]:
    """The judging script."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[2] / "tools"))
        yield importlib.import_module("eval_tiny_agent")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("agent")
    write_tiny_agent(folder / "model")
    with server(folder / "model", log=folder / "server.log") as running:
        yield running.url


def test_the_shipped_programs_get_right_answers_and_the_same_ones_as_from_transformers(
    judge: ModuleType, url: str
) -> None:
    questions = judge.episodes(SEED, 0, judge.SHIPPED, EACH)
    served = judge.through_server(url, questions)
    plain = judge.Plain(TRAINED).converse(questions)

    wrong = [e.question for e, text in zip(questions, served, strict=True) if judge.answer_of(text) != e.answer]
    print(f"wrong: {wrong}")
    assert len(wrong) <= len(questions) / 10  # its card says what it is bad at
    compared = [(a, b) for a, b in zip(served, plain, strict=True) if keeps_to_the_grammars(b)]
    assert len(compared) >= 0.8 * len(questions)
    assert [served for served, _ in compared] == [plain for _, plain in compared]


def keeps_to_the_grammars(conversation: str) -> bool:
    """Whether the programs' grammars allow all that was said: a look-up of no other name than the table's, say."""
    replies = [said.partition("USER:")[0].rstrip("\n") for said in conversation.split("ASSISTANT:")[1:]]
    if replies[0].startswith("<think>"):
        return re.fullmatch(reasoning.bounded(300, 150), replies[0].removeprefix("<think>")) is not None
    *calls, answer = replies
    return all(re.fullmatch(tool_agent.LATER_TURN, call) for call in calls) and bool(
        re.fullmatch(tool_agent.ANSWER, answer)
    )
