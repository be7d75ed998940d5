"""The pieces of one self-contained HTML report: coloured text, charts, tables and the page.

Knows nothing of models and loads no torch. Every function takes plain data and returns HTML; the
page asks nothing of the network, runs no script and follows the reader's light or dark scheme.
jinja2 and matplotlib are the extra `report` and are imported where they are used.
"""

from __future__ import annotations

import html
import importlib.util
import io
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Stand-ins that matplotlib draws with; the page's own colours take their place in the SVG.
_INK = "#010203"
_SERIES = ("#01020a", "#01020b", "#01020c", "#01020d", "#01020e", "#01020f")
_DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))


class TokenDepth(NamedTuple):
    """A token's text and how many recursions it took; `exits` are its router scores, if known."""

    text: str
    depth: int
    exits: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page. `html` is trusted, `title` and `note` are plain text."""

    title: str
    html: str
    note: str = ""


def require_report_extra() -> None:
    """Raise ValueError with the install command when the report's libraries are missing."""
    for name in ("jinja2", "matplotlib"):
        if importlib.util.find_spec(name) is None:
            raise ValueError(
                f"{name} is missing; the report needs: pip install 'mixture-of-recursions[report]'"
            )


def depth_text_html(tokens: Sequence[TokenDepth], max_depth: int) -> str:
    """Return the text with every token on a background that says its depth, under a legend.

    The `pre` element holds the tokens' text and nothing else. Depths are 1..max_depth.
    """
    counts = Counter(token.depth for token in tokens)
    assert all(1 <= depth <= max_depth for depth in counts), f"depths {sorted(counts)}"
    key = "".join(
        f'<li><span class="tok d{d}">depth {d}</span> {counts[d] / max(1, len(tokens)):.0%}</li>'
        for d in range(1, max_depth + 1)
    )
    spans = "".join(_token_html(token, max_depth) for token in tokens)
    return (
        f'<div class="depths" style="--last:{max(1, max_depth - 1)}">'
        f'<ul class="key" aria-label="share of tokens by depth">{key}</ul>'
        f'<pre tabindex="0">{spans}</pre></div>'
    )


def _token_html(token: TokenDepth, max_depth: int) -> str:
    tip = f"depth {token.depth} of {max_depth}"
    if token.exits:
        tip += "; scores " + ", ".join(f"{score:.2f}" for score in token.exits)
    # a parser turns a bare carriage return into a newline
    text = html.escape(token.text).replace("\r", "&#13;")
    return f'<span class="tok d{token.depth}" title="{tip}">{text}</span>'


def _label(name: str) -> str:
    """Return a name as matplotlib shows it: no mathematics in $, not hidden for a leading _."""
    hidden = "\u200b" if name.startswith("_") else ""
    return hidden + name.replace("$", r"\$")


def curves_svg(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    x_label: str,
    y_label: str,
    log_x: bool = False,
) -> str:
    """Return a line chart of name -> (x, y) as a figure with inline SVG. NaN leaves a gap."""
    require_report_extra()
    from matplotlib.ticker import EngFormatter

    with _chart(x_label, y_label, list(series)) as (chart, axes):
        for i, (name, (x, y)) in enumerate(series.items()):
            axes.plot(
                x,
                y,
                label=_label(name),
                color=_SERIES[i % len(_SERIES)],
                linestyle=_DASHES[i % len(_DASHES)],
                linewidth=1.8,
                marker="o" if len(x) == 1 else None,
            )
        if log_x:
            axes.set_xscale("log")
        axes.xaxis.set_major_formatter(EngFormatter())
        axes.margins(x=0.01)
    return chart.html


def histogram_svg(shares: Mapping[str, Sequence[float]], x_label: str, y_label: str) -> str:
    """Return bars of the share of tokens (0 to 1) at depth 1, 2, ... for every named model."""
    with _chart(x_label, y_label, list(shares)) as (chart, axes):
        width = 0.8 / len(shares)
        for i, (name, values) in enumerate(shares.items()):
            left = (i - len(shares) / 2 + 0.5) * width
            bars = axes.bar(
                [depth + left for depth in range(1, len(values) + 1)],
                [100 * value for value in values],
                width=0.92 * width,
                label=_label(name),
                color=_SERIES[i % len(_SERIES)],
            )
            labels = [f"{100 * value:.0f}" if value else "" for value in values]
            axes.bar_label(bars, labels, padding=2, fontsize=8, color=_INK)
        deepest = max(len(values) for values in shares.values())
        axes.set_xticks(range(1, deepest + 1))
        axes.set_xlim(0.5, deepest + 0.5)
        axes.tick_params(axis="x", length=0)
        axes.yaxis.set_major_formatter("{x:.0f} %")
    return chart.html


class _Chart:
    """What `_chart` yields; `html` is set when its block ends."""

    html = ""


@contextmanager
def _chart(x_label: str, y_label: str, names: list[str]) -> Iterator[tuple[_Chart, Axes]]:
    """Set up axes in the report's look; drawing done, turn them into the page's own colours."""
    if not names:
        raise ValueError("a chart needs at least one named series")
    require_report_extra()
    from matplotlib import style
    from matplotlib.figure import Figure

    look = {
        "svg.fonttype": "none",
        "svg.hashsalt": "mor",
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "grid.alpha": 0.16,
        "grid.linewidth": 0.8,
        "ytick.left": False,
        "legend.frameon": False,
        "font.size": 9.5,
        **{f"{part}.color": _INK for part in ("text", "xtick", "ytick", "grid")},
        **{f"axes.{part}": _INK for part in ("edgecolor", "labelcolor")},
    }
    # the reader's own rcParams must not change what a report looks like
    with style.context(["default", look]):
        figure = Figure(figsize=(7.6, 3.7), layout="constrained")
        axes = figure.add_subplot()
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        chart = _Chart()
        yield chart, axes
        figure.legend(loc="outside upper left", ncols=min(4, len(names)), handlelength=2.4)
        chart.html = _figure_html(figure, f"{y_label} by {x_label}: {', '.join(names)}")


def _figure_html(figure: Figure, label: str) -> str:
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    # ids such as axes_1 are not referred to and would stand twice in a page of two charts
    svg = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", svg)
    svg = re.sub(r'^<svg [^>]*viewBox="([^"]*)"[^>]*>', _svg_tag(label), svg)
    svg = svg.replace(_INK, "currentColor")
    for i, stand_in in enumerate(_SERIES):
        svg = svg.replace(stand_in, f"var(--series-{i + 1})")
    return f'<figure class="chart">{svg}</figure>'


def _svg_tag(label: str) -> str:
    safe = html.escape(label).replace("\\", "\\\\")
    return rf'<svg viewBox="\1" role="img" aria-label="{safe}">'


def table_html(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    best: Collection[tuple[int, int]] = (),
    caption: str = "",
) -> str:
    """Return a table: the first column names its row, the others hold numbers.

    best      (row, column) of the cells to stress, counted from 0
    """
    assert all(len(row) == len(columns) for row in rows), "a row does not match the columns"
    parts = [f"<caption>{html.escape(caption)}</caption>"] if caption else []
    heads = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in columns)
    parts.append(f"<thead><tr>{heads}</tr></thead><tbody>")
    for i, (name, *cells) in enumerate(rows):
        parts.append(f'<tr><th scope="row">{html.escape(name)}</th>')
        for j, cell in enumerate(cells, start=1):
            text = html.escape(cell)
            parts.append(f"<td>{f'<strong>{text}</strong>' if (i, j) in best else text}</td>")
        parts.append("</tr>")
    name = html.escape(caption or "table")
    return (
        f'<div class="wide" role="region" aria-label="{name}" tabindex="0">'
        f"<table>{''.join(parts)}</tbody></table></div>"
    )


def render_page(
    title: str,
    subtitle: str,
    sections: Sequence[Section],
    *,
    command: str,
    machine: Mapping[str, str],
) -> str:
    """Return the whole report as one HTML file that ends with the command and the machine."""
    require_report_extra()
    from jinja2 import Environment

    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(_PAGE)
    return template.render(
        title=title,
        subtitle=subtitle,
        sections=sections,
        command=command,
        machine=machine,
        style=_STYLE,
    )


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ title }}</title>
<style>
{{ style | safe }}</style>
</head>
<body>
<header>
<h1>{{ title }}</h1>
<p class="lead">{{ subtitle }}</p>
<nav aria-label="sections"><ul>
{% for section in sections %}
<li><a href="#s{{ loop.index }}">{{ section.title }}</a></li>
{% endfor %}
<li><a href="#made">How this was made</a></li>
</ul></nav>
</header>
<main>
{% for section in sections %}
<section aria-labelledby="s{{ loop.index }}">
<h2 id="s{{ loop.index }}">{{ section.title }}</h2>
{% if section.note %}
<p class="note">{{ section.note }}</p>
{% endif %}
{{ section.html | safe }}
</section>
{% endfor %}
<section aria-labelledby="made">
<h2 id="made">How this was made</h2>
<pre class="command" tabindex="0"><code>{{ command }}</code></pre>
<dl>
{% for name, value in machine.items() %}
<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>
{% endfor %}
</dl>
</section>
</main>
</body>
</html>
"""

# Depth n of 0..last goes from the paper's colour to full blue: lightness alone tells the depths
# apart, so the scale reads the same for every kind of colour vision. Series colours are Okabe and
# Ito's, and lines differ by their dashes too.
_STYLE = """\
:root {
  --paper: #fff; --card: #f7f8fa; --ink: #1a1d23; --soft: #5a6270; --line: #dde1e7;
  --accent: #0063b1; --flat: 97%; --span: -34%; --tint: 88%;
  --series-1: #0072b2; --series-2: #d55e00; --series-3: #00805c;
  --series-4: #b0528a; --series-5: #8a6d00; --series-6: #5a6270;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14161a; --card: #1c1f25; --ink: #e7e9ed; --soft: #a3abb8; --line: #333842;
    --accent: #6cb6ff; --flat: 15%; --span: 24%; --tint: 64%;
    --series-1: #56b4e9; --series-2: #ff9a56; --series-3: #3ccfa2;
    --series-4: #e79cc8; --series-5: #e6c84b; --series-6: #a3abb8;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body {
  margin: 0 auto; padding: 3rem 1.5rem 5rem; max-width: 62rem;
  background: var(--paper); color: var(--ink);
  font: 1rem/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
}
h1 { margin: 0; font-size: 2.1rem; line-height: 1.2; letter-spacing: -0.02em; text-wrap: balance; }
h2 { margin: 3.25rem 0 0.5rem; font-size: 1.35rem; line-height: 1.3; letter-spacing: -0.01em; }
p { max-width: 46rem; }
.lead { margin: 0.6rem 0 1.4rem; font-size: 1.12rem; color: var(--soft); }
.note { margin: 0 0 1rem; color: var(--soft); }
nav ul, .key { display: flex; flex-wrap: wrap; gap: 0.35rem 1.25rem; margin: 0; padding: 0;
  list-style: none; }
nav { padding: 0.7rem 0; border-block: 1px solid var(--line); font-size: 0.92rem; }
a { color: var(--accent); text-underline-offset: 0.2em; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.wide { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-size: 0.92rem; line-height: 1.35;
  font-variant-numeric: tabular-nums; }
caption { padding-bottom: 0.6rem; text-align: left; color: var(--soft); }
th, td { padding: 0.55rem 0 0.55rem 1.1rem; text-align: right; vertical-align: bottom; }
th:first-child { padding-left: 0; text-align: left; white-space: nowrap; }
thead th { border-bottom: 2px solid var(--line); font-weight: 600; color: var(--soft); }
tbody th { font-weight: 600; }
tbody td { white-space: nowrap; }
tbody tr { border-bottom: 1px solid var(--line); }
td strong { color: var(--accent); }
.chart { margin: 0.5rem 0 0; padding: 1rem 1.1rem; border: 1px solid var(--line);
  border-radius: 0.6rem; background: var(--card); }
.chart svg { display: block; width: 100%; height: auto; }
.chart text { font-family: inherit !important; }
.key { margin-bottom: 0.7rem; font-size: 0.92rem; color: var(--soft); }
pre { margin: 0; padding: 1rem 1.1rem; overflow-x: auto; border: 1px solid var(--line);
  border-radius: 0.6rem; background: var(--card);
  font: 0.84rem/1.75 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.depths pre { white-space: pre-wrap; overflow-wrap: anywhere; background: none; tab-size: 4; }
.tok { --n: 0; padding: 0.16em 0; color: var(--ink);
  background: hsl(208 var(--tint) calc(var(--flat) + var(--span) * var(--n) / var(--last)));
  box-shadow: inset 1px 0 var(--paper); -webkit-box-decoration-break: clone;
  box-decoration-break: clone; -webkit-print-color-adjust: exact; print-color-adjust: exact; }
.key .tok { padding: 0.16em 0.55em; border-radius: 0.3em; }
.d2 { --n: 1; } .d3 { --n: 2; } .d4 { --n: 3; } .d5 { --n: 4; } .d6 { --n: 5; } .d7 { --n: 6; }
.d8 { --n: 7; } .d9 { --n: 8; } .d10 { --n: 9; } .d11 { --n: 10; } .d12 { --n: 11; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr));
  gap: 0.8rem 1.5rem; margin: 1.2rem 0 0; }
dt { font-size: 0.85rem; color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
@media print {
  :root { --paper: #fff; --card: #fff; --ink: #000; --soft: #444; --line: #bbb; --accent: #0063b1;
    --flat: 97%; --span: -34%; --tint: 88%;
    --series-1: #0072b2; --series-2: #d55e00; --series-3: #00805c;
    --series-4: #b0528a; --series-5: #8a6d00; --series-6: #5a6270; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  nav { display: none; }
  h2 { break-after: avoid; }
  .chart, tr { break-inside: avoid; }
  .wide, pre { overflow: visible; }
}
"""
