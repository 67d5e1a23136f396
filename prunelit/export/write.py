"""save(model, folder): the plainest format that fits, written to the side, proved, and moved into place."""

import json
import logging
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from prunelit.calibration import metrics
from prunelit.core.plan import PruningPlan
from prunelit.data import offloaded
from prunelit.export.card import CARD_FILE, render_model_card
from prunelit.export.formats import AUTO_FORMATS, ExportJob, ExportResult, Format, load_export_format
from prunelit.export.overwrite import check_output
from prunelit.export.proof.compare import PROOF_FILE
from prunelit.model.decoder import Decoder
from prunelit.quantization.linears import get_quantization
from prunelit.runtime.atomic_files import replace_folder
from prunelit.runtime.errors import BadOption, DoesNotFit, NotProved, OutputNotWritable
from prunelit.runtime.progress import show_stage

_log = logging.getLogger("prunelit")
_UNPROVED_VERDICT = {"passed": None, "why": "not proved, as asked", "loader": "nothing: it was not proved, as asked"}


def check_export_request(
    target: str | os.PathLike[str],
    format: str = "auto",
    kind: str = "",
    overwrite: bool = False,
    max_shard_size: str = "5GB",
    unproved: bool = False,
    stream: bool = False,
    reads: Collection[str] = (),
) -> None:
    """Check what can be checked without a model; `stream`: its layers will be on disk; `reads`: see `check_output`.

    Raises:
        DoesNotFit: the format takes models in memory only.
        BadOption: an unknown format, kind or size of shards; a kind for a format that has none.
        OutputNotWritable: see `check_output`.
        PrunelitError: the format, or without `unproved` its proof, needs something that is not installed.
    """
    chosen = load_export_format(AUTO_FORMATS[0] if format == "auto" else format)
    if kind and kind not in chosen.kinds:
        expected = f"one of {', '.join(chosen.kinds)}" if chosen.kinds else "none (it keeps the model's dtype)"
        raise BadOption(f"type {kind!r}: expected {expected} with format {format!r}")
    if not re.fullmatch(r"\d+(\.\d+)?(KB|MB|GB|TB)", max_shard_size):
        raise BadOption(f"max_shard_size: expected a size as '5GB' or '500MB', got {max_shard_size!r}")
    chosen.check_installed()
    if not unproved:
        chosen.check_proof_installed()
    _check_accepts_streamed(chosen, stream)
    check_output(target, overwrite, _is_single_file(chosen, Path(target)), reads)


def check_format_fits(model: nn.Module, tokenizer: Any, format: str) -> None:
    """Check that a format can hold a model, without writing it: from shapes and config, no weight is read.

    Args:
        model: as of `write_model`; linears may be without memory.
        tokenizer: as of `write_model`.
        format: "auto" always fits.

    Raises:
        BadOption: an unknown format.
        DoesNotFit: it cannot.
    """
    if format != "auto":
        load_export_format(format).check(model, tokenizer)


def _check_accepts_streamed(chosen: Format, stream: bool) -> None:
    if stream and not chosen.accepts_streamed:
        raise DoesNotFit(
            f"format {chosen.name!r}: expected a model in memory, got one that is streamed from disk; leave the format "
            "out, then `python -m prunelit export` the saved folder"
        )


def _is_single_file(format: Format, target: Path) -> bool:
    return bool(format.suffix) and target.suffix == format.suffix


def save(
    model: nn.Module,
    folder: str | os.PathLike[str],
    tokenizer: Any = None,
    plan: PruningPlan | None = None,
    format: str = "auto",
    overwrite: bool = False,
    **more: Any,
) -> str:
    """`write_model`, for those who want to know the format only.

    Returns:
        The format written.

    Raises:
        PrunelitError: see `write_model`.
    """
    return write_model(model, folder, tokenizer, plan, format, overwrite, **more).format


def write_model(
    model: nn.Module | Decoder,
    target: str | os.PathLike[str],
    tokenizer: Any = None,
    plan: PruningPlan | None = None,
    format: str = "auto",
    overwrite: bool = False,
    kind: str = "",
    max_shard_size: str = "5GB",
    fresh_process: bool = False,
    report: Mapping[str, Any] | None = None,
    unproved: bool = False,
) -> ExportResult:
    """Write a cut (or dense) causal LM so that it loads again with equal logits.

    The target appears complete or not at all. `prunelit.load` reads the folders; plain transformers reads "uniform" and
    "padded", and "hetero" with `trust_remote_code=True`.

    Args:
        model: what `surgery.apply` left, or its `Decoder`; no adapters; plain, or int4.
        target: a folder; or a file, where the format is one and `target` has its suffix.
        tokenizer: saved beside the model if given.
        plan: saved as plan.json if given.
        format: "auto" takes "uniform" where a stock class holds the shapes, else "hetero", and "int4" for a model in
            4 bits; others: see `formats`.
        overwrite: replace what is there: a file, or a folder that prunelit wrote.
        kind: number format of the weights, for formats that have several; "" for the first of them.
        max_shard_size: of one weight file, as "5GB".
        fresh_process: prove in a new process, with plain transformers, generation included; otherwise it is read back
            in this one, which is faster.
        report: of the run that made it (report.json), for the model card.
        unproved: leave out the proof; the verdict then says so.

    Raises:
        BadOption: an unknown format, kind or size of shards.
        OutputNotWritable: see `check_output`, or the disk refused while writing.
        DoesNotFit: the format cannot hold the model's shapes.
        NotProved: what was written is not the same model; nothing was kept.
    """
    decoders = [model] if isinstance(model, Decoder) else []
    model = model.model if isinstance(model, Decoder) else model
    check_export_request(target, format, kind, overwrite, max_shard_size, unproved, offloaded.is_streamed(model))
    tried = AUTO_FORMATS if format == "auto" else (format,)
    if base := get_quantization(model):
        if base == "int4" and format == "auto":
            tried = ("int4",)
        elif base != format:
            raise DoesNotFit(
                f"format {format!r}: expected plain linears, got {base}; call "
                "prunelit.quantization.quantize.dequantize_model first"
            )
    path = Path(target).resolve()  # "." has a name then, and a link is followed, not replaced
    for name in tried:
        chosen = load_export_format(name)
        job = ExportJob(
            *(model, path, tokenizer, plan, kind or next(iter(chosen.kinds), "")),
            *(max_shard_size, fresh_process, decoders),
        )
        try:
            with replace_folder(path, _is_single_file(chosen, path)) as folder:
                return _write_and_prove(chosen, job, folder, report or {}, unproved)
        except DoesNotFit:
            if name == tried[-1]:
                raise
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise OutputNotWritable(f"output {str(path)!r}: cannot be written: {reason}") from error
    raise AssertionError(tried)


def _measure_size(job: ExportJob) -> dict[str, int]:
    return metrics.measure_model_size(job.model if get_quantization(job.model) else job.get_decoder())


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise (OSError(str(error)) if "os error" in str(error) else error) from error


def _write_and_prove(
    chosen: Format, job: ExportJob, folder: Path, report: Mapping[str, Any], unproved: bool
) -> ExportResult:
    """Write a format into a folder and prove it.

    Args:
        chosen: the format.
        job: with the target as its place.
        folder: an empty one, at the side of the target.
        report: for the card.
        unproved: do not prove it.

    Raises:
        NotProved: it is not the same model.
    """
    target, file = job.path, _is_single_file(chosen, job.path)
    place = folder / (target.name if file else f"model{chosen.suffix}") if chosen.suffix else folder
    job = replace(job, path=place)
    with show_stage(f"writing {chosen.name}"):
        facts = chosen.write(job)
    if not chosen.suffix and job.tokenizer is not None:
        _save_tokenizer(job.tokenizer, folder)
    with show_stage(f"proving {chosen.name}"):
        proof = {"format": chosen.name, **(_UNPROVED_VERDICT if unproved else chosen.prove(job))}
    if not proof["passed"] and not unproved:
        raise NotProved(f"output: {proof['why']}; nothing was kept")
    dense = None
    if job.plan is not None:
        element = next(job.model.parameters()).element_size()
        dense = metrics.compute_dense_size(replace(job.plan.model, bytes_per_element=element))
    written = ExportResult(chosen.name, target, proof, facts.get("size") or _measure_size(job), dense, facts)
    name = f"{target.stem}.{PROOF_FILE}" if file else PROOF_FILE
    (folder / name).write_text(json.dumps(proof, indent=2) + "\n", encoding="utf-8")
    if not file:
        (folder / CARD_FILE).write_text(render_model_card(written, chosen, job, report), encoding="utf-8")
        if job.plan is not None:
            job.plan.save(folder / "plan.json")
    for made in folder.iterdir():  # safetensors are written for their owner's eyes only
        if made.is_file():
            made.chmod((folder / name).stat().st_mode)
    if "note" in facts:
        _log.info(facts["note"])
    return written
