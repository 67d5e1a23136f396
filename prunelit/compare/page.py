"""report.html of a comparison: the content of compare.json as figures and tables."""

import math

import yaml

from prunelit.compare import figures
from prunelit.compare.report_content import ComparisonReport
from prunelit.compare.tables import build_comparison_sections, find_best_rows
from prunelit.report.format_numbers import format_percent
from prunelit.report.page import html
from prunelit.report.page.parts import Code, Fact, Page, PagePicture, Section

_CONFIG = ("source", "rows", "ratios", "seeds", "calibration", "texts", "options", "latency")


def render_comparison_page(report: ComparisonReport) -> str:
    """Write the content of compare.json as one HTML page, with the cells that are finished so far.

    Args:
        report: content of compare.json.

    Returns:
        The whole HTML file.

    Example: see `prunelit.compare.run.compare_methods`.
    """
    finished = sum(cell["status"] == "finished" for cell in report["cells"])
    tables, provenance = build_comparison_sections(report)
    sections = [
        Section("Pictures", _draw_page_pictures(report)),
        tables._replace(title="Tables"),
        provenance._replace(title="How it was made"),
        Section("Config", [Code(_render_config(report))], folded=True),
    ]
    lead = f"{finished} of {len(report['cells'])} cells finished; perplexity on {', '.join(report['texts'])}."
    facts = [
        Fact(f"Best at {format_percent(ratio)}", label, f"{value:.3f} nats above the dense model")
        for ratio, (label, value) in find_best_rows(report).items()
    ]
    title = f"Pruning methods on {report['model']}"
    return html.render_html(Page(title, lead, facts, [section for section in sections if section.parts]))


def _draw_page_pictures(report: ComparisonReport) -> list[PagePicture]:
    caption = (
        "A line is a method, a point a ratio (small: one seed); dashed is the dense model. Lower is better. At the end "
        "of a line is its perplexity at the deepest cut; an arrow marks lines that end above the picture."
    )
    pictures = []
    for axis in figures.list_axes(report):
        for number, text in enumerate(report["texts"]):
            title = f"Perplexity on {text} against {axis}"
            figure = figures.draw_comparison(report, axis, [text])
            pictures.append(PagePicture(f"{axis}{number}", title, caption, _summarize_text(report, text), figure))
    return pictures


def _summarize_text(report: ComparisonReport, text: str) -> str:
    cells = [cell for cell in report["cells"] if cell["status"] == "finished"]
    nearest = min(cells, key=lambda cell: cell["texts"][text]["nll"])
    farthest = max(cells, key=lambda cell: cell["texts"][text]["nll"])
    dense_nll = report["dense"]["texts"][text]["nll"]
    clauses = [
        f"{title} {cell['label']} at {format_percent(cell['ratio'])}, "
        f"{cell['texts'][text]['nll'] - dense_nll:+.3f} nats"
        for title, cell in (("nearest to dense:", nearest), ("farthest:", farthest))
    ]
    return f"Dense {math.exp(min(dense_nll, 700.0)):.4g}; {'; '.join(clauses)}."


def _render_config(report: ComparisonReport) -> str:
    content: dict[str, object] = dict(report)
    chosen = {name: content[name] for name in _CONFIG if content.get(name) is not None}
    return str(yaml.safe_dump(chosen, sort_keys=False, allow_unicode=True))
