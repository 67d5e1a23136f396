"""The model card, README.md: what was cut from what, on which text, what it costs and predicts, how to load it.

Only what the plan, the run's report and the proof know; paths of the machine that made it are cut to their last names.
"""

import re
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml

from prunelit.core.plan import PruningPlan
from prunelit.export.formats import ExportJob, ExportResult, Format

CARD_FILE = "README.md"
_SIZE_LABELS = {
    "parameters": "parameters",
    "block_parameters": "parameters of the decoder layers",
    "macs_per_token": "MACs per token",
    "kv_bytes_per_token": "KV-cache bytes per token",
}
_INHERITED_FIELDS = ("base_model", "license", "license_name", "license_link", "language")


def render_model_card(written: ExportResult, chosen: Format, job: ExportJob, report: Mapping[str, Any]) -> str:
    """Markdown with the hub's front matter.

    Args:
        written: sizes, verdict, what the format has to say.
        chosen: the format.
        job: the model, its plan.
        report: report.json of the run that made it; may be empty.
    """
    note = written.facts.get("note")
    source = str(getattr(job.model.config, "_name_or_path", "") or "")
    head = _build_front_matter(source, chosen)
    name = job.plan.model.name if job.plan else Path(source).name or type(job.model).__name__
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        _render_title(name, job.plan),
        f"## Load\n\n```python\n{chosen.load_snippet}\n```" + (f"\n\n{_format_sentence(note)}" if note else ""),
        _render_sizes(written, job.plan),
        _render_method(job.plan),
        _render_quality(report),
        _render_proof(written.proof),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _build_front_matter(source: str, chosen: Format) -> dict[str, Any]:
    """For the hub: the base model where it has a name there; its license and language from its own card."""
    head: dict[str, Any] = {"library_name": chosen.library, "pipeline_tag": "text-generation"}
    found = re.match(r"---\n(.*?)\n---", _read_text_or_empty(Path(source, CARD_FILE)) if source else "", re.DOTALL)
    try:
        theirs = yaml.safe_load(found[1]) if found else {}
    except yaml.YAMLError:
        theirs = {}
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not Path(source).exists():
        head["base_model"] = source
    head |= {name: theirs[name] for name in _INHERITED_FIELDS if isinstance(theirs, dict) and name in theirs}
    return head | {"tags": ["prunelit", "pruned", "structured-pruning", chosen.name]}


def _read_text_or_empty(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _render_title(name: str, plan: PruningPlan | None) -> str:
    if plan is None:
        return f"# {name}\n\nWritten by prunelit."
    share = plan.predicted["ratio_of_block_parameters"]
    return (
        f"# {name}, {share:.1%} smaller layers\n\n"
        f"{name} after structured pruning with prunelit: {share:.1%} of the decoder layers' parameters were removed. "
        "Nothing is masked; the weights are gone."
    )


def _render_sizes(written: ExportResult, plan: PruningPlan | None) -> str:
    size, dense = written.size, written.dense
    if plan is None or dense is None:
        rows = [f"| {what} | {size[name]:,} |" for name, what in _SIZE_LABELS.items()]
        return "\n".join(["## Size", "", "| | |", "|---|---|", *rows])
    rows = [
        f"| {what} | {dense[name]:,} | {size[name]:,} | {1 - size[name] / dense[name]:.1%} |"
        for name, what in _SIZE_LABELS.items()
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
    """Rows of layers in succession that keep as much."""
    pairs = zip(plan.layers, plan.model.layers, strict=True)
    rows = [
        tuple(
            f"{kept} of {of}" if kept else "-"
            for kept, of in zip(layer.widths, (shape.query_heads, shape.kv_groups, shape.ffn_channels), strict=True)
        )
        for layer, shape in pairs
    ]
    start = 0
    for row, same in groupby(rows):
        end = start + len(list(same))
        yield f"| {start if end == start + 1 else f'{start}-{end - 1}'} | {' | '.join(row)} |"
        start = end


def _render_method(plan: PruningPlan | None) -> str:
    if plan is None:
        return ""
    options = ", ".join(f"{name} {_format_value(value)}" for name, value in plan.options.items() if value is not None)
    read = plan.calibration
    text = (
        f"{read['windows']} windows of {read['seqlen']} tokens of {_format_value(read['source'])}"
        if _has_text_source(read)
        else "none"
    )
    return (
        f"## How\n\n- method: `{plan.method}`\n- options: {options or 'none'}\n- calibration text: {text}\n"
        f"- seed: {plan.seed}\n- plan: `plan.json`, digest {plan.digest}"
    )


def _has_text_source(calibration: Mapping[str, Any]) -> bool:
    return {"windows", "seqlen", "source"} <= calibration.keys()


def _render_quality(report: Mapping[str, Any]) -> str:
    """Perplexities of the run's report, with their protocol."""
    stages = [name for name in ("dense", "pruned", "recovered") if _get_perplexity(report, name) is not None]
    if not stages:
        return ""
    found = report.get("protocol")
    protocol = ", ".join(
        f"{name.replace('_', ' ')} {_format_value(value)}"
        for name, value in (found.items() if isinstance(found, Mapping) else ())
    )
    rows = [f"| {name} | {_get_perplexity(report, name):.2f} |" for name in stages]
    return "\n".join(["## Quality", "", "| | perplexity |", "|---|---|", *rows, "", f"Protocol: {protocol}."])


def _get_perplexity(report: Mapping[str, Any], stage: str) -> float | None:
    found = report.get(stage)
    number = found.get("perplexity") if isinstance(found, Mapping) else None
    return number if isinstance(number, int | float) else None


def _render_proof(proof: Mapping[str, Any]) -> str:
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
    names = ("prunelit", "transformers", "torch", "python")
    used = ", ".join(f"{name} {proof['versions'][name]}" for name in names if name in proof.get("versions", {}))
    return "\n".join(["## Proof", "", *lines, f"- versions: {used}", "", "The same as data: `proof.json`."])


def _format_value(value: Any) -> str:
    """A value in a sentence; a path without its folders."""
    if isinstance(value, list | tuple):
        return " + ".join(_format_value(item) for item in value) or "none"
    if isinstance(value, str) and (value.startswith((".", "/", "~")) or Path(value).exists()):
        return Path(value).name
    return str(value)


def _format_sentence(said: str) -> str:
    return f"{said[0].upper()}{said[1:]}."
