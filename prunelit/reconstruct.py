"""Closed-form least squares on what is kept: the dense model's activations are the target."""

from collections.abc import Sequence

from torch import nn

from prunelit.calibrate import Batch
from prunelit.plan import PruningPlan


def apply(model: nn.Module, plan: PruningPlan, batches: Sequence[Batch], how: str) -> None:
    """Cut `model` as `plan` says and repair it on the way."""
    raise NotImplementedError
