"""report.html of a comparison: the content of compare.json as pictures and tables."""

import math

import yaml

from prunelit.compare import figures
from prunelit.compare.tables import Report, best_places, sections
from prunelit.report.page import html
from prunelit.report.page.parts import Code, Fact, Page, Section, Shown
from prunelit.runtime.format_numbers import percent

_CONFIG = ("source", "rows", "ratios", "seeds", "calibration", "texts", "options", "latency")


def page_of(report: Report) -> str:
    """The whole file, of as many cells as are finished."""
    done = sum(cell["status"] == "finished" for cell in report["cells"])
    tables, below = sections(report)
    wanted = [
        Section("Pictures", _pictures(report)),
        tables._replace(title="Tables"),
        below._replace(title="How it was made"),
        Section("Config", [Code(_config(report))], folded=True),
    ]
    lead = f"{done} of {len(report['cells'])} cells finished; perplexity on {', '.join(report['texts'])}."
    facts = [
        Fact(f"Best at {percent(ratio)}", label, f"{value:.3f} nats above the dense model")
        for ratio, (label, value) in best_places(report).items()
    ]
    title = f"Pruning methods on {report['model']}"
    return html.render(Page(title, lead, facts, [section for section in wanted if section.parts]))


def _pictures(report: Report) -> list[Shown]:
    caption = (
        "A line is a method, a point a ratio (small: one seed); dashed is the dense model. Lower is better; a line "
        "that leaves the picture goes on above it."
    )
    found = []
    for axis in figures.axes_of(report):
        for number, text in enumerate(report["texts"]):
            title = f"Perplexity on {text} against {axis}"
            made = figures.draw(report, axis, [text])
            found.append(Shown(f"{axis}{number}", title, caption, _summary(report, text), made))
    return found


def _summary(report: Report, text: str) -> str:
    cells = [cell for cell in report["cells"] if cell["status"] == "finished"]
    least = min(cells, key=lambda cell: cell["texts"][text]["nll"])
    most = max(cells, key=lambda cell: cell["texts"][text]["nll"])
    dense = report["dense"]["texts"][text]["nll"]
    said = [
        f"{what} {cell['label']} at {percent(cell['ratio'])}, {cell['texts'][text]['nll'] - dense:+.3f} nats"
        for what, cell in (("nearest to dense:", least), ("farthest:", most))
    ]
    return f"Dense {math.exp(min(dense, 700.0)):.4g}; {'; '.join(said)}."


def _config(report: Report) -> str:
    chosen = {name: report[name] for name in _CONFIG if report.get(name) is not None}
    return str(yaml.safe_dump(chosen, sort_keys=False, allow_unicode=True))
