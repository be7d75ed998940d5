"""mor/report.py: the report holds what it was given, in one file that needs nothing else."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mor import report
from mor.report import (
    Section,
    TokenDepth,
    curves_svg,
    depth_text_html,
    histogram_svg,
    render_page,
    require_report_extra,
    table_html,
)

NASTY = "<script>alert(\"1\")</script> & 'it'"
SERIES = {"mor": ([1.0, 2.0, 3.0], [5.0, 4.0, 3.5]), "a <b> & c": ([1.0, 2.0], [5.0, 4.5])}


class Reader(HTMLParser):
    """What a browser would see: the tags, and the text inside `pre`."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.pre_text = ""
        self.text = ""
        self._in_pre = False
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._in_pre = self._in_pre or tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        self._in_pre = self._in_pre and tag != "pre"

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._in_pre:
            self.pre_text += data


@pytest.fixture
def page() -> str:
    tokens = [TokenDepth("def", 1), TokenDepth(" f(", 3, (0.7, 0.6)), TokenDepth(NASTY, 2)]
    sections = [
        Section("Results", table_html(["Model", "Loss"], [["mor", "1.2"]], caption="All")),
        Section(NASTY, depth_text_html(tokens, 3), note=NASTY),
        Section("Curves", curves_svg(SERIES, x_label="tokens", y_label="loss")),
        Section("Depth", histogram_svg({"$mor$": [0.5, 0.5], "_flat": [1.0]}, "depth", "share")),
    ]
    return render_page(NASTY, NASTY, sections, command="mor demo && x", machine={NASTY: NASTY})


def test_the_page_lets_no_given_text_become_markup(page: str) -> None:
    reader = Reader(page)
    assert "script" not in {tag for tag, _ in reader.tags}
    assert reader.text.count(NASTY) >= 6
    assert "mor demo && x" in reader.pre_text


def test_the_page_asks_nothing_of_the_network(page: str) -> None:
    for _, attrs in Reader(page).tags:
        for name in ("src", "href", "xlink:href", "srcset", "action", "data"):
            assert (attrs.get(name) or "#").startswith("#"), attrs
    assert not re.search(r"@import|url\((?!#)", page)
    assert "://" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)


def test_the_page_follows_light_and_dark(page: str) -> None:
    assert "prefers-color-scheme: dark" in page
    assert '<meta name="color-scheme" content="light dark">' in page
    chart = page[page.index("<svg") : page.index("</svg>")]
    assert "currentColor" in chart
    assert "var(--series-2)" in chart
    assert not re.search(r"#0102..\b", chart), "a stand-in colour is left"


def test_the_page_can_be_walked_by_headings_and_links(page: str) -> None:
    tags = Reader(page).tags
    assert ("html", {"lang": "en"}) in tags
    assert [tag for tag, _ in tags].count("h1") == 1
    ids = [attrs["id"] for _, attrs in tags if "id" in attrs]
    links = {attrs["href"] for tag, attrs in tags if tag == "a"}
    # a matplotlib marker may stand in two charts under one id, but then with one shape
    assert links <= {f"#{name}" for name in ids}
    assert len(links) == 5
    for tag, attrs in tags:
        if tag == "th":
            assert attrs["scope"] in ("row", "col")
        if tag == "svg":
            assert attrs["aria-label"]


@given(
    st.lists(st.tuples(st.text(st.characters(exclude_categories=["Cs", "Cc"])), st.integers(1, 4)))
)
def test_the_coloured_text_is_the_given_text(pairs: list[tuple[str, int]]) -> None:
    tokens = [TokenDepth(text, depth) for text, depth in pairs]
    reader = Reader(depth_text_html(tokens, 4))
    assert reader.pre_text == "".join(text for text, _ in pairs)


def test_the_coloured_text_keeps_newlines_tabs_and_carriage_returns() -> None:
    text = "\n\tif x:\r\n    y  =  1\n\n"
    html = depth_text_html([TokenDepth(text, 1)], 1)
    assert Reader(html).pre_text == text
    assert "\r" not in html


def test_every_token_says_its_depth() -> None:
    html = depth_text_html([TokenDepth("a", 1), TokenDepth("b", 3, (0.91, 0.5))], 3)
    spans = [attrs for tag, attrs in Reader(html).tags if tag == "span" and "title" in attrs]
    assert spans == [
        {"class": "tok d1", "title": "depth 1 of 3"},
        {"class": "tok d3", "title": "depth 3 of 3; scores 0.91, 0.50"},
    ]
    assert "depth 2</span> 0%" in html
    with pytest.raises(AssertionError, match="depths"):
        depth_text_html([TokenDepth("a", 4)], 3)


def test_a_table_stresses_only_the_best_cells() -> None:
    html = table_html(["Model", "Loss"], [["a", "1"], ["b", "2"]], best=[(1, 1)], caption="<c>")
    assert re.findall("<strong>(.*?)</strong>", html) == ["2"]
    assert "<caption>&lt;c&gt;</caption>" in html
    with pytest.raises(AssertionError, match="columns"):
        table_html(["Model", "Loss"], [["a"]])


def test_charts_are_the_same_bytes_every_time() -> None:
    first, second = (curves_svg(SERIES, x_label="x", y_label="y", log_x=True) for _ in range(2))
    assert first == second
    assert "a &lt;b&gt; &amp; c" in first


@pytest.mark.parametrize(
    "series", [{"one": ([1.0], [2.0])}, {"gap": ([1.0, 2.0], [2.0, float("nan")])}]
)
def test_a_short_or_broken_curve_still_draws(series: dict) -> None:
    assert "<svg" in curves_svg(series, x_label="x", y_label="y")


def test_a_chart_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        histogram_svg({}, "depth", "share")


def test_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'mixture-of-recursions\[report\]'"):
        require_report_extra()


def test_importing_the_module_loads_neither_torch_nor_matplotlib() -> None:
    code = (
        "import sys, mor.report; "
        "sys.exit(bool({'torch', 'matplotlib', 'jinja2', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
