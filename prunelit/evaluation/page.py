"""report.html of an evaluation: the content of evaluate.json as numbers, tables and completions side by side."""

from collections.abc import Iterator

from prunelit.evaluation.markdown import EvaluationReport, build_evaluation_sections
from prunelit.report.format_numbers import exponentiate_nll, format_count, format_perplexity
from prunelit.report.page import html
from prunelit.report.page.parts import Fact, Page


def render_evaluation_page(report: EvaluationReport) -> str:
    """Write the content of evaluate.json as one HTML page.

    Args:
        report: content of evaluate.json.

    Returns:
        The whole HTML file.

    Example: see `prunelit.evaluation.run.evaluate_model`.
    """
    model, against = report["model"], report.get("against")
    size_section, *measured, provenance = build_evaluation_sections(report)
    lead = f"Against {against['source']}." if against else "Alone, against no other model."
    parts = [part for part in size_section.parts if not isinstance(part, str)]
    sections = [
        *measured,
        size_section._replace(title="Size", parts=parts),
        provenance._replace(title="How it was made"),
    ]
    title = f"Evaluation of {model['source']}" + (f" with adapter {model['adapter']}" if model["adapter"] else "")
    return html.render_html(Page(title, lead, list(_list_facts(report)), sections))


def _list_facts(report: EvaluationReport) -> Iterator[Fact]:
    for name, entry in report.get("perplexity", {}).items():
        note = f"against {format_perplexity(exponentiate_nll(entry['against']))}" if "against" in entry else ""
        yield Fact(f"Perplexity on {name}", format_perplexity(exponentiate_nll(entry["model"])), note)
    for metric, average in report.get("zero_shot", {}).get("averages", {}).items():
        note = f"against {average['against']:.3f}" if "against" in average else ""
        yield Fact(f"Zero-shot, mean {metric}", f"{average['model']:.3f}", note)
    for kind, ratio in report.get("speed", {}).get("ratios", {}).items():
        yield Fact(f"{kind.capitalize()}, times as fast", f"{ratio['median']:.2f}", f"promised {ratio['promised']:.2f}")
    for kind, ratio in report.get("speed", {}).get("vllm", {}).get("ratios", {}).items():
        title = f"{kind.capitalize()} in vLLM, times as fast"
        yield Fact(title, f"{ratio['median']:.2f}", f"promised {ratio['promised']:.2f}")
    for name, title, unit in (("parameters", "Parameters", ""), ("kv_bytes_per_token", "KV cache per token", " B")):
        values = [f"{format_count(report[role][name])}{unit}" for role in ("model", "against") if role in report]
        yield Fact(title, values[0], f"against {values[1]}" if len(values) > 1 else "")
