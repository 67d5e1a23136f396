"""The scaled rope of a GGUF file: what the factors in it are of."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_SAME = 1e-4
"""Largest relative difference of a factor: files hold them in float32, computed from frequencies in float32."""
_LONGEST_TRAINED = 2**20


def describe_rope(metadata: Mapping[str, Any], factors: Tensor | None, head_dim: int) -> dict[str, Any]:
    """Describe the rope of a file as `rope_parameters`.

    Args:
        metadata: of the file, by names without the architecture.
        factors: [D / 2], by which each frequency is divided; None where the file has none.
        head_dim: D.

    Returns:
        The settings, of rope_type "default", "linear" or "llama3".

    Raises:
        ValueError: a rope of another kind.

    Example:
        >>> describe_rope({"rope.freq_base": 10000.0}, torch.full((4,), 2.0), 8)
        {'rope_theta': 10000.0, 'rope_type': 'linear', 'factor': 2.0}
    """
    base = {"rope_theta": float(metadata.get("rope.freq_base", 10000.0))}
    kind, scale = str(metadata.get("rope.scaling.type", "none")), float(metadata.get("rope.scaling.factor", 1.0))
    scale = float(metadata.get("rope.scale_linear", scale))
    if kind not in ("none", "linear") or (scale != 1.0 and factors is not None):
        raise ValueError(f"expected plain, linear or Llama 3 rope, got {kind!r} scaled by {scale:g}")
    if int(metadata.get("rope.dimension_count", head_dim)) != head_dim:
        raise ValueError(
            f"expected rope over all {head_dim} dimensions of a head, got {metadata['rope.dimension_count']}"
        )
    if factors is None:
        return base | ({"rope_type": "default"} if scale == 1.0 else {"rope_type": "linear", "factor": scale})
    if len(factors) != head_dim // 2:
        raise ValueError(f"expected {head_dim // 2} factors of rope, got {len(factors)}")
    largest = float(factors.max())
    if bool(((factors - largest).abs() <= _SAME * largest).all()):
        return base | {"rope_type": "linear", "factor": round(largest, 3)}
    length = 2
    while length <= _LONGEST_TRAINED:  # Llama 3 has these settings but for factor and length
        settings = base | {
            "rope_type": "llama3",
            "factor": round(largest, 3),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": length,
        }
        if bool(((_compute_llama3_factors(settings, head_dim) - factors).abs() <= _SAME * factors).all()):
            return settings
        length *= 2
    raise ValueError("expected plain, linear or Llama 3 rope, got other factors in rope_freqs.weight")


def _compute_llama3_factors(settings: Mapping[str, Any], head_dim: int) -> Tensor:
    """Compute the factors [D / 2] by which Llama 3 divides the frequencies of plain rope: 1 for high ones."""
    powers = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    wavelengths = 2 * torch.pi * settings["rope_theta"] ** powers
    turns = settings["original_max_position_embeddings"] / wavelengths
    low, high = settings["low_freq_factor"], settings["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / (kept + (1 - kept) / settings["factor"])).float()
