"""Spans of layers: any way of walking through the decoder ends where one forward pass does."""

import pytest
import torch

from prunelit.calibration.partial_forward import PartialForward
from prunelit.model.decoder import Decoder
from prunelit.model.per_layer import shares_keys
from prunelit.model.surgery import apply
from prunelit.runtime.errors import BadOption
from tests.tiny import FAMILIES, cut, tiny, tokens


def same(found, wanted):
    """Equal but for the last bits, which depend on where in memory a tensor lies on some CPUs."""
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def masked_batch():
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[1, 7:] = 0
    return {"input_ids": tokens(), "attention_mask": mask}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_layer_by_layer_is_the_forward_pass(family):
    model = tiny(family)
    batch = masked_batch()
    wanted = model(**batch).logits
    stream, hidden = PartialForward(Decoder(model)), None
    if shares_keys(stream.decoder.config):
        hidden = stream.run_layers(batch, hidden, 0, 1)
        with pytest.raises(BadOption, match="use the keys and values of earlier ones"):
            stream.run_layers(batch, hidden, 1, 2)
        return
    layers = len(stream.decoder.layers)
    for index in range(layers):
        hidden = stream.run_layers(batch, hidden, index, index + 1)
    same(stream.run_layers(batch, hidden, layers), wanted)
    for start in (1, 2):
        middle = stream.run_layers(batch, None, 0, start)
        same(stream.run_layers(batch, middle, start), wanted)
    assert not any("forward" in module.__dict__ for module in model.modules())
    same(model(**batch).logits, wanted)


@torch.no_grad()
def test_a_model_with_removed_blocks_streams_too():
    model = tiny("gemma2")
    apply(model, cut(model, "mixed"))
    batch = masked_batch()
    stream = PartialForward(Decoder(model))
    hidden = stream.run_layers(batch, None, 0, 2)
    assert torch.equal(stream.run_layers(batch, hidden, 2), model(**batch).logits)


def test_gradients_flow_through_a_span():
    model = tiny("llama")
    stream = PartialForward(Decoder(model))
    hidden = stream.run_layers({"input_ids": tokens()}, None, 0, 1).detach()
    stream.run_layers({"input_ids": tokens()}, hidden, 1, 3).square().sum().backward()
    touched = {name.split(".")[2] for name, p in model.named_parameters() if p.grad is not None}
    assert touched == {"1", "2"}


@torch.no_grad()
def test_nothing_stays_behind_when_a_layer_fails():
    model = tiny("llama")
    stream = PartialForward(Decoder(model))
    hidden = stream.run_layers({"input_ids": tokens()}, None, 0, 1)
    with pytest.raises(RuntimeError):
        stream.run_layers({"input_ids": tokens()}, hidden[..., :-1], 1, 2)
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(("hidden", "start", "stop"), [(None, 1, 2), (torch.zeros(2, 10, 72), 0, 1), (None, 0, 0)])
def test_a_span_that_makes_no_sense_is_refused(hidden, start, stop):
    with pytest.raises(ValueError, match="expected"):
        PartialForward(Decoder(tiny("llama"))).run_layers({"input_ids": tokens()}, hidden, start, stop)
