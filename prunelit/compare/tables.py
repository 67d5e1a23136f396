"""A comparison as tables: perplexities, their mean log ratio to the dense model, what was measured how.

Works on the content of compare.json alone; nothing is computed that needs a model.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from prunelit.report.page import parts
from prunelit.report.page.parts import Notes, Section, Table
from prunelit.runtime.format_numbers import number, percent, perplexity_of

Report = Mapping[str, Any]
"""The content of compare.json, see `prunelit.compare.run`."""

_MISSING = "\N{EN DASH}"


def mean_log_ratio(cell: Mapping[str, Any], dense: Mapping[str, Any]) -> float:
    """Mean over the texts of ln(perplexity / dense perplexity), in nats; 0 is the dense model."""
    texts = cell["texts"]
    return sum(texts[name]["nll"] - dense["texts"][name]["nll"] for name in texts) / len(texts)


def _decimals(digits: int) -> Callable[[float, float], str]:
    return lambda value, _: f"{value:.{digits}f}"


def spread(values: Sequence[float], form: Callable[[float, float], str]) -> str:
    """The mean over seeds, and half the range where there are several; `form(value, mean)` writes both alike."""
    mean = sum(values) / len(values)
    if len(values) == 1 or not math.isfinite(mean):
        return form(mean, mean)
    return f"{form(mean, mean)} ± {form((max(values) - min(values)) / 2, mean)}"


def markdown(report: Report) -> str:
    """The whole compare.md."""
    return parts.markdown(f"Pruning methods on {report['model']}", sections(report))


def sections(report: Report) -> list[Section]:
    """The tables, and last of all what must stand below them."""
    texts, dense = list(report["texts"]), report["dense"]
    perplexities = " / ".join(number(perplexity_of(dense["texts"][name])) for name in texts)

    def all_texts(cells: Sequence[Mapping[str, Any]]) -> str:
        found = ([perplexity_of(cell["texts"][name]) for cell in cells] for name in texts)
        return " / ".join(spread(values, number) for values in found)

    def seconds(cells: Sequence[Mapping[str, Any]]) -> str:
        return spread([cell["seconds"]["prune"] for cell in cells], _decimals(1))

    def speed(cells: Sequence[Mapping[str, Any]]) -> str:
        return spread([cell["latency"]["speedup"] for cell in cells], _decimals(2))

    found: list[parts.Part] = [
        f"Perplexity on {' / '.join(texts)}; the dense model has {perplexities}.",
        grid(report, all_texts),
        f"Mean over {' / '.join(texts)} of ln(perplexity / dense perplexity), in nats, smaller is better; the best of "
        "each column in bold.",
        grid(report, _log_ratios(dense), best=lambda cells: _mean(mean_log_ratio(cell, dense) for cell in cells)),
        "Seconds to score, plan, cut and repair.",
        grid(report, seconds),
    ]
    if report["latency"]:
        found += [
            f"Prefill of {report['latency']['tokens']} tokens: times as fast as the dense model, median of "
            f"{report['latency']['repeats']} passes in turn.",
            grid(report, speed),
        ]
    return [Section("", found), Section("", [Notes(notes(report))])]


def best_places(report: Report) -> dict[float, tuple[str, float]]:
    """{ratio: (row, its mean log ratio)} of the best row at each ratio that any row has finished with every seed."""
    found: dict[float, tuple[str, float]] = {}
    for ratio in report["ratios"]:
        for row in report["rows"]:
            cells = _place(report, row["label"], ratio)
            if len(cells) == len(report["seeds"]):
                measure = _mean(mean_log_ratio(cell, report["dense"]) for cell in cells)
                if ratio not in found or measure < found[ratio][1]:
                    found[ratio] = row["label"], measure
    return found


def _log_ratios(dense: Mapping[str, Any]) -> Callable[[Sequence[Mapping[str, Any]]], str]:
    return lambda cells: spread([mean_log_ratio(cell, dense) for cell in cells], _decimals(3))


def _mean(values: Any) -> float:
    listed = list(values)
    return float(sum(listed) / len(listed))


def grid(
    report: Report,
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
        places = [_place(report, row["label"], ratio) for row in report["rows"]]
        whole = [cells for cells in places if len(cells) == wanted]
        least = min((best(cells) for cells in whole), default=None) if best else None
        for row, (line, cells) in enumerate(zip(lines, places, strict=True)):
            said = content(cells) if cells else _MISSING
            if cells and len(cells) < wanted:
                said += f" ({len(cells)} of {wanted} seeds)"
            if best and len(cells) == wanted and best(cells) == least:
                standing_out.add((row, column))
            line.append(said)
    return Table(["method", *map(percent, report["ratios"])], lines, frozenset(standing_out))


def _place(report: Report, label: str, ratio: float) -> list[Mapping[str, Any]]:
    """The finished cells of a row at a ratio, one for each seed."""
    return [
        cell
        for cell in report["cells"]
        if cell["status"] == "finished" and (cell["label"], cell["ratio"]) == (label, ratio)
    ]


def notes(report: Report) -> list[str]:
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
            f"Scored on {calibration['windows']} x {calibration['seqlen']} tokens of {_and(calibration['text'])}, the "
            "same for all methods at one seed"
        )
    for name, text in report["texts"].items():
        found.append(
            f"{name}: {text['windows']} windows of {text['sequence_length']} tokens of {_and(text['text'])}, without "
            f"overlap, {text['dtype']}"
        )
    if report["options"]:
        found.append(f"Options of all methods that take them: {_options(report['options'])}")
    for row in report["rows"]:
        own = {name: value for name, value in row["options"].items() if report["options"].get(name) != value}
        if own or row["label"] != row["method"]:
            found.append(f"{row['label']}: `{row['method']}`" + (f" with {_options(own)}" if own else ""))
    found += _exceptions(report)
    machine = report["hardware"]
    found.append(f"Made by `{report['command']}` on {machine['device']}, {machine['threads']} threads")
    found.append(", ".join(f"{name} {version}" for name, version in report["versions"].items()))
    return found


def _exceptions(report: Report) -> list[str]:
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
            percent(ratio) + (f" (seed {', '.join(map(str, of))})" if len(of) < len(report["seeds"]) else "")
            for ratio, of in ratios.items()
        )
        labels.setdefault((where, said), []).append(label)
    found = [f"{', '.join(names)} at {where}: {said}" for (where, said), names in labels.items()]
    missing = sum(cell["status"] == "missing" for cell in report["cells"])
    return found + ([f"{missing} of {len(report['cells'])} cells have not been run"] if missing else [])


def _options(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in options.items())


def _and(names: Sequence[str]) -> str:
    return ", ".join(names)
