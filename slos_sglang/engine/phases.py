"""Seeing the end of a phase (of thinking, say) in a request's output, at the token that completes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that is used."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool = ...) -> str: ...


class MarkerWatch:
    """Finds texts, one after the other, in a growing token sequence, also when they are split over tokens.

    A token adds at least one byte to the text (special tokens are kept), so that a window of as many tokens as the
    marker has bytes, and a few for a character begun before it, always holds the whole marker. A marker is looked for
    after the token that completed the one before it, so that one token ends one phase at most.
    """

    def __init__(self, tokenizer: Tokenizer, markers: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._markers = list(markers)
        self._after = 0

    def completed_by(self, output_ids: Any, index: int) -> bool:
        """True if the next marker stands in the text of the tokens up to and including `output_ids[index]`.

        Ask for each token once, in order: the first to say so is the one that completes it.
        """
        if not self._markers:
            return False
        window = len(self._markers[0].encode()) + 4
        ids = list(output_ids[max(self._after, index + 1 - window) : index + 1])
        if self._markers[0] not in self._tokenizer.decode(ids, skip_special_tokens=False):
            return False
        self._markers.pop(0)
        self._after = index + 1
        return True
