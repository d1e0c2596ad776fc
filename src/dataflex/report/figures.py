"""Pieces of a Plotly figure: thinned curves, colours, axes. Figures are plain dicts, as Plotly's JSON has them."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Points = Sequence[tuple[float, float]]
"""Place on the x axis (step, round, tokens, seconds) and value, ascending."""

Trace = dict[str, Any]
Figure = dict[str, Any]

CURVE_POINTS = 2000
"""Points drawn of one curve, at most."""

CHART_POINTS = 10_000
"""Points drawn in all charts of one kind together: what keeps the page small when runs or domains are many."""

SMOOTH_PARTS = 50
"""A running mean is over one ``SMOOTH_PARTS``-th of a curve, where that is two points or more."""

MARKERS = 20
"""Points marked of a line, at most: enough to tell it from others without its colour."""

# After Okabe and Ito, without black, yellow and light blue: each stands out on white and on black.
_COLOURS = ("#1B84C6", "#D55E00", "#009E73", "#CC79A7", "#C98A00", "#8E6CC4", "#8A8A8A")
CHANCE = "#8A8A8A"
"""Colour of a level that nothing was trained for."""

_DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "cross", "star", "triangle-down")
_PATTERNS = ("", "/", ".", "\\", "x", "-", "|", "+")


@dataclass(frozen=True)
class Style:
    """How one run or one domain looks in every chart: told apart without its colour too."""

    colour: str
    dash: str
    symbol: str
    pattern: str


REST = Style(CHANCE, "solid", "circle", "")
"""How the domains look that are added up."""


def style(i: int) -> Style:
    """Return the look of item number ``i``."""
    return Style(
        _COLOURS[i % len(_COLOURS)],
        _DASHES[i % len(_DASHES)],
        _SYMBOLS[i % len(_SYMBOLS)],
        _PATTERNS[i % len(_PATTERNS)],
    )


def points_per_curve(num_curves: int) -> int:
    """Return how many points each of ``num_curves`` curves of one kind of chart may have."""
    return min(CURVE_POINTS, max(20, CHART_POINTS // max(num_curves, 1)))


def thin(points: Points, limit: int) -> Points:
    """Return at most ``limit`` (>= 4) points: the first, the last, the lowest and highest of each stretch between."""
    if len(points) <= limit:
        return points
    values = np.array([value for _, value in points])
    low, high = np.where(np.isnan(values), np.inf, values), np.where(np.isnan(values), -np.inf, values)
    kept = {0, len(points) - 1}
    for stretch in np.array_split(np.arange(1, len(points) - 1), (limit - 2) // 2):
        kept |= {int(stretch[low[stretch].argmin()]), int(stretch[high[stretch].argmax()])}
    return [points[i] for i in sorted(kept)]


def is_smoothed(points: Points) -> bool:
    """Whether :func:`smooth` changes the points."""
    return len(points) >= 2 * SMOOTH_PARTS


def smooth(points: Points) -> Points:
    """Return the running mean of many points, and few as they are; NaN counts as absent."""
    if not is_smoothed(points):
        return points
    window = len(points) // SMOOTH_PARTS | 1
    values = np.array([value for _, value in points])
    known = np.isfinite(values)
    kernel = np.ones(window)
    count = np.convolve(known, kernel, mode="same")
    total = np.convolve(np.where(known, values, 0.0), kernel, mode="same")
    means = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    return [(x, float(mean)) for (x, _), mean in zip(points, means, strict=True)]


def line(points: Points, name: str, look: Style, limit: int) -> Trace:
    """Return a line through the thinned points, some of them marked."""
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
    """Return the background of a running mean: the values it is the mean of. Not in the data below a chart."""
    changes = {"opacity": 0.3, "showlegend": False, "hoverinfo": "skip"}
    thin_line = {"color": look.colour, "width": 1, "dash": "solid"}
    return {**line(points, name, look, limit), **changes, "mode": "lines", "line": thin_line}


def band(
    x: Sequence[int], low: ArrayLike, high: ArrayLike, name: str, colour: str, opacity: float = 0.25
) -> list[Trace]:
    """Return the filled range between two curves; ``meta`` names each where numbers are listed."""
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
    """Return a figure in the common layout; the page adds the colours of its theme and a legend."""
    layout: dict[str, Any] = {
        "height": 320,
        "margin": {"l": 56, "r": 12, "t": 12, "b": 44},
        "xaxis": {"title": {"text": x_title, "standoff": 8}, "automargin": True, "zeroline": False},
        "yaxis": {"title": {"text": y_title}, "automargin": True, "zeroline": False},
        "showlegend": False,
        "hoverlabel": {"namelength": -1},
    }
    return {"data": traces, "layout": layout}


def whole_numbers(chart: Figure, last: int) -> None:
    """Put the ticks of the x axis on whole numbers."""
    chart["layout"]["xaxis"] |= {"tickformat": "d"} | ({"dtick": 1} if last <= 10 else {})


def hatching(look: Style) -> dict[str, Any]:
    """Return the pattern drawn over an area in the colour of ``look``."""
    white = "rgba(255,255,255,0.6)"
    return {"shape": look.pattern, "fillmode": "overlay", "fgcolor": white, "solidity": 0.2, "size": 8}


def packed(values: ArrayLike, dtype: str) -> dict[str, str]:
    """Return numbers in Plotly's binary form: a third of the size of text."""
    array: NDArray[Any] = np.asarray(values).astype(dtype)
    return {"dtype": dtype[1:], "bdata": base64.b64encode(array.tobytes()).decode("ascii")}


def unpacked(values: Any) -> list[Any]:
    """Return the numbers or words of one axis of a trace, packed or not."""
    if isinstance(values, dict):
        return np.frombuffer(base64.b64decode(values["bdata"]), dtype=f"<{values['dtype']}").tolist()
    return [] if values is None else list(values)


def text(name: str) -> str:
    """Return a name as Plotly shows it literally: it reads a few HTML tags in text, and formulas between dollars."""
    return html.escape(name, quote=False).replace("$", "&#36;")


def row_labels(names: Sequence[str], limit: int) -> list[str]:
    """Return the names as :func:`text`, long ones with their middle left out where all can still be told apart."""
    shown = [_shortened(name, limit) for name in names]
    return [text(name) for name in (shown if len(set(shown)) == len(set(names)) else names)]


def _shortened(name: str, limit: int) -> str:
    if len(name) <= limit:
        return name
    head = (limit - 3) // 2
    return f"{name[:head]}...{name[len(name) - (limit - 3 - head) :]}"


def _places(values: Sequence[float]) -> dict[str, str]:
    """Pack places on an axis: steps and rounds as whole numbers, tokens and seconds exactly."""
    small = all(isinstance(value, int) and abs(value) < 1 << 31 for value in values)
    return packed(values, "<i4" if small else "<f8")


def _translucent(colour: str, opacity: float) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"
