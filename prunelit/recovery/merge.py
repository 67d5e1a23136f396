"""The end of a recovery: what merging the adapters changed, and the adapters as they were."""

from pathlib import Path
from typing import Any

from torch import Tensor

from prunelit import export
from prunelit.calibration import metrics
from prunelit.core.plan import PruningPlan
from prunelit.export.proof.compare import PROOF_FILE
from prunelit.quantization import int4_folder, quantize, views
from prunelit.quantization.linears import get_quantization, has_adapters
from prunelit.recovery import adapter_files
from prunelit.runtime.atomic_files import replace_folder
from prunelit.runtime.errors import BadQuantisation
from prunelit.runtime.text_files import write_json

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


def choose_probe_tokens(windows: Tensor | None, model: Any) -> Tensor:
    """Token ids [2, <= 128] on which a merge is judged: of the validation text where there is one, else made up."""
    return metrics.make_fixed_tokens(model, _LENGTH, 0) if windows is None else windows[:_ROWS, :_LENGTH]


def describe_merge(base: str, found: dict[str, float]) -> str:
    """One line on what a merge changed.

    Args:
        base: what was under the adapters: "none", "nf4" or "int4".
        found: of `measure.difference`, with losses.
    """
    return (
        f"adapters merged {_MERGE_TARGETS[base]}: loss {found['loss_before']:.4f} before, {found['loss_after']:.4f} after; "
        f"logits differ by {found['relative']:.2g} (relative, {found['tokens']} tokens)"
    )


def save_adapter(
    module: Any, folder: Path, tokenizer: Any, plan: PruningPlan | None, save_base: bool, report: dict[str, Any]
) -> str | None:
    """Save the adapters in PEFT's format as `folder`/adapter, and as `folder`/base the model that they are for.

    Args:
        module: a RecoveryModule that is not merged yet.
        folder: of the run.
        tokenizer: saved beside the base.
        plan: of the cut, beside both.
        save_base: whether the base is written; the adapters are useless without it.
        report: for the base's card.

    Returns:
        The format of the base; None where there are no adapters, or the base was not asked for.

    Raises:
        OutputNotWritable: see `check_output`.
    """
    adapted, written, wide = module.whole_model(), None, None
    if not has_adapters(adapted):
        return None
    base = module.cut_model()
    if get_quantization(base) == "int4":
        try:
            wide = views.view_as_plain_linears(base, int4_folder.find_common_group_size(base))
        except BadQuantisation:  # no reader takes it in 4 bits
            base = quantize.dequantize_model(base)
    if save_base:
        written = export.save(base, folder / "base", tokenizer, plan, overwrite=True, report=report)
    export.check_output(folder / "adapter", overwrite=True)
    with replace_folder((folder / "adapter").resolve()) as staging:
        adapter_files.write_adapter(adapted, staging, str((folder / "base").resolve()) if save_base else "", wide)
        if plan is not None:
            plan.save(staging / "plan.json")
        write_json(staging / PROOF_FILE, _ADAPTER_VERDICT)
    return written
