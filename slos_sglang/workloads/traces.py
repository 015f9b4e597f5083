"""Readers of published traces: arrivals and lengths as their owners published them.

    Azure LLM inference traces   CSV: TIMESTAMP, ContextTokens, GeneratedTokens (AzurePublicDataset, CC BY 4.0;
                                 Patel et al., Splitwise, ISCA 2024)
    summarization lengths        CSV: num_prefill_tokens, num_decode_tokens, ... (microsoft/vidur, MIT); no arrivals
    Mooncake                     JSON lines: timestamp (ms), input_length, output_length, hash_ids (kvcache-ai, FAST'25)

The package holds none of their data: users point it at their own copy. Wrong input raises `ValueError` with the file's
name and the line number.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

DATA_ENV = "SLOS_SGLANG_DATA"
AZURE_CODE, AZURE_CONV = "azure_2023_code*.csv", "azure_2023_conv*.csv"
ARXIV = "arxiv_summarization*.csv"
# Mooncake's hash ids stand for blocks of this many tokens.
MOONCAKE_BLOCK_TOKENS = 512
_BESIDE_CHECKOUT = Path(__file__).resolve().parents[2].parent / "shared" / "data"


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """One call of a trace; `arrival_s` counts from the trace's first call."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int = 0


def data_dir(given: Path | None = None) -> Path:
    """Where the published files lie: `given`, else the environment's SLOS_SGLANG_DATA, else beside the checkout.

    Raises `ValueError` where there is no such folder.
    """
    named = given or (Path(os.environ[DATA_ENV]) if os.environ.get(DATA_ENV) else None)
    folder = named or _BESIDE_CHECKOUT
    if not folder.is_dir():
        hint = f"point --data or {DATA_ENV} at a folder with the published trace files"
        raise ValueError(f"data must be a folder, not {str(folder)!r}" if named else f"no trace data: {hint}")
    return folder


def find(folder: Path, pattern: str) -> Path:
    """The one file of `folder` that `pattern` names. Raises `ValueError` where there is none."""
    files = sorted(folder.glob(pattern))
    if not files:
        raise ValueError(f"data folder {str(folder)!r} holds no file named {pattern}")
    return files[0]


def read_azure(file: Path) -> list[Arrival]:
    """An Azure trace, by time."""
    columns = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
    return _from_zero([_read(file, number, _azure, row) for number, row in _rows(file, columns)])


def read_lengths(file: Path) -> list[Arrival]:
    """Summarization lengths; all arrive at 0."""
    columns = ("num_prefill_tokens", "num_decode_tokens")
    return [_read(file, number, lambda *row: _call(0.0, *row), row) for number, row in _rows(file, columns)]


def read_mooncake(file: Path) -> list[Arrival]:
    """A Mooncake trace, by time; a prompt's leading blocks that an earlier prompt had count as cached."""
    rows: list[Arrival] = []
    seen: set[int] = set()
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            body = json.loads(line)
            call = _call(float(body["timestamp"]) / 1e3, body["input_length"], body["output_length"])
            hits = 0
            for block in body.get("hash_ids", ()):
                if block not in seen:
                    break
                hits += 1
            seen.update(body.get("hash_ids", ()))
        except (ValueError, TypeError, KeyError) as error:
            what = f"no field {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{file}, line {number}: {what}") from None
        cached_tokens = min(hits * MOONCAKE_BLOCK_TOKENS, call.prompt_tokens - 1)
        rows.append(replace(call, cached_tokens=cached_tokens))
    return _from_zero(rows)


def _rows(file: Path, columns: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """These columns of a CSV file, row by row with their line numbers."""
    with file.open(encoding="utf-8", newline="") as lines:
        reader = csv.DictReader(lines)
        for column in columns:
            if column not in (reader.fieldnames or ()):
                raise ValueError(f"{file}, line 1: no column {column!r}")
        for row in reader:
            yield reader.line_num, [row[column] or "" for column in columns]


def _read(file: Path, number: int, parse: Callable[..., Arrival], row: Sequence[str]) -> Arrival:
    try:
        return parse(*row)
    except ValueError as error:
        raise ValueError(f"{file}, line {number}: {error}") from None


def _azure(timestamp: str, prompt_tokens: str, output_tokens: str) -> Arrival:
    # Seven digits of a second; Python reads six.
    at = datetime.fromisoformat(timestamp[:26]).replace(tzinfo=UTC)
    return _call(at.timestamp(), prompt_tokens, output_tokens)


def _call(arrival_s: float, prompt_tokens: object, output_tokens: object) -> Arrival:
    prompt, output = int(str(prompt_tokens)), int(str(output_tokens))
    if prompt < 1 or output < 1:
        raise ValueError(f"lengths must be at least 1, not {prompt} and {output}")
    return Arrival(arrival_s=arrival_s, prompt_tokens=prompt, output_tokens=output)


def _from_zero(rows: Sequence[Arrival]) -> list[Arrival]:
    start_s = min((row.arrival_s for row in rows), default=0.0)
    return sorted((replace(row, arrival_s=row.arrival_s - start_s) for row in rows), key=lambda row: row.arrival_s)
