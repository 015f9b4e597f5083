"""Trains the embedded model: a small Llama that calls tools, on one CPU thread, from nothing but `tiny_episodes`.

    python tools/train_tiny_agent.py DIR [--seed S]

The same seed gives the same weights on the same machine. A run can be stopped and started again: it goes on from its
checkpoint in DIR. What makes copying of names learnable in minutes: their letters and digits are tokens of their own
while all other words are whole tokens; attention and positions start anew with every conversation; practice in plain
copying comes first; and Muon moves the matrices (Jordan et al. 2024).
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tiny_conversations import Episode
from tiny_episodes import Source
from tiny_tokenizer import EOS, PAD, agent_tokenizer
from tokenizers import Tokenizer
from torch import Tensor, nn

HIDDEN, LAYERS, HEADS, HEAD_DIM, FFN = 192, 4, 6, 32, 512
ROPE_THETA, NORM_EPS, CONTEXT_TOKENS = 10_000.0, 1e-5, 4096
STEP_TOKENS, ROW_TOKENS = 2048, 256
WARM_UP_STEPS, COPYING_STEPS, COPYING_SHARE = 100, 400, 0.6
MATRIX_LR, LR, WEIGHT_DECAY, LONGEST_GRADIENT = 5e-3, 3e-3, 0.01, 1.0
CHECKPOINT_STEPS, REPORT_STEPS = 100, 50
IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class Part:
    """So many steps. The learning rates warm up to a share of the full ones, stay, and fall to nothing at the end.

    mix  how often each kind of episode comes: by how hard it is, and how much it is used
    """

    steps: int
    peak: float
    decay_steps: int
    mix: Mapping[str, int]


# The second part dwells on what is not yet sure by then.
PARTS = (
    Part(steps=3800, peak=1.0, decay_steps=2200, mix={
        "calc": 14, "lookup": 9, "highest": 12, "difference": 9, "higher": 8, "together": 7, "product": 8, "unknown": 7,
        "outside": 8, "think_sum": 7, "think_compare": 8, "think_outside": 2, "copy": 8, "drill": 4,
    }),
    Part(steps=1200, peak=0.5, decay_steps=1200, mix={
        "calc": 18, "lookup": 10, "highest": 18, "difference": 6, "higher": 7, "together": 5, "product": 7,
        "unknown": 8, "outside": 10, "think_sum": 7, "think_compare": 11, "think_outside": 1, "copy": 8, "drill": 3,
    }),
)  # fmt: skip
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ ('USER' if message['role'] == 'tool' else message['role'] | upper) + ':' + (message['content'] or '') + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

Tokens = tuple[list[int], list[int]]  # of an episode, and for each the one to come


class Attention(nn.Module):
    """The modules and their names are those of the files that transformers and SGLang load."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in "qkvo")

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        """`x` of (rows, tokens, hidden); `mask` says which token may see which."""
        q, k, v = (
            p(x).unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        seen = F.scaled_dot_product_attention(turned(q, cos, sin), turned(k, cos, sin), v, attn_mask=mask)
        return self.o_proj(seen.transpose(1, 2).flatten(2))


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions, as Llama has them: the two halves of a head turn against each other."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class FeedForward(nn.Module):
    """Two ways in, one way out."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(HIDDEN, FFN, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(FFN, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Attention, then the feed-forward part, each beside a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = (nn.RMSNorm(HIDDEN, NORM_EPS) for _ in range(2))
        self.self_attn, self.mlp = Attention(), FeedForward()

    def forward(self, h: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        """The residual stream, one layer on."""
        h = h + self.self_attn(self.input_layernorm(h), cos, sin, mask)
        return h + self.mlp(self.post_attention_layernorm(h))


class Llama(nn.Module):
    """Embedding, layers, norm; the embedding is the output layer too."""

    def __init__(self, vocab_tokens: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab_tokens, HIDDEN)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(HIDDEN, NORM_EPS)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                std = 0.02 if "embed" in name else 0.6 * weight.shape[1] ** -0.5
                nn.init.normal_(weight, std=std / (2 * LAYERS) ** 0.5 if "o_proj" in name or "down" in name else std)

    def forward(self, ids: Tensor, positions: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        """The mean loss over the tokens that have labels."""
        speeds = ROPE_THETA ** (-torch.arange(0, HEAD_DIM, 2, dtype=torch.float32) / HEAD_DIM)
        angles = (positions[..., None] * speeds)[:, None]
        cos, sin = angles.cos(), angles.sin()
        h = self.embed_tokens(ids)
        for layer in self.layers:
            h = layer(h, cos, sin, mask)
        logits = F.linear(self.norm(h), self.embed_tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED)


def encoded(tokenizer: Tokenizer, episode: Episode) -> Tokens:
    """An episode's tokens and, for each, the one to come: only what the model is to write has one.

    Where a reply ends, the end token is to come, though the conversation goes on with the next prompt instead.
    """
    ids: list[int] = []
    labels: list[int] = []
    end = tokenizer.encode(EOS).ids
    for turn in episode.turns:
        prompt, reply = tokenizer.encode(turn.prompt).ids, tokenizer.encode(turn.reply).ids
        ids += prompt + reply
        if turn.learned:
            labels += [IGNORED] * (len(prompt) - 1) + reply + (end if turn.ends else [IGNORED])
        else:
            labels += [IGNORED] * (len(prompt) + len(reply))
    return ids, labels


def batches(tokenizer: Tokenizer, seed: int) -> Iterator[tuple[Tensor, ...]]:
    """The steps' rows, filled with whole episodes; practice in copying soon gives way to the mix.

    Rows are short, because attention over a row costs its square, until enough long episodes wait for long rows.
    """
    source, rng = Source(seed), random.Random(f"mix {seed}")
    short: list[Tokens] = []
    long: list[Tokens] = []
    for step, mix in enumerate(part.mix for part in PARTS for _ in range(part.steps)):
        copying = max(0.0, COPYING_SHARE * (1 - step / COPYING_STEPS))
        while sum(len(ids) for ids, _ in short) < 3 * STEP_TOKENS:
            kind = "copy" if rng.random() < copying else rng.choices(list(mix), list(mix.values()))[0]
            made = encoded(tokenizer, source.episode(kind))
            (short if len(made[0]) <= ROW_TOKENS else long).append(made)
        many = sum(len(ids) for ids, _ in long) > STEP_TOKENS
        yield packed(long if many else short, ROW_TOKENS * (1 + many))


def packed(episodes: list[Tokens], row_tokens: int) -> tuple[Tensor, ...]:
    """Tokens, positions, who sees whom, labels: of episodes taken off the list, in order, each seeing only itself."""
    ids = torch.zeros(STEP_TOKENS // row_tokens, row_tokens, dtype=torch.long)
    labels, positions, owner = torch.full_like(ids, IGNORED), torch.zeros_like(ids), torch.zeros_like(ids)
    for row in range(len(ids)):
        at, count = 0, 0
        while (n := next((n for n, e in enumerate(episodes) if at + len(e[0]) <= row_tokens), None)) is not None:
            tokens, following = episodes.pop(n)
            count, span = count + 1, slice(at, at + len(tokens))
            ids[row, span], labels[row, span] = torch.tensor(tokens), torch.tensor(following)
            positions[row, span], owner[row, span] = torch.arange(len(tokens)), count
            at = span.stop
    order = torch.arange(row_tokens)
    mask = (owner[:, :, None] == owner[:, None, :]) & (order[:, None] >= order[None, :])
    return ids, positions, mask[:, None], labels


def optimizers(model: Llama) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for all else; each group remembers its full learning rate."""
    inner = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n]
    outer = [p for n, p in model.named_parameters() if p.dim() != 2 or "embed" in n]
    return [
        torch.optim.Muon(
            [{"params": inner, "full_lr": MATRIX_LR}],
            momentum=0.95, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(
            [{"params": outer, "full_lr": LR}], betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY, fused=True
        ),
    ]  # fmt: skip


def learning_rates() -> list[float]:
    """Of each step, as a share of the full ones."""
    return [
        part.peak * min(1.0, (step + 1) / WARM_UP_STEPS, (part.steps - step) / part.decay_steps)
        for part in PARTS
        for step in range(part.steps)
    ]


def train(out: Path, seed: int) -> None:
    """The whole run, or what is left of it; progress on stdout."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    tokenizer = agent_tokenizer()
    model = Llama(tokenizer.get_vocab_size())
    opts = optimizers(model)
    loss_of, rates = torch.compile(model), learning_rates()
    checkpoint, first, start_s, losses = out / "checkpoint.pt", 0, time.process_time(), []
    if checkpoint.exists():
        state = torch.load(checkpoint)
        first, start_s = state["step"], start_s - state["cpu_s"]
        model.load_state_dict(state["model"])
        for opt, kept in zip(opts, state["optimizers"], strict=True):
            opt.load_state_dict(kept)
    for step, batch in enumerate(batches(tokenizer, seed)):
        if step < first:
            continue
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(*batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), LONGEST_GRADIENT)
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = group["full_lr"] * rates[step]
            opt.step()
            opt.zero_grad()
        losses.append(loss.item())
        done, cpu_s = step + 1, time.process_time() - start_s
        if done % REPORT_STEPS == 0:
            print(
                f"step {done}: loss {sum(losses[-REPORT_STEPS:]) / REPORT_STEPS:.4f}, {cpu_s:.0f} s of CPU", flush=True
            )
        if done % CHECKPOINT_STEPS == 0:
            save(out, model, tokenizer, seed)
            kept = {"model": model.state_dict(), "optimizers": [opt.state_dict() for opt in opts]}
            torch.save({"step": done, "cpu_s": cpu_s, **kept}, checkpoint)


def save(out: Path, model: Llama, tokenizer: Tokenizer, seed: int) -> None:
    """Write what transformers and SGLang load: weights in bfloat16, to be computed with in float32."""
    out.mkdir(parents=True, exist_ok=True)
    weights = {f"model.{n}": p.detach().to(torch.bfloat16).contiguous() for n, p in model.named_parameters()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(out / "tokenizer.json"))
    ids = {"eos_token_id": tokenizer.token_to_id(EOS), "pad_token_id": tokenizer.token_to_id(PAD)}
    config = {
        "model_name": "slos-tiny", "training_seed": seed, "architectures": ["LlamaForCausalLM"], "model_type": "llama",
        "hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS, "head_dim": HEAD_DIM, "hidden_act": "silu",
        "max_position_embeddings": CONTEXT_TOKENS, "rms_norm_eps": NORM_EPS, "rope_theta": ROPE_THETA,
        "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False,
        "vocab_size": tokenizer.get_vocab_size(), "dtype": "float32", "bos_token_id": None, **ids,
    }  # fmt: skip
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS, "pad_token": PAD,
        "model_max_length": CONTEXT_TOKENS, "clean_up_tokenization_spaces": False, "chat_template": CHAT_TEMPLATE,
    }  # fmt: skip
    for name, content in (
        ("config.json", config), ("generation_config.json", ids), ("tokenizer_config.json", tokenizer_config),
    ):  # fmt: skip
        (out / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    train(args.out, args.seed)


if __name__ == "__main__":
    main()
