"""A run as one picture: who was served when, what was due, and what each batch was made of.

`timeline_rows` turns events into rows and is pure; `draw_timeline` only draws them. What must stay true:
a time in a row is a time of the event file, and whether a deadline counts as kept follows the same
tolerance as attainment (measure/attainment.py), so the picture never disagrees with a receipt.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slos_sglang.policy.request import TOLERANCE
from slos_sglang.telemetry.events import Arrive, Event, Finish, Step

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_ROWS = 60

_PREFILL, _DECODE, _PARKED = "#E39A2D", "#2F6DB5", "#9AA3AD"
_KEPT, _MISSED, _PREDICTED = "#1E9E57", "#D6322B", "#8E3B8A"
_INK, _FAINT = "#22272E", "#8B939C"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One request. Times are seconds on the events' clock; spans are (start, end).

    prefill       (start, end, tokens) of each chunk       decode_s  when each token after the first left
    parked        while it was running but sat out         *_kept    None where there was no such deadline
    final_due_s   when its last token was due: by the deadline of its stage or by its pace, what is earlier
    attained      the verdict of its receipt
    """

    rid: str
    label: str
    group: str
    best_effort: bool
    declined: bool
    arrive_s: float
    finish_s: float | None
    prefill: tuple[tuple[float, float, int], ...]
    decode_s: tuple[float, ...]
    parked: tuple[tuple[float, float], ...]
    first_due_s: float | None
    first_kept: bool | None
    final_due_s: float | None
    final_kept: bool | None
    attained: bool | None


def timeline_rows(events: Iterable[Event]) -> tuple[Row, ...]:
    """The requests of `events`: guaranteed ones first, the stages of a program together, then by arrival."""
    events = tuple(events)
    arrived = {event.rid: event for event in events if isinstance(event, Arrive)}
    finished = {event.rid: event for event in events if isinstance(event, Finish)}
    steps: dict[str, list[Step]] = {rid: [] for rid in arrived}
    for step in events:
        if isinstance(step, Step):
            for rid in {*step.decode, *step.prefill, *step.parked} & arrived.keys():
                steps[rid].append(step)
    group_arrival_s: dict[str, float] = {}
    for arrive in arrived.values():
        group = arrive.program or arrive.rid
        group_arrival_s[group] = min(group_arrival_s.get(group, arrive.t_s), arrive.t_s)
    rows = (_row(arrive, steps[rid], finished.get(rid)) for rid, arrive in arrived.items())
    return tuple(sorted(rows, key=lambda r: (r.best_effort, group_arrival_s[r.group], r.group, r.arrive_s, r.rid)))


def _row(arrive: Arrive, steps: Sequence[Step], finish: Finish | None) -> Row:
    rid, receipt = arrive.rid, {} if finish is None else finish.receipt
    prefill = tuple((s.t_s, s.end_s, s.prefill[rid]) for s in steps if rid in s.prefill)
    decode_s = tuple(s.end_s for s in steps if rid in s.decode)
    # The last chunk brings the first token; without a later token or an end nobody knows whether it was the last.
    chunk_ends_s = [end for _, end, _ in prefill if not decode_s or end <= decode_s[0]]
    first_s = max(chunk_ends_s, default=None) if decode_s or finish else None
    first_due_s = None if arrive.ttft_target_ms is None else arrive.t_s + arrive.ttft_target_ms / 1e3
    first_kept = None
    if first_due_s is not None and (first_s is not None or finish is not None):
        first_kept = first_s is not None and first_s - arrive.t_s <= (first_due_s - arrive.t_s) * TOLERANCE
    final_due_s, final_kept = _final(arrive, finish, first_s, decode_s[-1] if decode_s else first_s)
    group = arrive.program or rid
    stage = (arrive.stage or "").rsplit("/", 1)[-1]
    return Row(
        rid=rid,
        label=f"{group[:8]}/{stage}" if stage else group[:8],
        group=group,
        best_effort=receipt.get("tier", arrive.tier) == "best_effort",
        declined=receipt.get("declined", arrive.declined),
        arrive_s=arrive.t_s,
        finish_s=None if finish is None else finish.t_s,
        prefill=prefill,
        decode_s=decode_s,
        parked=_parked(rid, steps),
        first_due_s=first_due_s,
        first_kept=first_kept,
        final_due_s=final_due_s,
        final_kept=final_kept,
        attained=receipt.get("attained"),
    )


def _final(
    arrive: Arrive, finish: Finish | None, first_s: float | None, last_s: float | None
) -> tuple[float | None, bool | None]:
    """When the last token was due, and whether it came: a deadline is strict, a pace has its tolerance.

    The pace of a request that thought first is left out: an event does not say when thinking ended.
    """
    due_s = arrive.deadline_s
    if finish is None:
        return due_s, None
    kept = due_s is None or (last_s is not None and last_s <= due_s)
    thought = "," in (finish.receipt.get("phases") or "")
    if arrive.tpot_target_ms is not None and not thought and first_s is not None and last_s is not None:
        start_s = max(first_s, arrive.t_s + (arrive.ttft_target_ms or 0.0) / 1e3)
        length_s = (finish.output_tokens - 1) * arrive.tpot_target_ms / 1e3
        kept = kept and last_s <= start_s + length_s * TOLERANCE
        due_s = start_s + length_s if due_s is None else min(due_s, start_s + length_s)
    return due_s, None if due_s is None else kept


def _parked(rid: str, steps: Sequence[Step]) -> tuple[tuple[float, float], ...]:
    """Steps that a request sat out one after the other make one span."""
    spans: list[tuple[float, float]] = []
    joins = False
    for step in steps:
        if rid in step.parked:
            start_s = spans.pop()[0] if joins else step.t_s
            spans.append((start_s, step.end_s))
        joins = rid in step.parked
    return tuple(spans)


def draw_timeline(
    events: Iterable[Event],
    path: str | Path,
    *,
    title: str = "Who was served when, and what was due",
    window_s: tuple[float, float] | None = None,
) -> None:
    """Write a PNG of 1600 x 1000 pixels to `path`.

    `window_s` picks a part of the run, in seconds since the first arrival; None shows all of it. At most
    `MAX_ROWS` requests are shown, best effort left out first.
    Raises `ValueError` where no request falls into the window.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    events = tuple(events)
    all_rows = timeline_rows(events)
    if not all_rows:
        raise ValueError("the events hold no request: nothing to draw")
    zero_s = min(row.arrive_s for row in all_rows)
    last_s = max((e.end_s if isinstance(e, Step) else e.t_s) for e in events)
    left_s, right_s = window_s or (0.0, (last_s - zero_s) * 1.01)
    inside = [
        row
        for row in all_rows
        if row.arrive_s - zero_s <= right_s and (last_s if row.finish_s is None else row.finish_s) - zero_s >= left_s
    ]
    if not inside:
        raise ValueError(f"window_s={window_s!r} holds no request: the run lasts {last_s - zero_s:.1f} s")
    rows = inside[:MAX_ROWS]
    steps = [e for e in events if isinstance(e, Step) and e.end_s - zero_s >= left_s and e.t_s - zero_s <= right_s]

    figure = Figure(figsize=(16, 10), dpi=100, facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        3, 1, height_ratios=(6.4, 1.3, 1.3), hspace=0.09, left=0.1, right=0.975, top=0.872, bottom=0.055
    )
    top = figure.add_subplot(grid[0])
    tokens = figure.add_subplot(grid[1], sharex=top)
    times = figure.add_subplot(grid[2], sharex=top)
    for axes in (top, tokens, times):
        axes.set(xlim=(left_s, right_s), autoscalex_on=False)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#C9CED4")
        axes.tick_params(colors=_INK, labelsize=9, length=3, color="#C9CED4")
        axes.grid(axis="x", color="#ECEFF2", linewidth=0.8)
        axes.set_axisbelow(True)
    _draw_rows(top, rows, zero_s, right_s)
    _draw_steps(tokens, times, steps, zero_s)
    top.tick_params(labelbottom=False)
    tokens.tick_params(labelbottom=False)
    times.set_xlabel("seconds since the first request", fontsize=10, color=_INK)
    figure.text(0.02, 0.966, title, fontsize=17, fontweight="bold", color=_INK, va="center")
    figure.text(0.02, 0.935, _summary(rows, steps, len(all_rows)), fontsize=11, color="#5B636C", va="center")
    _legend(figure)
    figure.savefig(path)


def _summary(rows: Sequence[Row], steps: Sequence[Step], in_file: int) -> str:
    promised = [row for row in rows if not row.best_effort]
    judged = [row for row in promised if row.attained is not None]
    parts = [f"{len(promised)} with a guarantee"]
    if judged:
        attained = sum(bool(row.attained) for row in judged)
        parts[0] += f", {attained} of {len(judged)} attained (the names of others are red)"
    parts += [f"{len(rows) - len(promised)} best effort", f"{len(steps):,} batches"]
    if in_file > len(rows):
        parts.append(f"{in_file - len(rows)} more in the file")
    return "  ·  ".join(parts)


def _draw_rows(axes: Axes, rows: Sequence[Row], zero_s: float, right_s: float) -> None:
    from matplotlib.collections import LineCollection

    shaded, group = False, ""
    point_size = min(34.0, 900 / len(rows))
    for y, row in enumerate(rows):
        strong = 0.32 if row.best_effort else 1.0
        if row.group != group and not row.best_effort:
            shaded, group = not shaded, row.group
        if shaded and not row.best_effort:
            axes.axhspan(y - 0.5, y + 0.5, color="#F4F6F9", linewidth=0, zorder=0)
        end_s = right_s if row.finish_s is None else row.finish_s - zero_s
        axes.hlines(y, row.arrive_s - zero_s, end_s, color="#C3C9D0", linewidth=0.9, alpha=strong, zorder=1)
        axes.broken_barh(
            [(start - zero_s, end - start) for start, end in row.parked],
            (y - 0.2, 0.4),
            facecolor="#E3E6EA",
            edgecolor=_PARKED,
            hatch="/////",
            linewidth=0,
            alpha=strong,
            zorder=2,
        )
        axes.add_collection(
            LineCollection(
                [[(t - zero_s, y - 0.3), (t - zero_s, y + 0.3)] for t in row.decode_s],
                colors=_DECODE,
                linewidths=1.1,
                alpha=strong,
                zorder=3,
            )
        )
        axes.broken_barh(
            [(start - zero_s, end - start) for start, end, _ in row.prefill],
            (y - 0.4, 0.8),
            facecolor=_PREFILL,
            edgecolor=_PREFILL,
            linewidth=0.9,
            alpha=strong,
            zorder=4,
        )
        for due_s, kept, marker, size, rise in (
            (row.first_due_s, row.first_kept, "v", 1.3 * point_size, 0.36),
            (row.final_due_s, row.final_kept, "D", point_size, 0.0),
        ):
            if due_s is not None and due_s - zero_s <= right_s:
                colour = {True: _KEPT, False: _MISSED, None: "white"}[kept]
                axes.scatter(
                    due_s - zero_s, y - rise, marker=marker, s=size, c=colour, zorder=6, linewidth=0.8,
                    edgecolor=_FAINT if kept is None else "white", alpha=max(strong, 0.55),
                )  # fmt: skip
        if row.declined:
            axes.scatter(row.arrive_s - zero_s, y, marker="x", s=point_size, c=_MISSED, linewidth=1.4, zorder=6)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_yticks(range(len(rows)), [row.label for row in rows])
    for text, row in zip(axes.get_yticklabels(), rows, strict=True):
        text.set_fontsize(max(6.0, min(9.5, 390 / len(rows))))
        text.set_color(_FAINT if row.best_effort else _MISSED if row.attained is False else _INK)
    promised = sum(not row.best_effort for row in rows)
    for start, end, name in ((0, promised, "guaranteed"), (promised, len(rows), "best effort")):
        if end - start > 2:
            axes.text(
                1.006, (start + end) / 2 - 0.5, name, transform=axes.get_yaxis_transform(), rotation=270,
                ha="left", va="center", fontsize=10, color=_FAINT,
            )  # fmt: skip
    if 0 < promised < len(rows):
        axes.axhline(promised - 0.5, color="#AEB5BD", linewidth=0.9, linestyle=(0, (4, 3)))


def _draw_steps(tokens: Axes, times: Axes, steps: Sequence[Step], zero_s: float) -> None:
    start = np.array([step.t_s - zero_s for step in steps])
    measured = np.array([step.measured_ms for step in steps])
    predicted = np.array([np.nan if step.predicted_ms is None else step.predicted_ms for step in steps])
    decode = np.array([len(step.decode) for step in steps])
    prefill = np.array([sum(step.prefill.values()) for step in steps])
    for low, high, colour in ((0 * decode, decode, _DECODE), (decode, decode + prefill, _PREFILL)):
        _boxes(tokens, start, start + measured / 1e3, low, high, colour)
    tokens.set_ylabel("tokens a batch", fontsize=10, color=_INK)
    most = float(np.max(decode + prefill, initial=1))
    # A chunk has a hundred times the tokens of a decode: the square root lets both be seen.
    tokens.set_yscale("function", functions=(lambda y: np.sqrt(np.maximum(y, 0)), np.square))
    tokens.set_ylim(0, most * 1.1)
    ticks = [0.0]
    for count in (5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000):
        if count**0.5 - ticks[-1] ** 0.5 > 0.2 * most**0.5 and count <= most:
            ticks.append(count)
    tokens.set_yticks(ticks)
    times.scatter(start, measured, s=7, c=_INK, alpha=0.55, linewidths=0, zorder=3)
    times.scatter(start, predicted, s=9, marker="_", c=_PREDICTED, linewidths=1.1, zorder=4)
    times.set_ylabel("ms a batch", fontsize=10, color=_INK)
    ceiling = np.percentile(measured, 99) * 1.5 if len(steps) else 1.0
    times.set_ylim(0, max(1.0, float(ceiling)))
    error = np.abs(predicted - measured) / np.maximum(measured, 1e-9)
    if np.isfinite(error).any():
        text = f"median error of the prediction {np.nanmedian(error):.0%}"
        times.text(0.995, 0.94, text, transform=times.transAxes, ha="right", va="top", fontsize=9, color=_PREDICTED)


def _boxes(axes: Axes, left: Any, right: Any, low: Any, high: Any, colour: str) -> None:
    from matplotlib.collections import PolyCollection

    corners = np.stack(
        [np.stack(pair, axis=-1) for pair in ((left, low), (left, high), (right, high), (right, low))], axis=1
    )[high > low]
    axes.add_collection(PolyCollection(list(corners), facecolors=colour, edgecolors=colour, linewidths=0.4))


def _legend(figure: Any) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    def point(marker: str, colour: str, label: str, size: float = 7) -> Line2D:
        return Line2D([], [], marker=marker, color=colour, linestyle="", markersize=size, label=label)

    figure.legend(
        handles=[
            Patch(color=_PREFILL, label="prefill chunk"),
            point("|", _DECODE, "one token", 10),
            Patch(facecolor="#E3E6EA", edgecolor=_PARKED, hatch="/////", linewidth=0, label="parked"),
            point("v", _KEPT, "first token due: kept"),
            point("D", _KEPT, "last token due: kept", 6),
            Line2D([], [], marker="v", color=_MISSED, linestyle="", label="due: missed"),
            point("x", _MISSED, "declined", 6),
            point("o", _INK, "measured", 4),
            point("_", _PREDICTED, "predicted", 9),
        ],
        loc="center left",
        bbox_to_anchor=(0.012, 0.903),
        ncols=9,
        fontsize=10,
        frameon=False,
        columnspacing=1.9,
        handletextpad=0.5,
        labelcolor=_INK,
    )
