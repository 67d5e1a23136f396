"""The proof that a saved folder holds the model in memory: the folder is loaded again and compared.

The logits on fixed tokens must be those of the model in memory. In a new process, greedy generation with the KV cache
must also equal generation without it. A model that is streamed from disk does not fit into a process a second time; its
folder is read layer by layer, and every tensor is compared as well.
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
from prunelit.model.stored.folder import find_auto_class
from prunelit.runtime.versions import collect_versions

_log = logging.getLogger("prunelit")
PROOF_FILE = "proof.json"
ROUNDING_TOLERANCE = 1e-3
"""Largest difference of logits of the same weights, as a share of the largest logit; sums in another order differ."""
_NEW_TOKENS = 8
"""Tokens to generate in the comparison with and without the KV cache."""


def prove_folder(
    job: ExportJob,
    remote_code: bool = False,
    same_shapes: bool = True,
    placed: bool = False,
    tolerance: float | None = None,
) -> dict[str, Any]:
    """Load a folder in transformers, and compare it with the model in memory.

    Args:
        job: the model, and the folder that was written.
        remote_code: the folder comes with a modelling file.
        same_shapes: the folder's tensors have the shapes of those in memory. Otherwise sums are rounded in another
            order, which shows in 16 bits; both models are then compared in float32, which holds the same weights.
        placed: the folder loads only with a named device (`device_map`).
        tolerance: largest difference that is expected, as a share of the largest logit; None: `ROUNDING_TOLERANCE`.

    Returns:
        The verdict: {"passed", "why" (the reason if it failed, or None), "loader", "dtype", "largest_difference",
        "limit", "tokens", ...}.

    Raises:
        NotProved: the folder cannot be loaded in a new process.

    Example: see `prunelit.export.write_model`, which calls it.
    """
    stored_dtype = next(job.model.parameters()).dtype
    compared_dtype = stored_dtype if same_shapes else torch.float32
    if offloaded.is_streamed(job.model):
        expected, reloaded = layer_files.read_back_layers(job.model, job.path)
        verdict: dict[str, Any] = {"loader": "prunelit, layer by layer in this process; every tensor compared"}
    elif job.fresh_process:
        expected, reloaded, verdict = _compute_logits_elsewhere(job, remote_code, compared_dtype, placed)
    else:
        expected, reloaded = _compute_logits_here(job, compared_dtype)
        verdict = {"loader": "prunelit.load in the process that wrote it"}
    # The weights are equal, so only the order of sums may differ.
    numbers = compare_logits(expected, reloaded, ROUNDING_TOLERANCE if tolerance is None else tolerance)
    difference, limit = numbers["largest_difference"], numbers["limit"]
    why = verdict.pop("why", None)
    if not difference <= limit:  # "not <=" and no ">": NaN must fail
        why = (
            "the saved model does not read back equal: largest logit difference "
            f"{difference:.2e}, expected at most {limit:.2e}"
        )
    # Kernels of experts sum in an order that depends on where their tensors lie in memory.
    elif difference and same_shapes and tolerance is None and not _has_experts(job.model):
        warnings.warn(f"the saved model's logits differ by {difference:.1e} from those in memory", stacklevel=4)
    return {
        "passed": why is None,
        "why": why,
        **verdict,
        "dtype": str(stored_dtype).removeprefix("torch."),
        "compared_in": str(compared_dtype).removeprefix("torch."),
        "device": str(next(job.model.parameters()).device),
        **numbers,
        "versions": collect_versions(),
    }


def _has_experts(model: Any) -> bool:
    return any(hasattr(module, "experts") for module in model.modules())


def compare_logits(expected: Tensor, reloaded: Tensor, tolerance: float = ROUNDING_TOLERANCE) -> dict[str, Any]:
    """Measure the difference of logits, and set the limit for it.

    Args:
        expected: logits [N, S, V] of the model in memory.
        reloaded: logits [N, S, V] of what was saved.
        tolerance: allowed difference as a share of the largest logit.

    Returns:
        `measure_logit_difference`, with the largest allowed difference as "limit".

    Example:
        >>> numbers = compare_logits(torch.tensor([[[2.0, 1.0]]]), torch.tensor([[[2.0, 1.5]]]), tolerance=0.5)
        >>> numbers["largest_difference"], numbers["limit"]
        (0.5, 1.0)
    """
    numbers = metrics.measure_logit_difference(expected, reloaded)
    return numbers | {"limit": tolerance * numbers["largest_logit"]}


def _compute_logits_here(job: ExportJob, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Compute the logits of the model and of the folder, which is loaded in this process."""
    ids = metrics.make_fixed_tokens(job.model, room=_NEW_TOKENS)
    reloaded = loading.load(job.path, dtype).to(ids.device)
    expected = _compute_logits_as_reloaded(job.model, ids, dtype, dict(reloaded.named_buffers()))
    return expected, metrics.compute_logits(reloaded, ids)


def _compute_logits_elsewhere(
    job: ExportJob, remote_code: bool, dtype: torch.dtype, placed: bool
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Compute the logits of the model and of the folder, which is loaded in a new process.

    Returns:
        Logits of the model, logits of the folder, and the parts of the verdict on loader and generation.
    """
    ids = metrics.make_fixed_tokens(job.model, room=_NEW_TOKENS)
    answer = run_reload_script(
        {
            "folder": str(job.path),
            "auto_class": find_auto_class(job.model.config).__name__,
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
    placement = f'device_map="{ids.device}", ' if placed else ""
    auto_class = find_auto_class(job.model.config).__name__
    loader = f"{auto_class}.from_pretrained(..., {placement}trust_remote_code={remote_code}) in a new process"
    return expected, answer["logits"], {"loader": loader} | _judge_cache_difference(answer, expected, dtype)


def run_reload_script(question: dict[str, Any]) -> dict[str, Any]:
    """Run `reload.reload_and_run` in a new process, which cannot import prunelit.

    Args:
        question: as of `reload.reload_and_run`, with "threads".

    Returns:
        Its answer.

    Raises:
        NotProved: the folder cannot be loaded or run; the message holds the last line of that process.

    Example: see `tests/export/proof/test_compare.py`.
    """
    _log.info("written; loading it again in a new process")
    answer = new_process.run_proof_script(
        reload.__file__, question, Path(question["folder"]), "output: what was written cannot be loaded again"
    )
    return dict(torch.load(io.BytesIO(answer), weights_only=True))


def _judge_cache_difference(answer: Mapping[str, Any], expected: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """Return the part of the verdict on generation with the KV cache."""
    difference = answer["cache_difference"]
    # With the cache the model reads one token at a time, for which torch takes other kernels; their sums differ by
    # rounding, in 16 bits by more than the tolerance.
    limit = max(ROUNDING_TOLERANCE, 32 * torch.finfo(dtype).eps) * expected.abs().max().item()
    verdict = {
        "cache_difference": difference,
        "cache_limit": limit,
        "generated": answer["cached"],
        "same_text_without_cache": answer["cached"] == answer["uncached"],
    }
    if difference <= limit:
        return verdict
    return verdict | {
        "why": f"generation with the KV cache differs from that without: largest logit difference {difference:.2e}, "
        f"expected at most {limit:.2e}"
    }


def _compute_logits_as_reloaded(model: Any, ids: Tensor, dtype: torch.dtype, reloaded: Mapping[str, Tensor]) -> Tensor:
    """Compute logits of the model in memory, in the dtype and with the buffers of the reloaded one."""
    with _cast_parameters(model, dtype), _use_reloaded_buffers(model, reloaded):
        return metrics.compute_logits(model, ids)


@contextmanager
def _cast_parameters(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Cast the parameters for a while, to a dtype that holds their values without loss."""
    dtype_before = [(parameter, parameter.dtype) for parameter in model.parameters() if parameter.dtype != dtype]
    for parameter, _ in dtype_before:
        parameter.data = parameter.data.to(dtype)
    try:
        yield
    finally:
        for parameter, own_dtype in dtype_before:
            parameter.data = parameter.data.to(own_dtype)


@contextmanager
def _use_reloaded_buffers(model: nn.Module, reloaded: Mapping[str, Tensor]) -> Iterator[None]:
    """Give the model's buffers for a while the precision that they have after loading.

    Buffers such as rotary frequencies are computed on loading, not saved. `model.to(dtype)` rounds them in the live
    model; a reloaded buffer replaces one that equals it after that rounding, and no other.
    """
    replaced = []
    for name, buffer in model.named_buffers():
        precise = reloaded.get(name)
        if precise is None or precise.dtype == buffer.dtype:
            continue
        if not torch.equal(precise.to(buffer.device, buffer.dtype), buffer):
            continue
        path, _, attribute = name.rpartition(".")
        owner = model.get_submodule(path)
        replaced.append((owner, attribute, buffer))
        setattr(owner, attribute, precise.to(buffer.device))
    try:
        yield
    finally:
        for owner, attribute, buffer in replaced:
            setattr(owner, attribute, buffer)
