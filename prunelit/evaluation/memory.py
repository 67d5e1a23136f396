"""Peak memory of one model at work, measured in a process of its own so that nothing else counts.

On a GPU it is the most memory that torch allocated. On a CPU it is the peak of resident memory after loading, minus
what the process held before it loaded the model. Where the system cannot reset the peak (macOS), loading counts too;
the result says so.
"""

import resource
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import torch

from prunelit.data import sources
from prunelit.data.loading import choose_device
from prunelit.evaluation.speed import ModelTimer, Speed
from prunelit.evaluation.subject import EvaluatedModel
from prunelit.model.modes import move_to_device
from prunelit.runtime import progress
from prunelit.runtime.errors import PrunelitError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory(TypedDict):
    """Peak memory of one model at work: "of" is "GPU" or "process".

    Example: see `measure_peak_memory`.
    """

    peak_bytes: int
    of: str
    loading_counts: bool


def measure_peak_memory(subject: EvaluatedModel, speed: Speed) -> PeakMemory:
    """Measure the peak memory of prefill and decode.

    Args:
        subject: the model; it is loaded in another process.
        speed: lengths and batch size of the work.

    Returns:
        {"peak_bytes": bytes, "of": "GPU" or "process", "loading_counts": whether loading is included}.

    Raises:
        PrunelitError: the process was killed, most likely because memory ran out.

    Example: see `prunelit.evaluation.run.evaluate_model`.
    """
    threads = torch.get_num_threads()
    try:
        with (
            progress.show_stage(f"peak memory of {sources.shorten_source(subject.source)}"),
            ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool,
        ):
            return pool.submit(_measure_peak_in_process, subject, speed, threads).result()
    except BrokenProcessPool as error:
        raise PrunelitError(
            f"peak memory of {subject.source!r}: the process that measures it was killed, most likely out of memory; "
            "lower speed.prompt, speed.context or speed.batch"
        ) from error


def _measure_peak_in_process(subject: EvaluatedModel, speed: Speed, threads: int) -> PeakMemory:
    progress.silence_progress()  # the parent's progress bar is on the same terminal
    torch.set_num_threads(threads)
    device = choose_device(subject.device)
    bytes_before = _read_resident_bytes("VmRSS")
    network = subject.load_model()
    with move_to_device(network, device):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            _prefill_and_decode(network, speed)
            return {"peak_bytes": torch.cuda.max_memory_allocated(device), "of": "GPU", "loading_counts": False}
        was_reset = _reset_peak_memory()
        _prefill_and_decode(network, speed)
        return {
            "peak_bytes": _read_resident_bytes("VmHWM") - bytes_before,
            "of": "process",
            "loading_counts": not was_reset,
        }


def _prefill_and_decode(network: "PreTrainedModel", speed: Speed) -> None:
    timer = ModelTimer(network, speed)
    timer.prefill(speed.prompt)
    timer.decode(timer.context)


def _reset_peak_memory() -> bool:
    """Reset the kernel's peak of resident memory (Linux only); return whether it worked."""
    try:
        _RESET.write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _read_resident_bytes(name: str) -> int:
    """Read resident memory now (VmRSS) or at its peak (VmHWM), bytes; the peak of all time without /proc."""
    try:
        lines = _STATUS.read_text(encoding="ascii").splitlines()
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024
