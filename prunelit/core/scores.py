"""Scores of one layer's units, and the types of attention units and cost functions."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from prunelit.core.plan import LayerShape

Unit = Literal["kv_group", "query_head"]

Cost = Callable[[LayerShape, int, int, int], float]
"""(dense layer, query heads, KV groups, FFN channels) -> cost of the layer at these widths. The costs of heads and
channels add up: neither changes what the other saves."""


@dataclass(frozen=True)
class LayerScores:
    """Importance of one layer's units; units with larger scores remain. A kind with scores None is not pruned.

    Attributes:
        heads: [Q]. The score of a KV group is the sum over its query heads, or their mean where scope "global" compares
            it with channels.
        channels: [F].

    Example:
        >>> import torch
        >>> LayerScores(channels=torch.tensor([0.5, 2.0])).heads is None
        True
    """

    heads: Tensor | None = None
    channels: Tensor | None = None
