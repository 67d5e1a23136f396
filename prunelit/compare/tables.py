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
LEAST_DIFFERENCE = 0.005
"""Nats by which a winner leads at least: about half of the range between two seeds, see docs/lab-log.md."""
LARGEST_SHARE_GAP = 0.005
"""Rows whose removed shares differ by more are not compared, unless the winner is the one that removed more."""


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
        f"Mean over {' / '.join(texts)} of ln(perplexity / dense perplexity), in nats, smaller is better; a winner is "
        f"in bold: one that leads by more than the seeds' spread and {LEAST_DIFFERENCE} nats, and removed no less.",
        build_ratio_table(report, _format_log_ratios(dense), winners=find_best_rows(report)),
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
    """Find the winner at each ratio, among the rows that have finished every seed.

    A row wins if no other one is within noise of it, and if none of those behind it removed clearly more. With one row
    there is nothing to win.

    Args:
        report: content of compare.json.

    Returns:
        {ratio: (label of the row, its mean log ratio)}; ratios without a winner are left out.

    Example:
        >>> def make_cell(label, nll):
        ...     shares = {"ratio": 0.2, "ratio_of_block_parameters": 0.2}
        ...     return {"status": "finished", "label": label, "texts": {"a": {"nll": nll}}, **shares}
        >>> cells, rows = [make_cell("flap", 2.5), make_cell("random", 2.9)], [{"label": "flap"}, {"label": "random"}]
        >>> report = {"ratios": [0.2], "seeds": [0], "rows": rows, "cells": cells}
        >>> find_best_rows({**report, "dense": {"texts": {"a": {"nll": 2.0}}}})
        {0.2: ('flap', 0.5)}
    """
    best: dict[float, tuple[str, float]] = {}
    for ratio in report["ratios"]:
        cells_by_label = {row["label"]: _select_finished_cells(report, row["label"], ratio) for row in report["rows"]}
        complete = {label: cells for label, cells in cells_by_label.items() if len(cells) == len(report["seeds"])}
        if winner := _find_winner(complete, report["dense"], _counts_parameters(report)):
            best[ratio] = winner, _compute_mean(_list_log_ratios(complete[winner], report["dense"]))
    return best


def _find_winner(
    cells_by_label: Mapping[str, Sequence[CellEntry]], dense: DenseResult, counts_parameters: bool
) -> str | None:
    """Find the row that is clearly the nearest to the dense model; None where there is none.

    A row that removed clearly more than the nearest one is no rival of it: nobody knows how it would do at its share.
    """
    ratios_by_label = {label: _list_log_ratios(cells, dense) for label, cells in cells_by_label.items()}
    means = {label: _compute_mean(ratios) for label, ratios in ratios_by_label.items()}
    finite = [label for label, mean in means.items() if math.isfinite(mean)]
    best = min(finite, key=lambda label: means[label], default=None)
    if best is None:
        return None
    rivals = 0
    for label, ratios in ratios_by_label.items():
        removed_more = _compute_share(cells_by_label[label]) - _compute_share(cells_by_label[best])
        if label == best or (counts_parameters and removed_more > LARGEST_SHARE_GAP):
            continue
        rivals += 1
        noise = max(LEAST_DIFFERENCE, _compute_half_range(ratios_by_label[best]) + _compute_half_range(ratios))
        if math.isfinite(means[label]) and not means[label] - means[best] > noise:
            return None
    return best if rivals else None


def _counts_parameters(report: ComparisonReport) -> bool:
    """Whether the ratios are shares of the parameters, which every cell tells, in all rows."""
    return all(row.get("options", {}).get("budget", "parameters") == "parameters" for row in report["rows"])


def _list_log_ratios(cells: Sequence[CellEntry], dense: DenseResult) -> list[float]:
    return [compute_mean_log_ratio(cell, dense) for cell in cells]


def _compute_half_range(values: Sequence[float]) -> float:
    return (max(values) - min(values)) / 2


def _compute_share(cells: Sequence[CellEntry]) -> float:
    """The share of the decoder layers' parameters that was removed, mean over seeds."""
    return _compute_mean(cell["ratio_of_block_parameters"] for cell in cells)


def _format_log_ratios(dense: DenseResult) -> Callable[[Sequence[CellEntry]], str]:
    return lambda cells: format_spread([compute_mean_log_ratio(cell, dense) for cell in cells], _format_decimals(3))


def _compute_mean(values: Iterable[float]) -> float:
    listed = list(values)
    return float(sum(listed) / len(listed))


def build_ratio_table(
    report: ComparisonReport,
    content: Callable[[Sequence[CellEntry]], str],
    winners: Mapping[float, tuple[str, float]] | None = None,
) -> Table:
    """Build a table with one row for each method and one column for each ratio, whose title is the share removed.

    Where the rows of a column removed different shares, each of its cells names its own.

    Args:
        report: content of compare.json.
        content: writes a table cell from its finished cells (one for each seed).
        winners: rows to highlight, see `find_best_rows`.

    Example:
        >>> report = {"ratios": [0.2], "seeds": [0], "rows": [{"label": "flap"}], "cells": []}
        >>> build_ratio_table(report, content=lambda cells: "").head
        ['method', '20%']
    """
    seed_count = len(report["seeds"])
    rows, highlighted, head = [[row["label"]] for row in report["rows"]], set(), ["method"]
    for column, ratio in enumerate(report["ratios"], 1):
        cells_by_row = [_select_finished_cells(report, row["label"], ratio) for row in report["rows"]]
        shares = [_compute_share(cells) for cells in cells_by_row if cells] if _counts_parameters(report) else []
        is_one_share = not shares or max(shares) - min(shares) <= LARGEST_SHARE_GAP
        head.append(_title_column(ratio, shares))
        for row_index, (row_cells, cells) in enumerate(zip(rows, cells_by_row, strict=True)):
            text = content(cells) if cells else _MISSING
            if cells and not is_one_share:
                text += f" (-{_compute_share(cells):.1%})"
            if cells and len(cells) < seed_count:
                text += f" ({len(cells)} of {seed_count} seeds)"
            if winners and winners.get(ratio, ("",))[0] == report["rows"][row_index]["label"]:
                highlighted.add((row_index, column))
            row_cells.append(text)
    return Table(head, rows, frozenset(highlighted))


def _title_column(ratio: float, shares: Sequence[float]) -> str:
    """The share that the rows of a column removed, and the ratio where that was another."""
    asked = format_percent(ratio)
    if not shares or max(abs(share - ratio) for share in shares) <= LARGEST_SHARE_GAP:
        return asked
    low, high = f"{min(shares):.1%}", f"{max(shares):.1%}"
    removed = low if max(shares) - min(shares) <= LARGEST_SHARE_GAP else f"{low} to {high}"
    return f"{removed} (asked: {asked})"


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
