"""The model card, README.md: what was pruned from which model, on which text, its size and quality, and how to load it.

The card holds only what the plan, the run's report and the proof say. Of a local path it shows the last name only.
"""

import re
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml

from prunelit.core.plan import PruningPlan
from prunelit.data.yaml_text import parse_yaml
from prunelit.export.formats import ExportJob, ExportResult, Format
from prunelit.export.load_commands import list_serve_commands
from prunelit.export.proof.served import format_served_verdict
from prunelit.model.stored.folder import read_model_config

CARD_FILE = "README.md"
_SIZE_LABELS = {
    "parameters": "parameters",
    "block_parameters": "parameters of the decoder layers",
    "macs_per_token": "MACs per token",
    "kv_bytes_per_token": "KV-cache bytes per token",
}
_INHERITED_FIELDS = ("base_model", "license", "license_name", "license_link", "language")
"""Front matter that is taken from the card of the dense model."""


def render_model_card(written: ExportResult, chosen: Format, job: ExportJob, report: Mapping[str, Any]) -> str:
    """Render the model card.

    Args:
        written: the sizes, the verdict, and the format's facts.
        chosen: the format.
        job: the model and its plan.
        report: report.json of the run that made the model; may be empty.

    Returns:
        Markdown with the front matter of the Hugging Face hub.

    Example: see `prunelit.export.write_model`, which writes it as README.md.
    """
    note = written.facts.get("note")
    source = str(getattr(job.model.config, "_name_or_path", "") or "")
    head = _build_front_matter(source, chosen)
    name = job.plan.model.name if job.plan else Path(source).name or type(job.model).__name__
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        _render_title(name, job.plan),
        f"## Load\n\n```python\n{chosen.render_load_snippet(job.model.config)}\n```"
        + (f"\n\n{_format_sentence(note)}" if note else ""),
        _render_servers(written, chosen, job),
        _render_sizes(written, job.plan),
        _render_method(job.plan),
        _render_quality(report),
        _render_proof(written.proof),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _render_servers(written: ExportResult, chosen: Format, job: ExportJob) -> str:
    """Render the commands of servers, each with what is known of it; "" where none is known."""
    model_type = str(read_model_config(job.path).get("model_type", ""))  # the written one: InternLM 3 becomes Llama
    commands = list_serve_commands(chosen.name, "PATH", model_type, job.plan, written.proof.get("vllm"))
    sections = [f"{heading}:\n\n```sh\n{lines}\n```" for heading, lines in commands]
    return "\n\n".join(["## Serve", *sections]) if sections else ""


def _build_front_matter(source: str, chosen: Format) -> dict[str, Any]:
    """Build the hub's front matter.

    The base model is named if it is one of the hub. If it is a local folder, its card gives license and language.
    """
    head: dict[str, Any] = {"library_name": chosen.library, "pipeline_tag": "text-generation"}
    source_card = _read_text_or_empty(Path(source, CARD_FILE)) if source else ""
    front_matter = re.match(r"---\n(.*?)\n---", source_card, re.DOTALL)
    try:
        source_head = parse_yaml(front_matter[1]) if front_matter else {}
    except yaml.YAMLError:
        source_head = {}
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not Path(source).exists():
        head["base_model"] = source
    if isinstance(source_head, dict):
        head |= {name: source_head[name] for name in _INHERITED_FIELDS if name in source_head}
    return head | {"tags": ["prunelit", "pruned", "structured-pruning", chosen.name]}


def _read_text_or_empty(path: Path) -> str:
    """Read a text file; "" where there is none or it is no text."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _render_title(name: str, plan: PruningPlan | None) -> str:
    """Render the heading and the first paragraph."""
    if plan is None:
        return f"# {name}\n\nWritten by prunelit."
    share = plan.predicted["ratio_of_block_parameters"]
    return (
        f"# {name}, {share:.1%} smaller layers\n\n"
        f"{name} after structured pruning with prunelit: {share:.1%} of the decoder layers' parameters were removed. "
        "Nothing is masked; the weights are gone."
    )


def _render_sizes(written: ExportResult, plan: PruningPlan | None) -> str:
    """Render the table of sizes, and with a plan the table of remaining units."""
    size, dense = written.size, written.dense
    if plan is None or dense is None:
        rows = [f"| {label} | {size[name]:,} |" for name, label in _SIZE_LABELS.items()]
        return "\n".join(["## Size", "", "| | |", "|---|---|", *rows])
    rows = [
        f"| {label} | {dense[name]:,} | {size[name]:,} | {1 - size[name] / dense[name]:.1%} |"
        for name, label in _SIZE_LABELS.items()
        if dense[name]
    ]
    return "\n".join(
        [
            *("## What is left", "", "| | dense | here | saved |", "|---|---|---|---|", *rows, ""),
            "Kept by the plan, of the dense model's layers (-: the whole block was removed):",
            *(
                "",
                "| layers | query heads | KV groups | FFN channels |",
                "|---|---|---|---|",
                *_render_layer_rows(plan),
            ),
        ]
    )


def _render_layer_rows(plan: PruningPlan) -> Iterator[str]:
    """Render a table row for each run of consecutive layers with the same remaining widths."""
    pairs = zip(plan.layers, plan.model.layers, strict=True)
    rows = [
        tuple(
            f"{kept} of {total}" if kept else "-"
            for kept, total in zip(layer.widths, (shape.query_heads, shape.kv_groups, shape.ffn_channels), strict=True)
        )
        for layer, shape in pairs
    ]
    start = 0
    for row, equal_rows in groupby(rows):
        end = start + len(list(equal_rows))
        yield f"| {start if end == start + 1 else f'{start}-{end - 1}'} | {' | '.join(row)} |"
        start = end


def _render_method(plan: PruningPlan | None) -> str:
    """Render the section on method, options and calibration set; "" without a plan."""
    if plan is None:
        return ""
    options = ", ".join(f"{name} {_format_value(value)}" for name, value in plan.options.items() if value is not None)
    calibration = plan.calibration
    text = "none"
    if _has_text_source(calibration):
        text = f"{calibration['windows']} windows of {calibration['seqlen']} tokens"
        text += f" of {_format_value(calibration['source'])}"
    return (
        f"## How\n\n- method: `{plan.method}`\n- options: {options or 'none'}\n- calibration text: {text}\n"
        f"- seed: {plan.seed}\n- plan: `plan.json`, digest {plan.digest}"
    )


def _has_text_source(calibration: Mapping[str, Any]) -> bool:
    """Tell whether a plan's calibration record describes text."""
    return {"windows", "seqlen", "source"} <= calibration.keys()


def _render_quality(report: Mapping[str, Any]) -> str:
    """Render the perplexities of the run's report, with their protocol; "" where there are none."""
    stages = [name for name in ("dense", "pruned", "recovered") if _get_perplexity(report, name) is not None]
    if not stages:
        return ""
    settings = report.get("protocol")
    protocol = ", ".join(
        f"{name.replace('_', ' ')} {_format_value(value)}"
        for name, value in (settings.items() if isinstance(settings, Mapping) else ())
    )
    rows = [f"| {name} | {_get_perplexity(report, name):.2f} |" for name in stages]
    return "\n".join(["## Quality", "", "| | perplexity |", "|---|---|", *rows, "", f"Protocol: {protocol}."])


def _get_perplexity(report: Mapping[str, Any], stage: str) -> float | None:
    """Return the perplexity of a stage; None where the report has no such number.

    Example:
        >>> _get_perplexity({"dense": {"perplexity": 12.5}}, "dense")
        12.5
    """
    metrics = report.get(stage)
    perplexity = metrics.get("perplexity") if isinstance(metrics, Mapping) else None
    return perplexity if isinstance(perplexity, int | float) else None


def _render_proof(proof: Mapping[str, Any]) -> str:
    """Render the section on the proof."""
    lines = [f"- loaded by: {proof['loader']}"]
    if "largest_difference" in proof:
        lines.append(
            f"- largest difference of logits to the model in memory: {proof['largest_difference']:.3g} on "
            f"{proof['tokens']} fixed tokens (at most {proof['limit']:.2g}; largest logit {proof['largest_logit']:.3g})"
        )
    if "summary" in proof:
        lines.append(f"- {proof['summary']}")
    if "cache_difference" in proof:
        lines.append(
            f"- greedy generation with the KV cache and without: difference of logits {proof['cache_difference']:.3g} "
            f"(at most {proof['cache_limit']:.2g})"
        )
    if "vllm" in proof:
        lines.append(f"- {format_served_verdict(proof['vllm'])}")
    names = ("prunelit", "transformers", "torch", "python")
    versions = ", ".join(f"{name} {proof['versions'][name]}" for name in names if name in proof.get("versions", {}))
    return "\n".join(["## Proof", "", *lines, f"- versions: {versions}", "", "The same as data: `proof.json`."])


def _format_value(value: Any) -> str:
    """Format a value for a sentence; of a path only the last name is shown.

    Example:
        >>> _format_value(["/data/words.txt", 3])
        'words.txt + 3'
    """
    if isinstance(value, list | tuple):
        return " + ".join(_format_value(item) for item in value) or "none"
    if isinstance(value, str) and (value.startswith((".", "/", "~")) or Path(value).exists()):
        return Path(value).name
    return str(value)


def _format_sentence(text: str) -> str:
    """Capitalise the first letter of a text, and end it with a full stop."""
    return f"{text[0].upper()}{text[1:]}."
