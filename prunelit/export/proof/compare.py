"""The proof that a folder is the model in memory: load it again, compare.

Logits on fixed tokens are compared with those of the model in memory; in a new process also greedy generation with the
KV cache with that without. A model that is streamed from disk does not fit into a process a second time: its folder is
read layer by layer, and every tensor compared as well.
"""

import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunelit.calibration import metrics
from prunelit.data import loading, offloaded
from prunelit.export import layer_files
from prunelit.export.formats import ExportJob
from prunelit.export.proof import new_process, reload
from prunelit.runtime.versions import collect_versions

_log = logging.getLogger("prunelit")
PROOF_FILE = "proof.json"
ROUNDING_TOLERANCE = 1e-3
"""Largest difference of logits of the same weights, as a share of the largest logit: sums in another order."""
_NEW_TOKENS = 8


def prove_folder(
    job: ExportJob,
    remote_code: bool = False,
    same_shapes: bool = True,
    placed: bool = False,
    tolerance: float | None = None,
) -> dict[str, Any]:
    """Load a folder that transformers loads, and compare it with the model in memory.

    Args:
        job: with the folder.
        remote_code: it comes with a modelling file.
        same_shapes: its tensors have the shapes of those in memory. Otherwise sums are rounded in another order, which
            16 bits show: both are then compared in float32, which holds the same weights.
        placed: it loads only onto a device that is named (`device_map`).
        tolerance: largest difference that is expected, as a share of the largest logit; None: that of rounded sums.

    Returns:
        The verdict: {"passed", "why" (it did not), "loader", "dtype", "largest_difference", "limit", "tokens", ...}.
    """
    stored = next(job.model.parameters()).dtype
    computed = stored if same_shapes else torch.float32
    if offloaded.is_streamed(job.model):
        expected, found = layer_files.read_back_layers(job.model, job.path)
        verdict: dict[str, Any] = {"loader": "prunelit, layer by layer in this process; every tensor compared"}
    elif job.fresh_process:
        expected, found, verdict = _compute_logits_elsewhere(job, remote_code, computed, placed)
    else:
        expected, found = _compute_logits_here(job, computed)
        verdict = {"loader": "prunelit.load in the process that wrote it"}
    # Equal weights: what is left is the order of sums. NaN logits can not be compared.
    numbers = compare_logits(expected, found, ROUNDING_TOLERANCE if tolerance is None else tolerance)
    difference, limit = numbers["largest_difference"], numbers["limit"]
    why = verdict.pop("why", None)
    if not difference <= limit:
        why = (
            "the saved model does not read back equal: largest logit difference "
            f"{difference:.2e}, expected at most {limit:.2e}"
        )
    elif difference and same_shapes and tolerance is None:
        warnings.warn(f"the saved model's logits differ by {difference:.1e} from those in memory", stacklevel=4)
    return {
        "passed": why is None,
        "why": why,
        **verdict,
        "dtype": str(stored).removeprefix("torch."),
        "compared_in": str(computed).removeprefix("torch."),
        "device": str(next(job.model.parameters()).device),
        **numbers,
        "versions": collect_versions(),
    }


def compare_logits(expected: Tensor, found: Tensor, tolerance: float = ROUNDING_TOLERANCE) -> dict[str, Any]:
    """`measure.difference` of logits [N, S, V], and the largest one allowed: a share of the largest logit."""
    numbers = metrics.measure_logit_difference(expected, found)
    return numbers | {"limit": tolerance * numbers["largest_logit"]}


def _compute_logits_here(job: ExportJob, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits of the model and of the folder, loaded in this process."""
    ids = metrics.make_fixed_tokens(job.model, room=_NEW_TOKENS)
    again = loading.load(job.path, dtype).to(ids.device)
    return _compute_logits_as_reloaded(job.model, ids, dtype, dict(again.named_buffers())), metrics.compute_logits(
        again, ids
    )


def _compute_logits_elsewhere(
    job: ExportJob, remote_code: bool, dtype: torch.dtype, placed: bool
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Logits of the model and of the folder, loaded in a new process, and what is known of its generation."""
    ids = metrics.make_fixed_tokens(job.model, room=_NEW_TOKENS)
    answer = run_reload_script(
        {
            "folder": str(job.path),
            "remote_code": remote_code,
            "dtype": str(dtype).removeprefix("torch."),
            "device": str(ids.device),
            "placed": placed,
            "tokens": ids.tolist(),
            "new_tokens": _NEW_TOKENS,
            "threads": torch.get_num_threads(),
        }
    )
    expected = _compute_logits_as_reloaded(job.model, ids, dtype, answer["buffers"])
    how = f'device_map="{ids.device}", ' if placed else ""
    loader = f"AutoModelForCausalLM.from_pretrained(..., {how}trust_remote_code={remote_code}) in a new process"
    return expected, answer["logits"], {"loader": loader} | _judge_cache_difference(answer, expected, dtype)


def run_reload_script(question: dict[str, Any]) -> dict[str, Any]:
    """`reload.reload_and_run`, from a process that knows transformers only.

    Raises:
        NotProved: the folder can not be loaded or run; says what that process said last.
    """
    _log.info("written; loading it again in a new process")
    answer = new_process.run_proof_script(
        reload.__file__, question, Path(question["folder"]), "output: what was written can not be loaded again"
    )
    return dict(torch.load(io.BytesIO(answer), weights_only=True))


def _judge_cache_difference(answer: Mapping[str, Any], expected: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """The part of the verdict that is about generation with the KV cache."""
    difference = answer["cache_difference"]
    # One token at a time takes other kernels, whose sums differ by rounding.
    limit = max(ROUNDING_TOLERANCE, 32 * torch.finfo(dtype).eps) * expected.abs().max().item()
    found = {
        "cache_difference": difference,
        "cache_limit": limit,
        "generated": answer["cached"],
        "same_text_without_cache": answer["cached"] == answer["uncached"],
    }
    if difference <= limit:
        return found
    return found | {
        "why": f"generation with the KV cache differs from that without: largest logit difference {difference:.2e}, "
        f"expected at most {limit:.2e}"
    }


def _compute_logits_as_reloaded(model: Any, ids: Tensor, dtype: torch.dtype, reloaded: Mapping[str, Tensor]) -> Tensor:
    with _cast_parameters(model, dtype), _use_reloaded_buffers(model, reloaded):
        return metrics.compute_logits(model, ids)


@contextmanager
def _cast_parameters(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Inside, the parameters are of a dtype that holds their values as they are."""
    own = [(parameter, parameter.dtype) for parameter in model.parameters() if parameter.dtype != dtype]
    for parameter, _ in own:
        parameter.data = parameter.data.to(dtype)
    try:
        yield
    finally:
        for parameter, before in own:
            parameter.data = parameter.data.to(before)


@contextmanager
def _use_reloaded_buffers(model: nn.Module, reloaded: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, tables that are computed, not saved (rotary frequencies), have the precision that they are loaded with.

    They were rounded along if the live model was cast; nothing else about them is taken from the folder.
    """
    changed = []
    for name, own in model.named_buffers():
        other = reloaded.get(name)
        if other is None or other.dtype == own.dtype or not torch.equal(other.to(own.device, own.dtype), own):
            continue
        path, _, last = name.rpartition(".")
        changed.append((model.get_submodule(path), last, own))
        setattr(*changed[-1][:2], other.to(own.device))
    try:
        yield
    finally:
        for owner, last, own in changed:
            setattr(owner, last, own)
