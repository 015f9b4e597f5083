"""What the scheduler did, one JSON line an event, so that a run can be drawn and argued about afterwards.

Four kinds: a request arrived and was judged, a batch ran, a request ended, a conversation was kept. All times
are monotonic seconds of the scheduler process. What must stay true: writing never delays or ends a scheduler. Lines
gather in memory and go out in one system call at most every `FLUSH_EVERY_S`, when a request ends, and on
`flush`; a full disk switches the writer off with one warning.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import orjson
from pydantic import Field, TypeAdapter, ValidationError

FLUSH_EVERY_S = 0.5

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Arrive:
    """A request reached the scheduler and was admitted, declined, or taken as best effort.

    `reason` says why it was declined: what would have broken, when, and whose. `deadline_s` is when its last token is
    due (stage or program deadline), on the clock of `t_s`; None: open.
    """

    kind: Literal["arrive"] = "arrive"
    t_s: float
    rid: str
    program: str | None = None
    stage: str | None = None
    tier: Literal["standard", "best_effort"]
    declined: bool = False
    prompt_tokens: int
    ttft_target_ms: float | None = None
    tpot_target_ms: float | None = None
    deadline_s: float | None = None
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One batch: it started at `t_s` and its tokens left `measured_ms` later.

    decode  the requests that each got one token        prefill  prompt tokens computed, by request
    parked  running requests that sat this batch out    waiting  requests in the queue
    """

    kind: Literal["step"] = "step"
    t_s: float
    measured_ms: float
    predicted_ms: float | None = None
    decode: tuple[str, ...] = ()
    prefill: Mapping[str, int] = field(default_factory=dict)
    parked: tuple[str, ...] = ()
    waiting: int = 0
    context_tokens: int = 0

    @property
    def end_s(self) -> float:
        return self.t_s + self.measured_ms / 1000


@dataclass(frozen=True, kw_only=True)
class Finish:
    """A request ended; `receipt` is what its client got."""

    kind: Literal["finish"] = "finish"
    t_s: float
    rid: str
    output_tokens: int
    receipt: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Kept:
    """The KV of a conversation was kept for `kept_ms` after its call `rid` had ended, while its tool ran.

    `gap_ms` after that end its next call came; None: it did not while the KV was kept.
    """

    kind: Literal["kept"] = "kept"
    t_s: float
    rid: str
    kept_ms: float
    gap_ms: float | None = None


Event = Arrive | Step | Finish | Kept
_event: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="kind")])


class EventWriter:
    """Appends events to a new file at `path`; with `path` None every call returns at once.

    One writer, one server life: an older file at `path` is replaced.
    Raises `ValueError` where it can't be opened.
    """

    def __init__(self, path: str | Path | None) -> None:
        self._fd: int | None = None
        self._lines: list[bytes] = []
        self._flush_due_s = 0.0
        if path is None:
            return
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
        except OSError as error:
            raise ValueError(f"events={str(path)!r} can't be written: {error.strerror}") from None

    @property
    def on(self) -> bool:
        """False where nothing is recorded; callers may then spare themselves the arguments."""
        return self._fd is not None

    def arrive(
        self,
        *,
        t_s: float,
        rid: str,
        program: str | None,
        stage: str | None,
        tier: str,
        declined: bool,
        prompt_tokens: int,
        ttft_target_ms: float | None,
        tpot_target_ms: float | None,
        deadline_s: float | None,
        reason: str,
    ) -> None:
        """See `Arrive`."""
        if self._fd is None:
            return
        self._append(
            {
                "kind": "arrive",
                "t_s": t_s,
                "rid": rid,
                "program": program,
                "stage": stage,
                "tier": tier,
                "declined": declined,
                "prompt_tokens": prompt_tokens,
                "ttft_target_ms": ttft_target_ms,
                "tpot_target_ms": tpot_target_ms,
                "deadline_s": deadline_s,
                "reason": reason,
            }
        )

    def step(
        self,
        *,
        t_s: float,
        measured_ms: float,
        predicted_ms: float | None,
        decode: Sequence[str],
        prefill: Mapping[str, int],
        parked: Sequence[str],
        waiting: int,
        context_tokens: int,
    ) -> None:
        """See `Step`. `t_s` is the start of the step."""
        if self._fd is None:
            return
        self._append(
            {
                "kind": "step",
                "t_s": t_s,
                "measured_ms": measured_ms,
                "predicted_ms": predicted_ms,
                "decode": decode,
                "prefill": prefill,
                "parked": parked,
                "waiting": waiting,
                "context_tokens": context_tokens,
            }
        )
        if t_s >= self._flush_due_s:
            self._flush_due_s = t_s + FLUSH_EVERY_S
            self.flush()

    def finish(self, *, t_s: float, rid: str, output_tokens: int, receipt: Mapping[str, Any]) -> None:
        """See `Finish`. A reader sees everything up to here at once."""
        if self._fd is None:
            return
        self._append({"kind": "finish", "t_s": t_s, "rid": rid, "output_tokens": output_tokens, "receipt": receipt})
        self.flush()

    def kept(self, *, t_s: float, rid: str, kept_ms: float, gap_ms: float | None) -> None:
        """See `Kept`."""
        if self._fd is not None:
            self._append({"kind": "kept", "t_s": t_s, "rid": rid, "kept_ms": kept_ms, "gap_ms": gap_ms})

    def flush(self) -> None:
        """Hand over what has gathered; cheap when nothing has. To be called when the server idles, too."""
        if self._fd is None or not self._lines:
            return
        data = b"".join(self._lines)
        self._lines.clear()
        try:
            while data:
                data = data[os.write(self._fd, data) :]
        except OSError as error:
            logger.warning("events are off from here on: %s", error)
            self._close_fd()

    def close(self) -> None:
        """Flush and close; later calls do nothing."""
        self.flush()
        self._close_fd()

    def _append(self, event: dict[str, Any]) -> None:
        # orjson takes half a microsecond for a step of 32 requests, and writes infinity and NaN as null.
        self._lines.append(orjson.dumps(event, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY))

    def _close_fd(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def read_events(path: str | Path) -> list[Event]:
    """The events of a file, in the order they were written; fields that are not known here are passed over.

    A last line without its newline is still being written, or its writer was killed: it is left out.
    Raises `ValueError` naming file and line for anything malformed, and the file where it can't be read.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    events: list[Event] = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            events.append(_event.validate_json(line))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ValueError(f"{path}:{number}: not an event: {where + ': ' if where else ''}{first['msg']}") from None
    return events
