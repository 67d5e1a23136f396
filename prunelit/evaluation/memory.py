"""Peak memory of one model at work, in a process of its own, so that nothing else counts.

On a GPU it is what torch allocated at most; on a CPU the peak of resident memory after loading, less what the process
had before it loaded the model. Where a system can not reset its peak (macOS) loading counts too; the result says so.
"""

import resource
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from prunelit.data import sources
from prunelit.data.loading import choose_device
from prunelit.evaluation.speed import ModelTimer, Speed
from prunelit.evaluation.subject import EvaluatedModel
from prunelit.model.modes import move_to_device
from prunelit.runtime import progress
from prunelit.runtime.errors import PrunelitError

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def measure_peak_memory(subject: EvaluatedModel, wanted: Speed) -> dict[str, Any]:
    """Peak memory of prefill and decode.

    Args:
        subject: the model; it is loaded in another process.
        wanted: the work.

    Returns:
        {"peak_bytes", "of": "GPU" or "process", "loading_counts"}.

    Raises:
        PrunelitError: the process was killed, most likely because memory ran out.
    """
    threads = torch.get_num_threads()
    try:
        with (
            progress.show_stage(f"peak memory of {sources.shorten_source(subject.source)}"),
            ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool,
        ):
            return pool.submit(_measure_peak_in_process, subject, wanted, threads).result()
    except BrokenProcessPool as error:
        raise PrunelitError(
            f"peak memory of {subject.source!r}: the process that measures it was killed, most likely out of memory; "
            "lower speed.prompt, speed.context or speed.batch"
        ) from error


def _measure_peak_in_process(subject: EvaluatedModel, wanted: Speed, threads: int) -> dict[str, Any]:
    progress.silence_progress()  # two processes would draw over each other
    torch.set_num_threads(threads)
    target = choose_device(subject.device)
    before = _read_resident_bytes("VmRSS")
    network = subject.load_model()
    with move_to_device(network, target):
        if target.type == "cuda":
            torch.cuda.reset_peak_memory_stats(target)
            _prefill_and_decode(network, wanted)
            return {"peak_bytes": torch.cuda.max_memory_allocated(target), "of": "GPU", "loading_counts": False}
        reset = _reset_peak_memory()
        _prefill_and_decode(network, wanted)
        return {"peak_bytes": _read_resident_bytes("VmHWM") - before, "of": "process", "loading_counts": not reset}


def _prefill_and_decode(network: Any, wanted: Speed) -> None:
    runner = ModelTimer(network, wanted)
    runner.prefill(wanted.prompt)
    runner.decode(runner.context)


def _reset_peak_memory() -> bool:
    """Whether the kernel forgot the peak of resident memory so far (Linux)."""
    try:
        _RESET.write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _read_resident_bytes(name: str) -> int:
    """Resident memory now (VmRSS) or at most (VmHWM), bytes; the peak of all time where there is no /proc."""
    try:
        lines = _STATUS.read_text(encoding="ascii").splitlines()
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024
