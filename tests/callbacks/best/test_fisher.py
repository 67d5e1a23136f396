"""Fisher importance, against autograd on switches in front of the output projections."""

import pytest
import torch

from prunelit.callbacks.best.fisher import score_fisher
from prunelit.model.decoder import Decoder
from tests.tiny import tiny, tokens


def by_hand(model, ids, layer, kind):
    """d(summed loss) / d(switch of a unit at a token), [S, units]: a switch multiplies what the unit passes on."""
    shape = layer.shape
    units = shape.query_heads if kind == "heads" else shape.ffn_channels
    switches = torch.ones(len(ids), units, requires_grad=True)
    width = shape.head_dim if kind == "heads" else 1
    linear = layer.output if kind == "heads" else layer.down
    handle = linear.register_forward_pre_hook(lambda m, args: (args[0] * switches.repeat_interleave(width, 1),))
    try:
        logits = model(input_ids=ids[None]).logits[0]
    finally:
        handle.remove()
    loss = sum(-logits[t].log_softmax(-1)[ids[t + 1]] for t in range(len(ids) - 1))
    return torch.autograd.grad(loss, switches)[0]


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "gemma2", "phi3"])
def test_scores_are_squared_derivatives_of_the_loss_by_switches(family):
    model = tiny(family)
    decoder, ids, mask = Decoder(model), tokens(3, 8), torch.ones(3, 8, dtype=torch.long)
    mask[2, 6:] = 0
    found = score_fisher(decoder, [{"input_ids": ids[:2]}, {"input_ids": ids[2:], "attention_mask": mask[2:]}])
    texts = [ids[0], ids[1], ids[2, :6]]
    for layer, scores in zip(decoder, found, strict=True):
        for kind, score in (("heads", scores.heads), ("channels", scores.channels)):
            squares = torch.cat([by_hand(model, text, layer, kind).square() for text in texts])
            torch.testing.assert_close(score.float(), squares.sum(0) / 22, rtol=1e-3, atol=1e-10)


def test_the_model_is_left_as_it_was_and_a_callers_no_grad_does_not_matter():
    model = tiny("llama").train()
    model.lm_head.weight.requires_grad_(False)
    with torch.no_grad():
        score_fisher(Decoder(model), [{"input_ids": tokens()}])
    assert model.training
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["lm_head.weight"]
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_no_graph_outlives_its_sequence():
    """A hook that held the tensor it hangs on would keep every sequence's activations."""
    import gc
    import weakref

    model, alive = tiny("llama"), []
    handle = model.model.layers[0].mlp.down_proj.register_forward_pre_hook(
        lambda m, args: alive.append(weakref.ref(args[0].untyped_storage()))
    )
    gc.disable()
    try:
        score_fisher(Decoder(model), [{"input_ids": tokens(4, 8)}])
    finally:
        gc.enable()
        handle.remove()
    assert len(alive) == 4
    assert sum(one() is not None for one in alive) <= 1
