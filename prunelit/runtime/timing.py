"""Time: stages of a run, calls that finish on their device, and calls in turns so that other load slows all alike."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch

from prunelit.runtime.environment import get_peak_memory_mib
from prunelit.runtime.progress import show_stage, track_progress

Result = TypeVar("Result")


@contextmanager
def time_stage(name: str, seconds: dict[str, float], emit: Callable[..., object]) -> Iterator[None]:
    """Show a stage of a run while it lasts, add its seconds to `seconds[name]`, and emit the event "stage".

    Args:
        name: of the stage, with underscores: "load_model".
        seconds: seconds of every stage so far; a stage that is entered again adds up.
        emit: called as `emit("stage", name=..., seconds=..., memory_mib=...)`, see `EventSource.emit`.

    Example:
        >>> seconds = {}
        >>> with time_stage("load_model", seconds, lambda event, **facts: print(event, facts["name"])):
        ...     pass
        stage load_model
    """
    start = time.perf_counter()
    with show_stage(name.replace("_", " ")):
        yield
    taken = time.perf_counter() - start
    seconds[name] = seconds.get(name, 0.0) + taken
    emit("stage", name=name, seconds=taken, memory_mib=get_peak_memory_mib())


def measure_seconds(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, all of its work on the device included: CUDA events on a GPU, else the wall clock.

    Example: see `tests/runtime/test_timing.py`.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize(device)
            start.record()  # type: ignore[no-untyped-call]
            run()
            end.record()  # type: ignore[no-untyped-call]
            end.synchronize()  # type: ignore[no-untyped-call]
            return float(start.elapsed_time(end)) / 1e3  # type: ignore[no-untyped-call]
    began = time.perf_counter()
    run()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - began


def run_in_rounds(runs: Sequence[Callable[[], Result]], repeats: int, what: str) -> list[list[Result]]:
    """Call all of them once in every round, forwards and backwards in turn; one round before is not counted.

    Args:
        runs: the calls.
        repeats: rounds that count.
        what: name on the progress bar.

    Returns:
        For each call what it returned, round by round.

    Example: see `tests/runtime/test_timing.py`.
    """
    results: list[list[Result]] = [[] for _ in runs]
    for run in runs:
        run()  # the first run of a shape sets up kernels and buffers
    for turn in track_progress(range(repeats), what, unit="round"):
        pairs = list(zip(runs, results, strict=True))
        for run, results_of_call in reversed(pairs) if turn % 2 else pairs:
            results_of_call.append(run())
    return results
