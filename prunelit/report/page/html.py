"""A page as one HTML file: no script, no network, nothing beside it; foreign text is escaped."""

import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from prunelit.report.page import inline
from prunelit.report.page.parts import Code, Completions, Notes, Page, PagePicture, Table

_TEMPLATE = "page.html.jinja"
_WORD = 28
# Control characters, halves of characters and non-characters: no HTML file can hold them, UTF-8 not even write some.
_NOT_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
_LONG_WORD = re.compile(rf"\S{{{_WORD}}}(?=\S)")


def render_html(page: Page) -> str:
    """The whole file."""
    return _NOT_TEXT.sub(
        "\N{REPLACEMENT CHARACTER}",
        _load_template().render(page=page, kind=_get_part_kind, element=inline.embed_picture),
    )


@lru_cache(maxsize=1)
def _load_template() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"ticks": _format_code_spans, "cell": _insert_word_breaks}
    return made.get_template(_TEMPLATE)


def _format_code_spans(line: str) -> Markup:
    """`text` between backticks as code, all of it escaped."""
    pieces = line.split("`")
    if len(pieces) % 2 == 0:  # an odd one is itself
        return escape(line)
    return Markup("").join(Markup("<code>{}</code>").format(p) if n % 2 else escape(p) for n, p in enumerate(pieces))


def _insert_word_breaks(text: str) -> Markup:
    """Places to break inside a word that would make its column as wide as itself."""
    return Markup("<wbr>").join(escape(piece) for piece in _LONG_WORD.sub("\\g<0>\0", text).split("\0"))


def _get_part_kind(part: Any) -> str:
    """The name of a part's kind, which the template chooses by."""
    kinds = {
        Table: "table",
        Notes: "notes",
        Code: "code",
        Completions: "completions",
        PagePicture: "picture",
        str: "text",
    }
    return kinds[type(part)]
