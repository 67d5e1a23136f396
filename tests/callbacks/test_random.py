"""Random's scores come from its seed and from nothing else."""

import torch

from prunelit.callbacks.random import Random
from prunelit.model.decoder import Decoder
from prunelit.pruning.context import PruningContext
from tests.tiny import tiny


def plan_of(seed, global_seed=0, family="llama"):
    model = tiny(family)
    torch.manual_seed(global_seed)
    return Random(0.3, align=8, seed=seed).prune(model)


def test_same_seed_same_plan_whatever_the_global_generator():
    assert plan_of(0, global_seed=1).digest == plan_of(0, global_seed=2).digest


def test_another_seed_another_plan():
    assert len({plan_of(seed).digest for seed in range(4)}) == 4


def test_scores_are_the_draws_of_a_generator_with_that_seed():
    model = tiny("gpt2")
    generator = torch.Generator().manual_seed(7)
    for score, shape in zip(
        Random(0.3, seed=7).score(PruningContext(Decoder(model), [])), Decoder(model).shape.layers, strict=True
    ):
        assert torch.equal(score.heads, torch.rand(shape.query_heads, generator=generator))
        assert torch.equal(score.channels, torch.rand(shape.ffn_channels, generator=generator))


def test_layers_lose_different_units():
    kept = plan_of(0).layers
    assert len({layer.ffn_channels for layer in kept}) == len(kept)


def test_no_text_is_needed():
    assert not Random.reads_text
