"""A comparison as tables: perplexities, their mean log ratio to the dense model, what was measured how.

Works on the content of compare.json alone; nothing is computed that needs a model.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from prunelit.report.page import parts
from prunelit.report.page.parts import Notes, Section, Table
from prunelit.runtime.format_numbers import exponentiate_nll, format_percent, format_perplexity

ComparisonReport = Mapping[str, Any]
"""The content of compare.json, see `prunelit.compare.run`."""

_MISSING = "\N{EN DASH}"


def compute_mean_log_ratio(cell: Mapping[str, Any], dense: Mapping[str, Any]) -> float:
    """Mean over the texts of ln(perplexity / dense perplexity), in nats; 0 is the dense model."""
    texts = cell["texts"]
    return sum(texts[name]["nll"] - dense["texts"][name]["nll"] for name in texts) / len(texts)


def _format_decimals(digits: int) -> Callable[[float, float], str]:
    return lambda value, _: f"{value:.{digits}f}"


def format_spread(values: Sequence[float], form: Callable[[float, float], str]) -> str:
    """The mean over seeds, and half the range where there are several; `form(value, mean)` writes both alike."""
    mean = sum(values) / len(values)
    if len(values) == 1 or not math.isfinite(mean):
        return form(mean, mean)
    return f"{form(mean, mean)} ± {form((max(values) - min(values)) / 2, mean)}"


def render_comparison_markdown(report: ComparisonReport) -> str:
    """The whole compare.md."""
    return parts.render_markdown(f"Pruning methods on {report['model']}", build_comparison_sections(report))


def build_comparison_sections(report: ComparisonReport) -> list[Section]:
    """The tables, and last of all what must stand below them."""
    texts, dense = list(report["texts"]), report["dense"]
    perplexities = " / ".join(format_perplexity(exponentiate_nll(dense["texts"][name])) for name in texts)

    def all_texts(cells: Sequence[Mapping[str, Any]]) -> str:
        found = ([exponentiate_nll(cell["texts"][name]) for cell in cells] for name in texts)
        return " / ".join(format_spread(values, format_perplexity) for values in found)

    def seconds(cells: Sequence[Mapping[str, Any]]) -> str:
        return format_spread([cell["seconds"]["prune"] for cell in cells], _format_decimals(1))

    def speed(cells: Sequence[Mapping[str, Any]]) -> str:
        return format_spread([cell["latency"]["speedup"] for cell in cells], _format_decimals(2))

    found: list[parts.Part] = [
        f"Perplexity on {' / '.join(texts)}; the dense model has {perplexities}.",
        build_ratio_table(report, all_texts),
        f"Mean over {' / '.join(texts)} of ln(perplexity / dense perplexity), in nats, smaller is better; the best of "
        "each column in bold.",
        build_ratio_table(
            report,
            _format_log_ratios(dense),
            best=lambda cells: _compute_mean(compute_mean_log_ratio(cell, dense) for cell in cells),
        ),
        "Seconds to score, plan, cut and repair.",
        build_ratio_table(report, seconds),
    ]
    if report["latency"]:
        found += [
            f"Prefill of {report['latency']['tokens']} tokens: times as fast as the dense model, median of "
            f"{report['latency']['repeats']} passes in turn.",
            build_ratio_table(report, speed),
        ]
    return [Section("", found), Section("", [Notes(list_comparison_notes(report))])]


def find_best_rows(report: ComparisonReport) -> dict[float, tuple[str, float]]:
    """{ratio: (row, its mean log ratio)} of the best row at each ratio that any row has finished with every seed."""
    found: dict[float, tuple[str, float]] = {}
    for ratio in report["ratios"]:
        for row in report["rows"]:
            cells = _select_finished_cells(report, row["label"], ratio)
            if len(cells) == len(report["seeds"]):
                measure = _compute_mean(compute_mean_log_ratio(cell, report["dense"]) for cell in cells)
                if ratio not in found or measure < found[ratio][1]:
                    found[ratio] = row["label"], measure
    return found


def _format_log_ratios(dense: Mapping[str, Any]) -> Callable[[Sequence[Mapping[str, Any]]], str]:
    return lambda cells: format_spread([compute_mean_log_ratio(cell, dense) for cell in cells], _format_decimals(3))


def _compute_mean(values: Any) -> float:
    listed = list(values)
    return float(sum(listed) / len(listed))


def build_ratio_table(
    report: ComparisonReport,
    content: Callable[[Sequence[Mapping[str, Any]]], str],
    best: Callable[[Sequence[Mapping[str, Any]]], float] | None = None,
) -> Table:
    """Methods down, ratios across.

    Args:
        report: content of compare.json.
        content: the text of a place, from its finished cells (one for each seed).
        best: the measure whose smallest value in a column is set in bold; a place with failed seeds can not win.
    """
    wanted = len(report["seeds"])
    lines, standing_out = [[row["label"]] for row in report["rows"]], set()
    for column, ratio in enumerate(report["ratios"], 1):
        places = [_select_finished_cells(report, row["label"], ratio) for row in report["rows"]]
        whole = [cells for cells in places if len(cells) == wanted]
        least = min((best(cells) for cells in whole), default=None) if best else None
        for row, (line, cells) in enumerate(zip(lines, places, strict=True)):
            said = content(cells) if cells else _MISSING
            if cells and len(cells) < wanted:
                said += f" ({len(cells)} of {wanted} seeds)"
            if best and len(cells) == wanted and best(cells) == least:
                standing_out.add((row, column))
            line.append(said)
    return Table(["method", *map(format_percent, report["ratios"])], lines, frozenset(standing_out))


def _select_finished_cells(report: ComparisonReport, label: str, ratio: float) -> list[Mapping[str, Any]]:
    """The finished cells of a row at a ratio, one for each seed."""
    return [
        cell
        for cell in report["cells"]
        if cell["status"] == "finished" and (cell["label"], cell["ratio"]) == (label, ratio)
    ]


def list_comparison_notes(report: ComparisonReport) -> list[str]:
    """What must stand below the numbers: protocol, what failed, what was really cut."""
    seeds = ", ".join(map(str, report["seeds"]))
    several = len(report["seeds"]) > 1
    found = [
        f"Ratio: share of the decoder layers' budget to remove; seed{'s' * several} {seeds}"
        + " (mean ± half the range)" * several
    ]
    calibration = report["calibration"]
    if calibration["fingerprints"]:  # none where no method reads text
        found.append(
            f"Scored on {calibration['windows']} x {calibration['seqlen']} tokens of {_join_names(calibration['text'])}, the "
            "same for all methods at one seed"
        )
    for name, text in report["texts"].items():
        found.append(
            f"{name}: {text['windows']} windows of {text['sequence_length']} tokens of {_join_names(text['text'])}, without "
            f"overlap, {text['dtype']}"
        )
    if report["options"]:
        found.append(f"Options of all methods that take them: {_format_options(report['options'])}")
    for row in report["rows"]:
        own = {name: value for name, value in row["options"].items() if report["options"].get(name) != value}
        if own or row["label"] != row["method"]:
            found.append(f"{row['label']}: `{row['method']}`" + (f" with {_format_options(own)}" if own else ""))
    found += _list_exceptions(report)
    machine = report["hardware"]
    found.append(f"Made by `{report['command']}` on {machine['device']}, {machine['threads']} threads")
    found.append(", ".join(f"{name} {version}" for name, version in report["versions"].items()))
    return found


def _list_exceptions(report: ComparisonReport) -> list[str]:
    """Cells that failed, that were cut by another share than asked for, or that have not been run."""
    seeds: dict[tuple[str, str], dict[float, list[int]]] = {}
    for cell in report["cells"]:
        if cell["status"] == "failed":
            said = f"failed: {cell['failed']}"
        elif cell["status"] == "finished" and abs(cell["ratio_of_block_parameters"] - cell["ratio"]) > 0.005:
            said = f"{cell['ratio_of_block_parameters']:.1%} of the decoder layers' parameters removed"
        else:
            continue
        seeds.setdefault((cell["label"], said), {}).setdefault(cell["ratio"], []).append(cell["seed"])
    labels: dict[tuple[str, str], list[str]] = {}
    for (label, said), ratios in seeds.items():
        where = ", ".join(
            format_percent(ratio) + (f" (seed {', '.join(map(str, of))})" if len(of) < len(report["seeds"]) else "")
            for ratio, of in ratios.items()
        )
        labels.setdefault((where, said), []).append(label)
    found = [f"{', '.join(names)} at {where}: {said}" for (where, said), names in labels.items()]
    missing = sum(cell["status"] == "missing" for cell in report["cells"])
    return found + ([f"{missing} of {len(report['cells'])} cells have not been run"] if missing else [])


def _format_options(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in options.items())


def _join_names(names: Sequence[str]) -> str:
    return ", ".join(names)
