"""Pruning methods as Lightning callbacks, found by name.

A method is one file, or a folder with a `callback.py` where it needs more.
"""

import importlib
from typing import Any

from prunelit.pruning.registry import method_class, methods
from prunelit.runtime.versions import check_lowest_versions

__all__ = ["Dashboard", "PruningCallback", "method_class", "methods"]

_ELSEWHERE = {"PruningCallback": "prunelit.pruning.callback", "Dashboard": "prunelit.monitoring.dashboard"}
"""Classes that YAML files name as `prunelit.callbacks.NAME`, and the modules that define them."""


def __getattr__(name: str) -> Any:
    for method in methods().values():
        if method.class_name == name:
            check_lowest_versions()
            return method_class(method.name)
    if name in _ELSEWHERE:
        check_lowest_versions()
        return getattr(importlib.import_module(_ELSEWHERE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
