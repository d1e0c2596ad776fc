"""A chart without its picture: the legend in HTML, the data as a table, one sentence."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dataflex.report.figures import Figure, Trace, unpacked
from dataflex.report.measure import evenly

DATA_ROWS = 50
"""Most rows of the data below a chart. If a chart has more curves, it has a row for each."""

_SPOKEN = 3
"""Most curves whose values the sentence gives."""

_DASHES = {"dash": "7 3", "dot": "2 3", "dashdot": "7 3 2 3", "longdash": "12 4"}
# Paths of the symbols in :mod:`dataflex.report.figures` and of a chance level, around (17, 6).
_SYMBOLS = {
    "circle": "M13 6a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "square": "M13 2h8v8h-8z",
    "diamond": "M17 1l5 5l-5 5l-5-5z",
    "triangle-up": "M17 1l5 9h-10z",
    "x": "M13 3.5l1.5-1.5l2.5 2.5l2.5-2.5l1.5 1.5l-2.5 2.5l2.5 2.5l-1.5 1.5l-2.5-2.5l-2.5 2.5l-1.5-1.5l2.5-2.5z",
    "cross": "M15.5 1h3v3.5h3.5v3h-3.5v3.5h-3v-3.5h-3.5v-3h3.5z",
    "star": "M17 0l1.6 4.2h4.4l-3.5 2.7l1.3 4.3l-3.8-2.6l-3.8 2.6l1.3-4.3l-3.5-2.7h4.4z",
    "triangle-down": "M12 2h10l-5 9z",
    "line-ns-open": "M16 0h2v12h-2z",
}
_RISING = "".join(f"M{x} 12l12-12" for x in range(-8, 34, 6))
_FALLING = "".join(f"M{x} 0l12 12" for x in range(-8, 34, 6))
_UPRIGHT = "".join(f"M{x} 0v12" for x in range(3, 34, 6))
_LEVEL = "M0 4h34M0 8h34"
_PATTERNS = {
    "/": _RISING,
    "\\": _FALLING,
    "x": _RISING + _FALLING,
    "|": _UPRIGHT,
    "-": _LEVEL,
    "+": _UPRIGHT + _LEVEL,
    ".": "".join(f"M{x} {y}h2" for x in range(1, 34, 5) for y in (3, 9)),
}


@dataclass(frozen=True)
class LegendItem:
    """An entry of a legend: its text, its symbol (SVG), and the indices of the traces that it shows and hides."""

    name: str
    swatch: str
    traces: list[int]


@dataclass(frozen=True)
class Data:
    """The data of a chart as a table."""

    header: list[str]
    rows: list[list[str]]
    note: str
    """The number of points that are not listed. Empty if all are."""


@dataclass(frozen=True)
class _Series:
    """One trace: its name, positions and values."""

    name: str
    places: list[Any]
    values: list[Any]
    bars: list[str]
    """Text of each value's error bar. Empty without error bars."""


def legend(figure: Figure) -> list[LegendItem]:
    """Return an entry for each group of traces, in the order of the figure."""
    groups: dict[str, list[int]] = {}
    for i, trace in enumerate(figure["data"]):
        groups.setdefault(str(trace.get("legendgroup", trace.get("name", ""))), []).append(i)
    items = []
    for members in groups.values():
        shown = [trace for i in members if (trace := figure["data"][i]).get("showlegend", True)]
        if shown:
            items.append(LegendItem(_plain(shown[0].get("name", "")), _swatch(shown[0]), members))
    return items


def data(figure: Figure, limit: int = DATA_ROWS) -> Data:
    """Return the data of a figure in at most ``limit`` rows, picked evenly with the first and the last.

    If all curves have the same positions, there is a row for each position, else a row for each point of a curve. Every
    curve has at least a row with its last point, even if there are more than ``limit`` curves.
    """
    series = _series(figure)
    x, y = _axis_names(figure)
    if not series:
        return Data([x, y], [], "")
    same = all(each.places == series[0].places and not each.bars for each in series)
    if same:
        picked = evenly(range(len(series[0].places)), limit)
        rows = [[_shown(series[0].places[i]), *(_shown(each.values[i]) for each in series)] for i in picked]
        return Data([x, *(each.name for each in series)], rows, _left_out(len(picked), len(series[0].places), "rows"))
    bars = any(each.bars for each in series)
    rows = []
    for each in series:
        for i in evenly(range(len(each.places)), max(1, limit // len(series))):
            row = [each.name, _shown(each.places[i]), _shown(each.values[i])]
            rows.append([*row, each.bars[i] if each.bars else ""] if bars else row)
    known = sum(len(each.places) for each in series)
    note = _left_out(len(rows), known, "points" + (", the last of each curve" if limit < 2 * len(series) else ""))
    return Data(["", x, y, *(["error bar"] if bars else [])], rows, note)


def sentence(title: str, figure: Figure) -> str:
    """Return one sentence with the title, the range of the x axis, and the first and last value of the first curves."""
    series = _series(figure)
    x, _ = _axis_names(figure)
    places = [place for each in series for place in each.places]
    over = ""
    if places and all(isinstance(place, int | float) for place in places):
        over = f" over {x} {_shown(min(places))} to {_shown(max(places))}"
    told = [_told(each) for each in series[:_SPOKEN] if each.values]
    told += [f"and {len(series) - _SPOKEN} more"] if len(series) > _SPOKEN else []
    return f"Chart: {title}{over}: {'; '.join(told)}."


def _told(series: _Series) -> str:
    first, last = _shown(series.values[0]), _shown(series.values[-1])
    return f"{series.name} {first}" if len(series.values) == 1 else f"{series.name} from {first} to {last}"


def _series(figure: Figure) -> list[_Series]:
    """Return the traces that carry data. In a horizontal figure the labels of the rows are the positions."""
    found = []
    for trace in figure["data"]:
        if trace.get("hoverinfo") == "skip":
            continue
        axes = {name: unpacked(trace.get(name)) for name in "xy"}
        place, value = ("y", "x") if _is_horizontal(figure) else ("x", "y")
        axis = figure["layout"].get(f"{place}axis", {})
        places = axes[place]
        if axis.get("ticktext"):
            at = np.asarray(axis["tickvals"], dtype=float)
            places = [_plain(axis["ticktext"][int(np.abs(at - each).argmin())]) for each in places]
        name = _plain(trace.get("meta") or trace.get("name", ""))
        found.append(_Series(name, places, axes[value], _bars(axes[value], trace.get(f"error_{value}") or {})))
    return found


def _bars(values: list[Any], error: dict[str, Any]) -> list[str]:
    up, down = unpacked(error.get("array")), unpacked(error.get("arrayminus"))
    if down:
        return [f"{_shown(v - low)} to {_shown(v + high)}" for v, low, high in zip(values, down, up, strict=True)]
    return [f"+- {_shown(float(each))}" for each in up]


def _is_horizontal(figure: Figure) -> bool:
    """Return whether the y axis names rows, as for horizontal bars and for points beside a name."""
    axis = figure["layout"].get("yaxis", {})
    first = figure["data"][0] if figure["data"] else {}
    words = any(isinstance(value, str) for value in unpacked(first.get("y")))
    return bool(axis.get("ticktext")) or first.get("orientation") == "h" or words


def _axis_names(figure: Figure) -> tuple[str, str]:
    """Return the names of the positions and of the values."""
    names = [figure["layout"].get(f"{name}axis", {}).get("title", {}).get("text", "") for name in "xy"]
    place, value = reversed(names) if _is_horizontal(figure) else names
    return _plain(place), _plain(value)


def _left_out(shown: int, known: int, what: str) -> str:
    return f"{shown} of {known} {what}." if shown < known else ""


def _shown(value: Any) -> str:
    if isinstance(value, float):
        if not math.isfinite(value):
            return "-" if math.isnan(value) else str(value)
        if value.is_integer() and abs(value) < 1e15:
            return f"{value:,.0f}"
        return f"{value:,.1f}" if 1e4 <= abs(value) < 1e15 else f"{value:.5g}"
    return f"{value:,}" if isinstance(value, int) else _plain(str(value))


def _plain(name: str) -> str:
    """Undo :func:`dataflex.report.figures.text`."""
    return html.unescape(name)


def _swatch(trace: Trace) -> str:
    """Return a picture of the trace's line and symbol, or of its area."""
    outline, marker = trace.get("line", {}), trace.get("marker", {})
    parts: Sequence[str]
    if trace.get("type") == "bar" or "fillcolor" in trace:
        colour = trace.get("fillcolor", marker.get("color", "currentColor"))
        shape = (trace.get("fillpattern") or marker.get("pattern") or {}).get("shape", "")
        lines = _PATTERNS.get(shape, "")
        parts = [
            f'<rect width="34" height="12" fill="{html.escape(str(colour))}"/>',
            f'<path d="{lines}" stroke="#fff" stroke-opacity="0.75" stroke-width="1.5"/>' if lines else "",
        ]
    else:
        mode = trace.get("mode", "lines")
        colour = html.escape(str(outline.get("color") or marker.get("color") or "currentColor"))
        dash = _DASHES.get(outline.get("dash", ""), "")
        width = outline.get("width", 2)
        known = marker.get("symbol", "circle")
        symbol = _SYMBOLS.get(known if isinstance(known, str) else known[0].removesuffix("-open"), _SYMBOLS["circle"])
        parts = [
            f'<path d="M0 6h34" stroke="{colour}" stroke-width="{width}" stroke-dasharray="{dash}"/>'
            if "lines" in mode
            else "",
            f'<path d="{symbol}" fill="{colour}"/>' if "markers" in mode else "",
        ]
    return f'<svg width="34" height="12" aria-hidden="true">{"".join(parts)}</svg>'
