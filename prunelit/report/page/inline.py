"""A figure inside a page: matplotlib's SVG document as one HTML element, in the colours of the page.

A standalone SVG document may have its own style sheet, ids and colours. Inside a page, ids must be unique across all
figures, a style sheet would apply to the whole page, and dark lines must become light on a dark page.
"""

import re
from html import escape

from markupsafe import Markup

from prunelit.report.figures.style import FAINT, INK, encode_svg
from prunelit.report.page.parts import PagePicture

COLOURS = {INK: "var(--ink)", FAINT: "var(--line)", "#ffffff": "var(--card)"}
"""Colours of a figure that the page replaces with its own; all others stand out on light and dark backgrounds."""


def embed_picture(picture: PagePicture) -> Markup:
    """Write a figure as an <svg> element with a title and a description for screen readers.

    Args:
        picture: the figure with its title and summary.

    Example:
        >>> from prunelit.report.figures.style import create_figure
        >>> picture = PagePicture("p", "Title", "caption", "summary", create_figure(1.0))
        >>> '<title id="p-title">Title</title>' in embed_picture(picture)
        True
    """
    document, name = encode_svg(picture.figure), picture.name
    svg_element = document[document.index("<svg") : document.rindex("</svg>")]
    opening_tag, _, content = svg_element.partition(">")
    view_box = re.search(r'viewBox="([\d. -]+)"', opening_tag)
    content = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", content, flags=re.DOTALL)
    content = re.sub(r"<[^>]+>", lambda tag: _rewrite_svg_tag(tag[0], name), content)
    labels = f"{name}-title {name}-said"
    title = f'<title id="{name}-title">{escape(picture.title)}</title>'
    description = f'<desc id="{name}-said">{escape(picture.summary)}</desc>'
    size = view_box[1] if view_box else "0 0 310 200"
    return Markup(f'<svg role="img" aria-labelledby="{labels}" viewBox="{size}">{title}{description}{content}</svg>')


def _rewrite_svg_tag(tag: str, name: str) -> str:
    """Make the ids of a tag unique to this figure, drop the xlink namespace, and use the page's colours."""
    tag = re.sub(r'\bid="', f'id="{name}-', tag)
    tag = re.sub(r'\bxlink:href="', 'href="', tag)
    tag = re.sub(r'href="#', f'href="#{name}-', tag)
    tag = re.sub(r"url\(#", f"url(#{name}-", tag)
    for figure_colour, page_colour in COLOURS.items():
        tag = re.sub(rf"((?:fill|stroke): ?){figure_colour}\b", rf"\1{page_colour}", tag, flags=re.IGNORECASE)
    return tag
