"""The parts of a page as plain data without markup. `html.render_html` and `render_markdown` write them."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Table(NamedTuple):
    """A table. All rows are as long as the head; the first cell of a row is the row's name.

    Attributes:
        head: names of the columns.
        rows: cells.
        best: (row, column) of the cells to highlight.

    Example:
        >>> Table(["method", "perplexity"], [["flap", "12.3"], ["wanda_sp", "12.9"]]).right
        [1]
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    best: frozenset[tuple[int, int]] = frozenset()

    @property
    def right(self) -> list[int]:
        """Indices of the columns that hold numbers only, which are flush right."""
        columns = range(1, len(self.head))
        return [column for column in columns if all(_is_number(row[column]) for row in self.rows)]


def _is_number(cell: str) -> bool:
    """Return whether a cell starts like a number or marks a missing one."""
    return cell in ("", "-", "\N{EN DASH}") or cell.lstrip("+-\N{MINUS SIGN}")[:1].isdigit()


class Notes(NamedTuple):
    """Short lines that belong together, shown as a list.

    Example:
        >>> render_markdown("T", [Section("", [Notes(["one", "two"])])])
        '# T\\n\\n- one\\n- two\\n'
    """

    lines: Sequence[str]


class Code(NamedTuple):
    """Text shown unchanged, such as a config or a command.

    Attributes:
        text: the text.
        label: a caption; "" for none.

    Example: see `render_markdown`.
    """

    text: str
    label: str = ""


class Completions(NamedTuple):
    """Texts that several models wrote after the same prompts.

    Attributes:
        prompts: the prompts.
        texts: {model: one text for each prompt}.

    Example: see `render_markdown`.
    """

    prompts: Sequence[str]
    texts: Mapping[str, Sequence[str]]


class PagePicture(NamedTuple):
    """A figure on a page.

    Attributes:
        name: letters and digits; unique on the page.
        title: its heading.
        caption: how to read it.
        summary: what it shows, in one sentence.
        figure: a matplotlib figure, see `prunelit.report.figures`.

    Example: see `prunelit.report.page.inline.embed_picture`.
    """

    name: str
    title: str
    caption: str
    summary: str
    figure: "Figure"


Part = str | Table | Notes | Code | Completions | PagePicture
"""What a section holds; a string is a paragraph."""


class Section(NamedTuple):
    """Parts under a heading.

    Attributes:
        title: the heading; "" for none.
        parts: what the section holds.
        folded: whether it is closed until the reader opens it.

    Example: see `render_markdown`.
    """

    title: str
    parts: Sequence[Part]
    folded: bool = False


class Fact(NamedTuple):
    """A headline number.

    Attributes:
        name: what the number is.
        value: the number, formatted.
        note: what it is compared with.
        wide: whether it takes the room of two.

    Example:
        >>> Fact("Perplexity on wikitext2", "12.3", "against 11.8").wide
        False
    """

    name: str
    value: str
    note: str = ""
    wide: bool = False


class Page(NamedTuple):
    """A whole page.

    Attributes:
        title: heading of the page.
        lead: a line below the title.
        facts: the most important numbers.
        sections: the rest.

    Example: see `prunelit.report.page.html.render_html`.
    """

    title: str
    lead: str
    facts: Sequence[Fact]
    sections: Sequence[Section]


def render_markdown(title: str, sections: Sequence[Section]) -> str:
    """Write sections as Markdown; figures are left out.

    Args:
        title: heading of the document.
        sections: what follows below it.

    Example:
        >>> print(render_markdown("Title", [Section("Size", ["A paragraph.", Code("pip install prunelit")])]))
        # Title
        <BLANKLINE>
        ## Size
        <BLANKLINE>
        A paragraph.
        <BLANKLINE>
            pip install prunelit
        <BLANKLINE>
    """
    blocks = [f"# {title}"]
    for section in sections:
        blocks += [f"## {section.title}"] * bool(section.title)
        blocks += [rendered for part in section.parts if (rendered := _render_markdown_part(part))]
    return "\n\n".join(blocks) + "\n"


def _render_markdown_part(part: Part) -> str:
    if isinstance(part, Table):
        return render_markdown_table(part)
    if isinstance(part, Notes):
        return "\n".join(f"- {line}" for line in part.lines)
    if isinstance(part, Code):
        return _indent_block(part.text)
    if isinstance(part, Completions):
        blocks: list[str] = []
        for index, prompt in enumerate(part.prompts):
            blocks.append(f"Prompt:\n\n{_indent_block(prompt)}")
            blocks += [f"{name}:\n\n{_indent_block(texts[index])}" for name, texts in part.texts.items()]
        return "\n\n".join(blocks)
    return part if isinstance(part, str) else ""


def render_markdown_table(table: Table) -> str:
    """Write a table as Markdown; highlighted cells are bold.

    Args:
        table: the table.

    Example:
        >>> print(render_markdown_table(Table(["", "nll"], [["a", "1.5"], ["b", "2.0"]], best=frozenset({(0, 1)}))))
        |  | nll |
        | --- | --- |
        | a | **1.5** |
        | b | 2.0 |
    """
    rows = [
        [f"**{cell}**" if (row_index, column) in table.best else cell for column, cell in enumerate(row)]
        for row_index, row in enumerate(table.rows)
    ]
    lines = [list(table.head), *rows]
    escaped_lines = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    escaped_lines.insert(1, ["---"] * len(table.head))
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped_lines)


def _indent_block(content: str) -> str:
    """Indent a text by four spaces, so that nothing in it is read as Markdown."""
    return "\n".join(f"    {line}" for line in content.splitlines() or [""])
