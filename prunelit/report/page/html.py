"""A page as one HTML file without scripts, network access or other files; text from outside is escaped."""

import re
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from markupsafe import Markup, escape

from prunelit.report.page import inline
from prunelit.report.page.parts import Code, Completions, Notes, Page, PagePicture, Part, Table

if TYPE_CHECKING:
    from jinja2 import Template

_TEMPLATE = "page.html.jinja"
_WORD = 28  # letters after which a long word may be broken
# Control characters, surrogates and non-characters are not allowed in HTML, and surrogates cannot be encoded as UTF-8.
_NOT_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
_LONG_WORD = re.compile(rf"\S{{{_WORD}}}(?=\S)")


def render_html(page: Page) -> str:
    """Write a page as HTML.

    Args:
        page: title, facts and sections.

    Returns:
        The whole file. Characters that HTML cannot hold become U+FFFD.

    Example:
        >>> html = render_html(Page("A & B", "lead", facts=[], sections=[]))
        >>> "<h1>A &amp; B</h1>" in html
        True
    """
    return _NOT_TEXT.sub(
        "\N{REPLACEMENT CHARACTER}",
        _load_template().render(page=page, kind=_get_part_kind, element=inline.embed_picture),
    )


@lru_cache(maxsize=1)
def _load_template() -> "Template":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"ticks": _format_code_spans, "cell": _insert_word_breaks}
    return environment.get_template(_TEMPLATE)


def _format_code_spans(line: str) -> Markup:
    """Escape a line and turn `text` between backticks into code."""
    pieces = line.split("`")
    if len(pieces) % 2 == 0:  # an odd number of backticks is left as it is
        return escape(line)
    return Markup("").join(
        Markup("<code>{}</code>").format(piece) if index % 2 else escape(piece) for index, piece in enumerate(pieces)
    )


def _insert_word_breaks(text: str) -> Markup:
    """Escape a cell and allow line breaks inside long words, which would widen the column otherwise."""
    return Markup("<wbr>").join(escape(piece) for piece in _LONG_WORD.sub("\\g<0>\0", text).split("\0"))


def _get_part_kind(part: Part) -> str:
    """Return the name of a part's type, by which the template chooses the markup."""
    kinds = {
        Table: "table",
        Notes: "notes",
        Code: "code",
        Completions: "completions",
        PagePicture: "picture",
        str: "text",
    }
    return kinds[type(part)]
