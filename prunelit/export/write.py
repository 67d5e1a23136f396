"""Write a model: the simplest format that fits, written beside the target, proved, and moved into place."""

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping
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
from prunelit.export.proof.served import prove_in_vllm
from prunelit.model.decoder import Decoder
from prunelit.model.text_model import extract_text_model, is_multimodal
from prunelit.quantization.linears import get_quantization
from prunelit.runtime.atomic_files import replace_folder
from prunelit.runtime.errors import BadOption, DoesNotFit, NotProved, OutputNotWritable
from prunelit.runtime.progress import show_stage

_log = logging.getLogger("prunelit")
_PROCESSOR_FILES = (
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
    *("chat_template.jinja", "chat_template.json"),
)
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
    """Check the arguments of `write_model` before there is a model.

    Args:
        target: as of `write_model`.
        format: as of `write_model`.
        kind: as of `write_model`.
        overwrite: as of `write_model`.
        max_shard_size: as of `write_model`.
        unproved: as of `write_model`.
        stream: whether the model's layers will be on disk.
        reads: sources that are read for the model, see `check_output`.

    Raises:
        DoesNotFit: the format takes models in memory only.
        BadOption: an unknown format, kind or size of shards; a kind for a format that has none.
        OutputNotWritable: see `check_output`.
        PrunelitError: the format, or its proof unless `unproved`, needs a package that is not installed.

    Example:
        >>> check_export_request("folder", max_shard_size="5")
        Traceback (most recent call last):
        prunelit.runtime.errors.BadOption: max_shard_size: expected a size as '5GB' or '500MB', got '5'
    """
    chosen = load_export_format(AUTO_FORMATS[0] if format == "auto" else format)
    if kind and kind not in chosen.kinds:
        expected = f"one of {', '.join(chosen.kinds)}" if chosen.kinds else "none (it keeps the model's dtype)"
        raise BadOption(f"type {kind!r}: expected {expected} with format {format!r}")
    if not re.fullmatch(r"\d+(\.\d+)?(KB|MB|GB|TB)", max_shard_size):
        raise BadOption(f"max_shard_size: expected a size as '5GB' or '500MB', got {max_shard_size!r}")
    chosen.check_installed(kind)
    if not unproved:
        chosen.check_proof_installed()
    _check_accepts_streamed(chosen, stream)
    check_output(target, overwrite, _is_single_file(chosen, Path(target)), reads)


def check_format_fits(model: nn.Module, tokenizer: Any, format: str) -> None:
    """Check that a format can hold a model, from shapes and config; no weight is read and nothing is written.

    Args:
        model: as of `write_model`; its linears may be on the meta device.
        tokenizer: as of `write_model`.
        format: as of `write_model`; "auto" always fits.

    Raises:
        BadOption: an unknown format.
        DoesNotFit: the format cannot hold the model.

    Example: see `save`.
    """
    if format != "auto":
        chosen = load_export_format(format)
        chosen.check(extract_text_model(model) if chosen.text_only else model, tokenizer)


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
    """Write a model as `write_model` does, and return the name of the format.

    Args:
        model: as of `write_model`.
        folder: the target of `write_model`.
        tokenizer: as of `write_model`.
        plan: as of `write_model`.
        format: as of `write_model`.
        overwrite: as of `write_model`.
        more: further arguments of `write_model`.

    Returns:
        The format that was written.

    Raises:
        PrunelitError: see `write_model`.

    Example:
        >>> import tempfile
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(model, Path(folder, "small"))
        'uniform'
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
    text_only: bool = False,
    add_files: Callable[[Path, ExportResult], None] | None = None,
    vllm_python: str | None = None,
) -> ExportResult:
    """Write a pruned (or dense) causal LM so that it loads again with equal logits.

    The target appears as a whole or not at all. `prunelit.load` reads the folders. Plain transformers reads "uniform"
    and "padded", and "hetero" with `trust_remote_code=True`.

    Args:
        model: a model, pruned by `prunelit.apply` or dense, or its `Decoder`; plain or int4, without adapters.
        target: a folder; or a file, for a format that is one file and a `target` with its suffix.
        tokenizer: saved beside the model if given.
        plan: saved as plan.json if given.
        format: "auto" takes "uniform" where a stock class holds the shapes, else "hetero", and "int4" for a model in
            4 bits; for the others see `formats`.
        overwrite: replace what is there: a file, or a folder that prunelit wrote.
        kind: type of the weights, for formats that have several; "" for the first of them.
        max_shard_size: largest size of one weight file, as "5GB".
        fresh_process: prove in a new process, with plain transformers and with generation; otherwise the model is read
            back in this process, which is faster.
        report: report.json of the run that made the model, for the model card.
        unproved: leave out the proof; the verdict then says so.
        text_only: of a multimodal model write the causal LM inside it. GGUF and deci hold nothing else.
        add_files: called with the folder as it will be and the result, after the proof; what it adds there appears
            together with the model.
        vllm_python: Python of an environment with vLLM ("" is the running one), whose engine proves the folder as well;
            None: it does not.

    Returns:
        Format, path, sizes and verdict.

    Raises:
        BadOption: an unknown format, kind or size of shards.
        OutputNotWritable: see `check_output`, or the disk refused while writing.
        DoesNotFit: the format cannot hold the model.
        NotProved: what was written is not the same model; nothing was kept.

    Example: see `save`.
    """
    decoders = [model] if isinstance(model, Decoder) else []
    model = model.model if isinstance(model, Decoder) else model
    if is_multimodal(model) and (text_only or (format != "auto" and load_export_format(format).text_only)):
        text_model: nn.Module = extract_text_model(model)
        model, decoders = text_model, []
    check_export_request(target, format, kind, overwrite, max_shard_size, unproved, offloaded.is_streamed(model))
    candidates = AUTO_FORMATS if format == "auto" else (format,)
    if base := get_quantization(model):
        if base == "int4" and format == "auto":
            candidates = ("int4",)
        elif base != load_export_format(candidates[0]).base:
            raise DoesNotFit(
                f"format {format!r}: expected plain linears, got {base}; call "
                "prunelit.quantization.quantize.dequantize_model first"
            )
    path = Path(target).resolve()  # so that "." has a name, and a link is followed, not replaced
    for name in candidates:
        chosen = load_export_format(name)
        job = ExportJob(
            *(model, path, tokenizer, plan, kind or next(iter(chosen.kinds), "")),
            *(max_shard_size, fresh_process, vllm_python, decoders),
        )
        try:
            with replace_folder(path, _is_single_file(chosen, path)) as folder:
                result = _write_and_prove(chosen, job, folder, report or {}, unproved)
                if add_files is not None:
                    add_files(folder, result)
                return result
        except DoesNotFit:
            if name == candidates[-1]:
                raise
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise OutputNotWritable(f"output {str(path)!r}: cannot be written: {reason}") from error
    raise AssertionError(candidates)


def _measure_size(job: ExportJob) -> dict[str, int]:
    """Measure the size of the model; a quantised one has no decoder."""
    return metrics.measure_model_size(job.model if get_quantization(job.model) else job.get_decoder())


def _copy_processor_files(source: str, folder: Path) -> None:
    """Copy the settings by which a processor makes pictures into numbers, as far as the source has them.

    Args:
        source: folder or hub id that the model was loaded from.
        folder: of the written model; what is there stays.
    """
    from transformers.utils import cached_file

    for name in _PROCESSOR_FILES:
        path = cached_file(source, name, _raise_exceptions_for_missing_entries=False) if source else None
        if path is not None and not (folder / name).exists():
            shutil.copyfile(path, folder / name)


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # the tokenizers library raises a plain Exception, with the system's message in it
        raise (OSError(str(error)) if "os error" in str(error) else error) from error
    # transformers also saves how the tokenizer was loaded: from this machine's files, or offline.
    path = folder / "tokenizer_config.json"
    if path.is_file():
        settings = json.loads(path.read_text(encoding="utf-8"))
        kept = {name: value for name, value in settings.items() if name not in ("is_local", "local_files_only")}
        path.write_text(json.dumps(kept, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_and_prove(
    chosen: Format, job: ExportJob, folder: Path, report: Mapping[str, Any], unproved: bool
) -> ExportResult:
    """Write a format into a folder and prove it.

    Args:
        chosen: the format.
        job: the job, whose path is the target.
        folder: an empty folder beside the target.
        report: report of the run, for the card.
        unproved: whether to leave out the proof.

    Raises:
        NotProved: what was written is not the same model.
    """
    target, is_file = job.path, _is_single_file(chosen, job.path)
    path = folder / (target.name if is_file else f"model{chosen.suffix}") if chosen.suffix else folder
    job = replace(job, path=path)
    with show_stage(f"writing {chosen.name}"):
        facts = chosen.write(job)
    if not chosen.suffix and job.tokenizer is not None:
        _save_tokenizer(job.tokenizer, folder)
    if not chosen.suffix and is_multimodal(job.model):
        _copy_processor_files(str(job.model.config.name_or_path), folder)
    with show_stage(f"proving {chosen.name}"):
        proof = {"format": chosen.name, **(_UNPROVED_VERDICT if unproved else chosen.prove(job))}
    if not proof["passed"] and not unproved:
        raise NotProved(f"output: {proof['why']}; nothing was kept")
    if job.vllm_python is not None:
        with show_stage(f"proving {chosen.name} in vLLM"):
            proof["vllm"] = prove_in_vllm(job, chosen.name)
    dense = None
    if job.plan is not None:
        element_size = next(job.model.parameters()).element_size()
        dense = metrics.compute_dense_size(replace(job.plan.model, bytes_per_element=element_size))
    result = ExportResult(chosen.name, target, proof, facts.get("size") or _measure_size(job), dense, facts)
    proof_file = folder / (f"{target.stem}.{PROOF_FILE}" if is_file else PROOF_FILE)
    proof_file.write_text(json.dumps(proof, indent=2) + "\n", encoding="utf-8")
    if not is_file:
        (folder / CARD_FILE).write_text(render_model_card(result, chosen, job, report), encoding="utf-8")
        if job.plan is not None:
            job.plan.save(folder / "plan.json")
    # safetensors makes files that only their owner can read; other files follow the umask.
    for file in folder.iterdir():
        if file.is_file():
            file.chmod(proof_file.stat().st_mode)
    if "note" in facts:
        _log.info(facts["note"])
    return result
