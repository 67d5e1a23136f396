"""python -m prunelit compare: methods x ratios x seeds from one YAML, as tables and figures.

Every finished cell is saved at once. A stopped comparison goes on where it stopped, and another comparison in the same
folder reuses identical cells. The measure is the mean over several texts of ln(perplexity / dense perplexity), because
a single text is misleading.

    out/cells/      one JSON for each cell, named by a digest of everything that determines it
    out/plans/      one plan for each cell, with `plans: true`
    out/kept/       cache of scores and journals that several ratios share; may be deleted
    compare.json    the whole comparison: request, protocol, all cells, versions
    compare.md      the tables; report.html: the same with figures, for a browser
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
    select_method_rows,
)
from prunelit.compare.report_content import CellEntry, CellResult, ComparisonReport
from prunelit.data import loading, text
from prunelit.data import sources as model_source
from prunelit.data.eval_texts import EvaluationText, resolve_text_sources
from prunelit.data.loading import choose_device, load_on_device
from prunelit.data.option_types import Dtype, wrap_in_list
from prunelit.model import context_length
from prunelit.model.decoder import Decoder
from prunelit.pruning.callback import PruningCallback
from prunelit.report.format_numbers import exponentiate_nll, format_perplexity
from prunelit.runtime import fingerprints
from prunelit.runtime.atomic_files import check_folder
from prunelit.runtime.environment import describe_hardware
from prunelit.runtime.errors import BadOption, OutputNotWritable, PrunelitError
from prunelit.runtime.progress import track_progress
from prunelit.runtime.text_files import write_json, write_text
from prunelit.runtime.versions import collect_versions
from prunelit.runtime.wandb_settings import check_wandb_installed

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
) -> ComparisonReport:
    """Prune one model by several methods and measure each result on several texts.

    Args:
        model: model source: folder, .gguf file, pypi:NAME==VERSION, or hub id.
        out: output folder; cells that an earlier comparison finished there are reused where they are identical.
        methods: rows of the table: a method's name, or {method, label, options}.
        texts: what perplexity is measured on, {name: {text, seqlen, windows}}.
        ratios: shares of the decoder layers' budget to remove (sparsities).
        seeds: of the draw of calibration windows and of the methods.
        calibration: text that the methods score on; each seed draws its windows once, for all methods. Null: 64 x 512
            tokens of the built-in text.
        options: options of all methods that have them.
        latency: also time prefill against the dense model; null: do not.
        data: folder of text files whose paths are relative.
        only: run only the rows with these labels; the tables show what is known of the others.
        plans: save every cell's plan.
        again: run cells again although they are finished.
        wandb_project: also log the table and the figures to this Weights & Biases project.
        dtype: of scoring and measuring; "auto" is the model's own, but float32 for float16 on a CPU.
        device: "cpu", "cuda", "cuda:1", ...; "auto" takes a GPU if there is one.

    Returns:
        The content of compare.json.

    Raises:
        PrunelitError: bad input, before the model is loaded. A cell that fails is recorded, and the others go on.

    Example:
        compare_methods("models/tiny", "out", methods=["flap", "wanda_sp"], texts={"wiki": "wiki.txt"}, ratios=[0.2])
    """
    method_rows = parse_method_rows(methods, options or {})
    ratios, seeds = check_distinct_values("ratios", ratios), check_distinct_values("seeds", seeds)
    selected_rows = select_method_rows(method_rows, wrap_in_list(only or []))
    calibration = calibration or Calibration()
    checked_texts = {
        str(name): EvaluationText.from_option(str(name), text_options) for name, text_options in texts.items()
    }
    cells = [Cell(row, ratio, seed) for row in method_rows for seed in seeds for ratio in ratios]
    pruners = [cell.row.build_method(cell.ratio, cell.seed, calibration) for cell in cells]
    if not texts:
        raise BadOption("texts: expected at least one text to measure on, {name: {text, seqlen, windows}}, got none")
    text_sources = {
        name: resolve_text_sources(f"texts.{name}", options_of_text.text, data)
        for name, options_of_text in checked_texts.items()
    }
    reads_text = any(method.needs_text() for method in pruners)
    calibration_sources = resolve_text_sources("calibration", calibration.text, data) if reads_text else []
    torch_device, folder = choose_device(device), Path(out)
    model_source.check_prunable_source(model)
    for cell, method in zip(cells, pruners, strict=True):
        _check_method_source(cell.row.label, method, model)
    lengths = {f"texts.{name}.seqlen": options_of_text.seqlen for name, options_of_text in checked_texts.items()}
    lengths |= {"calibration.seqlen": calibration.seqlen} if reads_text else {}
    lengths |= {"latency.tokens": latency.tokens} if latency else {}
    for name, tokens in lengths.items():
        model_source.check_sequence_length(model, tokens, name)
    check_folder(folder)
    if wandb_project:
        check_wandb_installed("wandb_project")

    tokenizer = loading.load_tokenizer(model)
    windows = {
        name: _draw_named_windows(
            f"texts.{name}", text_sources[name], tokenizer, options_of_text.seqlen, options_of_text.windows
        )
        for name, options_of_text in checked_texts.items()
    }
    calibration_windows = {
        seed: _draw_named_windows(
            "calibration", calibration_sources, tokenizer, calibration.seqlen, calibration.windows, seed
        )
        for seed in (seeds if reads_text else [])
    }
    _make_folders(folder / "cells", *[folder / "plans"] * plans)
    with ExitStack() as stack:
        wandb_run = wandb.open_wandb_run(wandb_project, folder.name, folder, stack) if wandb_project else None
        dense = load_on_device(model, dtype, device)
        # Where the source is not a local folder, only the loaded model tells its context length.
        for name, tokens in lengths.items():
            context_length.check_position_table(dense.config, tokens, name)
        Decoder(dense).check_finite()
        runner = CellRunner(
            dense, windows, calibration_windows, calibration, folder, torch_device, latency, plans, again
        )
        report = _make_report_head(model, method_rows, ratios, seeds, calibration, checked_texts, runner)
        report |= {"options": dict(options or {}), "dense": runner.measure_dense()}
        _run_missing_cells(runner, list(zip(cells, pruners, strict=True)), selected_rows, again, report)
        image_files = figures.write_comparison_figures(report, folder)
        write_text(folder / "report.html", page.render_comparison_page(report))
        if wandb_run is not None:
            wandb.log_comparison(wandb_run, report, image_files)
    return report


def _check_method_source(label: str, method: PruningCallback, model: str) -> None:
    """Check that a method says something of the model; errors say which row is meant."""
    try:
        method.check_source(model)
    except BadOption as error:
        raise BadOption(f"method {label!r}: {error}") from error


def _draw_named_windows(name: str, *arguments: Any) -> Tensor:
    """Draw windows of a text; errors say which text is meant."""
    try:
        return text.draw_windows(*arguments)
    except PrunelitError as error:
        raise type(error)(f"{name}: {error}") from error


def _run_missing_cells(
    runner: CellRunner,
    cells: Sequence[tuple[Cell, PruningCallback]],
    selected_rows: Sequence[MethodRow],
    again: bool,
    report: ComparisonReport,
) -> None:
    """Run the cells that are not finished, and update compare.json and compare.md after each of them."""
    selected = [pair for pair in cells if pair[0].row in selected_rows]
    missing = [pair for pair in selected if again or runner.load_result(*pair)["status"] != "finished"]
    _log.info("%d cells: %d finished earlier, %d to run", len(selected), len(selected) - len(missing), len(missing))
    _log_other_versions([runner.load_result(*pair) for pair in selected if pair not in missing])
    _write_comparison(runner, cells, report)
    finished = 0
    try:
        for cell, _ in track_progress(missing, "cells", unit="cell"):
            result = runner.run_cell(cell)
            finished += 1
            _log.info("%s: %s", cell, _describe_result(result, report))
            _write_comparison(runner, cells, report)
    except KeyboardInterrupt:
        _log.info("stopped after %d of %d cells; the same command goes on from here", finished, len(missing))
        raise


def _make_report_head(
    model: str,
    method_rows: Sequence[MethodRow],
    ratios: Sequence[float],
    seeds: Sequence[int],
    calibration: Calibration,
    texts: Mapping[str, EvaluationText],
    runner: CellRunner,
) -> ComparisonReport:
    """Build the part of compare.json that is known before a cell is run; sources are as the user wrote them."""
    dtype = str(next(runner.dense.parameters()).dtype).removeprefix("torch.")
    protocol = {
        name: metrics.describe_protocol(wrap_in_list(texts[name].text), windows, dtype)
        | {"fingerprint": fingerprints.fingerprint_token_ids(windows)}
        for name, windows in runner.windows.items()
    }
    arguments = sys.argv[1:] if sys.argv[1:2] == ["compare"] else ["compare"]
    return {
        "command": shlex.join(["python", "-m", "prunelit", *arguments]),
        "model": Decoder(runner.dense).shape.name,
        "source": model,
        "rows": [{"label": row.label, "method": row.method, "options": dict(row.options)} for row in method_rows],
        "ratios": list(ratios),
        "seeds": list(seeds),
        "calibration": {
            "text": wrap_in_list(calibration.text),
            "windows": calibration.windows,
            "seqlen": calibration.seqlen,
            "fingerprints": {
                str(seed): fingerprints.fingerprint_token_ids(windows)
                for seed, windows in runner.calibration_windows.items()
            },
        },
        "texts": protocol,
        "latency": asdict(runner.latency) if runner.latency else None,
        "hardware": describe_hardware(runner.device),
        "versions": collect_versions(),
    }


def _write_comparison(
    runner: CellRunner, cells: Sequence[tuple[Cell, PruningCallback]], report: ComparisonReport
) -> None:
    """Write all cells of the folder; another process may be running other rows of the same table."""
    report["cells"] = []
    for cell, method in cells:
        result = runner.load_result(cell, method)
        entry: CellEntry = {
            "label": cell.row.label,
            "method": cell.row.method,
            "ratio": cell.ratio,
            "seed": cell.seed,
            **result,
        }
        entry.pop("key", None)
        entry.pop("traceback", None)
        if result["status"] == "finished":
            entry["mean_log_ratio"] = tables.compute_mean_log_ratio(result, report["dense"])
        report["cells"].append(entry)
    try:
        write_json(runner.folder / "compare.json", report)
        write_text(runner.folder / "compare.md", tables.render_comparison_markdown(report))
    except OSError as error:
        raise OutputNotWritable(f"output {str(runner.folder)!r}: {error.strerror or error}") from error


def _describe_result(result: CellResult, report: ComparisonReport) -> str:
    """Describe the result of one cell in one line."""
    if result["status"] != "finished":
        return f"failed: {result['failed']}"
    perplexities = " / ".join(format_perplexity(exponentiate_nll(result["texts"][name])) for name in report["texts"])
    measure = tables.compute_mean_log_ratio(result, report["dense"])
    return f"{perplexities}, mean log ratio {measure:.3f}, {result['seconds']['prune']:.0f} s to prune"


def _log_other_versions(results: Sequence[CellResult]) -> None:
    """Log which reused cells were made with other versions of the libraries."""
    current = collect_versions()
    outdated = [cell for cell in results if cell.get("versions", current) != current]
    if outdated:
        names = sorted({name for cell in outdated for name in current if cell["versions"].get(name) != current[name]})
        _log.info("%d of them with other versions of %s; --again true runs them anew", len(outdated), ", ".join(names))


def _make_folders(*folders: Path) -> None:
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputNotWritable(f"output {str(folder)!r}: cannot be made: {error.strerror or error}") from error
