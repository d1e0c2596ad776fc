"""Parts of a Plotly figure: thinned curves, colours, axes. Figures are plain dicts in the form of Plotly's JSON."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Points = Sequence[tuple[float, float]]
"""Position on the x axis (step, round, tokens, seconds) and value, in ascending order of the position."""

Trace = dict[str, Any]
Figure = dict[str, Any]

CURVE_POINTS = 2000
"""Most points drawn of one curve."""

CHART_POINTS = 10_000
"""Most points drawn in all charts of one kind together. Limits the size of a page with many runs or domains."""

SMOOTH_PARTS = 50
"""A running mean covers one ``SMOOTH_PARTS``-th of a curve, if that is two points or more."""

MARKERS = 20
"""Most points marked of a line. They suffice to recognise the line without its colour."""

# After Okabe and Ito, without black, yellow and light blue, so that each is visible on white and on black.
_COLOURS = ("#1B84C6", "#D55E00", "#009E73", "#CC79A7", "#C98A00", "#8E6CC4", "#8A8A8A")
CHANCE = "#8A8A8A"
"""Colour of a level that no run produced."""

_DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "cross", "star", "triangle-down")
_PATTERNS = ("", "/", ".", "\\", "x", "-", "|", "+")


@dataclass(frozen=True)
class Style:
    """The look of a run or a domain in every chart. It is recognisable without the colour."""

    colour: str
    dash: str
    symbol: str
    pattern: str


REST = Style(CHANCE, "solid", "circle", "")
"""Look of the domains that are added up."""


def style(i: int) -> Style:
    """Return the look of item number ``i``."""
    return Style(
        _COLOURS[i % len(_COLOURS)],
        _DASHES[i % len(_DASHES)],
        _SYMBOLS[i % len(_SYMBOLS)],
        _PATTERNS[i % len(_PATTERNS)],
    )


def points_per_curve(num_curves: int) -> int:
    """Return the most points of each curve, if one kind of chart has ``num_curves`` curves."""
    return min(CURVE_POINTS, max(20, CHART_POINTS // max(num_curves, 1)))


def thin(points: Points, limit: int) -> Points:
    """Return at most ``limit`` (>= 4) points: first, last, and the lowest and highest of each part in between."""
    if len(points) <= limit:
        return points
    values = np.array([value for _, value in points])
    low, high = np.where(np.isnan(values), np.inf, values), np.where(np.isnan(values), -np.inf, values)
    kept = {0, len(points) - 1}
    for stretch in np.array_split(np.arange(1, len(points) - 1), (limit - 2) // 2):
        kept |= {int(stretch[low[stretch].argmin()]), int(stretch[high[stretch].argmax()])}
    return [points[i] for i in sorted(kept)]


def is_smoothed(points: Points) -> bool:
    """Return whether :func:`smooth` changes the points."""
    return len(points) >= 2 * SMOOTH_PARTS


def smooth(points: Points) -> Points:
    """Return the running mean of the points, or the points themselves if they are few. NaN counts as missing."""
    if not is_smoothed(points):
        return points
    window = len(points) // SMOOTH_PARTS | 1  # odd, so that the mean is centred on its point
    values = np.array([value for _, value in points])
    known = np.isfinite(values)
    kernel = np.ones(window)
    count = np.convolve(known, kernel, mode="same")
    total = np.convolve(np.where(known, values, 0.0), kernel, mode="same")
    means = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    return [(x, float(mean)) for (x, _), mean in zip(points, means, strict=True)]


def line(points: Points, name: str, look: Style, limit: int) -> Trace:
    """Return a line through the thinned points, with markers on some of them."""
    shown = thin(points, limit)
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": text(name),
        "legendgroup": text(name),
        "x": _places([x for x, _ in shown]),
        "y": packed([value for _, value in shown], "<f4"),
        "line": {"color": look.colour, "dash": look.dash, "width": 1.8},
        "marker": {"symbol": look.symbol, "size": 6, "maxdisplayed": MARKERS},
        "hovertemplate": "%{x}: %{y:.4~g}",
    }


def faint_line(points: Points, name: str, look: Style, limit: int) -> Trace:
    """Return a faint line of the values behind their running mean. It is not in the data below a chart."""
    changes = {"opacity": 0.3, "showlegend": False, "hoverinfo": "skip"}
    thin_line = {"color": look.colour, "width": 1, "dash": "solid"}
    return {**line(points, name, look, limit), **changes, "mode": "lines", "line": thin_line}


def band(
    x: Sequence[int], low: ArrayLike, high: ArrayLike, name: str, colour: str, opacity: float = 0.25
) -> list[Trace]:
    """Return the filled range between two curves. ``meta`` has the name of each curve for the data below a chart."""
    common: Trace = {
        "type": "scatter",
        "mode": "lines",
        "x": packed(x, "<i4"),
        "name": text(name),
        "legendgroup": text(name),
        "line": {"width": 0, "color": colour},
        "hovertemplate": "%{x}: %{y:.4~g}",
    }
    fill = {"fill": "tonexty", "fillcolor": _translucent(colour, opacity)}
    return [
        {**common, "y": packed(low, "<f4"), "showlegend": False, "meta": f"{text(name)}, low"},
        {**common, **fill, "y": packed(high, "<f4"), "meta": f"{text(name)}, high"},
    ]


def figure(traces: list[Trace], x_title: str, y_title: str) -> Figure:
    """Return a figure in the common layout. The page adds the colours of its theme and a legend."""
    layout: dict[str, Any] = {
        "height": 320,
        "margin": {"l": 56, "r": 12, "t": 12, "b": 44},
        "xaxis": {"title": {"text": x_title, "standoff": 8}, "automargin": True, "zeroline": False},
        "yaxis": {"title": {"text": y_title}, "automargin": True, "zeroline": False},
        "showlegend": False,
        "hoverlabel": {"namelength": -1},
    }
    return {"data": traces, "layout": layout}


@dataclass(frozen=True)
class Estimate:
    """A point with an interval in a row of a figure.

    Attributes:
        row: its row, from 0 at the top.
        value: the value.
        ends: ends of its interval. None means that it has none: its symbol is open.
        said: text at the pointer.
    """

    row: int
    value: float
    ends: tuple[float, float] | None
    said: str


def estimates(name: str, look: Style, points: Sequence[Estimate]) -> Trace:
    """Return points with their intervals, under one name in the legend."""
    ends = [point.ends or (point.value, point.value) for point in points]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": text(name),
        "x": packed([point.value for point in points], "<f8"),
        "y": packed([point.row for point in points], "<i4"),
        "error_x": {
            "type": "data",
            "symmetric": False,
            "array": packed([high - point.value for (_, high), point in zip(ends, points, strict=True)], "<f8"),
            "arrayminus": packed([point.value - low for (low, _), point in zip(ends, points, strict=True)], "<f8"),
            "color": look.colour,
            "thickness": 2,
            "width": 6,
        },
        "marker": {
            "color": look.colour,
            "size": 10,
            "symbol": [look.symbol if point.ends else f"{look.symbol}-open" for point in points],
        },
        "text": [text(point.said) for point in points],
        "hovertemplate": "%{text}",
    }


def forest(traces: list[Trace], labels: Sequence[str], x_title: str, level: float) -> Figure:
    """Return a figure of :func:`estimates` with a label for each row, and a line at ``level``."""
    drawn = figure(traces, x_title, "")
    drawn["layout"]["yaxis"] |= {
        "tickvals": list(range(len(labels))),
        "ticktext": row_labels(labels, 44),
        "range": [len(labels) - 0.5, -0.5],
    }
    line = {"type": "line", "x0": level, "x1": level, "yref": "paper", "y0": 0, "y1": 1}
    drawn["layout"]["shapes"] = [{**line, "line": {"color": CHANCE, "width": 1}}]
    return drawn


def whole_numbers(chart: Figure, last: int) -> None:
    """Put the ticks of the x axis on whole numbers."""
    chart["layout"]["xaxis"] |= {"tickformat": "d"} | ({"dtick": 1} if last <= 10 else {})


def hatching(look: Style) -> dict[str, Any]:
    """Return the pattern drawn over an area in the colour of ``look``."""
    white = "rgba(255,255,255,0.6)"
    return {"shape": look.pattern, "fillmode": "overlay", "fgcolor": white, "solidity": 0.2, "size": 8}


def packed(values: ArrayLike, dtype: str) -> dict[str, str]:
    """Return numbers in Plotly's binary form, which takes a third of the size of text."""
    array: NDArray[Any] = np.asarray(values).astype(dtype)
    return {"dtype": dtype[1:], "bdata": base64.b64encode(array.tobytes()).decode("ascii")}


def unpacked(values: Any) -> list[Any]:
    """Return the numbers or texts of one axis of a trace, packed or not."""
    if isinstance(values, dict):
        return np.frombuffer(base64.b64decode(values["bdata"]), dtype=f"<{values['dtype']}").tolist()
    return [] if values is None else list(values)


def text(name: str) -> str:
    """Return a name in a form that Plotly shows literally.

    Plotly interprets a few HTML tags in text, and formulas between dollar signs.
    """
    return html.escape(name, quote=False).replace("$", "&#36;")


def row_labels(names: Sequence[str], limit: int) -> list[str]:
    """Return the names as :func:`text`. The middle of long names is omitted if they stay distinct."""
    shown = [_shortened(name, limit) for name in names]
    return [text(name) for name in (shown if len(set(shown)) == len(set(names)) else names)]


def _shortened(name: str, limit: int) -> str:
    if len(name) <= limit:
        return name
    head = (limit - 3) // 2
    return f"{name[:head]}...{name[len(name) - (limit - 3 - head) :]}"


def _places(values: Sequence[float]) -> dict[str, str]:
    """Pack positions on an axis: steps and rounds as int32, tokens and seconds as float64."""
    small = all(isinstance(value, int) and abs(value) < 1 << 31 for value in values)
    return packed(values, "<i4" if small else "<f8")


def _translucent(colour: str, opacity: float) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"
