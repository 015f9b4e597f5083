"""The embedded models: small Llamas with tokenizer, chat template and thinking marks, without any download.

The default one comes trained, with this package: it drives the shipped programs, and its card says what it learned.
The other has random weights, made in seconds. It speaks gibberish, well formed under a grammar, at any length: good
for load. The same seed must give the same bytes on every machine.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from slos_sglang.tiny_corpus import corpus

TRAINED = Path(__file__).resolve().parent / "tiny_agent"

VOCAB_TOKENS = 2048
CONTEXT_TOKENS = 4096
HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, FFN = 256, 4, 8, 4, 32, 512

CONSTANT, BIAS = 8.0, 8.0  # see _weights

BOS, EOS, PAD = "<|begin|>", "<|end|>", "<|pad|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
THINK = ("<think>", "</think>")

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + '\n' + (message['content'] or '') + eos_token + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class TinyModel:
    """What was written: where, made or trained with which seed, and how large."""

    directory: str
    seed: int
    parameters: int
    vocab_tokens: int
    context_tokens: int


def write_tiny_agent(directory: str | Path) -> TinyModel:
    """Write the trained model into `directory` (made where missing).

    Raises `ValueError` where the directory holds another model.
    """
    path = _place(directory)
    for file in sorted(TRAINED.iterdir()):
        shutil.copyfile(file, path / file.name)
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    with safe_open(path / "model.safetensors", "np") as weights:
        shapes = [weights.get_slice(name).get_shape() for name in weights.keys()]  # noqa: SIM118, not a dict
    return TinyModel(
        directory=str(path),
        seed=config["training_seed"],
        parameters=sum(math.prod(shape) for shape in shapes),
        vocab_tokens=config["vocab_size"],
        context_tokens=config["max_position_embeddings"],
    )


def make_tiny_model(directory: str | Path, seed: int = 0) -> TinyModel:
    """Write a model with random weights that SGLang and transformers load into `directory` (made where missing).

    Raises `ValueError` where the seed is negative or the directory holds another model.
    """
    if seed < 0:
        raise ValueError(f"seed must not be negative, not {seed!r}")
    path = _place(directory)
    tokenizer = _tokenizer(seed)
    tokenizer.save(str(path / "tokenizer.json"))
    weights = _weights(seed, spoken=_spoken_tokens(tokenizer))
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    for name, content in _configs(tokenizer).items():
        (path / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return TinyModel(
        directory=str(path),
        seed=seed,
        parameters=sum(tensor.size for tensor in weights.values()),
        vocab_tokens=VOCAB_TOKENS,
        context_tokens=CONTEXT_TOKENS,
    )


def _place(directory: str | Path) -> Path:
    """The directory, made where missing. Raises `ValueError` where another model is in it."""
    path = Path(directory)
    config = path / "config.json"
    if path.is_file() or (config.exists() and json.loads(config.read_text()).get("model_name") != "slos-tiny"):
        raise ValueError(f"directory {str(path)!r} is a file or holds another model")
    path.mkdir(parents=True, exist_ok=True)
    return path


def _tokenizer(seed: int) -> Tokenizer:
    """A byte-level BPE of exactly `VOCAB_TOKENS` tokens; any text survives encode and decode."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_TOKENS - len(THINK),
        special_tokens=[BOS, EOS, PAD, *ROLES],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(seed), trainer)
    tokenizer.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in THINK])
    assert tokenizer.get_vocab_size() == VOCAB_TOKENS, tokenizer.get_vocab_size()
    return tokenizer


def _spoken_tokens(tokenizer: Tokenizer) -> list[int]:
    """The tokens a random model is to speak: readable text; no white space alone, other scripts' bytes or marks."""
    texts = (tokenizer.decode([token], skip_special_tokens=True) for token in range(VOCAB_TOKENS))
    return [
        token
        for token, text in enumerate(texts)
        if text.strip() and text not in THINK and text.isascii() and text.isprintable()
    ]


def _weights(seed: int, *, spoken: list[int]) -> dict[str, np.ndarray]:
    """Random tensors, scaled so that a greedy answer wanders instead of repeating itself.

    Sharp attention that outweighs the embedding in the residual stream makes the next token depend on the whole
    context, yet the two likeliest tokens stay far enough apart for rounding not to decide. The first hidden unit is a
    constant that no layer reads or writes; the output layer takes it for a bias against all tokens but `spoken`: an
    answer does not end early, and under a grammar does not dawdle in white space.
    """
    rng = np.random.Generator(np.random.PCG64(seed))

    def normal(rows: int, columns: int, std: float) -> np.ndarray:
        return (rng.standard_normal((rows, columns)) * std).astype(np.float32)

    embedding = normal(VOCAB_TOKENS, HIDDEN, 1.0)
    embedding[:, 0] = CONSTANT
    weights = {
        "model.embed_tokens.weight": embedding,
        "model.norm.weight": np.ones(HIDDEN, np.float32),
    }
    unit = HIDDEN**-0.5  # keeps the variance of a normalised input
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        weights |= {
            f"{prefix}.input_layernorm.weight": np.ones(HIDDEN, np.float32),
            f"{prefix}.post_attention_layernorm.weight": np.ones(HIDDEN, np.float32),
            f"{prefix}.self_attn.q_proj.weight": normal(HEADS * HEAD_DIM, HIDDEN, 2.25 * unit),
            f"{prefix}.self_attn.k_proj.weight": normal(KV_HEADS * HEAD_DIM, HIDDEN, 2.25 * unit),
            f"{prefix}.self_attn.v_proj.weight": normal(KV_HEADS * HEAD_DIM, HIDDEN, unit),
            f"{prefix}.self_attn.o_proj.weight": normal(HIDDEN, HEADS * HEAD_DIM, 3 * unit),
            f"{prefix}.mlp.gate_proj.weight": normal(FFN, HIDDEN, unit),
            f"{prefix}.mlp.up_proj.weight": normal(FFN, HIDDEN, unit),
            f"{prefix}.mlp.down_proj.weight": normal(HIDDEN, FFN, 2 * FFN**-0.5),
        }
        for reader in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
            weights[f"{prefix}.{reader}.weight"][:, 0] = 0
        for writer in ("self_attn.o_proj", "mlp.down_proj"):
            weights[f"{prefix}.{writer}.weight"][0] = 0
    head = normal(VOCAB_TOKENS, HIDDEN, 2 * unit)
    head[:, 0] = -BIAS
    head[spoken, 0] = 0
    weights["lm_head.weight"] = head
    return weights


def _configs(tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
    """The JSON files beside weights and tokenizer, by name."""
    special_ids = {
        f"{kind}_token_id": tokenizer.token_to_id(token) for kind, token in (("bos", BOS), ("eos", EOS), ("pad", PAD))
    }
    return {
        "config.json": {
            "model_name": "slos-tiny",
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": HIDDEN,
            "intermediate_size": FFN,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "head_dim": HEAD_DIM,
            "hidden_act": "silu",
            "max_position_embeddings": CONTEXT_TOKENS,
            "rms_norm_eps": 1e-05,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "attention_bias": False,
            "mlp_bias": False,
            "vocab_size": VOCAB_TOKENS,
            "dtype": "float32",
            **special_ids,
        },
        "generation_config.json": special_ids,
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": PAD,
            "model_max_length": CONTEXT_TOKENS,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    }
