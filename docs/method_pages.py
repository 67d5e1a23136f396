"""One page of the site for each method, written from the card that `methods NAME` prints: nothing is kept twice."""

from pathlib import Path

from prunelit.cli import method_cards
from prunelit.pruning.registry import Method, methods

_INDEX_HEAD = """\
# Every method

What `python -m prunelit methods NAME` prints, one page each. Where each equation comes from, and what is ours:
[methods](../methods.md). How they compare: [choose](../howto/choose.md).

| method | needs | paper | what it does |
|---|---|---|---|
"""


def render_method_page(method: Method) -> str:
    """Write the page of one method as Markdown."""
    summary, _, description = method.card.partition("\n")
    title, _, purpose = summary.partition(": ")
    rows = []
    for option in method_cards.list_method_options(method.name):
        default = "required" if option.default is None else f"`{option.default}`"
        rows.append(f"| `{option.name}` | {default} | {_escape(option.what)} |")
    _, _, commands = method_cards.render_method_card(method).rpartition("\n\nCut a model;")
    return "\n".join(
        [
            f"# {method.name}",
            "",
            f"{title}: {purpose} It {method_cards.NEEDS[method_cards.determine_needs(method)]}.",
            "",
            f"Equations, sources and tests, one by one: [methods](../../methods.md#{method.name}).",
            "",
            "```text",
            description.strip(),
            "```",
            "",
            "## Options",
            "",
            "| option | default | what it does |",
            "|---|---|---|",
            *rows,
            "",
            "## Commands",
            "",
            "```text",
            f"Cut a model;{commands}",
            "```",
            "",
        ]
    )


def write_method_pages(folder: Path) -> None:
    """Write method-pages.md, the table of all methods, and methods/NAME.md for each of them."""
    (folder / "methods").mkdir(parents=True, exist_ok=True)
    rows = []
    for name, method in methods().items():
        (folder / "methods" / f"{name}.md").write_text(render_method_page(method), encoding="utf-8")
        purpose = _escape(method.summary.partition(": ")[2])
        need, paper = method_cards.determine_needs(method), method_cards.find_paper(method)
        source = f"[{paper}](https://arxiv.org/abs/{paper})" if paper[0].isdigit() else paper
        rows.append(f"| [{name}](methods/{name}.md) | {need} | {source} | {purpose} |")
    contents = ["", "```{toctree}", ":hidden:", *(f"methods/{name}" for name in methods()), "```", ""]
    (folder / "method-pages.md").write_text("\n".join([_INDEX_HEAD.rstrip("\n"), *rows, *contents]), encoding="utf-8")


def _escape(text: str) -> str:
    return text.replace("|", "\\|")
