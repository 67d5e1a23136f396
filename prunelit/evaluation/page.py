"""report.html of an evaluation: the content of evaluate.json as numbers and tables, completions side by side."""

from collections.abc import Iterator

from prunelit.evaluation.markdown import EvaluationReport, build_evaluation_sections
from prunelit.report.page import html
from prunelit.report.page.parts import Fact, Page
from prunelit.runtime.format_numbers import exponentiate_nll, format_count, format_perplexity


def render_evaluation_page(report: EvaluationReport) -> str:
    """The whole file."""
    model, against = report["model"], report.get("against")
    sizes, *measured, how = build_evaluation_sections(report)
    lead = f"Against {against['source']}." if against else "Alone, against no other model."
    parts = [part for part in sizes.parts if not isinstance(part, str)]
    wanted = [*measured, sizes._replace(title="Size", parts=parts), how._replace(title="How it was made")]
    title = f"Evaluation of {model['source']}" + (f" with adapter {model['adapter']}" if model["adapter"] else "")
    return html.render_html(Page(title, lead, list(_list_facts(report)), wanted))


def _list_facts(report: EvaluationReport) -> Iterator[Fact]:
    for name, entry in report.get("perplexity", {}).items():
        note = f"against {format_perplexity(exponentiate_nll(entry['against']))}" if "against" in entry else ""
        yield Fact(f"Perplexity on {name}", format_perplexity(exponentiate_nll(entry["model"])), note)
    for metric, average in report.get("zero_shot", {}).get("averages", {}).items():
        note = f"against {average['against']:.3f}" if "against" in average else ""
        yield Fact(f"Zero-shot, mean {metric}", f"{average['model']:.3f}", note)
    for kind, ratio in report.get("speed", {}).get("ratios", {}).items():
        yield Fact(f"{kind.capitalize()}, times as fast", f"{ratio['median']:.2f}", f"promised {ratio['promised']:.2f}")
    for name, what, unit in (("parameters", "Parameters", ""), ("kv_bytes_per_token", "KV cache per token", " B")):
        values = [f"{format_count(report[who][name])}{unit}" for who in ("model", "against") if who in report]
        yield Fact(what, values[0], f"against {values[1]}" if len(values) > 1 else "")
