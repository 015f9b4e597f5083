"""The embedded model: the same bytes everywhere, a tokenizer for any text, answers worth scheduling."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from slos_sglang.tiny_model import BOS, EOS, PAD, THINK, VOCAB_TOKENS, make_tiny_model

FILES = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(make_tiny_model(tmp_path_factory.mktemp("tiny") / "model").directory)


@pytest.fixture(scope="module")
def tokenizer(made: Path) -> Tokenizer:
    return Tokenizer.from_file(str(made / "tokenizer.json"))


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_the_command_makes_the_same_bytes_in_another_process(made, tmp_path):
    environment = os.environ | {"PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "1"}
    program = "from slos_sglang.cli.main import main; main()"
    for directory in (tmp_path / "new", tmp_path / "new"):  # the second run overwrites
        command = [sys.executable, "-c", program, "tiny-model", str(directory), "--random", "--json"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        report = json.loads(done.stdout)
        assert (report["seed"], report["vocab_tokens"], report["context_tokens"]) == (0, VOCAB_TOKENS, 4096)
        assert contents(directory) == contents(made)
    assert set(contents(made)) == FILES


def test_another_seed_makes_another_model(made, tmp_path):
    make_tiny_model(tmp_path, seed=1)
    assert contents(tmp_path)["model.safetensors"] != contents(made)["model.safetensors"]


@given(text=st.text())
def test_any_text_survives(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_marks_are_single_tokens_and_english_is_short(tokenizer):
    for mark in (BOS, EOS, PAD, *THINK):
        assert len(tokenizer.encode(mark).ids) == 1
    assert tokenizer.decode(tokenizer.encode("<think>a</think>").ids) == "<think>a</think>"  # not hidden as special
    text = "The question about the population of the city is clear.\n"
    assert len(tokenizer.encode(text).ids) < len(text) / 3


def test_the_weights_fit_the_config(made):
    config, weights = json.loads((made / "config.json").read_text()), load_file(made / "model.safetensors")
    hidden, head = config["hidden_size"], config["head_dim"]
    assert weights["model.embed_tokens.weight"].shape == (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        shapes = {name: weights[f"model.layers.{layer}.self_attn.{name}_proj.weight"].shape for name in "qkvo"}
        kv_rows = config["num_key_value_heads"] * head
        q_rows = config["num_attention_heads"] * head
        assert shapes == {"q": (q_rows, hidden), "k": (kv_rows, hidden), "v": (kv_rows, hidden), "o": (hidden, q_rows)}
    assert 3.3e6 < sum(tensor.size for tensor in weights.values()) < 3.5e6
    assert {tensor.dtype for tensor in weights.values()} == {np.dtype("float32")}


def test_greedy_answers_are_long_and_varied(made, tokenizer):
    config, weights = json.loads((made / "config.json").read_text()), load_file(made / "model.safetensors")
    for prompt in ("Hello", "SELECT name"):
        ids = tokenizer.encode(f"{BOS}<|user|>\n{prompt}{EOS}\n<|assistant|>\n").ids
        start = len(ids)
        for _ in range(20):
            ids.append(int(next_logits(config, weights, ids).argmax()))
        answer = ids[start:]
        assert tokenizer.token_to_id(EOS) not in answer
        assert len(set(answer)) > 12
        assert tokenizer.decode(answer).isprintable()


def next_logits(config: dict, weights: dict[str, np.ndarray], ids: list[int]) -> np.ndarray:
    """A Llama in a few lines of numpy: the logits of the token after `ids`."""
    heads, size = config["num_attention_heads"], config["head_dim"]
    group = heads // config["num_key_value_heads"]
    speeds = config["rope_theta"] ** (-np.arange(0, size, 2) / size)
    angles = np.outer(np.arange(len(ids)), speeds).astype(np.float32)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]

    def norm(name, x):
        return weights[f"model.{name}.weight"] * x / np.sqrt((x**2).mean(-1, keepdims=True) + config["rms_norm_eps"])

    def rotate(x):
        a, b = np.split(x, 2, axis=-1)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    h = weights["model.embed_tokens.weight"][ids]
    hidden = np.triu(np.full((len(ids), len(ids)), -np.inf, np.float32), 1)
    for layer in range(config["num_hidden_layers"]):

        def project(name, x, layer=layer):
            return x @ weights[f"model.layers.{layer}.{name}.weight"].T

        x = norm(f"layers.{layer}.input_layernorm", h)
        q, k, v = (project(f"self_attn.{name}_proj", x).reshape(len(ids), -1, size) for name in "qkv")
        k, v = rotate(k).repeat(group, axis=1), v.repeat(group, axis=1)
        scores = np.einsum("qhd,khd->hqk", rotate(q), k) * np.float32(size**-0.5) + hidden
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        h = h + project("self_attn.o_proj", np.einsum("hqk,khd->qhd", shares, v).reshape(len(ids), -1))
        x = norm(f"layers.{layer}.post_attention_layernorm", h)
        gate = project("mlp.gate_proj", x)
        h = h + project("mlp.down_proj", gate / (1 + np.exp(-gate)) * project("mlp.up_proj", x))
    head = "model.embed_tokens" if config["tie_word_embeddings"] else "lm_head"
    return norm("norm", h)[-1] @ weights[f"{head}.weight"].T


def test_wrong_input_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"seed.*-1"):
        make_tiny_model(tmp_path / "model", seed=-1)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="another model"):
        make_tiny_model(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file"):
        make_tiny_model(tmp_path / "file")
