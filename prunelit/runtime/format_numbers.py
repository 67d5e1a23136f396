"""How numbers are written in tables, pictures and pages."""

import math
from collections.abc import Mapping
from typing import Any


def format_perplexity(perplexity: float, like: float | None = None) -> str:
    """A perplexity with three digits, more where it is larger (22.9, 102, 9386); as many decimals as `like` has."""
    if not math.isfinite(perplexity):
        return "inf"
    size = perplexity if like is None else like
    digits = 2 if size < 9.995 else 1 if size < 99.95 else 0
    return f"{perplexity:.{digits}f}"


def exponentiate_nll(text: Mapping[str, Any]) -> float:
    """exp(nll) of one measurement; infinite where no float holds it."""
    return math.exp(text["nll"]) if text["nll"] < 700 else math.inf


def format_percent(ratio: float) -> str:
    """0.125 -> "12.5%"."""
    return f"{round(100 * ratio, 6):g}%"


def format_count(count: float) -> str:
    """1,234,567 -> 1.23 M."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if count >= size:
            return f"{count / size:.3g} {letter}"
    return f"{count:,.0f}"


def format_duration(seconds: float) -> str:
    """Seconds as people say them: 40 ms, 3.2 s, 4 min 5 s, 2 h 10 min."""
    if seconds < 0.0995:
        return f"{1e3 * seconds:.2g} ms"
    if seconds < 59.95:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
