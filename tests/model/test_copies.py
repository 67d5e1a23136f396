"""Models that share tensors: what is changed in one is not in the other."""

from pathlib import Path
from typing import Any

import pytest
import torch

from prunelit.calibration import metrics
from prunelit.model import copies, surgery
from prunelit.model.decoder import Decoder
from prunelit.quantization import quantize, views
from prunelit.quantization.int4 import Int4Linear
from prunelit.quantization.linears import get_linear_widths, get_quantization, has_adapters, list_decoder_linears
from prunelit.recovery import lora
from tests.tiny import cut, keep, tiny, tokens


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens(), use_cache=False).logits


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "opt", "falcon-one_norm"])
def test_plain_has_the_shapes_of_before_and_no_memory(family: str) -> None:
    model = tiny(family)
    surgery.apply(model, cut(model, "mixed"))
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    before = metrics.measure_model_size(model)
    quantize.quantize_model(model, "int4", 16)
    held, wanted = dict(model.state_dict()), logits(model)
    other = views.view_as_plain_linears(model)
    assert {name: value.shape for name, value in other.state_dict().items()} == shapes
    assert metrics.measure_model_size(model) == before
    for name, value in other.state_dict().items():
        assert value.is_meta or value.data_ptr() == held[name].data_ptr()
    assert get_quantization(model) == "int4" and torch.equal(logits(model), wanted)


@pytest.mark.parametrize("family", ["llama-biases", "phi3", "opt"])
def test_plain_rounds_ffn_widths_up(family: str) -> None:
    model = tiny(family)
    shape = Decoder(model).shape
    plan = cut(model, "channel")
    layers = tuple(keep(layer, channels=tuple(range(37 + 8 * i))) for i, layer in enumerate(shape.layers))
    surgery.apply(model, type(plan)("test", shape, layers))
    quantize.quantize_model(model, "int4", 16)
    assert [layer.shape.ffn_channels for layer in Decoder(views.view_as_plain_linears(model, 16))] == [48, 48, 64]
    assert all(isinstance(x.module, Int4Linear) for x in list_decoder_linears(model))


def test_plain_of_a_plain_model_is_itself() -> None:
    model = tiny("llama")
    assert views.view_as_plain_linears(model, 16) is model and views.view_without_adapters(model) is model


@pytest.mark.parametrize("base", ["none", "int4"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_below_adapters_is_the_base_and_the_adapted_model_stays(family: str, base: Any) -> None:
    model = tiny(family)
    quantize.quantize_model(model, base, 16)
    dense = logits(model)
    adapted = lora.add_lora(model, 4, 8, 0.0).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    wanted = logits(adapted)
    below = views.view_without_adapters(adapted)
    assert torch.equal(logits(below), dense) and not has_adapters(below)
    assert has_adapters(adapted) and torch.equal(logits(adapted), wanted) and not torch.equal(wanted, dense)
    assert [get_linear_widths(x.module) for x in list_decoder_linears(below)] == [
        get_linear_widths(x.module) for x in list_decoder_linears(adapted)
    ]
    pairs = zip(list_decoder_linears(below), list_decoder_linears(adapted), strict=True)
    for mine, theirs in pairs:
        name = "packed" if base == "int4" else "weight"
        base_layer: Any = theirs.module.base_layer
        assert getattr(mine.module, name).data_ptr() == getattr(base_layer, name).data_ptr()


def test_a_model_without_memory_has_the_names_and_the_first_stays() -> None:
    model = tiny("llama")
    empty = copies.copy_to_meta_device(model)
    assert [(n, p.shape) for n, p in empty.named_parameters()] == [(n, p.shape) for n, p in model.named_parameters()]
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert not any(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_model_on_disk_is_as_it_was_and_leaves_no_file(family: str, tmp_path: Path) -> None:
    model = tiny(family).requires_grad_(False)
    surgery.apply(model, cut(model, "mixed"))
    wanted = logits(model)
    other = copies.copy_to_disk(model, tmp_path / "scratch")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(logits(other), wanted)
    assert not any(parameter.requires_grad for parameter in other.parameters())
    assert not list((tmp_path / "scratch").iterdir())
    assert (other.get_input_embeddings().weight is other.get_output_embeddings().weight) == (
        model.get_input_embeddings().weight is model.get_output_embeddings().weight
    )
    with torch.no_grad():
        Decoder(other).layers[0].down.weight.mul_(2)  # as merging does
    assert not torch.equal(logits(other), wanted)
