"""Figures of an evaluation, from plain numbers; nothing here runs or measures anything.

What must stay true: a series looks the same in every figure of a set (`COLOURS` has its colour and its place),
and the same numbers give the same picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {
    "slos": "#1E9E57",
    "slos, estimated": "#8FD0A9",
    "slos, admitted": "#5E7F6B",
    "qoserve": "#8E3B8A",
    "edf": "#C77FC2",
    "vllm": "#2F6DB5",
    "vllm_v1": "#86B0E0",
    "sarathi": "#E39A2D",
    "sglang": "#D6322B",
    "sglang_mixed": "#E98D89",
    "distserve": "#8B939C",
}
_INK = "#22272E"
Series = Mapping[str, Sequence[tuple[float, float]]]


def bars(
    file: Path, groups: Sequence[str], values: Mapping[str, Sequence[float | None]], *, title: str, unit: str
) -> None:
    """Grouped bars: for each series one value a group (None: not measured), in `unit`."""
    figure, axes = _figure(1, 1, height=3.6)
    ax = axes[0]
    names = _ordered(values)
    width = 0.8 / len(names)
    for number, name in enumerate(names):
        points = [(at, value) for at, value in enumerate(values[name]) if value is not None]
        ax.bar([at - 0.4 + (number + 0.5) * width for at, _ in points], [v for _, v in points], width, **_style(name))
    ax.set_xticks(range(len(groups)), groups)
    ax.set_title(title, fontsize=9)
    ax.set_ylabel(unit)
    _save(figure, axes, file)


def curves(
    file: Path, panels: Mapping[str, Series], *, x: str, y: str, columns: int = 3, mark_x: float | None = None
) -> None:
    """One panel of lines for each entry of `panels`; `mark_x` draws a vertical line."""
    rows = -(-len(panels) // columns)
    figure, axes = _figure(rows, min(columns, len(panels)), height=2.6 * rows)
    for ax, (title, series) in zip(axes, panels.items(), strict=False):
        for name in _ordered(series):
            ax.plot([a for a, _ in series[name]], [b for _, b in series[name]], marker=".", **_style(name))
        if mark_x is not None:
            ax.axvline(mark_x, color=_INK, linewidth=0.6, linestyle=":")
        ax.set_title(title, fontsize=9)
        ax.set_xlabel(x)
        ax.set_ylabel(y)
        ax.set_ylim(bottom=0)
    _save(figure, axes[: len(panels)], file)


def time_series(
    file: Path,
    panels: Mapping[str, Series],
    *,
    marks: Mapping[str, float],
    log: Sequence[str],
    burst_s: tuple[float, float],
) -> None:
    """Panels over time, one below the other, each titled with its unit.

    marks    a horizontal line in a panel: a target
    log      panels with a logarithmic scale
    burst_s  when the burst came, shaded
    """
    figure, axes = _figure(len(panels), 1, height=2.1 * len(panels))
    for ax, (title, series) in zip(axes, panels.items(), strict=True):
        for name in _ordered(series):
            ax.plot([a for a, _ in series[name]], [b for _, b in series[name]], linewidth=1.2, **_style(name))
        if title in marks:
            ax.axhline(marks[title], color=_INK, linewidth=0.6, linestyle=":")
        ax.axvspan(*burst_s, color="#E39A2D", alpha=0.15, linewidth=0)
        ax.set_title(title, fontsize=9)
        if title in log:
            ax.set_yscale("log")
        else:
            ax.set_ylim(bottom=0)
    axes[-1].set_xlabel("arrival, s")
    _save(figure, axes, file)


def _figure(rows: int, columns: int, *, height: float) -> tuple[Figure, list[Axes]]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, columns, figsize=(9, height), squeeze=False, layout="constrained")
    flat = [ax for row in axes for ax in row]
    for ax in flat:
        ax.grid(axis="y", linewidth=0.4, alpha=0.5)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=8)
    return figure, flat


def _save(figure: Figure, axes: Sequence[Axes], file: Path) -> None:
    from matplotlib import pyplot

    used = {id(ax) for ax in axes}
    for ax in figure.axes:
        if id(ax) not in used:
            ax.set_visible(False)
    handles: dict[str, Any] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6, fontsize=8, frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def _ordered(names: Mapping[str, Any]) -> list[str]:
    places = list(COLOURS)
    return sorted(names, key=lambda name: (places.index(name) if name in COLOURS else len(places), name))


def _style(name: str) -> dict[str, Any]:
    return {"label": name, "color": COLOURS.get(name, _INK)}
