"""A comparison as tables: perplexities, their mean log ratio to the dense model, and how they were measured.

It uses the content of compare.json alone and needs no model.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from prunelit.compare.report_content import CellEntry, CellResult, ComparisonReport, DenseResult
from prunelit.report.format_numbers import exponentiate_nll, format_percent, format_perplexity
from prunelit.report.page import parts
from prunelit.report.page.parts import Notes, Section, Table

_MISSING = "\N{EN DASH}"


def compute_mean_log_ratio(cell: CellResult, dense: DenseResult) -> float:
    """Compute the mean over the texts of ln(perplexity / dense perplexity), in nats; 0 is the dense model.

    Args:
        cell: a finished cell of compare.json.
        dense: the dense model's entry of compare.json.

    Example:
        >>> dense = {"texts": {"a": {"nll": 2.0}, "b": {"nll": 3.0}}}
        >>> compute_mean_log_ratio({"texts": {"a": {"nll": 2.5}, "b": {"nll": 3.25}}}, dense)
        0.375
    """
    texts = cell["texts"]
    return sum(texts[name]["nll"] - dense["texts"][name]["nll"] for name in texts) / len(texts)


def _format_decimals(digits: int) -> Callable[[float, float], str]:
    return lambda value, _: f"{value:.{digits}f}"


def format_spread(values: Sequence[float], format_value: Callable[[float, float], str]) -> str:
    """Write the mean over seeds, and half of the range where there are several seeds.

    Args:
        values: one for each seed.
        format_value: writes a value; it is given the mean too, so that both numbers get the same digits.

    Example:
        >>> format_spread([1.0, 2.0], lambda value, mean: f"{value:.1f}")
        '1.5 ± 0.5'
    """
    mean = sum(values) / len(values)
    if len(values) == 1 or not math.isfinite(mean):
        return format_value(mean, mean)
    return f"{format_value(mean, mean)} ± {format_value((max(values) - min(values)) / 2, mean)}"


def render_comparison_markdown(report: ComparisonReport) -> str:
    """Write the content of compare.json as compare.md.

    Args:
        report: content of compare.json.

    Returns:
        The whole Markdown document.

    Example: see `prunelit.compare.run.compare_methods`.
    """
    return parts.render_markdown(f"Pruning methods on {report['model']}", build_comparison_sections(report))


def build_comparison_sections(report: ComparisonReport) -> list[Section]:
    """Build the sections of compare.md and report.html: first the tables, then the notes below them.

    Args:
        report: content of compare.json.

    Example: see `prunelit.compare.run.compare_methods`.
    """
    texts, dense = list(report["texts"]), report["dense"]
    perplexities = " / ".join(format_perplexity(exponentiate_nll(dense["texts"][name])) for name in texts)

    def format_perplexities(cells: Sequence[CellEntry]) -> str:
        parts_of_tables = ([exponentiate_nll(cell["texts"][name]) for cell in cells] for name in texts)
        return " / ".join(format_spread(values, format_perplexity) for values in parts_of_tables)

    def format_seconds(cells: Sequence[CellEntry]) -> str:
        return format_spread([cell["seconds"]["prune"] for cell in cells], _format_decimals(1))

    def format_speedup(cells: Sequence[CellEntry]) -> str:
        return format_spread([cell["latency"]["speedup"] for cell in cells], _format_decimals(2))

    parts_of_tables: list[parts.Part] = [
        f"Perplexity on {' / '.join(texts)}; the dense model has {perplexities}.",
        build_ratio_table(report, format_perplexities),
        f"Mean over {' / '.join(texts)} of ln(perplexity / dense perplexity), in nats, smaller is better; the best of "
        "each column in bold.",
        build_ratio_table(
            report,
            _format_log_ratios(dense),
            best=lambda cells: _compute_mean(compute_mean_log_ratio(cell, dense) for cell in cells),
        ),
        "Seconds to score, plan, cut and repair.",
        build_ratio_table(report, format_seconds),
    ]
    if report["latency"]:
        parts_of_tables += [
            f"Prefill of {report['latency']['tokens']} tokens: times as fast as the dense model, median of "
            f"{report['latency']['repeats']} passes in turn.",
            build_ratio_table(report, format_speedup),
        ]
    return [Section("", parts_of_tables), Section("", [Notes(list_comparison_notes(report))])]


def find_best_rows(report: ComparisonReport) -> dict[float, tuple[str, float]]:
    """Find the best row at each ratio, among the rows that have finished every seed.

    Args:
        report: content of compare.json.

    Returns:
        {ratio: (label of the row, its mean log ratio)}.

    Example:
        >>> cell = {"status": "finished", "label": "flap", "ratio": 0.2, "texts": {"a": {"nll": 2.5}}}
        >>> dense = {"texts": {"a": {"nll": 2.0}}}
        >>> report = {"ratios": [0.2], "seeds": [0], "rows": [{"label": "flap"}], "cells": [cell], "dense": dense}
        >>> find_best_rows(report)
        {0.2: ('flap', 0.5)}
    """
    best: dict[float, tuple[str, float]] = {}
    for ratio in report["ratios"]:
        for row in report["rows"]:
            cells = _select_finished_cells(report, row["label"], ratio)
            if len(cells) == len(report["seeds"]):
                measure = _compute_mean(compute_mean_log_ratio(cell, report["dense"]) for cell in cells)
                if ratio not in best or measure < best[ratio][1]:
                    best[ratio] = row["label"], measure
    return best


def _format_log_ratios(dense: DenseResult) -> Callable[[Sequence[CellEntry]], str]:
    return lambda cells: format_spread([compute_mean_log_ratio(cell, dense) for cell in cells], _format_decimals(3))


def _compute_mean(values: Iterable[float]) -> float:
    listed = list(values)
    return float(sum(listed) / len(listed))


def build_ratio_table(
    report: ComparisonReport,
    content: Callable[[Sequence[CellEntry]], str],
    best: Callable[[Sequence[CellEntry]], float] | None = None,
) -> Table:
    """Build a table with one row for each method and one column for each ratio.

    Args:
        report: content of compare.json.
        content: writes a table cell from its finished cells (one for each seed).
        best: the measure whose smallest value in a column is highlighted; rows with unfinished seeds do not count.

    Example:
        >>> report = {"ratios": [0.2], "seeds": [0], "rows": [{"label": "flap"}], "cells": []}
        >>> build_ratio_table(report, content=lambda cells: "").head
        ['method', '20%']
    """
    seed_count = len(report["seeds"])
    rows, highlighted = [[row_index["label"]] for row_index in report["rows"]], set()
    for column, ratio in enumerate(report["ratios"], 1):
        cells_by_row = [_select_finished_cells(report, row_index["label"], ratio) for row_index in report["rows"]]
        complete = [cells for cells in cells_by_row if len(cells) == seed_count]
        lowest = min((best(cells) for cells in complete), default=None) if best else None
        for row_index, (row_cells, cells) in enumerate(zip(rows, cells_by_row, strict=True)):
            text = content(cells) if cells else _MISSING
            if cells and len(cells) < seed_count:
                text += f" ({len(cells)} of {seed_count} seeds)"
            if best and len(cells) == seed_count and best(cells) == lowest:
                highlighted.add((row_index, column))
            row_cells.append(text)
    return Table(["method", *map(format_percent, report["ratios"])], rows, frozenset(highlighted))


def _select_finished_cells(report: ComparisonReport, label: str, ratio: float) -> list[CellEntry]:
    """Select the finished cells of a row at a ratio, one for each seed."""
    return [
        cell
        for cell in report["cells"]
        if cell["status"] == "finished" and (cell["label"], cell["ratio"]) == (label, ratio)
    ]


def list_comparison_notes(report: ComparisonReport) -> list[str]:
    """List the notes below the tables: protocol, failed cells, and cells that removed another share than asked for.

    Args:
        report: content of compare.json.

    Returns:
        Lines of text.

    Example: see `prunelit.compare.run.compare_methods`.
    """
    seeds = ", ".join(map(str, report["seeds"]))
    has_several = len(report["seeds"]) > 1
    lines = [
        f"Ratio: share of the decoder layers' budget to remove; seed{'s' * has_several} {seeds}"
        + " (mean ± half the range)" * has_several
    ]
    calibration = report["calibration"]
    if calibration["fingerprints"]:  # none where no method reads text
        sources = _join_names(calibration["text"])
        lines.append(
            f"Scored on {calibration['windows']} x {calibration['seqlen']} tokens of {sources}, the same for all "
            "methods at one seed"
        )
    for name, text in report["texts"].items():
        lines.append(
            f"{name}: {text['windows']} windows of {text['sequence_length']} tokens of {_join_names(text['text'])}, "
            f"without overlap, {text['dtype']}"
        )
    if report["options"]:
        lines.append(f"Options of all methods that take them: {_format_options(report['options'])}")
    for row in report["rows"]:
        own_options = {name: value for name, value in row["options"].items() if report["options"].get(name) != value}
        if own_options or row["label"] != row["method"]:
            lines.append(
                f"{row['label']}: `{row['method']}`" + (f" with {_format_options(own_options)}" if own_options else "")
            )
    lines += _list_exceptions(report)
    machine = report["hardware"]
    lines.append(f"Made by `{report['command']}` on {machine['device']}, {machine['threads']} threads")
    lines.append(", ".join(f"{name} {version}" for name, version in report["versions"].items()))
    return lines


def _list_exceptions(report: ComparisonReport) -> list[str]:
    """List cells that failed, that removed another share than asked for, or that have not been run."""
    seeds_by_message: dict[tuple[str, str], dict[float, list[int]]] = {}
    for cell in report["cells"]:
        if cell["status"] == "failed":
            message = f"failed: {cell['failed']}"
        elif cell["status"] == "finished" and abs(cell["ratio_of_block_parameters"] - cell["ratio"]) > 0.005:
            message = f"{cell['ratio_of_block_parameters']:.1%} of the decoder layers' parameters removed"
        else:
            continue
        seeds_by_message.setdefault((cell["label"], message), {}).setdefault(cell["ratio"], []).append(cell["seed"])
    labels_by_message: dict[tuple[str, str], list[str]] = {}
    for (label, message), ratios in seeds_by_message.items():
        place = ", ".join(
            format_percent(ratio)
            + (f" (seed {', '.join(map(str, failed_seeds))})" if len(failed_seeds) < len(report["seeds"]) else "")
            for ratio, failed_seeds in ratios.items()
        )
        labels_by_message.setdefault((place, message), []).append(label)
    lines = [
        f"{', '.join(row_labels)} at {place}: {message}" for (place, message), row_labels in labels_by_message.items()
    ]
    missing = sum(cell["status"] == "missing" for cell in report["cells"])
    return lines + ([f"{missing} of {len(report['cells'])} cells have not been run"] if missing else [])


def _format_options(options: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in options.items())


def _join_names(names: Sequence[str]) -> str:
    return ", ".join(names)
