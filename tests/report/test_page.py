"""A page holds what it was given, escaped, and asks for nothing from anywhere."""

import re
from html.parser import HTMLParser

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as some

from prunelit.report.figures import PICTURES, draw_picture
from prunelit.report.page import html, parts
from prunelit.report.page.parts import Code, Completions, Fact, Notes, Page, PagePicture, Part, Section, Table
from prunelit.report.page.summary import summarize_picture
from prunelit.report.record import Record
from prunelit.report.run_page import render_run_page
from tests.report.test_figures import full, plan_of

__all__ = ["full"]  # a fixture

_NOT_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


class Read(HTMLParser):
    """What a page says and asks for: its text, tags, attributes."""

    def __init__(self, page: str):
        super().__init__()
        self.text, self.tags, self.attributes = "", [], []
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data


def every_part(text: str) -> Page:
    wanted: list[Part] = [
        text,
        Table([text, "b"], [[text, text], ["x", "1"]], frozenset({(0, 1)})),
        Notes([text]),
        Code(text, text),
        Completions([text, "p"], {"dense": [text, ""], "pruned": ["", text]}),
    ]
    return Page(text, text, [Fact(text, text, text)], [Section(text, wanted), Section("", [Code(text)], folded=True)])


NASTY = (
    "<script>alert(1)</script>",
    "\"><img src=x onerror='alert(1)'>",
    "]]> --> </style></pre></table> <!--",
    "nul\x00 bell\x07 half \ud800 none \uffff",
    "\u202eright to left \u05e9\u05dc\u05d5\u05dd \U0001f9ea\ufe0f",
    "w" * 10_000,
    "{{ 7 * 7 }} {% raw %} `ticks` `odd",
    "https://example.com/x.js",
)


@given(some.text(min_size=1, max_size=60))
@settings(max_examples=40)
@example(NASTY[0])
@example(NASTY[1])
@example(NASTY[2])
@example(NASTY[3])
@example(NASTY[4])
@example(NASTY[5])
@example(NASTY[6])
def test_foreign_text_is_text(text: str) -> None:
    page = html.render_html(every_part(text))
    page.encode("utf-8")
    plain = Read(html.render_html(every_part("plain")))
    read = Read(page)
    structure = lambda found: [tag for tag in found.tags if tag not in ("wbr", "code")]  # noqa: E731
    assert structure(read) == structure(plain)
    names = lambda found: [(tag, name) for tag, name, _ in found.attributes if name != "class"]  # noqa: E731
    assert names(read) == names(plain)
    expected = _NOT_TEXT.sub("\N{REPLACEMENT CHARACTER}", text)
    shown = read.text.replace("\r\n", "\n").replace("\r", "\n")
    expected = expected.replace("\r\n", "\n").replace("\r", "\n")
    assert shown.count(expected) >= 10 or expected.strip() == ""


def test_markup_in_a_config_or_a_title_is_shown() -> None:
    record = Record(title=NASTY[0], facts={"config": NASTY[1], "load": [(NASTY[0], NASTY[2])]})
    record.on_event("completions", {"prompts": [NASTY[0]], "name": "dense", "texts": [NASTY[1]]})
    read = Read(render_run_page(record))
    assert not {"script", "img"} & set(read.tags)
    assert all(text in read.text for text in NASTY[:3])


def foreign(page: str) -> list[str]:
    """What a page would ask for from elsewhere."""
    read = Read(page)
    asked = [value for _, name, value in read.attributes if name in ("src", "href", "xlink:href", "srcset", "data")]
    found = [value for value in asked if not value.startswith(("#", "data:image/png;base64,"))]
    found += re.findall(r"@import[^;]*|url\((?!#)[^)]*\)|https?:[^\s\"'<]*", page)
    return found + [tag for tag in read.tags if tag in ("script", "link", "iframe", "object", "embed", "form", "base")]


def test_a_page_needs_nothing_else(full: Record) -> None:
    page = render_run_page(full)
    assert foreign(page) == []
    read = Read(page)
    policy = next(value for _, name, value in read.attributes if name == "content" and "default-src" in value)
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'")
    assert {"html", "head", "title", "main", "h1", "h2", "figure", "figcaption", "table", "svg"} <= set(read.tags)
    assert read.tags.count("h1") == 1 and ("html", "lang", "en") in read.attributes


def test_each_picture_has_a_name_a_sentence_and_ids_of_its_own(full: Record) -> None:
    read = Read(render_run_page(full))
    drawn = [name for name in PICTURES if draw_picture(name, full) is not None]
    assert read.tags.count("svg") == len(drawn) == len(PICTURES)
    ids = [value for _, name, value in read.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    asked = {value[1:] for _, name, value in read.attributes if name == "href" and value.startswith("#")}
    asked |= {found for _, _, value in read.attributes for found in re.findall(r"url\(#([^)]*)\)", value)}
    assert asked <= set(ids)
    for name in drawn:
        assert PICTURES[name].title in read.text and PICTURES[name].caption in read.text
        assert read.text.count(summarize_picture(name, full)) == 2  # seen, and read aloud
        assert {f"{name}-title", f"{name}-said"} <= set(ids)


def test_summaries_have_the_numbers_of_the_record(full: Record) -> None:
    assert summarize_picture("quality", full) == "Perplexity: dense 22.9, pruned 37.5, recovered 27.5."
    assert summarize_picture("speed", full) == "Median 102 tokens per second, 101 to 103."
    assert (
        summarize_picture("training", full)
        == "Loss 2.50 at step 1, 1.50 at 3; validation perplexity 29.0 at step 1, 27.0 at 3."
    )
    last = full.decided[-1]
    assert summarize_picture("search", full).startswith(
        f"{len(last['order'])} blocks removed after {len(full.search)} "
    )
    said = summarize_picture("kept", Record(plan=plan_of(3, 6, 3)))
    assert said == (
        "4 of 9 KV groups, 8 of 18 query heads, 96 of 192 FFN channels remain in 3 layers; removed: attention of "
        "layers 2."
    )
    goes = sum(sum(one.removed) for one in full.scores["channels"] if one)
    assert f"{goes:,} of" in summarize_picture("scores", full)


def test_the_headline_and_the_tables(full: Record) -> None:
    text = re.sub(r"\s+", " ", Read(render_run_page(full)).text)
    assert "22.9 \N{RIGHTWARDS ARROW} 37.5 \N{RIGHTWARDS ARROW} 27.5" in text
    assert "dense 2,000; 25.0% less" in text
    assert full.plan is not None and full.plan.digest in text
    assert all(block in text for block in full.decided[-1]["order"])


def test_an_empty_record_is_a_page_too() -> None:
    assert Read(render_run_page(Record())).tags.count("svg") == 0


@pytest.mark.parametrize("name", ["x|y", "<b>"])
def test_markdown(name: str) -> None:
    table = Table(["", name], [["a", "1"], ["b", "2"]], frozenset({(1, 1)}))
    shown = PagePicture("p", "t", "c", "s", None)
    said = parts.render_markdown("T", [Section("", ["one", table, shown]), Section("S", [Notes(["n"]), Code("c\nd")])])
    head = name.replace("|", "\\|")
    assert said == (
        f"# T\n\none\n\n|  | {head} |\n| --- | --- |\n| a | 1 |\n| b | **2** |\n\n## S\n\n- n\n\n    c\n    d\n"
    )
    assert table.right == [1] and Table(["", "a"], [["x", "yes"]]).right == []
