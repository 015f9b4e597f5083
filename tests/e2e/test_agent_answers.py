"""The embedded trained model through a real server: it answers right, and says what it says without a server."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

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
    assert served == plain
