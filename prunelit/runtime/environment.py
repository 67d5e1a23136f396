"""The machine that times, memory and rounding depend on."""

import os
import platform
import resource
import sys
from typing import Any

import torch


def get_peak_memory_mib() -> dict[str, float]:
    """Peak resident memory of this process, and of the GPU if there is one."""
    unit = 1 if sys.platform == "darwin" else 1024
    found = {"process": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, 1)}
    if torch.cuda.is_available():
        found["cuda"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
    return found


def describe_hardware(device: torch.device) -> dict[str, Any]:
    """{"device": name, "threads"}."""
    name = f"{platform.machine()} CPU, {os.cpu_count()} cores"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {"device": name, "threads": torch.get_num_threads()}
