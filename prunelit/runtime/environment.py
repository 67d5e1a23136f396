"""Describes the machine, on which times, memory and rounding depend."""

import os
import platform
import resource
import sys
from typing import TypedDict

import torch


class Hardware(TypedDict):
    """What `describe_hardware` returns.

    Example: see `describe_hardware`.
    """

    device: str
    threads: int


def get_peak_memory_mib() -> dict[str, float]:
    """Get the peak memory of this process in MiB.

    Returns:
        "process": resident memory; "cuda": memory allocated by torch on the GPU, if there is one.

    Example:
        >>> get_peak_memory_mib()["process"] > 1
        True
    """
    # ru_maxrss is in bytes on macOS, in KiB on Linux.
    bytes_per_unit = 1 if sys.platform == "darwin" else 1024
    peaks = {"process": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * bytes_per_unit / 2**20, 1)}
    if torch.cuda.is_available():
        peaks["cuda"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
    return peaks


def describe_hardware(device: torch.device) -> Hardware:
    """Describe the hardware of a device.

    Returns:
        "device": name of the GPU or CPU; "threads": number of torch's CPU threads.

    Example:
        >>> sorted(describe_hardware(torch.device("cpu")))
        ['device', 'threads']
    """
    name = f"{platform.machine()} CPU, {os.cpu_count()} cores"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {"device": name, "threads": torch.get_num_threads()}
