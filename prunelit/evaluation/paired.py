"""Two models on the same items: the mean difference with its 95% confidence interval.

Each item counts as right or wrong (1 or 0) for each model. d is the difference per item, and the interval is the normal
one, mean(d) +- 1.96 sd(d) / sqrt(n). Pairing removes the variance between items, so the interval is narrower than that
of two independent accuracies. It is rough below about 30 items, and has no width where the models agree on every item.
"""

import math
import statistics
from collections.abc import Sequence

from prunelit.runtime.errors import BadOption

INTERVAL = "normal, paired by item"
_Z = 1.959963984540054  # 97.5% quantile of the normal distribution


def compute_paired_difference(scores: Sequence[float], baseline: Sequence[float]) -> dict[str, float]:
    """Compute the mean difference of two models over items.

    Args:
        scores: one number per item.
        baseline: one number per item for the model to compare with, in the same order.

    Returns:
        {"difference": mean of scores - baseline, "stderr", "low", "high" (95% interval)}.

    Raises:
        BadOption: no items, or different numbers of items.

    Example:
        >>> interval = compute_paired_difference([1, 1, 0, 1], [0, 1, 0, 1])
        >>> {name: round(value, 3) for name, value in interval.items()}
        {'difference': 0.25, 'stderr': 0.25, 'low': -0.24, 'high': 0.74}
    """
    if len(scores) != len(baseline) or not scores:
        raise BadOption(f"paired difference: expected the same items for both, got {len(scores)} and {len(baseline)}")
    differences = [a - b for a, b in zip(scores, baseline, strict=True)]
    stderr = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else 0.0
    return _build_interval(math.fsum(differences) / len(differences), stderr)


def average_differences(differences: Sequence[dict[str, float]]) -> dict[str, float]:
    """Average the differences of several tasks.

    The tasks' items are independent, so the variance of the mean is the sum of the tasks' variances over n^2.

    Args:
        differences: results of `compute_paired_difference`, one for each task.

    Returns:
        {"difference", "stderr", "low", "high"}.

    Example:
        >>> task = compute_paired_difference([1, 1, 0, 1], [0, 1, 0, 1])
        >>> round(average_differences([task, task])["stderr"], 3)
        0.177
    """
    mean = math.fsum(task["difference"] for task in differences) / len(differences)
    return _build_interval(mean, math.sqrt(math.fsum(task["stderr"] ** 2 for task in differences)) / len(differences))


def _build_interval(mean: float, stderr: float) -> dict[str, float]:
    return {"difference": mean, "stderr": stderr, "low": mean - _Z * stderr, "high": mean + _Z * stderr}
