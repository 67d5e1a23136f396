"""Squared gradients at every layer's output, against autograd on the stream itself."""

import pytest
import torch

from prunelit import sensitivity
from prunelit.decoder import Decoder
from prunelit.stream import Stream
from tests.tiny import tiny, tokens


def by_hand(model, ids, mask, layer):
    """Gradient of the summed loss of one sequence at a layer's output: [S, H]."""
    stream = Stream(Decoder(model))
    batch = {"input_ids": ids[None], "attention_mask": mask[None]}
    hidden = stream.run(batch, None, 0, layer + 1).detach().requires_grad_()
    logits = stream.run(batch, hidden, layer + 1)[0] if layer < 2 else stream.run(batch, hidden, 3)[0]
    loss = sum(-logits[t].log_softmax(-1)[ids[t + 1]] for t in range(len(ids) - 1) if mask[t] and mask[t + 1])
    return torch.autograd.grad(loss, hidden)[0][0]


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "gemma2"])
def test_token_and_channel_weights_are_squared_gradients(family):
    model = tiny(family)
    ids, mask = tokens(3, 8), torch.ones(3, 8, dtype=torch.long)
    mask[2, 6:] = 0
    batches = [{"input_ids": ids[:2]}, {"input_ids": ids[2:], "attention_mask": mask[2:]}]
    found = sensitivity.measure(Decoder(model), batches)
    for layer in range(3):
        squares = torch.cat([by_hand(model, ids[n], mask[n], layer)[mask[n].bool()] for n in range(3)]).square()
        assert [len(t) for t in found[layer].tokens] == [16, 6]
        torch.testing.assert_close(torch.cat(found[layer].tokens), squares.sum(1), rtol=1e-3, atol=1e-9)
        torch.testing.assert_close(found[layer].channels, squares.sum(0) / squares.sum(), rtol=1e-3, atol=1e-9)


def test_the_model_is_left_as_it_was_and_a_callers_no_grad_does_not_matter():
    model = tiny("llama").train()
    model.lm_head.weight.requires_grad_(False)
    with torch.no_grad():
        sensitivity.measure(Decoder(model), [{"input_ids": tokens()}])
    assert model.training
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["lm_head.weight"]
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
