"""How two runs differ: options, what was cut, sizes, quality and time, as text or as one page."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

from prunelit.core.plan_diff import find_plan_differences
from prunelit.report.format_numbers import format_duration, format_percent
from prunelit.report.page import html
from prunelit.report.page.parts import Fact, Notes, Page, Part, Section, Table
from prunelit.report.plan_card import align_columns, list_difference_rows
from prunelit.report.run_summary import RunSummary
from prunelit.runtime.errors import BadPlan

_NAMES = ("A", "B")
_MOST_ROWS = 40
_LONGEST_CELL = 60


def is_same_run(first: RunSummary, second: RunSummary) -> bool:
    """Whether two runs have the same options and cut the same; what was measured may still differ.

    Args:
        first, second: the runs.

    Example: see `prunelit.cli.reports.diff`, which uses it.
    """
    digests = [run.plan.digest if run.plan else None for run in (first, second)]
    return first.kind == second.kind and first.options == second.options and digests[0] == digests[1]


def build_difference_sections(first: RunSummary, second: RunSummary) -> list[Section]:
    """Build one section for each way in which two runs can differ; those with nothing in them are left out.

    Args:
        first, second: the runs, called A and B.

    Example:
        >>> runs = [RunSummary(name, "plan", options={"ratio": ratio}) for name, ratio in (("a", "0.2"), ("b", "0.3"))]
        >>> section, = build_difference_sections(*runs)
        >>> section.title, section.parts[0].rows
        ('Options that differ', [['ratio', '0.2', '0.3']])
    """
    if first.kind == second.kind == "comparison":
        first, second = _keep_shared_cells(first, second)
    sections = (
        Section("Options that differ", _list_option_parts(first.options, second.options)),
        Section("What was cut", _list_cut_parts(first, second)),
        Section("Size", _list_number_parts(first.sizes, second.sizes, _format_size)),
        Section("Quality and speed", _list_quality_parts(first, second)),
        Section("Time", _list_number_parts(first.seconds, second.seconds, format_duration)),
    )
    return [section for section in sections if section.parts]


def _keep_shared_cells(first: RunSummary, second: RunSummary) -> tuple[RunSummary, RunSummary]:
    """Leave out cells that only one of two comparisons has, unless none is in both."""
    shared = first.quality.keys() & second.quality.keys()
    if not shared:
        return first, second
    places = {name.removesuffix(", nats") for name in shared}

    def keep_shared(run: RunSummary) -> RunSummary:
        quality = {name: value for name, value in run.quality.items() if name in shared}
        return replace(run, quality=quality, seconds={n: value for n, value in run.seconds.items() if n in places})

    return keep_shared(first), keep_shared(second)


def render_difference_text(first: RunSummary, second: RunSummary) -> str:
    """Write how two runs differ for a terminal.

    Args:
        first, second: the runs, called A and B.

    Example:
        >>> print(render_difference_text(RunSummary("a", "plan"), RunSummary("b", "plan")))
        A  a (plan)
        B  b (plan)
        <BLANKLINE>
        no difference was found
    """
    blocks = ["\n".join(f"{name}  {run.name} ({run.kind})" for name, run in zip(_NAMES, (first, second), strict=True))]
    for section in build_difference_sections(first, second):
        blocks.append(section.title.upper())
        blocks += [_render_text_part(part) for part in section.parts]
    return "\n\n".join(blocks if len(blocks) > 1 else [*blocks, "no difference was found"])


def render_difference_page(first: RunSummary, second: RunSummary) -> str:
    """Write how two runs differ as one HTML page.

    Args:
        first, second: the runs, called A and B.

    Example:
        >>> "<h1>Two runs" in render_difference_page(RunSummary("a", "plan"), RunSummary("b", "plan"))
        True
    """
    lead = "; ".join(f"{name}: {run.name} ({run.kind})" for name, run in zip(_NAMES, (first, second), strict=True))
    facts = [
        Fact(name[:1].upper() + name[1:], f"{format_value(values[0])} \N{RIGHTWARDS ARROW} {format_value(values[1])}")
        for name, values, format_value in (
            ("parameters", _get_both(first.sizes, second.sizes, "parameters"), _format_size),
            *((name, _get_both(first.quality, second.quality, name), _format_quality) for name in second.quality),
        )
        if values is not None
    ]
    return html.render_html(
        Page("Two runs, and what differs", lead, facts[:6], build_difference_sections(first, second))
    )


def _get_both(first: Mapping[str, float], second: Mapping[str, float], name: str) -> tuple[float, float] | None:
    return (first[name], second[name]) if name in first and name in second else None


def _list_option_parts(first: Mapping[str, str], second: Mapping[str, str]) -> list[Part]:
    rows = [
        [name, _shorten(first.get(name, "")), _shorten(second.get(name, ""))]
        for name in dict.fromkeys([*first, *second])
        if first.get(name, "") != second.get(name, "")
    ]
    return [Table(["option", *_NAMES], rows)] if rows else []


def _list_cut_parts(first: RunSummary, second: RunSummary) -> list[Part]:
    if first.plan is None or second.plan is None:
        return []
    try:
        differences = find_plan_differences(first.plan, second.plan)
    except BadPlan as error:
        return [f"Layers are not compared: {str(error).removeprefix('plan diff: ')}."]
    if not differences:
        return [f"Both keep the same units: plan {first.plan.digest}."]
    head, *rows = list_difference_rows(differences[:_MOST_ROWS], _NAMES)
    layer_count = len({difference.layer for difference in differences})
    left_out = len(differences) - len(rows)
    more = f"; {left_out} more rows: `plan diff` with both plan.json shows them" if left_out else ""
    return [f"{layer_count} of {len(first.plan.layers)} layers differ{more}.", Table(head, rows)]


def _list_quality_parts(first: RunSummary, second: RunSummary) -> list[Part]:
    parts = _list_number_parts(first.quality, second.quality, _format_quality)
    differing = [
        f"{name}: {_shorten(first.protocol.get(name, 'none'))} and {_shorten(second.protocol.get(name, 'none'))}"
        for name in dict.fromkeys([*first.protocol, *second.protocol])
        if first.protocol.get(name) != second.protocol.get(name)
    ]
    if parts and differing and first.quality and second.quality:
        parts += ["They were measured differently, so these numbers do not compare:", Notes(differing[:8])]
    return parts


def _list_number_parts(
    first: Mapping[str, float], second: Mapping[str, float], format_value: Callable[[float], str]
) -> list[Part]:
    rows = []
    for name in dict.fromkeys([*first, *second]):
        cells = [format_value(values[name]) if name in values else "" for values in (first, second)]
        rows.append([name, *cells, _describe_change(name, first.get(name), second.get(name))])
    return [Table(["", *_NAMES, "change"], rows)] if rows else []


def _describe_change(name: str, before: float | None, after: float | None) -> str:
    """Describe B against A: in percent, or as a difference of what is a share or a logarithm already."""
    if before is None or after is None or not math.isfinite(before) or not math.isfinite(after):
        return ""
    if before == after:
        return "same"
    if name.endswith("nats") or name.startswith("ratio"):
        return f"{after - before:+.3f}"
    if before <= 0 or after < 0:
        return ""
    ratio = after / before
    return f"{ratio:.3g} times" if ratio >= 2 else f"{ratio - 1:+.1%}"


def _format_size(value: float) -> str:
    return format_percent(round(value, 4)) if 0 < value < 1 else f"{value:,.0f}"


def _format_quality(value: float) -> str:
    return f"{value:,.0f}" if 1e4 <= abs(value) < math.inf else f"{value:.4g}"


def _shorten(text: str) -> str:
    return text if len(text) <= _LONGEST_CELL else f"{text[: _LONGEST_CELL - 3]}..."


def _render_text_part(part: Part) -> str:
    if isinstance(part, Table):
        return align_columns([part.head, *part.rows], part.right)
    return "\n".join(f"  {line}" for line in part.lines) if isinstance(part, Notes) else str(part)
