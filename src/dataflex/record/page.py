"""The page of a report: one HTML file that loads nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from itertools import groupby

from dataflex.record.charts import Chart
from dataflex.record.tables import Table

GENERATOR = '<meta name="generator" content="dataflex">'
"""Marks a file as ours, near its beginning."""

# Nothing may be fetched: the browser itself refuses it.
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"

_STYLE = """
:root { color-scheme: light dark; --ground: #ffffff; --text: #1c2024; --dim: #59636e; --line: #d9dee3; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #14171a; --text: #e6e8ea; --dim: #9aa4ae; --line: #363c42; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 1280px; background: var(--ground); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0.5rem 0; }
h2 { font-size: 1.2rem; margin: 2rem 0 0.5rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 0; }
p { margin: 0.3rem 0; }
.dim, figcaption { color: var(--dim); font-size: 0.87rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: 0.6rem 0 0.2rem; }
th, td { padding: 0.25rem 0.7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { padding-left: 0; }
.word { text-align: left; }
.charts { display: grid; gap: 1.5rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 520px), 1fr)); }
figure { margin: 0; min-width: 0; }
"""

_SCRIPT = """
const charts = JSON.parse(document.getElementById("charts").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
const config = {
  responsive: true, displaylogo: false, showSendToCloud: false,
  modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
};

function themed(layout) {
  const css = getComputedStyle(document.documentElement);
  const [ground, text, grid] = ["--ground", "--text", "--line"].map((name) => css.getPropertyValue(name).trim());
  return {
    ...layout,
    paper_bgcolor: ground,
    plot_bgcolor: ground,
    font: { color: text },
    hoverlabel: { ...layout.hoverlabel, bgcolor: ground, font: { color: text } },
    xaxis: { ...layout.xaxis, gridcolor: grid },
    yaxis: { ...layout.yaxis, gridcolor: grid },
  };
}

function draw() {
  for (const [id, { data, layout }] of Object.entries(charts)) {
    Plotly.react(id, data, themed(layout), config);
  }
}

draw();
dark.addEventListener("change", draw);
"""


def page(title: str, tables: Sequence[Table], charts: Sequence[Chart], plotly_js: str) -> str:
    """Return the whole HTML text.

    Args:
        title: heading of the page, plain text.
        tables: the first is shown above the charts, the others below.
        charts: shown by section; one without a figure becomes a line that says what is missing.
        plotly_js: source of plotly.js, put in once.
    """
    numbered = [(f"chart-{i}", chart) for i, chart in enumerate(charts)]
    figures = {key: chart.figure for key, chart in numbered if chart.figure is not None}
    script = plotly_js.replace("</script", "<\\/script")
    sections = groupby(numbered, key=lambda each: each[1].section)
    parts = [
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n{GENERATOR}',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>",
        f"<h1>{escape(title)}</h1>",
        *(_table(table) for table in tables[:1]),
        "<noscript><p>The charts need JavaScript; the tables have the numbers.</p></noscript>",
        *(_section(name, list(members)) for name, members in sections),
        *(_table(table) for table in tables[1:]),
        f'<script type="application/json" id="charts">{_inert(json.dumps(figures))}</script>',
        f"<script>{script}</script>",
        f"<script>{_SCRIPT}</script>\n</body>\n</html>\n",
    ]
    return "\n".join(parts)


def _table(table: Table) -> str:
    kinds = ["word" if i < table.text_columns else "number" for i in range(len(table.header))]
    head = _row("th", table.header, kinds)
    body = "\n".join(_row("td", row, kinds) for row in table.rows)
    notes = "\n".join(f'<p class="dim">{escape(note)}</p>' for note in table.notes)
    return (
        f'<div class="scroll"><table>\n<caption>{escape(table.title)}</caption>\n'
        f"<thead>{head}</thead>\n<tbody>\n{body}\n</tbody>\n</table></div>\n{notes}"
    )


def _row(tag: str, cells: Sequence[str], kinds: Sequence[str]) -> str:
    filled = (f'<{tag} class="{kind}">{escape(cell)}</{tag}>' for cell, kind in zip(cells, kinds, strict=True))
    return f"<tr>{''.join(filled)}</tr>"


def _section(name: str, charts: Sequence[tuple[str, Chart]]) -> str:
    """Return the charts of a section, and below them a line for each that has nothing to show."""
    drawn = [_figure(key, chart) for key, chart in charts if chart.figure is not None]
    missing = [
        f'<p class="dim">Not drawn - {escape(chart.title)}: {escape(chart.caption)}</p>'
        for _, chart in charts
        if chart.figure is None
    ]
    return "\n".join([f"<h2>{escape(name)}</h2>", '<div class="charts">', *drawn, "</div>", *missing])


def _figure(key: str, chart: Chart) -> str:
    return (
        f"<figure>\n<h3>{escape(chart.title)}</h3>\n<figcaption>{escape(chart.caption)}</figcaption>\n"
        f'<div id="{key}"></div>\n</figure>'
    )


def _inert(json_text: str) -> str:
    """Return JSON that cannot end the script element it stands in."""
    return json_text.replace("<", "\\u003c")
