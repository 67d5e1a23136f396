"""What tests of writers share: models compared, and plans that cut every layer alike."""

from typing import Any

import torch
from torch import Tensor

from prunelit.core.plan import LayerPlan, LayerShape, PruningPlan
from prunelit.model.decoder import Decoder
from prunelit.repair import bias
from tests.tiny import keep, tokens


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=tokens() % model.config.vocab_size, use_cache=False).logits


def generated(model: Any) -> list[list[int]]:
    return model.generate(tokens() % model.config.vocab_size, max_new_tokens=3, do_sample=False).tolist()


def assert_equal(found: Any, expected: Any) -> None:
    torch.testing.assert_close(logits(found), logits(expected), rtol=0, atol=0)
    assert generated(found) == generated(expected)


def plan_with(model: Any, *layers: LayerPlan) -> PruningPlan:
    return PruningPlan("test", Decoder(model).shape, layers)


def uniform(model: Any, groups: int | None = None, heads_in_group: int | None = None) -> PruningPlan:
    """The same shape in every layer: the last KV groups, the first heads of each, every third channel gone."""
    shapes = Decoder(model).shape.layers

    def layer(shape: LayerShape) -> LayerPlan:
        kept = None if groups is None else tuple(range(shape.kv_groups - groups, shape.kv_groups))
        heads = None if heads_in_group is None else tuple(range(heads_in_group))
        return keep(shape, kept, heads, tuple(c for c in range(shape.ffn_channels) if c % 3))

    return plan_with(model, *map(layer, shapes))


def compensate(model: Any, plan: PruningPlan) -> PruningPlan:
    """Cut and add the means of what went to the output biases."""
    stated = bias.declare_biases(Decoder(model), plan, True)
    bias.apply_bias_compensation(model, stated, [{"input_ids": tokens(4, 12)}])
    return stated
