"""The page in a real browser, on a phone's, a tablet's and a desk's width, light and dark."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prunelit.compare import page as compare_page
from prunelit.evaluation.page import render_evaluation_page
from prunelit.report.plan_card import make_dense_plan
from prunelit.report.record import Record
from prunelit.report.run_difference import render_difference_page
from prunelit.report.run_page import render_run_page
from prunelit.report.run_summary import summarize_plan
from tests.compare.test_run import handmade
from tests.evaluation.test_markdown import handmade_evaluation
from tests.report.test_figures import full
from tests.report.test_page import NASTY

__all__ = ["full"]  # a fixture

pytestmark = pytest.mark.slow
WIDTHS, SCHEMES = (360, 390, 768, 1440), ("light", "dark")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
LEAST_TEXT, LEAST_CONTRAST = 9.0, 4.5  # CSS pixels; WCAG's AA for text

# [size in CSS pixels, what it says] of every text in a picture.
SIZES = """() => [...document.querySelectorAll('svg text')].map(text => {
  const matrix = text.getScreenCTM();
  return [parseFloat(getComputedStyle(text).fontSize) * Math.hypot(matrix.a, matrix.b), text.textContent];
})"""
# [colour, background, what it says] of every element with text of its own.
COLOURS = """() => {
  const found = [];
  for (const element of document.body.querySelectorAll('*')) {
    const own = [...element.childNodes].filter(node => node.nodeType === 3 && node.data.trim());
    if (!own.length || element.closest('title, desc')) continue;
    let behind = element, colour = 'rgba(0, 0, 0, 0)';
    while (behind && colour === 'rgba(0, 0, 0, 0)') {
      colour = getComputedStyle(behind).backgroundColor;
      behind = behind.parentElement;
    }
    const style = getComputedStyle(element);
    found.push([element.closest('svg') ? style.fill : style.color, colour, own[0].data.trim().slice(0, 40)]);
  }
  return found;
}"""
# Pictures' texts that reach out of their card.
OUTSIDE = """() => [...document.querySelectorAll('figure')].flatMap(card => {
  const box = card.getBoundingClientRect();
  return [...card.querySelectorAll('text')].filter(text => {
    const own = text.getBoundingClientRect();
    return own.left < box.left - 1 || own.right > box.right + 1;
  }).map(text => text.textContent);
})"""

# Boxes that can be moved sideways, where nothing may be on a phone.
SIDEWAYS = """() => [...document.body.querySelectorAll('.scroll, pre, figure, dl, section')].filter(
  box => box.scrollWidth > box.clientWidth + 1).map(box => box.outerHTML.slice(0, 200))"""
PHONE = 400
WITH_PICTURES = ("run", "comparison")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install -e '.[dev]'")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-quic", "--no-first-run"]
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=program, args=flags)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def pages(full: Record, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    nasty = Record.from_json(full.to_json())
    texts = [text.replace("\ud800", "") for text in NASTY]
    for name in ("dense", "pruned", "recovered"):
        nasty.on_event("completions", {"prompts": texts, "name": name, "texts": texts[::-1]})
    nasty.facts = {"config": "\n".join(texts), "load": [(texts[0], texts[5])], "versions": {"torch": texts[5]}}
    content = {"run": render_run_page(nasty), "comparison": compare_page.render_comparison_page(handmade())}
    content["evaluation"] = render_evaluation_page(handmade_evaluation())
    runs = [summarize_plan(name, plan) for name, plan in (("a", full.plan), (texts[5], make_dense_plan(full.plan)))]
    content["difference"] = render_difference_page(*runs)
    for name, page in content.items():
        (folder / f"{name}.html").write_text(page, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in content}


@pytest.mark.parametrize("name", ["run", "comparison", "evaluation", "difference"])
def test_it_is_readable_at_every_width_and_in_both_schemes(browser: Any, pages: dict[str, Path], name: str) -> None:
    for scheme in SCHEMES:
        context = browser.new_context(color_scheme=scheme)
        page = context.new_page()
        said: list[str] = []
        asked: list[str] = []
        page.on("console", lambda message, said=said: said.append(message.text))
        page.on("pageerror", lambda error, said=said: said.append(str(error)))
        page.on("dialog", lambda dialog, said=said: said.append(dialog.message))
        page.on("request", lambda request, asked=asked: asked.append(request.url))
        page.goto(pages[name].as_uri())
        page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
        for width in WIDTHS:
            page.set_viewport_size({"width": width, "height": 900})
            where = (scheme, width)
            assert page.evaluate("document.scrollingElement.scrollWidth") <= width, where
            assert width > PHONE or page.evaluate(SIDEWAYS) == [], where
            sizes = page.evaluate(SIZES)
            assert bool(sizes) == (name in WITH_PICTURES)
            assert not sizes or min(sizes)[0] >= LEAST_TEXT, (where, min(sizes))
            assert page.evaluate(OUTSIDE) == [], where
        seen = {(colour, behind): text for colour, behind, text in page.evaluate(COLOURS)}
        faint = {pair: text for pair, text in seen.items() if contrast(*pair) < LEAST_CONTRAST}
        assert len(seen) >= 4 and not faint, scheme
        dark = luminance(page.evaluate("getComputedStyle(document.body).backgroundColor")) < 0.5
        assert dark == (scheme == "dark")
        assert said == [] and [url for url in asked if not url.startswith("data:")] == [pages[name].as_uri()]
        context.close()


def contrast(first: str, second: str) -> float:
    """WCAG 2.2's ratio of two colours, 1 to 21."""
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def luminance(colour: str) -> float:
    """Relative, of "rgb(r, g, b)"."""
    numbers = [float(part) / 255 for part in colour.partition("(")[2].rstrip(")").split(",")[:3]]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in numbers)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
