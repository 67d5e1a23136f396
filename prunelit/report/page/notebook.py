"""Parts of a page as HTML for a notebook's cell: plain tags, which the notebook gives its own style."""

from collections.abc import Iterable

from markupsafe import Markup

from prunelit.report.page.parts import Completions, Notes, Section, Table


def render_cell_html(title: str, sections: Iterable[Section]) -> str:
    """Write paragraphs, tables, lists and completions as HTML; what comes from outside is escaped.

    Args:
        title: the first line.
        sections: what follows; pictures and code are left out.

    Example:
        >>> render_cell_html("T", [Section("Size", [Table(["", "n"], [["<a>", "1"]])])])
        '<p><b>T</b></p><p><b>Size</b></p><table><tr><th></th><th>n</th></tr><tr><td>&lt;a&gt;</td><td>1</td></tr></table>'
    """
    pieces = [Markup("<p><b>{}</b></p>").format(title)]
    for section in sections:
        pieces += [Markup("<p><b>{}</b></p>").format(section.title)] * bool(section.title)
        for part in section.parts:
            if isinstance(part, str):
                pieces.append(Markup("<p>{}</p>").format(part))
            elif isinstance(part, Notes):
                pieces.append(_wrap("ul", (Markup("<li>{}</li>").format(line) for line in part.lines)))
            elif isinstance(part, Table):
                pieces.append(
                    _wrap("table", [_join_row(part.head, "th"), *(_join_row(row, "td") for row in part.rows)])
                )
            elif isinstance(part, Completions):
                rows = [
                    [prompt, *(texts[place] for texts in part.texts.values())]
                    for place, prompt in enumerate(part.prompts)
                ]
                head = _join_row(["prompt", *part.texts], "th")
                pieces.append(_wrap("table", [head, *(_join_row(row, "td") for row in rows)]))
    return str(Markup("").join(pieces))


def _join_row(cells: Iterable[str], tag: str) -> Markup:
    return _wrap("tr", (_wrap(tag, [cell]) for cell in cells))


def _wrap(tag: str, pieces: Iterable[str]) -> Markup:
    return Markup("<{0}>{1}</{0}>").format(Markup(tag), Markup("").join(pieces))
