"""report.html of a pruning run, drawn from its `Record` alone.

The page can be drawn again from record.json:

    from prunelit.report.record import Record
    from prunelit.report.run_page import render_run_page
    record = Record.from_json(Path("runs/quickstart/record.json").read_text())
    Path("again.html").write_text(render_run_page(record))
"""

from collections.abc import Iterator
from pathlib import Path

from prunelit.core.plan import PruningPlan
from prunelit.planning.serving import list_serving_notes, list_serving_options
from prunelit.report.figures import PICTURES, draw_picture
from prunelit.report.format_numbers import format_duration, format_percent, format_perplexity
from prunelit.report.headlines import describe_plan_share, list_headline_facts, list_next_steps
from prunelit.report.page import html
from prunelit.report.page.parts import Code, Completions, Notes, Page, PagePicture, Part, Section, Table
from prunelit.report.page.summary import summarize_picture
from prunelit.report.plan_card import describe_coverage, list_layer_rows
from prunelit.report.record import STATES, Record, Stage
from prunelit.runtime.text_files import JsonObject, write_text

_ROWS = {
    "perplexity": "perplexity",
    "parameters": "parameters",
    "block_parameters": "parameters of the decoder layers",
    "active_parameters": "active parameters: those that a token passes",
    "other_parameters": "parameters outside of them, which no budget counts",
    "tower_parameters": "of these, tower and projector",
    "macs_per_token": "MACs per token",
    "kv_bytes_per_token": "KV-cache bytes per token",
}


def write_run_page(record: Record, folder: Path) -> None:
    """Write report.html and record.json, each atomically.

    Args:
        record: the run.
        folder: where the two files are written.

    Raises:
        OutputNotWritable: the disk refused.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     write_run_page(Record(), Path(folder))
        ...     sorted(path.name for path in Path(folder).iterdir())
        ['record.json', 'report.html']
    """
    write_text(folder / "record.json", record.to_json())
    write_text(folder / "report.html", render_run_page(record))


def render_run_page(record: Record) -> str:
    """Write a record as one HTML page.

    Args:
        record: the run.

    Returns:
        The whole HTML file.

    Example:
        >>> page = render_run_page(Record(title="tiny"))
        >>> "<h1>tiny</h1>" in page
        True
    """
    sections = (
        Section("What next", list(list_next_steps(record))),
        Section("Quality and size", list(_list_size_parts(record))),
        Section("Pictures", list(_draw_page_pictures(record))),
        Section("What it writes", list(_list_completion_parts(record))),
        Section("Load it", [Code(commands, description) for description, commands in record.facts.get("load", ())]),
        Section("What each layer keeps", list(_list_layer_parts(record.plan))),
        Section("What serves it", list(_list_serving_parts(record.plan))),
        Section("How it was made", list(_list_provenance_parts(record))),
        Section("Config", [Code(record.facts["config"])] if record.facts.get("config") else [], folded=True),
    )
    page = Page(
        describe_plan_share(record),
        _make_lead(record),
        list(list_headline_facts(record)),
        [section for section in sections if section.parts],
    )
    return html.render_html(page)


def _make_lead(record: Record) -> str:
    plan, measured = record.plan, record.measured
    clauses = [f"Plan {plan.digest}, seed {plan.seed}"] if plan else []
    if record.kind == "fit":
        steps = record.facts.get("trained_steps")
        clauses.append(f"recovered in {steps} steps" if steps else "not finished: this is what was known so far")
    elif "pruned" not in measured:
        clauses.append("not finished: this is what was known so far")
    else:
        clauses.append("no training")
    return "; ".join(clauses).capitalize() + "."


def _format_perplexity(value: float | None) -> str:
    return "\N{EN DASH}" if value is None else format_perplexity(value)


def _list_size_parts(record: Record) -> Iterator[Part]:
    states = [name for name in STATES if name in record.measured]
    rows = []
    sizes = [_add_other_parameters(record.measured[state], record.facts.get("tower_parameters")) for state in states]
    for name, title in _ROWS.items():
        values = [size.get(name) for size in sizes]
        if any(value is not None for value in values):
            cells = map(_format_perplexity, values) if name == "perplexity" else (f"{value or 0:,}" for value in values)
            rows.append([title, *cells])
    if rows:
        yield Table(["", *states], rows)
    if protocol := record.facts.get("protocol"):
        yield _describe_protocol(protocol)


def _add_other_parameters(size: JsonObject, tower_parameters: int | None) -> JsonObject:
    """Add to measured sizes the parameters that are in no decoder layer, and those of a multimodal model's tower."""
    if size.get("parameters") is None or size.get("block_parameters") is None:
        return size
    others = size["parameters"] - size["block_parameters"]
    return size | {"other_parameters": others, "tower_parameters": tower_parameters or None}


def _describe_protocol(protocol: JsonObject) -> str:
    tokens = f", {protocol['tokens']:,} predicted tokens" if "tokens" in protocol else ""
    return (
        f"Perplexity on {', '.join(protocol['text'])}: {protocol['windows']} windows of {protocol['sequence_length']} "
        f"tokens, a new one every {protocol['stride']}{tokens}; mean {protocol['mean']}, {protocol['dtype']}."
    )


def _draw_page_pictures(record: Record) -> Iterator[PagePicture]:
    for name, picture in PICTURES.items():
        if (figure := draw_picture(name, record)) is not None:
            yield PagePicture(name, picture.title, picture.caption, summarize_picture(name, record), figure)


def _list_completion_parts(record: Record) -> Iterator[Part]:
    rows = record.completions
    states = [name for name in STATES if any(name in row for row in rows)]
    if states:
        token_limit = record.facts.get("completion_tokens")
        yield "Greedy completions" + (f" of at most {token_limit} tokens." if token_limit else ".")
        texts = {name: [row.get(name, "") for row in rows] for name in states}
        yield Completions([row["prompt"] for row in rows], texts)


def _list_layer_parts(plan: PruningPlan | None) -> Iterator[Part]:
    if plan is not None:
        head, *rows = list_layer_rows(plan)
        yield "Of the dense model's units; neighbours of one shape in one line."
        yield Table(head, rows)
        if coverage := describe_coverage(plan):
            yield f"{coverage.capitalize()}."


def _list_serving_parts(plan: PruningPlan | None) -> Iterator[Part]:
    if plan is not None:
        yield Table(
            ["program", "serves it", "why", "option", "how known"],
            [[row.target, row.answer, row.why, row.option, row.known] for row in list_serving_options(plan)],
        )
        yield Notes(list_serving_notes(plan))


def _list_provenance_parts(record: Record) -> Iterator[Part]:
    """List how the run was made: options, calibration set, machine, versions, and the cost of each stage."""
    facts, plan = record.facts, record.plan
    lines = []
    if plan is not None:
        options = ", ".join(f"{name} {value}" for name, value in plan.options.items() if value not in (None, []))
        lines.append(f"{plan.method}: {options}")
        if sources := plan.calibration.get("source"):
            tokens = plan.calibration.get("tokens")
            lines.append(f"scored on {', '.join(sources)}" + (f", {tokens:,} tokens" if tokens else ""))
    if "seed" in facts:
        lines.append(f"seed {facts['seed']}")
    if memory := facts.get("memory"):
        share = memory["trainable_parameters"] / memory["parameters"]
        lines.append(
            f"trained {memory['trainable_parameters']:,.0f} parameters, {format_percent(round(share, 4))} of them all"
        )
    if machine := facts.get("hardware"):
        lines.append(f"{machine['device']}, {machine['threads']} threads")
    if versions := facts.get("versions"):
        lines.append(", ".join(f"{name} {version}" for name, version in versions.items()))
    yield Notes(lines)
    if record.stages:
        rows = [
            [stage["name"].replace("_", " "), format_duration(stage["seconds"]), _format_peak_memory(stage)]
            for stage in record.stages
        ]
        yield Table(["stage", "time", "peak memory so far"], rows)


def _format_peak_memory(stage: Stage) -> str:
    memory = stage.get("memory_mib") or {}
    names = {"cuda": "GPU", "process": "process"}
    return ", ".join(f"{memory[key] / 1024:.2f} GiB ({name})" for key, name in names.items() if key in memory)
