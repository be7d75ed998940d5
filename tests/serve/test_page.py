"""Promises of the page, in real Chromium: depth is seen, keys suffice, nothing is asked of others.

With MOR_SCREENSHOT=FILE the last test writes the picture that docs/serving.md shows, of the model
folder in MOR_SCREENSHOT_MODEL where that is set.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serve.conftest import Client, running, slowly

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
if CHROMIUM is None:  # CI installs it
    pytest.skip("no Chromium here: apt-get install chromium", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        flags = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = started.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, client: Client) -> Iterator[Any]:
    with Opened(browser, client) as one:
        yield one


class Opened:
    """A page of a server; on leaving, that it asked no other and had no fault."""

    def __init__(self, browser: Any, client: Client, **settings: Any) -> None:
        self.context = browser.new_context(**settings)
        self.page, self.home = self.context.new_page(), f"http://127.0.0.1:{client.port}/"
        self.asked: list[str] = []
        self.faults: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("console", lambda said: said.type == "error" and self.faults.append(said.text))

    def __enter__(self) -> Any:
        self.page.goto(self.home)
        self.page.wait_for_selector("#legend mark")
        return self.page

    def __exit__(self, kind: Any, *exception: Any) -> None:
        self.context.close()
        if kind is None:
            assert all(url.startswith(self.home) for url in self.asked), self.asked
            faults = [text for text in self.faults if "status of 400" not in text]
            assert not faults, faults


def ask(page: Any, text: str, *, tokens: int = 12) -> None:
    """Type, send with Enter, wait for the end."""
    page.fill("#most", str(tokens))
    page.fill("#text", text)
    page.press("#text", "Enter")
    page.wait_for_selector("#send:enabled")


def depths(page: Any, place: str = "last-child") -> list[str]:
    return page.eval_on_selector_all(
        f"#talk p:{place} mark", "marks => marks.map(mark => mark.className)"
    )


def test_every_token_shows_its_depth(page: Any, client: Client):
    names = page.eval_on_selector_all("#legend mark", "marks => marks.map(m => m.className)")
    assert names == ["d1", "d2", "d3"]
    page.select_option("#mode", "complete")
    page.fill("#warmth", "0")
    ask(page, "the cat sees")
    shown = page.inner_text("#talk p:last-child")
    body = {"prompt": "the cat sees", "max_tokens": 12, "temperature": 0, "return_depths": True}
    wanted = client.post("/v1/completions", body).json["choices"][0]
    assert wanted["text"].strip() in shown and "mean depth" in shown and "FLOPs saved" in shown
    seen = depths(page)
    assert seen[: len(wanted["depths"])] == [f"d{depth}" for depth in wanted["depths"]]
    assert len(seen) == len(wanted["depths"]) + 1 and seen[-1] == ""  # the last is never run


def test_chat_goes_on_and_begins_anew(page: Any):
    ask(page, "the dog")
    ask(page, "and the cat")
    assert page.locator("#talk p.user").count() == page.locator("#talk p.answer").count() == 2
    page.click("#fresh")
    assert page.locator("#talk p").count() == 0


def test_the_slider_sets_depth_by_keys_alone(page: Any):
    page.focus("#slider")
    page.keyboard.press("Home")
    assert page.inner_text("#point") == "1"
    seen = []
    for _ in range(4):
        page.keyboard.press("ArrowRight")
        seen.append(page.inner_text("#point"))
    assert seen == ["low", "medium", "high", "max"]
    page.keyboard.press("Home")
    ask(page, "the dog")
    assert set(depths(page)) <= {"d1", ""}
    page.focus("#slider")
    page.keyboard.press("End")
    assert page.inner_text("#point") == "max"
    ask(page, "the dog")
    assert set(depths(page)) <= {"d3", ""}


def test_keys_reach_everything(page: Any):
    reached = []
    page.focus("#text")
    for _ in range(8):
        reached.append(page.evaluate("document.activeElement.id"))
        page.keyboard.press("Tab")
    assert {"text", "mode", "slider", "most", "warmth", "send", "fresh"} <= set(reached)


def test_an_error_is_shown_and_the_page_goes_on(page: Any):
    ask(page, "the cat " * 60)
    assert "shorten the prompt" in page.inner_text("#talk .error")
    page.click("#fresh")
    ask(page, "the cat")
    assert page.locator("#talk .error").count() == 0 and depths(page)


def test_stop_ends_an_answer(browser: Any, start: Any):
    with start() as client:
        engine = client.service.engine._engine
        engine.step = slowly(engine.step, 0.2)
        with Opened(browser, client) as page:
            page.fill("#text", "the cat")
            page.press("#text", "Enter")
            page.wait_for_selector("#talk p.answer mark", state="attached")
            page.click("#stop")
            page.wait_for_selector("#send:enabled")
            client.wait_idle()


def test_text_of_a_model_is_never_markup(page: Any):
    ask(page, "<img src=x onerror=alert(1)><b>bold</b>")
    assert page.locator("#talk img, #talk b").count() == 0
    assert "<img src=x" in page.inner_text("#talk p.user")


def test_gauges_move(page: Any, client: Client):
    ask(page, "the cat sees the dog")
    playwright.expect(page.locator("#depth")).not_to_have_text("-")
    assert re.fullmatch(r"[123]\.\d\d", page.inner_text("#depth"))
    assert page.inner_text("#saved").endswith("%")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_light_and_dark(browser: Any, client: Client, scheme: Any):
    with Opened(browser, client, color_scheme=scheme) as page:
        style = "getComputedStyle(document.body)"
        found = page.evaluate(f"[{style}.color, {style}.backgroundColor]")
        ink, back = (_luminance(colour) for colour in found)
        assert (max(ink, back) + 0.05) / (min(ink, back) + 0.05) > 7
        assert (back < 0.1) == (scheme == "dark")


def _luminance(colour: str) -> float:
    """Return the relative luminance of rgb(..), as WCAG has it."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.skipif("MOR_SCREENSHOT" not in os.environ, reason="MOR_SCREENSHOT names no file")
def test_screenshot(browser: Any, tiny_run: Path):
    folder = Path(os.environ.get("MOR_SCREENSHOT_MODEL", tiny_run / "model"))
    text = os.environ.get("MOR_SCREENSHOT_TEXT", "the old red house likes")
    size = {"width": 1000, "height": 720}
    with running(folder) as client, Opened(browser, client, viewport=size) as page:
        page.fill("#warmth", "0")
        ask(page, text, tokens=120)
        page.wait_for_timeout(1200)
        page.screenshot(path=os.environ["MOR_SCREENSHOT"])
