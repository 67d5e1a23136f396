"""Fisher scores of experts and of their channels are those of masks that autograd differentiates token by token."""

from typing import Any

import pytest
import torch

from prunelit.callbacks.best.callback import Best
from prunelit.callbacks.best.fisher import score_fisher
from prunelit.model.decoder import Decoder
from tests.tiny import tiny, tokens

BATCHES = [{"input_ids": tokens(3, 20)}]


def score_by_masks(model: Any, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks of ones on every expert and channel of one layer, one for each token; their gradients are the terms."""
    layer = Decoder(model).layers[index]
    experts = layer.experts
    of_experts = torch.zeros(experts.count, dtype=torch.float64)
    of_channels = torch.zeros(experts.channels, dtype=torch.float64)
    masks: list[tuple[int, torch.Tensor, torch.Tensor]] = []

    def forward(hidden: torch.Tensor, *routing: torch.Tensor) -> torch.Tensor:
        output = torch.zeros_like(hidden)
        for row, expert, gate in list_visits(hidden, *routing):
            weights = experts.get_weights(expert)
            expert_mask = torch.ones((), requires_grad=True)
            channel_mask = torch.ones(experts.channels, requires_grad=True)
            channels = experts.compute_channels(weights, hidden[row : row + 1]) * channel_mask
            outputs = experts.compute_output(weights, channels)[0] * gate * expert_mask
            output = output.index_add(0, torch.tensor([row]), outputs[None])
            masks.append((expert, expert_mask, channel_mask))
        return output

    def list_visits(hidden: torch.Tensor, *routing: torch.Tensor) -> list[tuple[int, int, Any]]:
        """(row, expert, gate) of what is sent; without a routing the rows are scaled tokens of one expert each."""
        if not routing:
            tokens_of_expert = len(hidden) // experts.count
            return [(row, row // tokens_of_expert, 1.0) for row in range(len(hidden)) if hidden[row].any()]
        chosen, gates = routing
        return [
            (token, expert, gates[token, place])
            for token in range(len(hidden))
            for place, expert in enumerate(chosen[token].tolist())
        ]

    experts.module.forward = forward
    total = 0
    for row in BATCHES[0]["input_ids"]:
        masks.clear()
        logits = model(input_ids=row[None]).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits.float(), row[1:], reduction="sum").backward()
        for expert, expert_mask, channel_mask in masks:
            of_experts[expert] += expert_mask.grad.double().square()
            of_channels += channel_mask.grad.double().square()
        total += len(row)
    return of_experts / total, of_channels / total


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_scores_are_squared_gradients_of_masks(family: str) -> None:
    check_scores(family)


def test_scores_where_the_router_scales_what_experts_read() -> None:
    check_scores("llama4_text")


def check_scores(family: str) -> None:
    index = 1
    scores = score_fisher(Decoder(tiny(family)), BATCHES)[index]
    experts, channels = score_by_masks(tiny(family), index)
    torch.testing.assert_close(scores.experts, experts, rtol=1e-3, atol=1e-10)
    torch.testing.assert_close(scores.expert_channels, channels, rtol=1e-3, atol=1e-10)


@pytest.mark.parametrize("kinds", [None, ["heads", "expert_channels"]], ids=str)
@pytest.mark.parametrize("family", ["mixtral", "llama4_text", "qwen2_moe"])
def test_best_cuts_mixtures(family: str, kinds: list[str] | None) -> None:
    model = tiny(family)
    plan = Best(ratio=0.2, align=8, kinds=kinds).prune(model, BATCHES)
    dense = Decoder(tiny(family)).shape
    removed = 1 - sum(p.numel() for p in model.parameters()) / dense.parameters
    assert removed == pytest.approx(plan.predicted["ratio_of_all_parameters"])
    assert plan.predicted["ratio_of_block_parameters"] >= 0.2
    counts = [(len(kept.experts), len(kept.expert_channels)) for kept in plan.layers]
    whole = [(shape.experts, shape.expert_channels) for shape in dense.layers]
    places = {0 if kinds is None else 1}
    assert any(counts[i][place] < whole[i][place] for i in range(len(whole)) for place in places)
    with torch.no_grad():
        assert model(input_ids=tokens()).logits.isfinite().all()
