"""Versions of the packages that results depend on, for records and reports."""

import platform
from importlib import metadata

_PACKAGES = ("prunelit", "torch", "lightning", "transformers", "peft", "datasets", "torchmetrics", "safetensors")


def collect_versions(*more: str) -> dict[str, str]:
    """Collect the versions of Python and of the installed packages that results depend on.

    Args:
        more: further package names.

    Example:
        >>> list(collect_versions())[:3]
        ['python', 'prunelit', 'torch']
    """
    versions = {"python": platform.python_version()}
    for name in (*_PACKAGES, *more):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
