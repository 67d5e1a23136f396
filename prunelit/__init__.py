"""prunelit: makes large language models structurally smaller and wins their quality back.

Names are imported on first use: `import prunelit` loads no torch.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "Architecture": "prunelit.architectures",
    "register": "prunelit.architectures",
    "PruningPlan": "prunelit.plan",
    "LayerPlan": "prunelit.plan",
    "Decoder": "prunelit.decoder",
    "LayerScores": "prunelit.rank",
    "observe": "prunelit.calibrate",
    "apply": "prunelit.surgery",
    "load": "prunelit.models",
    "load_tokenizer": "prunelit.models",
    "save": "prunelit.export",
    "perplexity": "prunelit.measure",
    "PruningCallback": "prunelit.callbacks",
    "LLMBIP": "prunelit.callbacks",
    "Magnitude": "prunelit.callbacks",
    "Random": "prunelit.callbacks",
    "Dashboard": "prunelit.callbacks",
    "RecoveryModule": "prunelit.recovery",
    "TextDataModule": "prunelit.data",
    "AtomicCheckpointIO": "prunelit.checkpoint",
    "SaveOnSigterm": "prunelit.checkpoint",
    "PrunelitError": "prunelit.errors",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
