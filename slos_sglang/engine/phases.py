"""Seeing the end of thinking in a request's output, at the token that completes it."""

from __future__ import annotations

from typing import Any, Protocol


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that is used."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool = ...) -> str: ...


class MarkerWatch:
    """Finds a text in a growing token sequence, also when it is split over tokens.

    A token adds at least one byte to the text (special tokens are kept), so that a window of as many tokens as the
    marker has bytes, and a few for a character begun before it, always holds the whole marker.
    """

    def __init__(self, tokenizer: Tokenizer, marker: str) -> None:
        self._tokenizer = tokenizer
        self._marker = marker
        self._window = len(marker.encode()) + 4

    def completed_by(self, output_ids: Any, index: int) -> bool:
        """True if the marker stands in the text of the tokens up to and including `output_ids[index]`, at their end."""
        window = list(output_ids[max(0, index + 1 - self._window) : index + 1])
        return self._marker in self._tokenizer.decode(window, skip_special_tokens=False)
