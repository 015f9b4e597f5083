"""The embedded trained model: it fits the shipped programs, and its teacher says only what is right."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from slos_sglang.programs import reasoning, tool_agent
from test_tiny_model import next_logits
from tokenizers import Tokenizer

from slos_sglang.cli import demo
from slos_sglang.tiny_model import TRAINED, make_tiny_model, write_tiny_agent

EACH = 40


@pytest.fixture(scope="module")
def tools() -> Iterator[Callable[[str], ModuleType]]:
    """Imports a module of the training scripts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[2] / "tools"))
        yield importlib.import_module


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(TRAINED / "tokenizer.json"))


@pytest.fixture(scope="module")
def conversations(tools):
    source = tools("tiny_episodes").Source(7)
    return {kind: [source.episode(kind) for _ in range(EACH)] for kind in tools("tiny_episodes").KINDS}


def test_it_is_written_out_whole_and_small(tmp_path):
    model = write_tiny_agent(tmp_path / "model")
    files = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= set(files)
    assert sum(map(len, files.values())) < 8e6
    assert 1e6 < model.parameters < 4e6
    assert json.loads(files["config.json"])["vocab_size"] == model.vocab_tokens > max(demo.WORDS)
    make_tiny_model(tmp_path / "model")  # one embedded model may replace another
    write_tiny_agent(tmp_path / "model")
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="another model"):
        write_tiny_agent(tmp_path)


@given(text=st.text())
def test_any_text_survives(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_its_tokenizer_is_the_one_that_it_was_trained_with(tools, tokenizer):
    """A change of the programs' fixed text, for instance, needs a new training."""
    assert json.loads(tools("tiny_tokenizer").agent_tokenizer().to_str()) == json.loads(tokenizer.to_str())


def test_no_word_of_a_name_is_a_token(tools, tokenizer):
    words = tools("tiny_names").NAME_WORDS
    assert all(len(tokenizer.encode(text).ids) == len(text) for word in words for text in (word, f" {word}"))
    name = tokenizer.encode("Ojos del Salado").tokens
    asked = tokenizer.encode("How high is Ojos del Salado?").tokens
    assert any(asked[n : n + len(name)] == name for n in range(len(asked)))


def test_conversations_are_tokenized_turn_by_turn_as_in_one_piece(conversations, tokenizer):
    for episode in (e for episodes in conversations.values() for e in episodes):
        texts = [text for turn in episode.turns for text in (turn.prompt, turn.reply)]
        assert [i for text in texts for i in tokenizer.encode(text).ids] == tokenizer.encode("".join(texts)).ids


def test_the_teacher_keeps_to_the_programs_grammars(tools, conversations):
    for kind, episodes in conversations.items():
        for episode in (e for e in episodes if kind not in tools("tiny_episodes").PRACTICE):
            if kind.startswith("think"):
                (turn,) = episode.turns
                assert re.fullmatch(reasoning.bounded(300, 150), turn.reply), turn.reply
                continue
            *agent, final = episode.turns
            assert re.fullmatch(tool_agent.ANSWER, final.reply), final.reply
            assert all(re.fullmatch(tool_agent.LATER_TURN, turn.reply) for turn in agent), agent


def test_the_teacher_is_right(conversations):
    for episode in conversations["difference"]:
        results = [turn.prompt.removesuffix("\nASSISTANT:") for turn in episode.turns[1:3]]
        first, second = (int(re.findall(r"(\d+) m$", result)[0]) for result in results)
        metres, more = re.findall(r"is (\d+) metres (higher|lower) than", episode.answer)[0]
        assert first - second == int(metres) * (1 if more == "higher" else -1)
    for episode in conversations["think_sum"]:
        a, b = map(int, re.findall(r"\d+", episode.question))
        assert episode.answer == f"{a} and {b} together make {a + b}."
    for episode in conversations["think_compare"]:
        a, b = map(int, re.findall(r"\d+", episode.question))
        assert episode.answer == f"{max(a, b)} is larger than {min(a, b)}."


def test_training_and_judging_have_no_name_in_common(tools):
    module = tools("tiny_episodes")
    learned, held_out = module.Source(1), module.Source(1, held_out=True)
    names = {learned.name() for _ in range(3000)}
    assert not names & {held_out.name() for _ in range(3000)}
    words = {word for name in names for word in name.split()}
    assert not words & (tools("tiny_names").NAME_WORDS - tools("tiny_names").COMMON_WORDS)


def test_it_asks_the_right_tool_and_reads_the_result(tokenizer):
    """One question in plain numpy, without the grammar."""
    text = f"SYSTEM:{tool_agent.SYSTEM}\nUSER:How high is Fuji?\nASSISTANT:"
    call = greedy(tokenizer, text)
    assert call == '{"tool": "lookup", "args": "Fuji"}'
    text += f"{call}\nUSER:{tool_agent.call_tool(call)}\nASSISTANT:"
    assert greedy(tokenizer, text) == '{"tool": "answer", "args": ""}'
    text += '{"tool": "answer", "args": ""}\nUSER:Now answer the question in one sentence.\nASSISTANT:'
    assert greedy(tokenizer, text) == "Fuji is 3776 metres high."


def greedy(tokenizer: Tokenizer, text: str) -> str:
    """What the model says after a text."""
    config = json.loads((TRAINED / "config.json").read_text())
    weights = {name: tensor.float().numpy() for name, tensor in load_file(TRAINED / "model.safetensors").items()}
    ids = tokenizer.encode(text).ids
    start = len(ids)
    while ids[-1] != config["eos_token_id"] and len(ids) < start + 40:
        ids.append(int(next_logits(config, weights, ids).argmax()))
    return tokenizer.decode(ids[start:])
