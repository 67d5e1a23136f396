"""Magnitude's scores are the l2 norms of the output columns, whichever way a family stores its weights."""

import pytest
import torch

from prunelit.callbacks.magnitude import Magnitude
from prunelit.model import surgery
from prunelit.model.decoder import Decoder
from prunelit.pruning.context import PruningContext
from tests.tiny import cut, tiny

# family: list of layers, output projection of attention, last linear of the FFN; True where weights are [in, out]
PLACES = {
    "llama": (lambda m: m.model.layers, lambda x: x.self_attn.o_proj, lambda x: x.mlp.down_proj, False),
    "phi3": (lambda m: m.model.layers, lambda x: x.self_attn.o_proj, lambda x: x.mlp.down_proj, False),
    "gpt2": (lambda m: m.transformer.h, lambda x: x.attn.c_proj, lambda x: x.mlp.c_proj, True),
    "opt": (lambda m: m.model.decoder.layers, lambda x: x.self_attn.out_proj, lambda x: x.fc2, False),
}


def scored(model):
    return Magnitude(0.3).score(PruningContext(Decoder(model), []))


@pytest.mark.parametrize("family", PLACES)
def test_scores_are_column_norms(family):
    model = tiny(family)
    layers, output, down, transposed = PLACES[family]
    for layer, score, shape in zip(layers(model), scored(model), Decoder(model).shape.layers, strict=True):
        heads, channels = output(layer).weight.detach(), down(layer).weight.detach()
        if transposed:
            heads, channels = heads.T, channels.T
        for head in range(shape.query_heads):
            columns = range(head * shape.head_dim, (head + 1) * shape.head_dim)
            expected = sum(heads[:, j].square().sum().sqrt().item() for j in columns)
            assert score.heads[head].item() == pytest.approx(expected, rel=1e-5)
        for j in range(shape.ffn_channels):
            assert score.channels[j].item() == pytest.approx(channels[:, j].square().sum().sqrt().item(), rel=1e-5)


def test_bfloat16_norms_are_taken_in_float32():
    model = tiny("llama").bfloat16()
    found = scored(model)[0].channels
    expected = model.model.layers[0].mlp.down_proj.weight.detach().double().square().sum(0).sqrt()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


def test_the_smallest_channels_go():
    model = tiny("llama")
    weak = [1, 5, 17, 40, 41, 42, 60, 95]
    for layer in model.model.layers:
        with torch.no_grad():
            layer.mlp.down_proj.weight[:, weak] *= 1e-3
    plan = Magnitude(0.01, align=8).prune(model)
    for kept, shape in zip(plan.layers, plan.model.layers, strict=True):
        assert set(range(shape.ffn_channels)) - set(kept.ffn_channels) == set(weak)


def test_no_text_is_needed():
    assert not Magnitude.reads_text


@pytest.mark.parametrize(("kind", "lost", "left"), [("attention", "heads", "channels"), ("mlp", "channels", "heads")])
def test_a_model_that_lost_blocks_is_scored_on_what_is_left(kind, lost, left):
    model = tiny("llama")
    surgery.apply(model, cut(model, kind))
    scores = scored(model)
    assert [getattr(score, lost) is None for score in scores] == [True, False, True]
    assert all(getattr(score, left) is not None for score in scores)
