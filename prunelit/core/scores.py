"""Scores of one layer, and the types of units and costs that they are compared by."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from prunelit.core.plan import LayerShape

Unit = Literal["kv_group", "query_head"]

Cost = Callable[[LayerShape, int, int, int], float]
"""What a layer costs at (query heads, KV groups, FFN channels). Heads and channels add up: neither changes what the
other saves."""


@dataclass(frozen=True)
class LayerScores:
    """Importance of one layer's units, larger = keep. None: this kind is not scored and stays whole.

    Attributes:
        heads: [Q]; a KV group is worth the sum of its query heads, or their mean where scope "global" compares it with
            channels.
        channels: [F].
    """

    heads: Tensor | None = None
    channels: Tensor | None = None
