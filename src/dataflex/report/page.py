"""The page of a report: one HTML file that loads nothing."""

from __future__ import annotations

import base64
import gzip
from collections.abc import Sequence
from html import escape
from itertools import groupby

from dataflex.files import json_text
from dataflex.report.charts.chart import Chart
from dataflex.report.figure_text import DATA_ROWS, Data, LegendItem, data, legend, sentence
from dataflex.report.tables import Table

GENERATOR = '<meta name="generator" content="dataflex">'
"""Text near the beginning of a file that marks it as a page of DataFlex."""

_ALL_DATA_ROWS = 2000
"""Most rows of data below all charts together. Limits the size of a page with many charts."""

# With this policy the browser refuses to fetch anything.
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"

_STYLE = """
:root { color-scheme: light dark; --ground: #ffffff; --text: #1c2024; --dim: #59636e; --line: #d9dee3;
  --focus: #0b57d0; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #14171a; --text: #e6e8ea; --dim: #9aa4ae; --line: #363c42; --focus: #8ab4f8; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 1280px; background: var(--ground); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
:focus-visible { outline: 3px solid var(--focus); outline-offset: 2px; }
h1 { font-size: 1.5rem; margin: 0.5rem 0; }
h2 { font-size: 1.2rem; margin: 2rem 0 0.5rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 0; }
p { margin: 0.3rem 0; }
.dim, figcaption { color: var(--dim); font-size: 0.87rem; }
.scroll { overflow-x: auto; }
details .scroll { overflow: auto; max-height: 24rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: 0.6rem 0 0.2rem; }
th, td { padding: 0.25rem 0.7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { padding-left: 0; }
.word { text-align: left; }
.charts { display: grid; gap: 1.5rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 520px), 1fr)); }
figure { margin: 0; min-width: 0; }
.legend { display: flex; flex-wrap: wrap; gap: 0.25rem; }
.legend button { display: flex; align-items: center; gap: 0.4rem; padding: 0.1rem 0.4rem; font: inherit;
  font-size: 0.87rem; text-align: left; color: var(--text); background: none; border: 1px solid var(--line);
  border-radius: 4px; cursor: pointer; }
.legend button[aria-pressed="false"] { text-decoration: line-through; color: var(--dim); }
.legend svg { flex: none; fill: none; overflow: hidden; }
summary { cursor: pointer; width: fit-content; font-size: 0.87rem; color: var(--dim); }
details table, pre { font-size: 0.87rem; }
pre { white-space: pre-wrap; max-height: 40rem; overflow: auto; }
.plain .plot, .plain .legend { display: none; }
"""

# The body has the class "plain" (tables only) until Plotly is loaded, and again if drawing fails.
_SCRIPT = """
const dark = matchMedia("(prefers-color-scheme: dark)");
const narrow = matchMedia("(max-width: 600px)");
const config = { responsive: true, displayModeBar: false };
let charts = {};

async function unpacked(id) {
  const bytes = Uint8Array.from(atob(document.getElementById(id).textContent), (char) => char.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
}

function themed(layout) {
  const css = getComputedStyle(document.documentElement);
  const [ground, text, grid] = ["--ground", "--text", "--line"].map((name) => css.getPropertyValue(name).trim());
  const rows = layout.yaxis.ticktext;
  return {
    ...layout,
    showlegend: false,
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
    paper_bgcolor: ground,
    plot_bgcolor: ground,
    font: { color: text },
    hoverlabel: { ...layout.hoverlabel, bgcolor: ground, font: { color: text } },
    xaxis: { ...layout.xaxis, gridcolor: grid },
    yaxis: { ...layout.yaxis, gridcolor: grid, ticktext: narrow.matches ? rows?.map(inLines) : rows },
  };
}

// Long names of rows would leave a narrow screen no room for the chart.
function inLines(name) {
  const lines = [""];
  for (const word of name.split(" ")) {
    const joined = `${lines.at(-1)} ${word}`.trim();
    if (joined.length <= 16) lines[lines.length - 1] = joined;
    else lines.push(word);
  }
  return lines.filter(Boolean).join("<br>");
}

function draw(id) {
  return Plotly.react(id, charts[id].data, themed(charts[id].layout), config);
}

function toggle(button) {
  const shown = button.getAttribute("aria-pressed") !== "true";
  button.setAttribute("aria-pressed", shown);
  for (const i of button.dataset.traces.split(" ")) {
    charts[button.dataset.chart].data[i].visible = shown ? true : "legendonly";
  }
  draw(button.dataset.chart);
}

function trouble(text) {
  document.body.classList.add("plain");
  const line = document.getElementById("trouble");
  line.textContent = `${text} The tables, and the data below the title of each chart, have the numbers.`;
  line.hidden = false;
}

async function main() {
  if (!("DecompressionStream" in window)) {
    trouble("This browser is too old to draw the charts (it has no DecompressionStream, as browsers have since 2023).");
    return;
  }
  charts = JSON.parse(await unpacked("charts"));
  const library = document.createElement("script");
  library.textContent = await unpacked("plotly");
  document.head.append(library);
  document.body.classList.remove("plain");
  await Promise.all(Object.keys(charts).map(draw));
  for (const button of document.querySelectorAll(".legend button")) {
    button.addEventListener("click", () => toggle(button));
  }
  for (const query of [dark, narrow]) query.addEventListener("change", () => Object.keys(charts).forEach(draw));
  document.body.dataset.state = "drawn";
}

main().catch((error) => trouble(`The charts could not be drawn (${error}).`));
"""


def page(
    title: str,
    tables: Sequence[Table],
    charts: Sequence[Chart],
    plotly_js: str,
    setup: Table | None = None,
    texts: Sequence[tuple[str, str]] = (),
) -> str:
    """Return the HTML text of a page.

    Args:
        title: heading of the page, plain text.
        tables: the first is shown above the charts, the others below.
        charts: shown by section. For a chart without a figure, a line gives the reason.
        plotly_js: source of plotly.js. The page contains it once, compressed.
        setup: table shown below the first table.
        texts: title and text of the sections that can be opened at the end.
    """
    numbered = [(f"chart-{i}", chart) for i, chart in enumerate(charts)]
    figures = {key: chart.figure for key, chart in numbered if chart.figure is not None}
    rows = min(DATA_ROWS, max(5, _ALL_DATA_ROWS // max(len(figures), 1)))
    sections = groupby(numbered, key=lambda each: each[1].section)
    parts = [
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n{GENERATOR}',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body class="plain">',
        f'<main>\n<h1>{escape(title)}</h1>\n<p id="trouble" role="alert" hidden></p>',
        "<noscript><p>The charts need JavaScript. The tables, and the data below the title of each chart, have the "
        "numbers.</p></noscript>",
        *(_table(table) for table in tables[:1]),
        *([_table(setup)] if setup is not None and setup.rows else []),
        *(_section(name, list(members), rows) for name, members in sections),
        *(["<h2>Tables</h2>"] if tables[1:] else []),
        *(_table(table) for table in tables[1:]),
        *(["<h2>Configuration</h2>"] if texts else []),
        *(f"<details><summary>{escape(name)}</summary><pre>{escape(text)}</pre></details>" for name, text in texts),
        "</main>",
        _compressed("charts", json_text(figures)),
        _compressed("plotly", plotly_js),
        f"<script>{_SCRIPT}</script>\n</body>\n</html>\n",
    ]
    return "\n".join(parts)


def _compressed(key: str, content: str) -> str:
    """Return a script element with compressed text, which the page's script unpacks.

    Base64 contains no "<", so the text cannot end the element early.
    """
    # Without a time stamp (mtime) equal content gives equal bytes.
    packed = base64.b64encode(gzip.compress(content.encode(), compresslevel=6, mtime=0)).decode("ascii")
    return f'<script type="text/plain" id="{key}">{packed}</script>'


def _table(table: Table) -> str:
    kinds = ["word" if i < table.text_columns else "" for i in range(len(table.header))]
    notes = "\n".join(f'<p class="dim">{escape(note)}</p>' for note in table.notes)
    return f"{_scrolled(table.title, table.header, table.rows, kinds)}\n{notes}"


def _scrolled(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], kinds: Sequence[str]) -> str:
    """Return a table in a separate region, which the keyboard can reach and scroll."""
    body = "\n".join(_row("td", row, kinds) for row in rows)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(title)}"><table>\n'
        f"<caption>{escape(title)}</caption>\n"
        f"<thead>{_row('th', header, kinds)}</thead>\n<tbody>\n{body}\n</tbody>\n</table></div>"
    )


def _row(tag: str, cells: Sequence[str], kinds: Sequence[str]) -> str:
    starts = (f'<{tag} class="{kind}">' if kind else f"<{tag}>" for kind in kinds)
    filled = (f"{start}{escape(cell)}</{tag}>" for start, cell in zip(starts, cells, strict=True))
    return f"<tr>{''.join(filled)}</tr>"


def _section(name: str, charts: Sequence[tuple[str, Chart]], rows: int) -> str:
    """Return the charts of a section, and below them a line for each chart without data."""
    drawn = [_figure(key, chart, rows) for key, chart in charts if chart.figure is not None]
    missing = [
        f'<p class="dim">Not drawn - {escape(chart.title)}: {escape(chart.caption)}</p>'
        for _, chart in charts
        if chart.figure is None
    ]
    return "\n".join([f"<h2>{escape(name)}</h2>", '<div class="charts">', *drawn, "</div>", *missing])


def _figure(key: str, chart: Chart, rows: int) -> str:
    assert chart.figure is not None
    items = legend(chart.figure)
    return (
        f"<figure>\n<h3>{escape(chart.title)}</h3>\n<figcaption>{escape(chart.caption)}</figcaption>\n"
        f'<div class="plot" id="{key}" role="img" aria-label="{escape(sentence(chart.title, chart.figure))}"></div>\n'
        f'<div class="legend" role="group" aria-label="Shown in {escape(chart.title)}">\n'
        f"{''.join(_entry(key, item) for item in items)}</div>\n"
        f"{_details(chart.title, data(chart.figure, rows))}\n</figure>"
    )


def _entry(key: str, item: LegendItem) -> str:
    numbers = " ".join(map(str, item.traces))
    return (
        f'<button type="button" aria-pressed="true" data-chart="{key}" data-traces="{numbers}">'
        f"{item.swatch}<span>{escape(item.name)}</span></button>\n"
    )


def _details(title: str, table: Data) -> str:
    note = f'<p class="dim">{escape(table.note)}</p>' if table.note else ""
    words = ["word" if i == 0 else "" for i in range(len(table.header))]
    shown = _scrolled(f"Data: {title}", table.header, table.rows, words)
    return f"<details><summary>Data</summary>\n{shown}{note}</details>"
