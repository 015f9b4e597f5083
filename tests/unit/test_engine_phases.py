"""The end of thinking is seen at the token that completes it, however a tokenizer splits it."""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer

from slos_sglang.engine.phases import MarkerWatch
from slos_sglang.tiny_model import make_tiny_model

MARKERS = ("</think>", "\n\n---\nAnswer:", "Denkende¡", "終わり", "🙂!", "x")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    make_tiny_model(folder)
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def byte_tokens(tokenizer: Tokenizer) -> dict[int, int]:
    """The token of each byte, by the alphabet of byte-level BPE: printable bytes stand for themselves."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {byte: chr(byte) for byte in plain}
    letters |= {byte: chr(256 + n) for n, byte in enumerate(b for b in range(256) if b not in letters)}
    return {byte: tokenizer.token_to_id(letter) for byte, letter in letters.items()}


def test_a_thousand_random_splits(tokenizer: Tokenizer) -> None:
    """Pieces of text and single bytes, also inside a character; the whole text decoded anew is the judge."""
    rng = random.Random(0)
    of_byte = byte_tokens(tokenizer)
    filler = "so 2 and 2 </thin <think> is é漢🙂 Answer then \n\n--"
    completed = 0
    for _ in range(1000):
        marker = rng.choice(MARKERS)
        before = "".join(rng.choices(filler, k=rng.randint(0, 12)))
        text = before + marker + "".join(rng.choices(filler, k=rng.randint(0, 12)))
        ids: list[int] = []
        while text:
            size = rng.randint(1, 6)
            piece, text = text[:size], text[size:]
            if rng.random() < 0.5:
                ids += tokenizer.encode(piece, add_special_tokens=False).ids
            else:
                ids += [of_byte[byte] for byte in piece.encode()]
        watch = MarkerWatch(tokenizer, [marker])
        seen = next((i for i in range(len(ids)) if watch.completed_by(ids, i)), None)
        whole = (i for i in range(len(ids)) if marker in tokenizer.decode(ids[: i + 1], skip_special_tokens=False))
        expected = next(whole, None)
        assert seen == expected, (marker, ids)
        completed += seen is not None
    assert completed == 1000


def test_several_markers_in_a_thousand_random_splits(tokenizer: Tokenizer) -> None:
    """Each is found at the token that completes it, after the one before it; also where all are the same text."""
    rng = random.Random(1)
    of_byte = byte_tokens(tokenizer)
    found = 0
    for _ in range(1000):
        markers = [rng.choice(MARKERS) for _ in range(rng.randint(2, 4))]
        text = "".join(f"{rng.choice(('', 'so ', 'é漢', '<thi'))}{marker}" for marker in markers) + "end"
        ids: list[int] = []
        while text:
            size = rng.randint(1, 6)
            piece, text = text[:size], text[size:]
            whole = tokenizer.encode(piece, add_special_tokens=False).ids
            ids += whole if rng.random() < 0.5 else [of_byte[byte] for byte in piece.encode()]
        watch = MarkerWatch(tokenizer, markers)
        seen = [i for i in range(len(ids)) if watch.completed_by(ids, i)]
        expected, after = [], 0
        for marker in markers:
            ends = (i for i in range(after, len(ids)) if marker in tokenizer.decode(ids[after : i + 1], False))
            if (end := next(ends, None)) is None:
                break
            expected.append(end)
            after = end + 1
        assert seen == expected, (markers, ids)
        found += len(seen)
    assert found > 2000


def test_a_special_token_can_end_thinking(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode("a b", add_special_tokens=False).ids, tokenizer.token_to_id("</think>")]
    watch = MarkerWatch(tokenizer, ["</think>"])
    assert [watch.completed_by(ids, i) for i in range(len(ids))] == [False] * (len(ids) - 1) + [True]


def test_only_a_bounded_window_is_decoded() -> None:
    """The cost of a token does not grow with the output."""
    lengths = []

    class Counting:
        def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
            lengths.append(len(token_ids))
            return ""

    watch = MarkerWatch(Counting(), ["</think>"])
    for index in range(0, 10_000, 999):
        watch.completed_by(range(10_000), index)
    assert max(lengths) < 16
