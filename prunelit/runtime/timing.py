"""Seconds of a call, finished on its device; and calls in turn, so that what else a machine does slows all alike."""

import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from prunelit.runtime.progress import track_progress

Result = TypeVar("Result")


def measure_seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, all of its work on the device included: CUDA events on a GPU, else the wall clock."""
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
    """
    found: list[list[Result]] = [[] for _ in runs]
    for run in runs:
        run()  # the first run of a shape sets up kernels and buffers
    for turn in track_progress(range(repeats), what, unit="round"):
        pairs = list(zip(runs, found, strict=True))
        for run, seen in reversed(pairs) if turn % 2 else pairs:
            seen.append(run())
    return found
