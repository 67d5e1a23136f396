"""A picture inside a page: matplotlib's SVG document as one element of HTML, in the colours of the page.

A document of its own may hold a style sheet, ids and colours that suit itself; several in one page must not share ids,
a sheet would hold for all of them, and ink on a dark page must be light.
"""

import re
from html import escape

from markupsafe import Markup

from prunelit.report.figures.style import FAINT, INK, encode_svg
from prunelit.report.page.parts import PagePicture

COLOURS = {INK: "var(--ink)", FAINT: "var(--line)", "#ffffff": "var(--card)"}
"""Colours of a picture that the page puts its own for; the others stand out on light and on dark."""


def embed_picture(shown: PagePicture) -> Markup:
    """<svg> with a title and a description, which programs that read aloud read."""
    document, name = encode_svg(shown.figure), shown.name
    drawn = document[document.index("<svg") : document.rindex("</svg>")]
    head, _, content = drawn.partition(">")
    box = re.search(r'viewBox="([\d. -]+)"', head)
    content = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", content, flags=re.DOTALL)
    content = re.sub(r"<[^>]+>", lambda tag: _rewrite_svg_tag(tag[0], name), content)
    labels = f"{name}-title {name}-said"
    said = (
        f'<title id="{name}-title">{escape(shown.title)}</title><desc id="{name}-said">{escape(shown.summary)}</desc>'
    )
    size = box[1] if box else "0 0 310 200"
    return Markup(f'<svg role="img" aria-labelledby="{labels}" viewBox="{size}">{said}{content}</svg>')


def _rewrite_svg_tag(tag: str, name: str) -> str:
    """Ids of this picture only, links without a namespace, colours of the page."""
    tag = re.sub(r'\bid="', f'id="{name}-', tag)
    tag = re.sub(r'\bxlink:href="', 'href="', tag)
    tag = re.sub(r'href="#', f'href="#{name}-', tag)
    tag = re.sub(r"url\(#", f"url(#{name}-", tag)
    for theirs, ours in COLOURS.items():
        tag = re.sub(rf"((?:fill|stroke): ?){theirs}\b", rf"\1{ours}", tag, flags=re.IGNORECASE)
    return tag
