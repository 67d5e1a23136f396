"""The site: the pages of this folder and the docstrings of the package. `make docs` builds it, without a network."""

import re
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

import method_pages  # noqa: E402

from prunelit import __version__  # noqa: E402
from prunelit.__main__ import render_usage  # noqa: E402

project = "prunelit"
release = version = __version__
project_copyright = "the authors of prunelit"

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "myst_nb"]
exclude_patterns = ["_build"]
nb_execution_mode = "off"  # notebooks are shown with the outputs they keep
myst_heading_anchors = 3
autodoc_typehints = "none"  # types are in the source; here they would bury the names
autodoc_member_order = "bysource"
napoleon_use_ivar = True
html_theme = "furo"
html_title = f"prunelit {__version__}"


def plain(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are plain text: in a module's, paragraphs with formulas or lists stand as they are; a bar is a bar."""
    if what != "module":
        lines[:] = [re.sub(r"(?<!\\)\|", r"\\|", line) for line in lines]
        return
    shown: list[str] = []
    for paragraph in "\n".join(lines).split("\n\n"):
        rows = paragraph.split("\n")
        if any(row.startswith((" ", "-", "1.")) or "|" in row for row in rows):
            shown += [".. code-block:: text", "", *(f"    {row}" for row in rows), ""]
        else:
            shown += [*rows, ""]
    lines[:] = shown


def setup(app: Any) -> None:
    """Bring what lies outside this folder: notebooks, the commands' list, and the cards of the methods."""
    app.connect("autodoc-process-docstring", plain, priority=100)  # before napoleon
    made = ROOT / "docs" / "made"
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    (made / "usage.txt").write_text(render_usage(), encoding="utf-8")
    method_pages.write_method_pages(made)
    names = [path.name for path in sorted((ROOT / "notebooks").glob("*.ipynb"))]
    for name in names:
        shutil.copy(ROOT / "notebooks" / name, made / name)
    body = ["```{toctree}", *names, "```"] if names else ["None yet."]
    (made / "notebooks.md").write_text("\n".join(["# Notebooks", "", *body, ""]), encoding="utf-8")
