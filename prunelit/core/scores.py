"""Scores of one layer's units, and the types of attention units and cost functions."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Unit = Literal["kv_group", "query_head"]

ScoreKind = Literal["heads", "channels", "experts", "expert_channels"]
"""Kinds of units that have scores."""
EXPERT_KINDS: tuple[ScoreKind, ScoreKind] = ("experts", "expert_channels")
"""Those of a mixture; they save parameters of each other, so one of them is cut at a time."""

Cost = Callable[..., float]
"""(dense layer, query heads, KV groups, FFN channels, experts=..., expert_channels=...) -> cost of the layer at these
widths; the last two are named, and are all of them where they are left out. The costs of heads, channels and one of the
last two add up: none changes what the others save."""


@dataclass(frozen=True)
class LayerScores:
    """Importance of one layer's units; units with larger scores remain. A kind with scores None is not pruned.

    Attributes:
        heads: [Q]. The score of a KV group is the sum over its query heads, or their mean where scope "global" compares
            it with channels.
        channels: [F].
        experts: [E].
        expert_channels: [C], one set for all experts of the layer.

    Example:
        >>> import torch
        >>> LayerScores(channels=torch.tensor([0.5, 2.0])).heads is None
        True
    """

    heads: Tensor | None = None
    channels: Tensor | None = None
    experts: Tensor | None = None
    expert_channels: Tensor | None = None
