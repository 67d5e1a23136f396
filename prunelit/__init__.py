"""prunelit: makes large language models structurally smaller and wins their quality back.

Names are imported on first use: `import prunelit` loads neither torch nor transformers. Type checkers and editors read
the imports under `TYPE_CHECKING`.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from prunelit.calibration.metrics import perplexity as perplexity
    from prunelit.calibration.observe import Sums as Sums
    from prunelit.calibration.observe import observe as observe
    from prunelit.callbacks.best.callback import Best as Best
    from prunelit.callbacks.block_pruner.callback import BlockPruner as BlockPruner
    from prunelit.callbacks.ean import EAN as EAN
    from prunelit.callbacks.expert_frequency import ExpertFrequency as ExpertFrequency
    from prunelit.callbacks.flap import FLAP as FLAP
    from prunelit.callbacks.greedy_output.callback import GreedyOutput as GreedyOutput
    from prunelit.callbacks.llm_bip import LLMBIP as LLMBIP
    from prunelit.callbacks.magnitude import Magnitude as Magnitude
    from prunelit.callbacks.random import Random as Random
    from prunelit.callbacks.reap import REAP as REAP
    from prunelit.callbacks.saap.callback import SAAP as SAAP
    from prunelit.callbacks.shortgpt import ShortGPT as ShortGPT
    from prunelit.callbacks.taylor import Taylor as Taylor
    from prunelit.callbacks.wanda_sp import WandaSp as WandaSp
    from prunelit.core.architectures import register as register
    from prunelit.core.declaration import Architecture as Architecture
    from prunelit.core.declaration import Mixture as Mixture
    from prunelit.core.plan import LayerPlan as LayerPlan
    from prunelit.core.plan import PruningPlan as PruningPlan
    from prunelit.core.scores import LayerScores as LayerScores
    from prunelit.data.loading import load as load
    from prunelit.data.loading import load_tokenizer as load_tokenizer
    from prunelit.evaluation.live import EvaluationResult as EvaluationResult
    from prunelit.evaluation.live import evaluate as evaluate
    from prunelit.export.write import save as save
    from prunelit.model.decoder import Decoder as Decoder
    from prunelit.model.surgery import apply as apply
    from prunelit.monitoring.checkpoints import AtomicCheckpointIO as AtomicCheckpointIO
    from prunelit.monitoring.checkpoints import SaveOnSigterm as SaveOnSigterm
    from prunelit.monitoring.dashboard import Dashboard as Dashboard
    from prunelit.pruning.callback import PruningCallback as PruningCallback
    from prunelit.pruning.context import PruningContext as PruningContext
    from prunelit.pruning.hosts.loops import prune_in_loop as prune_in_loop
    from prunelit.pruning.hosts.trainer import PruneBeforeTraining as PruneBeforeTraining
    from prunelit.pruning.one_call import plan as plan
    from prunelit.pruning.one_call import prune as prune
    from prunelit.pruning.restore import restore as restore
    from prunelit.recovery.datamodule import TextDataModule as TextDataModule
    from prunelit.recovery.live import recover as recover
    from prunelit.recovery.module import RecoveryModule as RecoveryModule
    from prunelit.report.figures.plans import draw_plan as draw_plan
    from prunelit.runtime.errors import PrunelitError as PrunelitError

_HOME = {
    # Verbs
    "prune": "prunelit.pruning.one_call",
    "plan": "prunelit.pruning.one_call",
    "recover": "prunelit.recovery.live",
    "evaluate": "prunelit.evaluation.live",
    "apply": "prunelit.model.surgery",
    "save": "prunelit.export.write",
    "load": "prunelit.data.loading",
    "restore": "prunelit.pruning.restore",
    "load_tokenizer": "prunelit.data.loading",
    "perplexity": "prunelit.calibration.metrics",
    # Plans
    "PruningPlan": "prunelit.core.plan",
    "LayerPlan": "prunelit.core.plan",
    "draw_plan": "prunelit.report.figures.plans",
    "EvaluationResult": "prunelit.evaluation.live",
    # Methods
    "Best": "prunelit.callbacks",
    "BlockPruner": "prunelit.callbacks",
    "EAN": "prunelit.callbacks",
    "ExpertFrequency": "prunelit.callbacks",
    "FLAP": "prunelit.callbacks",
    "GreedyOutput": "prunelit.callbacks",
    "LLMBIP": "prunelit.callbacks",
    "Magnitude": "prunelit.callbacks",
    "Random": "prunelit.callbacks",
    "REAP": "prunelit.callbacks",
    "SAAP": "prunelit.callbacks",
    "ShortGPT": "prunelit.callbacks",
    "Taylor": "prunelit.callbacks",
    "WandaSp": "prunelit.callbacks",
    # What the author of a method or an architecture needs
    "PruningCallback": "prunelit.pruning.callback",
    "PruningContext": "prunelit.pruning.context",
    "Decoder": "prunelit.model.decoder",
    "LayerScores": "prunelit.core.scores",
    "observe": "prunelit.calibration.observe",
    "Sums": "prunelit.calibration.observe",
    "Architecture": "prunelit.core.declaration",
    "Mixture": "prunelit.core.declaration",
    "register": "prunelit.core.architectures",
    # Jobs
    "PruneBeforeTraining": "prunelit.pruning.hosts.trainer",
    "prune_in_loop": "prunelit.pruning.hosts.loops",
    "RecoveryModule": "prunelit.recovery.module",
    "TextDataModule": "prunelit.recovery.datamodule",
    "Dashboard": "prunelit.monitoring.dashboard",
    "AtomicCheckpointIO": "prunelit.monitoring.checkpoints",
    "SaveOnSigterm": "prunelit.monitoring.checkpoints",
    "PrunelitError": "prunelit.runtime.errors",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    importlib.import_module("prunelit.runtime.versions").check_lowest_versions()
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
