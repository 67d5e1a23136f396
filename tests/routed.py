"""What the experts of a mixture do to every token, computed one token at a time: the reference for scores of experts.

Routing is that of the model's own router; experts are multiplied out here, family by family.
"""

from typing import Any, NamedTuple

import torch

from tests.observed import rows_at

# Blocks of separate and of fused-transposed experts, grouped routing, inputs scaled by the router; dense layers beside.
ROUTED = ("mixtral", "gpt_oss", "llama4_text", "deepseek_v3")


class Visit(NamedTuple):
    """One token at one expert."""

    expert: int
    gate: float
    channels: torch.Tensor
    output: torch.Tensor


def block_of(family: str, layer: Any) -> Any:
    return layer.feed_forward if family == "llama4_text" else layer.mlp


@torch.no_grad()
def visits_at(family: str, model: Any, index: int, batches: Any) -> list[Visit]:
    """Every visit of a token to an expert of one layer; none where the layer is dense. Padding visits nothing."""
    block = block_of(family, model.model.layers[index])
    if not hasattr(block, "experts"):
        return []
    found = []
    for x in rows_at(model, block, batches, "input").float():
        if family == "llama4_text":
            weights = block.router(x[None])[0][0]
            chosen = [(int(expert), 1.0, x * weights[expert]) for expert in weights.nonzero().flatten()]
        else:
            router = block.router if family == "gpt_oss" else block.gate
            _, gates, experts = router(x[None])
            chosen = [(int(expert), float(gate), x) for expert, gate in zip(experts[0], gates[0], strict=True)]
        found += [Visit(expert, gate, *run_expert(family, block.experts, expert, own)) for expert, gate, own in chosen]
    return found


def run_expert(family: str, experts: Any, number: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Channels and output of one expert on one token."""
    first, last = experts.gate_up_proj[number].double(), experts.down_proj[number].double()
    x, silu = x.double(), torch.nn.functional.silu
    if family == "gpt_oss":
        inner = x @ first + experts.gate_up_proj_bias[number]
        gate, up = inner[0::2].clamp(max=7.0), inner[1::2].clamp(-7.0, 7.0)
        channels = (up + 1) * gate * torch.sigmoid(1.702 * gate)
        return channels, channels @ last + experts.down_proj_bias[number]
    inner = x @ first if family == "llama4_text" else first @ x
    half = len(inner) // 2
    channels = silu(inner[:half]) * inner[half:]
    return channels, channels @ last if family == "llama4_text" else last @ channels


def count_experts(family: str, model: Any, index: int) -> int:
    block = block_of(family, model.model.layers[index])
    return len(block.experts.down_proj) if hasattr(block, "experts") else 0


def sum_over_visits(family: str, model: Any, index: int, batches: Any, value: Any) -> torch.Tensor | None:
    """Sum `value` of every visit by expert; None in a dense layer."""
    count = count_experts(family, model, index)
    sums = [0.0] * count
    for visit in visits_at(family, model, index, batches):
        sums[visit.expert] += float(value(visit))
    return torch.tensor(sums, dtype=torch.float64) if count else None
