"""Formats numbers for tables, figures and pages."""

import math
from collections.abc import Mapping
from typing import TypedDict


class MeanLoss(TypedDict):
    """A measurement with its mean negative log-likelihood in nats per token; it may hold more.

    Example: see `exponentiate_nll`.
    """

    nll: float


def format_perplexity(perplexity: float, like: float | None = None) -> str:
    """Format a perplexity with three significant digits, or all digits before the point if there are more.

    Args:
        perplexity: the number.
        like: another perplexity whose number of decimals is used, so that both line up.

    Example:
        >>> format_perplexity(22.94), format_perplexity(9386.2), format_perplexity(9.5, like=22.9)
        ('22.9', '9386', '9.5')
    """
    if not math.isfinite(perplexity):
        return "inf"
    magnitude = perplexity if like is None else like
    decimals = 2 if magnitude < 9.995 else 1 if magnitude < 99.95 else 0
    return f"{perplexity:.{decimals}f}"


def exponentiate_nll(text: MeanLoss) -> float:
    """Compute exp(nll) of one measurement, its perplexity; infinite if a float cannot hold it.

    Args:
        text: with "nll", the mean negative log-likelihood in nats per token.

    Example:
        >>> exponentiate_nll({"nll": 0.0}), exponentiate_nll({"nll": 1000.0})
        (1.0, inf)
    """
    return math.exp(text["nll"]) if text["nll"] < 700 else math.inf


def format_percent(ratio: float) -> str:
    """Format a ratio as a percentage.

    Example:
        >>> format_percent(0.125)
        '12.5%'
    """
    return f"{round(100 * ratio, 6):g}%"


def format_count(count: float) -> str:
    """Format a large count with three digits and M, G, T or P; below a million in full.

    Example:
        >>> format_count(1234567), format_count(1234)
        ('1.23 M', '1,234')
    """
    for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if count >= size:
            return f"{count / size:.3g} {letter}"
    return f"{count:,.0f}"


def describe_other_parameters(size: Mapping[str, float], tower_parameters: int | None = None) -> str:
    """Describe the parameters that no budget counts and no method cuts: those outside the decoder layers.

    Args:
        size: with "parameters" and "block_parameters".
        tower_parameters: those of a multimodal model's towers and projectors; 0 where there are none, None where the
            model is not at hand.

    Example:
        >>> size = {"parameters": 100, "block_parameters": 60}
        >>> describe_other_parameters(size, tower_parameters=30)
        'outside the decoder layers stay 10 of embeddings, last norm and head, 30 of tower and projector'
        >>> describe_other_parameters(size)
        'outside the decoder layers 40 stay'
    """
    others = int(size["parameters"] - size["block_parameters"])
    if tower_parameters is None:
        return f"outside the decoder layers {others:,} stay"
    tower = f", {tower_parameters:,} of tower and projector" if tower_parameters else ""
    return f"outside the decoder layers stay {others - tower_parameters:,} of embeddings, last norm and head{tower}"


def format_duration(seconds: float) -> str:
    """Format seconds in the units that people use.

    Example:
        >>> [format_duration(seconds) for seconds in (0.04, 3.2, 245, 7800)]
        ['40 ms', '3.2 s', '4 min 5 s', '2 h 10 min']
    """
    if seconds < 0.0995:
        return f"{1e3 * seconds:.2g} ms"
    if seconds < 59.95:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
