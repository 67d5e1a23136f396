"""prunelit: makes large language models structurally smaller and wins their quality back.

Names are imported on first use: `import prunelit` loads no torch.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "Architecture": "prunelit.core.architectures",
    "register": "prunelit.core.architectures",
    "PruningPlan": "prunelit.core.plan",
    "LayerPlan": "prunelit.core.plan",
    "Decoder": "prunelit.model.decoder",
    "LayerScores": "prunelit.core.scores",
    "observe": "prunelit.calibration.observe",
    "apply": "prunelit.model.surgery",
    "load": "prunelit.data.loading",
    "load_tokenizer": "prunelit.data.loading",
    "save": "prunelit.export",
    "perplexity": "prunelit.calibration.metrics",
    "PruningCallback": "prunelit.callbacks",
    "LLMBIP": "prunelit.callbacks",
    "Magnitude": "prunelit.callbacks",
    "Random": "prunelit.callbacks",
    "Dashboard": "prunelit.callbacks",
    "RecoveryModule": "prunelit.recovery.module",
    "TextDataModule": "prunelit.recovery.datamodule",
    "AtomicCheckpointIO": "prunelit.monitoring.checkpoints",
    "SaveOnSigterm": "prunelit.monitoring.checkpoints",
    "PrunelitError": "prunelit.runtime.errors",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
