"""Two models on the same items: the mean difference with its 95% confidence interval.

Each item counts as right or wrong (1 or 0) for either model, d is the difference per item, and the interval is the
normal one, mean(d) +- 1.96 sd(d) / sqrt(n). Pairing takes out what the items themselves vary, so it is narrower than
that of two independent accuracies; it is rough below about 30 items, and of no width where no item differs.
"""

import math
import statistics
from collections.abc import Sequence

from prunelit.runtime.errors import BadOption

INTERVAL = "normal, paired by item"
_Z = 1.959963984540054  # 97.5% quantile of the normal distribution


def compute_paired_difference(mine: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Mean of mine - theirs over items.

    Args:
        mine, theirs: one number per item, in the same order.

    Returns:
        {"difference", "stderr", "low", "high"}.

    Raises:
        BadOption: no items, or not as many for either.
    """
    if len(mine) != len(theirs) or not mine:
        raise BadOption(f"paired difference: expected the same items for both, got {len(mine)} and {len(theirs)}")
    items = [a - b for a, b in zip(mine, theirs, strict=True)]
    stderr = statistics.stdev(items) / math.sqrt(len(items)) if len(items) > 1 else 0.0
    return _build_interval(math.fsum(items) / len(items), stderr)


def average_differences(differences: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean over tasks, whose items are independent of each other's: variances add up."""
    mean = math.fsum(each["difference"] for each in differences) / len(differences)
    return _build_interval(mean, math.sqrt(math.fsum(each["stderr"] ** 2 for each in differences)) / len(differences))


def _build_interval(mean: float, stderr: float) -> dict[str, float]:
    return {"difference": mean, "stderr": stderr, "low": mean - _Z * stderr, "high": mean + _Z * stderr}
