"""The end of a recovery: the adapters are saved, then merged, and the merged model is saved."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from prunelit import export
from prunelit.calibration import metrics
from prunelit.core.plan import PruningPlan
from prunelit.data.sources import measure_source_bytes
from prunelit.export.card import CARD_FILE
from prunelit.export.formats import ExportResult
from prunelit.export.proof.compare import PROOF_FILE
from prunelit.model.stored.folder import read_model_config
from prunelit.model.text_model import count_tower_parameters
from prunelit.quantization import int4_folder, quantize, views
from prunelit.quantization.linears import get_quantization, has_adapters
from prunelit.recovery import adapter_files
from prunelit.recovery.adapter_card import render_adapter_card
from prunelit.recovery.module import RecoveryModule
from prunelit.runtime.atomic_files import replace_folder
from prunelit.runtime.distributed import get_rank
from prunelit.runtime.errors import BadQuantisation
from prunelit.runtime.messages import log_on_rank_zero
from prunelit.runtime.text_files import write_json

TimeStage = Callable[[str], AbstractContextManager[None]]
"""Times a stage of a run by its name, see `prunelit.runtime.timing.time_stage`."""
_ROWS, _LENGTH = 2, 128
_ADAPTER_VERDICT = {
    "format": "adapter",
    "passed": None,
    "why": "not proved alone: report.json says what merging them changed",
}
_MERGE_TARGETS = {
    "none": "into the weights",
    "int4": "into the zeros of the INT4 groups",
    "nf4": "out of nf4, into the cut weights in full precision",
}


@dataclass(frozen=True)
class RunFolder:
    """The folder in which a run saves its model and adapters, and the form in which it does.

    Attributes:
        path: the folder of the run.
        tokenizer: saved beside the models; None where the job has none.
        plan: the plan that was applied, saved beside the models; None where nothing was pruned.
        format: format of the saved model: "auto", or one of those of `python -m prunelit export`.
        save_base: whether the pruned model before recovery is saved too; the saved adapters are useless without it.

    Example: see `prunelit.monitoring.run_report`, which uses it.
    """

    path: Path
    tokenizer: Any
    plan: PruningPlan | None
    format: str = "auto"
    save_base: bool = True


def check_run_format_fits(module: RecoveryModule, tokenizer: Any, format: str) -> None:
    """Check before training that a format can hold the model that will be saved.

    Args:
        module: the module, with its adapters.
        tokenizer: the tokenizer that will be saved.
        format: as of `RunFolder`.

    Raises:
        DoesNotFit: the format cannot hold the model.

    Example: see `prunelit.monitoring.run_report`, which uses it.
    """
    if format == "auto":
        return
    base = views.view_without_adapters(module.model)
    # All formats but int4 are written from plain linears; the view has their shapes without memory.
    written = base if format == "int4" else views.view_as_plain_linears(base)
    export.check_format_fits(written, tokenizer, format)


def merge_and_save_adapters(
    module: RecoveryModule, run: RunFolder, windows: Tensor | None, report: dict[str, Any], time_stage: TimeStage
) -> nn.Module:
    """Save the adapters of a trained module as they are, merge them, and report what merging changed.

    Args:
        module: the trained module. Every rank must call, rank zero writes.
        run: the folder in which the adapters are saved.
        windows: validation windows [N, S], on which the merge is measured; None: fixed tokens.
        report: report of the run; "merge" is added, and "base_format" and "base" where they apply.
        time_stage: times a stage of the run by its name.

    Returns:
        The transformers model without adapters. It stays in 4 bits where `run.format` allows it.

    Example: see `prunelit.monitoring.run_report`, which uses it.
    """
    adapted = module.model
    if not has_adapters(adapted):
        return module.merge_model()
    base = get_quantization(adapted) or "none"
    ids = choose_probe_tokens(windows, adapted)
    logits_before = metrics.compute_logits(adapted, ids)
    module.gather_model()
    if get_rank() == 0:
        with time_stage("save_adapter"):
            base_format = save_adapter(module, run, report)
        if base_format:
            report["base_format"] = base_format
    merged = module.merge_model()
    difference = metrics.measure_logit_difference(logits_before, metrics.compute_logits(merged, ids), ids)
    report["merge"] = {"base": base} | difference
    log_on_rank_zero(describe_merge(base, difference))
    if base == "int4" and not _can_save_as_int4(merged, run.format):
        merged = quantize.dequantize_model(merged)
        report["base"] = "int4: the saved weights are the rounded ones, in full precision"
    return merged


def save_recovered_model(model: nn.Module, run: RunFolder, report: dict[str, Any]) -> ExportResult:
    """Save the merged model as `run.path`/model, with a proof in a new process; only rank zero may call it.

    Args:
        model: the merged model.
        run: the folder of the run.
        report: report of the run, for the model card.

    Raises:
        PrunelitError: see `prunelit.export.write_model`.

    Example: see `prunelit.monitoring.run_report`, which uses it.
    """
    return export.write_model(
        *(model, run.path / "model", run.tokenizer, run.plan, run.format),
        overwrite=True,
        fresh_process=True,
        report=report,
    )


def measure_dense_bytes(module: Any) -> int | None:
    """Measure the weight files of the model that a run starts from.

    Args:
        module: with the hyperparameter `model`.

    Returns:
        Bytes; None where the files are not in one known place.

    Example: see `prunelit.monitoring.run_report`, which uses it.
    """
    source = module.hparams.get("model")
    return measure_source_bytes(source) if isinstance(source, str) else None


def choose_probe_tokens(windows: Tensor | None, model: Any) -> Tensor:
    """Choose token ids [2, <= 128] on which a merge is measured.

    Args:
        windows: validation windows [N, S], of which the first are taken; None: fixed tokens.
        model: gives the vocabulary of the fixed tokens.

    Example:
        >>> choose_probe_tokens(Tensor(8, 256), model=None).shape
        torch.Size([2, 128])
    """
    return metrics.make_fixed_tokens(model, _LENGTH, 0) if windows is None else windows[:_ROWS, :_LENGTH]


def describe_merge(base: str, difference: Mapping[str, Any]) -> str:
    """Describe in one line what a merge changed.

    Args:
        base: the base under the adapters: "none", "nf4" or "int4".
        difference: result of `metrics.measure_logit_difference`, with losses.

    Example:
        >>> numbers = {"loss_before": 2.5, "loss_after": 2.5, "relative": 1e-7, "tokens": 256}
        >>> describe_merge("none", numbers).split(";")[0]
        'adapters merged into the weights: loss 2.5000 before, 2.5000 after'
    """
    return (
        f"adapters merged {_MERGE_TARGETS[base]}: loss {difference['loss_before']:.4f} before, "
        f"{difference['loss_after']:.4f} after; logits differ by {difference['relative']:.2g} (relative, "
        f"{difference['tokens']} tokens)"
    )


def save_adapter(module: RecoveryModule, run: RunFolder, report: Mapping[str, Any]) -> str | None:
    """Save the adapters in PEFT's format as `run.path`/adapter, and their base model as `run.path`/base.

    Args:
        module: the trained module, not merged yet.
        run: the folder of the run.
        report: report of the run, for the card of the base.

    Returns:
        The format of the base; None where there are no adapters, or the base is not saved.

    Raises:
        OutputNotWritable: see `check_output`.

    Example: `save_adapter` is used further down in this module.
    """
    adapted, base_format, padded_base = module.gather_model(), None, None
    if not has_adapters(adapted):
        return None
    base = module.get_pruned_model()
    if get_quantization(base) == "int4":
        try:
            padded_base = views.view_as_plain_linears(base, int4_folder.find_common_group_size(base))
        except BadQuantisation:  # no group size fits all linears, so the int4 format cannot hold it
            base = quantize.dequantize_model(base)
    folder = run.path / "base"
    if run.save_base:
        base_format = export.save(base, folder, run.tokenizer, run.plan, overwrite=True, report=report)
    export.check_output(run.path / "adapter", overwrite=True)
    with replace_folder((run.path / "adapter").resolve()) as staging:
        adapter_files.write_adapter(adapted, staging, str(folder.resolve()) if run.save_base else "", padded_base)
        if run.plan is not None:
            run.plan.save(staging / "plan.json")
        model_type = str(read_model_config(folder).get("model_type", "")) if base_format else base.config.model_type
        settings = adapter_files.read_adapter_settings(staging)
        card = render_adapter_card(base_format or "", model_type, run.plan, settings)
        (staging / CARD_FILE).write_text(card, encoding="utf-8")
        write_json(staging / PROOF_FILE, _ADAPTER_VERDICT)
    return base_format


def _can_save_as_int4(model: nn.Module, format: str) -> bool:
    """Tell whether an int4 model can be saved in 4 bits; the reason is logged where its widths prevent it."""
    if format not in ("auto", "int4"):
        return False
    try:
        int4_folder.find_common_group_size(model)
    except BadQuantisation as error:
        log_on_rank_zero(f"saved in full precision: {error}")
        return False
    return True


def count_trained_tower(model: Any) -> int:
    """Count the parameters of the tower and projector of a model as it is trained: with adapters, or in 4 bits.

    Args:
        model: of a recovery; 0 where it is no multimodal model.

    Example: see `prunelit.monitoring.run_report`, which reports them.
    """
    return count_tower_parameters(views.view_as_plain_linears(model))
