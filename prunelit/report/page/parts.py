"""What a page is made of; plain data, no markup. `html.render_html` and `render_markdown` write it."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Table(NamedTuple):
    """Rows under a head, all as long as it. The first cell of a row is its name.

    Attributes:
        head: names of the columns.
        rows: cells.
        best: (row, column) of the cells that stand out.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    best: frozenset[tuple[int, int]] = frozenset()

    @property
    def right(self) -> list[int]:
        """Columns of numbers, which stand flush right."""
        columns = range(1, len(self.head))
        return [place for place in columns if all(_is_number(row[place]) for row in self.rows)]


def _is_number(cell: str) -> bool:
    """Whether it starts like a number, or says that there is none."""
    return cell in ("", "-", "\N{EN DASH}") or cell.lstrip("+-\N{MINUS SIGN}")[:1].isdigit()


class Notes(NamedTuple):
    """Short lines that belong together."""

    lines: Sequence[str]


class Code(NamedTuple):
    """Text that stands as it is: a config, a command; `label` says what it is."""

    text: str
    label: str = ""


class Completions(NamedTuple):
    """What models wrote after the same prompts.

    Attributes:
        prompts: what they were given.
        texts: {model: a text for each prompt}.
    """

    prompts: Sequence[str]
    texts: Mapping[str, Sequence[str]]


class PagePicture(NamedTuple):
    """A picture.

    Attributes:
        name: of letters and digits; no other picture of the page has it.
        title: its heading.
        caption: how it is read.
        summary: what it shows, in a sentence.
        figure: a matplotlib figure of `prunelit.report.figures`.
    """

    name: str
    title: str
    caption: str
    summary: str
    figure: Any


Part = str | Table | Notes | Code | Completions | PagePicture
"""A text is a paragraph."""


class Section(NamedTuple):
    """Parts under a heading; without one where the title is empty. `folded`: shown on demand."""

    title: str
    parts: Sequence[Part]
    folded: bool = False


class Fact(NamedTuple):
    """A headline number, what it is, and what it is compared with; `wide`: it takes the room of two."""

    name: str
    value: str
    note: str = ""
    wide: bool = False


class Page(NamedTuple):
    """A whole page: the title, a line below it, the numbers that matter most, and the rest."""

    title: str
    lead: str
    facts: Sequence[Fact]
    sections: Sequence[Section]


def render_markdown(title: str, sections: Sequence[Section]) -> str:
    """The parts as Markdown, pictures left out."""
    found = [f"# {title}"]
    for section in sections:
        found += [f"## {section.title}"] * bool(section.title)
        found += [said for part in section.parts if (said := _render_markdown_part(part))]
    return "\n\n".join(found) + "\n"


def _render_markdown_part(part: Part) -> str:
    if isinstance(part, Table):
        return render_markdown_table(part)
    if isinstance(part, Notes):
        return "\n".join(f"- {line}" for line in part.lines)
    if isinstance(part, Code):
        return _indent_block(part.text)
    if isinstance(part, Completions):
        said: list[str] = []
        for place, prompt in enumerate(part.prompts):
            said.append(f"Prompt:\n\n{_indent_block(prompt)}")
            said += [f"{name}:\n\n{_indent_block(texts[place])}" for name, texts in part.texts.items()]
        return "\n\n".join(said)
    return part if isinstance(part, str) else ""


def render_markdown_table(table: Table) -> str:
    """A Markdown table; what stands out is bold."""
    rows = [
        [f"**{cell}**" if (number, place) in table.best else cell for place, cell in enumerate(row)]
        for number, row in enumerate(table.rows)
    ]
    lines = [list(table.head), *rows]
    said = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    said.insert(1, ["---"] * len(table.head))
    return "\n".join(f"| {' | '.join(line)} |" for line in said)


def _indent_block(content: str) -> str:
    """An indented block, in which nothing is Markdown."""
    return "\n".join(f"    {line}" for line in content.splitlines() or [""])
