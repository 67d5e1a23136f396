"""Versions of the packages that results depend on, for records and reports, and the lowest that prunelit runs on."""

import functools
import platform
import re
from importlib import metadata

from prunelit.runtime.errors import TooOld

_PACKAGES = ("prunelit", "torch", "lightning", "transformers", "peft", "datasets", "torchmetrics", "safetensors")
# As in pyproject.toml, which installers read; what each is needed for is in docs/reference/versions.md.
LOWEST_VERSIONS = {
    "torch": "2.9.1",
    "lightning": "2.6",
    "transformers": "5.14",
    "peft": "0.18",
    "datasets": "4.0",
    "huggingface_hub": "1.5",
    "jsonargparse": "4.41",
}
"""The packages of which an older version fails late, or in words of its own, and the lowest version of each."""


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


@functools.cache
def check_lowest_versions() -> None:
    """Check that no installed package is too old; no package is imported, so it takes milliseconds.

    A package that another one has put back to an older version would otherwise fail somewhere in an import, or late in
    a run. What passed once is not checked again. One that is not installed is left to the import that needs it.

    Raises:
        TooOld: one is.

    Example:
        >>> check_lowest_versions()
    """
    for name, lowest in LOWEST_VERSIONS.items():
        try:
            installed = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        if _read_numbers(installed) < _read_numbers(lowest):
            raise TooOld(f"prunelit needs {name} >= {lowest}, found {installed}: pip install -U {name}")


def _read_numbers(version: str) -> list[int]:
    """The numbers of a release: [2, 13, 0] of "2.13.0+cpu", and of "2.13.0rc1"."""
    release = re.match(r"[\d.]*\d", version)
    return [int(part) for part in release.group().split(".")] if release else []
