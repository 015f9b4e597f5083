"""The tokenizer of the embedded model: a word it was taught is one token, all else falls to letters.

No word of a name is in the vocabulary, so that a name is the same letters wherever it stands and can be copied. The
fixed text of the programs is one token each time, which keeps conversations short. Any text survives encode and decode.
"""

from __future__ import annotations

import re

from slos_sglang.programs import tool_agent
from tiny_conversations import DONE, NOW_ANSWER, THINK_SYSTEM
from tiny_episodes import KINDS, Source
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

EOS, PAD = "<|end|>", "<|pad|>"
THINK = ("<think>", "</think>")
PHRASES = (
    f"SYSTEM:{tool_agent.SYSTEM}\nUSER:",
    f"SYSTEM:{THINK_SYSTEM}\nUSER:",
    f"\nUSER:{NOW_ANSWER}\nASSISTANT:",
    '{"tool": "calculator", "args": "',
    '{"tool": "lookup", "args": "highest ',
    '{"tool": "lookup", "args": "',
    '{"tool": "search", "args": "',
    DONE,
    "error: no mountain named ",
    "error: nothing about ",
    "SYSTEM:",
    "\nUSER:",
    "\nASSISTANT:",
    '"}',
    "): ",
    "; ",
    ", ",
    *(f" {op} " for op in "+-*/="),
)
WORD = r" ?[a-z]+|[A-Z][A-Za-z]*|[0-9]| ?[^A-Za-z0-9\s]+|\s"


class Blank(Source):
    """Conversations without names, numbers or words from outside: what is left is what the model is taught."""

    def __init__(self) -> None:
        super().__init__(0)
        self._words = ["a"]

    def name(self) -> str:
        return str(self._rng.randint(1, 10**9))

    def word(self) -> str:
        return "a"

    def stray_question(self) -> str:
        return "aa"


def agent_tokenizer() -> Tokenizer:
    """The tokenizer, always the same."""
    source = Blank()
    texts = [turn.prompt + turn.reply for kind in KINDS for _ in range(300) for turn in source.episode(kind).turns]
    pattern = "|".join([*(re.escape(phrase) for phrase in PHRASES), WORD])
    taught = {
        token
        for text in texts
        for token in re.findall(pattern, text.replace("</think>", "\n"))
        if len(token) > 1 and not token[0].islower() and token[0] != ")"
    }
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [to_bytes.pre_tokenize_str(word)[0][0] for word in sorted(taught | set(PHRASES))]
    vocabulary = {token: number for number, token in enumerate([EOS, PAD, *alphabet, *words])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([EOS, PAD])
    tokenizer.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in THINK])
    return tokenizer
