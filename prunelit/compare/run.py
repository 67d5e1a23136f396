"""python -m prunelit compare: methods x ratios x seeds from one YAML, as tables and pictures.

Every finished cell is a file, written at once; a comparison that was stopped goes on where it was, and another one in
the same folder takes over what is identical. The measure is the mean over several texts of
ln(perplexity / dense perplexity), because one text alone misleads.

    out/cells/      one JSON for each cell, named by a digest of everything that determines it
    out/plans/      one plan for each cell, with `plans: true`
    out/kept/       scores and journals that serve several ratios; may be deleted
    compare.json    the whole comparison: what was asked, protocol, all cells, versions
    compare.md      the tables; report.html: the same with pictures, for a browser
    perplexity_vs_parameters.png .svg, perplexity_vs_latency.png .svg
"""

import logging
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from prunelit.calibration import metrics
from prunelit.compare import figures, page, tables, wandb
from prunelit.compare.cell import CellRunner
from prunelit.compare.config import (
    Calibration,
    Cell,
    Latency,
    MethodRow,
    check_distinct_values,
    parse_method_rows,
    select_rows,
)
from prunelit.data import loading, text
from prunelit.data import sources as model_source
from prunelit.data.eval_texts import EvaluationText, resolve_text_sources
from prunelit.data.loading import choose_device, load_on_device
from prunelit.data.option_types import Dtype, wrap_in_list
from prunelit.model import context_length
from prunelit.model.decoder import Decoder
from prunelit.monitoring.loggers import check_wandb_installed
from prunelit.pruning.callback import PruningCallback
from prunelit.runtime.atomic_files import check_folder
from prunelit.runtime.environment import describe_hardware
from prunelit.runtime.errors import BadOption, OutputNotWritable, PrunelitError
from prunelit.runtime.format_numbers import exponentiate_nll, format_perplexity
from prunelit.runtime.progress import track_progress
from prunelit.runtime.text_files import write_json, write_text
from prunelit.runtime.versions import collect_versions

_log = logging.getLogger("prunelit")


def compare_methods(
    model: str,
    out: str,
    methods: list[Any],
    texts: dict[str, Any],
    ratios: list[float],
    seeds: list[int] = [0],  # noqa: B006  (never changed; jsonargparse shows it as the default)
    calibration: Calibration | None = None,
    options: dict[str, Any] | None = None,
    latency: Latency | None = None,
    data: str | None = None,
    only: str | list[str] | None = None,
    plans: bool = False,
    again: bool = False,
    wandb_project: str | None = None,
    dtype: Dtype = "auto",
    device: str = "auto",
) -> dict[str, Any]:
    """Prune one model by several methods and measure each result on several texts.

    Args:
        model: model source: folder, .gguf file, pypi:NAME==VERSION, or hub id.
        out: output folder; what an earlier comparison finished there is taken over where it is identical.
        methods: rows of the table: a method's name, or {method, label, options}.
        texts: what perplexity is measured on, {name: {text, seqlen, windows}}.
        ratios: shares of the decoder layers' budget to remove.
        seeds: of the draw of calibration windows and of the methods.
        calibration: text that the methods score on; each seed draws its windows once, for all methods. Null: 64 x 512
            tokens of the built-in text.
        options: options of all methods that take them.
        latency: also measure prefill against the dense model; null: do not.
        data: folder of text files whose paths are relative.
        only: run these rows only, by their labels; the tables show what the others have.
        plans: keep every cell's plan.
        again: run cells again although they are finished.
        wandb_project: also log the table and the pictures to this Weights & Biases project.
        dtype: of scoring and measuring; "auto" is the model's own, but float32 for float16 on a CPU.
        device: "cpu", "cuda", "cuda:1", ...; "auto" takes a GPU if there is one.

    Returns:
        The content of compare.json.

    Raises:
        PrunelitError: bad input, before the model is loaded. A cell that fails is recorded, and the others go on.
    """
    table = parse_method_rows(methods, options or {})
    ratios, seeds = check_distinct_values("ratios", ratios), check_distinct_values("seeds", seeds)
    running = select_rows(table, wrap_in_list(only or []))
    calibration = calibration or Calibration()
    measured = {str(name): EvaluationText.from_option(str(name), given) for name, given in texts.items()}
    cells = [Cell(row, ratio, seed) for row in table for seed in seeds for ratio in ratios]
    built = [cell.row.build_method(cell.ratio, cell.seed, calibration) for cell in cells]
    if not texts:
        raise BadOption("texts: expected at least one text to measure on, {name: {text, seqlen, windows}}, got none")
    opened = {name: resolve_text_sources(f"texts.{name}", wanted.text, data) for name, wanted in measured.items()}
    reads = any(method.needs_text() for method in built)
    scored_on = resolve_text_sources("calibration", calibration.text, data) if reads else []
    target, folder = choose_device(device), Path(out)
    model_source.check_prunable_source(model)
    lengths = {f"texts.{name}.seqlen": wanted.seqlen for name, wanted in measured.items()}
    lengths |= {"calibration.seqlen": calibration.seqlen} if reads else {}
    lengths |= {"latency.tokens": latency.tokens} if latency else {}
    for name, tokens in lengths.items():
        model_source.check_sequence_length(model, tokens, name)
    check_folder(folder)
    if wandb_project:
        check_wandb_installed("wandb_project")

    tokenizer = loading.load_tokenizer(model)
    windows = {
        name: _draw_named_windows(f"texts.{name}", opened[name], tokenizer, wanted.seqlen, wanted.windows)
        for name, wanted in measured.items()
    }
    drawn = {
        seed: _draw_named_windows("calibration", scored_on, tokenizer, calibration.seqlen, calibration.windows, seed)
        for seed in (seeds if reads else [])
    }
    _make_folders(folder / "cells", *[folder / "plans"] * plans)
    with ExitStack() as closing:
        board = wandb.open_wandb_run(wandb_project, folder.name, folder, closing) if wandb_project else None
        dense = load_on_device(model, dtype, device)
        for name, tokens in lengths.items():  # of a model that is no local folder
            context_length.check_position_table(dense.config, tokens, name)
        Decoder(dense).check_finite()
        trials = CellRunner(dense, windows, drawn, calibration, folder, target, latency, plans, again)
        report = _make_report_head(model, table, ratios, seeds, calibration, measured, trials)
        report |= {"options": dict(options or {}), "dense": trials.measure_dense()}
        _run_missing_cells(trials, list(zip(cells, built, strict=True)), running, again, report)
        pictures = figures.write_comparison_figures(report, folder)
        write_text(folder / "report.html", page.render_comparison_page(report))
        if board is not None:
            wandb.log_comparison(board, report, pictures)
    return report


def _draw_named_windows(name: str, *arguments: Any) -> Tensor:
    """`text.draw_windows`, whose errors say which text is meant."""
    try:
        return text.draw_windows(*arguments)
    except PrunelitError as error:
        raise type(error)(f"{name}: {error}") from error


def _run_missing_cells(
    trials: CellRunner,
    cells: Sequence[tuple[Cell, PruningCallback]],
    running: Sequence[MethodRow],
    again: bool,
    report: dict[str, Any],
) -> None:
    """Run what is not finished; after every cell compare.json and compare.md say what is known."""
    mine = [pair for pair in cells if pair[0].row in running]
    todo = [pair for pair in mine if again or trials.load_result(*pair)["status"] != "finished"]
    _log.info("%d cells: %d finished earlier, %d to run", len(mine), len(mine) - len(todo), len(todo))
    _log_other_versions([trials.load_result(*pair) for pair in mine if pair not in todo])
    _write_comparison(trials, cells, report)
    done = 0
    try:
        for cell, _ in track_progress(todo, "cells", unit="cell"):
            found = trials.run_cell(cell)
            done += 1
            _log.info("%s: %s", cell, _describe_result(found, report))
            _write_comparison(trials, cells, report)
    except KeyboardInterrupt:
        _log.info("stopped after %d of %d cells; the same command goes on from here", done, len(todo))
        raise


def _make_report_head(
    model: str,
    table: Sequence[MethodRow],
    ratios: Sequence[float],
    seeds: Sequence[int],
    calibration: Calibration,
    texts: Mapping[str, EvaluationText],
    trials: CellRunner,
) -> dict[str, Any]:
    """The part of compare.json that is known before a cell is run. Sources stand as they were written."""
    dtype = str(next(trials.dense.parameters()).dtype).removeprefix("torch.")
    protocol = {
        name: metrics.describe_protocol(wrap_in_list(texts[name].text), ids, dtype)
        | {"fingerprint": text.fingerprint_token_ids(ids)}
        for name, ids in trials.windows.items()
    }
    started = sys.argv[1:] if sys.argv[1:2] == ["compare"] else ["compare"]
    return {
        "command": shlex.join(["python", "-m", "prunelit", *started]),
        "model": Decoder(trials.dense).shape.name,
        "source": model,
        "rows": [{"label": row.label, "method": row.method, "options": dict(row.options)} for row in table],
        "ratios": list(ratios),
        "seeds": list(seeds),
        "calibration": {
            "text": wrap_in_list(calibration.text),
            "windows": calibration.windows,
            "seqlen": calibration.seqlen,
            "fingerprints": {
                str(seed): text.fingerprint_token_ids(ids) for seed, ids in trials.calibration_windows.items()
            },
        },
        "texts": protocol,
        "latency": asdict(trials.latency) if trials.latency else None,
        "hardware": describe_hardware(trials.device),
        "versions": collect_versions(),
    }


def _write_comparison(
    trials: CellRunner, cells: Sequence[tuple[Cell, PruningCallback]], report: dict[str, Any]
) -> None:
    """Fill in what the folder knows of every cell; another process may be at work on other rows of the same table."""
    report["cells"] = []
    for cell, method in cells:
        found = trials.load_result(cell, method)
        where = {"label": cell.row.label, "method": cell.row.method, "ratio": cell.ratio, "seed": cell.seed}
        entry = where | {name: value for name, value in found.items() if name not in ("key", "traceback")}
        if found["status"] == "finished":
            entry["mean_log_ratio"] = tables.compute_mean_log_ratio(found, report["dense"])
        report["cells"].append(entry)
    try:
        write_json(trials.folder / "compare.json", report)
        write_text(trials.folder / "compare.md", tables.render_comparison_markdown(report))
    except OSError as error:
        raise OutputNotWritable(f"output {str(trials.folder)!r}: {error.strerror or error}") from error


def _describe_result(found: dict[str, Any], report: dict[str, Any]) -> str:
    """One cell in one line."""
    if found["status"] != "finished":
        return f"failed: {found['failed']}"
    perplexities = " / ".join(format_perplexity(exponentiate_nll(found["texts"][name])) for name in report["texts"])
    measure = tables.compute_mean_log_ratio(found, report["dense"])
    return f"{perplexities}, mean log ratio {measure:.3f}, {found['seconds']['prune']:.0f} s to prune"


def _log_other_versions(found: Sequence[Mapping[str, Any]]) -> None:
    """Say when cells that are taken over were made with other versions."""
    now = collect_versions()
    other = [cell for cell in found if cell.get("versions", now) != now]
    if other:
        names = sorted({n for cell in other for n in now if cell["versions"].get(n) != now[n]})
        _log.info("%d of them with other versions of %s; --again true runs them anew", len(other), ", ".join(names))


def _make_folders(*folders: Path) -> None:
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputNotWritable(f"output {str(folder)!r}: can not be made: {error.strerror or error}") from error
