"""Versions of what numbers depend on, for whatever is written down."""

import platform
from importlib import metadata

_PACKAGES = ("prunelit", "torch", "lightning", "transformers", "peft", "datasets", "torchmetrics", "safetensors")


def collect_versions(*more: str) -> dict[str, str]:
    """Versions of Python, of the packages that numbers depend on, and of some more; those that are installed."""
    found = {"python": platform.python_version()}
    for name in (*_PACKAGES, *more):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
