"""Quantised bases: what is replaced, what is refused, and that nothing wrong passes."""

import importlib.util
import sys
from typing import Any

import pytest
import torch

from prunelit.model import surgery
from prunelit.model.decoder import Decoder, get_weight_out_in
from prunelit.quantization import quantize as quantize_module
from prunelit.quantization.int4 import Int4Linear
from prunelit.quantization.linears import get_quantization, list_decoder_linears
from prunelit.quantization.quantize import (
    check_base_fits_config,
    check_base_options,
    check_base_shapes,
    dequantize_model,
    find_misfits,
    measure_base_memory,
    quantize_model,
)
from prunelit.recovery.lora import add_lora
from prunelit.runtime.errors import BadOption, BadQuantisation
from tests.tiny import FAMILIES, MIXTURES, cut, tiny, tokens

# Widths that NF4 takes on CPUs: inputs in multiples of 64.
FIT = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 128}
FAMILY = ("llama", "llama-biases", "qwen3", "phi3", "gpt_neox", "gpt2", "opt")
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


def fitting(family: str) -> Any:
    match family:
        case "gpt2":
            return tiny(family, n_embd=64, n_head=8, n_inner=128)
        case "gpt_neox" | "opt":
            sizes = {key: FIT[key] for key in ("hidden_size", "num_attention_heads")}
            inner = {"ffn_dim": 128, "word_embed_proj_dim": 64} if family == "opt" else {"intermediate_size": 128}
            return tiny(family, **sizes, **inner)
    return tiny(family, **FIT)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens()).logits


def distance(got: torch.Tensor, wanted: torch.Tensor) -> float:
    got, wanted = got.detach(), wanted.detach()
    return float((got - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("family", FAMILY)
def test_int4_replaces_every_prunable_linear_and_nothing_else(family: str) -> None:
    model = tiny(family)
    dense, plain = logits(model), {linear.name for linear in list_decoder_linears(model)}
    others = {name: p.detach().clone() for name, p in model.named_parameters() if name.rpartition(".")[0] not in plain}
    records = quantize_model(model, "int4", 32)
    assert {record.name for record in records} == plain and get_quantization(model) == "int4"
    assert all(isinstance(linear.module, Int4Linear) for linear in list_decoder_linears(model))
    assert all(0 < record.error < 0.12 for record in records)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    left = dict(model.named_parameters())
    assert all(torch.equal(left[name], value) for name, value in others.items())
    assert 0 < distance(logits(model), dense) < 0.5


@pytest.mark.parametrize("family", FAMILY)
def test_dequantised_int4_is_the_stock_model_with_rounded_weights(family: str) -> None:
    model, stock = tiny(family), tiny(family)
    quantize_model(model, "int4", 16)
    wanted = logits(model)
    plain = dequantize_model(model)
    torch.testing.assert_close(logits(plain), wanted, rtol=1e-4, atol=1e-4)
    for mine, other in zip(list_decoder_linears(plain), list_decoder_linears(stock), strict=True):
        assert type(mine.module) is type(other.module) and repr(mine.module) == repr(other.module)
    stock.load_state_dict(plain.state_dict())
    assert torch.equal(logits(stock), logits(plain))


@pytest.mark.parametrize("kind", ["mixed", "attention", "mlp", "layer", "channel"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_cut_models_are_quantised(family: str, kind: str) -> None:
    model = tiny(family)
    surgery.apply(model, cut(model, kind))
    before = logits(model)
    records = quantize_model(model, "int4", 16)
    assert len(records) == sum(isinstance(module, Int4Linear) for module in model.modules())
    assert distance(logits(model), before) < 0.5


def test_none_changes_nothing() -> None:
    model = tiny("llama")
    assert quantize_model(model, "none") == [] and find_misfits(model, "none") == [] and get_quantization(model) is None
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert dequantize_model(model) is model


@needs_bitsandbytes
@pytest.mark.parametrize("family", FAMILY)
@pytest.mark.parametrize("double_quant", [True, False])
def test_nf4_is_near_the_dense_model_in_training_and_in_evaluation(family: str, double_quant: bool) -> None:
    model = fitting(family)
    dense, weights = logits(model), [get_weight_out_in(x.module).clone() for x in list_decoder_linears(model)]
    records = quantize_model(model, "nf4", double_quant=double_quant)
    assert len(records) == len(weights) and all(0.05 < record.error < 0.12 for record in records)
    assert get_quantization(model) == "nf4" and model.is_loaded_in_4bit
    for linear in list_decoder_linears(model):
        linear.module.train()  # not the model: some families have dropout
    trained = logits(model)
    torch.testing.assert_close(logits(model.eval()), trained)
    model.state_dict()
    torch.testing.assert_close(logits(model), trained)  # bitsandbytes alone has packed the weights by now, in bfloat16
    assert distance(trained, dense) < 0.7
    plain = dequantize_model(model)
    torch.testing.assert_close(logits(plain), trained, rtol=1e-4, atol=1e-4)
    assert not hasattr(plain, "is_loaded_in_4bit")
    for linear, weight in zip(list_decoder_linears(plain), weights, strict=True):
        assert distance(get_weight_out_in(linear.module), weight) < 0.12


@needs_bitsandbytes
@pytest.mark.parametrize(
    ("sizes", "first", "remedy"),
    [
        (
            {"intermediate_size": 96},
            r"layers.0.mlp.down_proj: .* got 96 \(3 such",
            "; cut with align: 64, or use base int4",
        ),
        ({"intermediate_size": 100}, r"layers.0.mlp.down_proj: .* got 100 ", "; cut with align: 64, or use base int4"),
        ({"hidden_size": 72}, r"layers.0.self_attn.q_proj: .* got 72 ", "; use base int4 or none"),
        (
            {"num_attention_heads": 4},
            r"layers.0.self_attn.o_proj: .* got 32 ",
            "; use base int4",
        ),
    ],
)
def test_nf4_refuses_widths_before_anything_is_changed(sizes: dict[str, int], first: str, remedy: str) -> None:
    model = tiny("llama", **(FIT | sizes))
    with pytest.raises(BadQuantisation, match=first) as refused:
        quantize_model(model, "nf4")
    assert remedy in str(refused.value) and "\n" not in str(refused.value)
    assert get_quantization(model) is None and all(parameter.requires_grad for parameter in model.parameters())


@needs_bitsandbytes
def test_guard_catches_wrong_nf4_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    right = quantize_module._make_nf4_linear

    def wrong(weight: torch.Tensor, *rest: Any) -> Any:
        return right(weight if weight.shape[1] == 64 else weight.roll(1, 0), *rest)

    monkeypatch.setattr(quantize_module, "_make_nf4_linear", wrong)
    with pytest.raises(BadQuantisation, match=r"layers.0.mlp.down_proj: nf4: .* at 128 inputs .* align: 64"):
        quantize_model(fitting("llama"), "nf4")


@needs_bitsandbytes
def test_guard_catches_widths_where_bitsandbytes_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(64, 96)
    if (
        distance(
            quantize_module._dequantize_weight(quantize_module._make_nf4_linear(weight, None, torch.float32, True)),
            weight,
        )
        < 0.15
    ):
        pytest.skip("bitsandbytes is right on this CPU")
    monkeypatch.setattr(quantize_module, "check_base_shapes", lambda *_: None)
    with pytest.raises(BadQuantisation, match=r"layers.0.mlp.down_proj: nf4: .* at 96 inputs and 64 outputs"):
        quantize_model(tiny("llama", **(FIT | {"intermediate_size": 96})), "nf4")


def test_guard_catches_weights_that_are_not_finite() -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(BadQuantisation, match=r"layers.1.mlp.up_proj: int4: .* got nan"):
        quantize_model(model, "int4")


@needs_bitsandbytes
def test_weights_that_an_evaluation_packed_are_refused() -> None:
    """As bitsandbytes does it where this package did not build the linears."""
    model = fitting("llama-mha")
    quantize_model(model, "nf4")
    module: Any = list_decoder_linears(model)[0].module
    module.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(BadQuantisation, match="packed by an evaluation outside prunelit; load them again"):
        dequantize_model(model)


def test_misfits_of_int4_say_what_align_would_fix() -> None:
    model = tiny("llama")  # hidden 72, FFN 96, heads 9 of 8
    surgery.apply(model, cut(model, "channel"))  # FFN 40, 48, 56
    check_base_shapes(model, "int4", 16)  # padded, never refused
    found = {misfit.name.removeprefix("model.layers."): misfit for misfit in find_misfits(model, "int4", 16)}
    assert found["0.mlp.down_proj"].align == 16 and found["2.mlp.down_proj"].in_features == 56
    assert "1.mlp.down_proj" not in found  # 48
    assert found["0.mlp.gate_proj"].align is None and found["0.self_attn.o_proj"].align is None  # 72


@pytest.mark.parametrize("family", ["gpt2", "opt", "gpt_neox", "phi3"])
def test_linears_have_their_block(family: str) -> None:
    kinds = {linear.path: linear.kind for linear in list_decoder_linears(tiny(family))}
    assert (
        kinds
        == {
            "gpt2": {"attn.c_attn": "attention", "attn.c_proj": "attention", "mlp.c_fc": "ffn", "mlp.c_proj": "ffn"},
            "opt": {f"self_attn.{name}": "attention" for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
            | {"fc1": "ffn", "fc2": "ffn"},
            "gpt_neox": {
                "attention.query_key_value": "attention",
                "attention.dense": "attention",
                "mlp.dense_h_to_4h": "ffn",
                "mlp.dense_4h_to_h": "ffn",
            },
            "phi3": {
                "self_attn.qkv_proj": "attention",
                "self_attn.o_proj": "attention",
                "mlp.gate_up_proj": "ffn",
                "mlp.down_proj": "ffn",
            },
        }[family]
    )


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in FAMILY])
def test_every_family_is_quantised(family: str) -> None:
    model = tiny(family)
    dense = logits(model)
    quantize_model(model, "int4", 16)
    assert distance(logits(model), dense) < 0.6


def test_options_are_checked() -> None:
    with pytest.raises(BadOption, match="base: expected one of none, nf4, int4, got 'int8'"):
        check_base_options("int8")
    with pytest.raises(BadOption, match="group_size"):
        check_base_options("int4", 20)
    with pytest.raises(BadOption, match="group_size"):
        quantize_model(tiny("llama"), "int4", 20)


def test_quantise_once_and_before_adapters() -> None:
    model = tiny("llama")
    quantize_model(model, "int4")
    with pytest.raises(BadQuantisation, match="quantise once, first"):
        quantize_model(model, "int4")
    with pytest.raises(BadQuantisation, match="merge them first"):
        dequantize_model(add_lora(model, 2, 4, 0.0))
    with pytest.raises(BadQuantisation, match="quantise once, first"):
        quantize_model(add_lora(tiny("llama"), 2, 4, 0.0), "int4")


def test_missing_bitsandbytes_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(BadOption, match=r"nf4: expected bitsandbytes, .*pip install 'prunelit\[nf4\]'"):
        check_base_options("nf4")


def test_bytes_of_plain_and_int4_bases() -> None:
    model = tiny("llama")
    count = sum(parameter.numel() for parameter in model.parameters())
    assert measure_base_memory(model) == {
        "trainable_parameters": count,
        "parameters": count,
        "base_bytes": 4 * count,
        "bytes_per_base_parameter": 4.0,
    }
    linears = sum(get_weight_out_in(linear.module).numel() for linear in list_decoder_linears(model))
    codes = scales = 0
    for linear in list_decoder_linears(model):
        out, width = get_weight_out_in(linear.module).shape
        groups = -(-width // 16)
        codes, scales = codes + out * groups * 8, scales + out * groups * 8
    quantize_model(model, "int4", 16)
    add_lora(model, 2, 4, 0.0)
    adapters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert measure_base_memory(model) == {
        "trainable_parameters": adapters,
        "parameters": count + adapters,
        "base_bytes": 4 * (count - linears) + codes + scales,
        "bytes_per_base_parameter": (4 * (count - linears) + codes + scales) / count,
    }


@needs_bitsandbytes
def test_bytes_of_nf4() -> None:
    model = fitting("llama")
    count = sum(parameter.numel() for parameter in model.parameters())
    linears = sum(get_weight_out_in(linear.module).numel() for linear in list_decoder_linears(model))
    quantize_model(model, "nf4", double_quant=False)
    plain = measure_base_memory(model)
    assert plain["parameters"] == count and plain["trainable_parameters"] == 0
    expected = 4 * (count - linears) + linears // 2 + 4 * linears // 64
    assert expected <= plain["base_bytes"] <= expected + 64 * len(list_decoder_linears(model))
    adapted = measure_base_memory(add_lora(model, 2, 4, 0.0))
    assert adapted["base_bytes"] == plain["base_bytes"] and adapted["trainable_parameters"] > 0


@pytest.mark.parametrize("base", ["int4", pytest.param("nf4", marks=needs_bitsandbytes)])
@pytest.mark.parametrize("family", MIXTURES)
def test_mixtures_are_refused_with_what_would_stay_in_full_precision(family: str, base: Any) -> None:
    model = tiny(family)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    experts = [layer.experts.module for layer in Decoder(model) if layer.experts is not None]
    share = sum(p.numel() for module in experts for p in module.parameters()) / sum(
        p.numel() for p in model.parameters()
    )
    with pytest.raises(
        BadQuantisation, match=f"base: expected none for a mixture of experts, got {base}.* {share:.0%}"
    ):
        quantize_model(model, base, 16)
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    with pytest.raises(BadQuantisation, match="most of the model"):
        check_base_fits_config(base, model.config)
    check_base_fits_config("none", model.config)


def test_a_family_with_mixtures_but_a_model_without_them_is_rounded() -> None:
    model = tiny("qwen3_next")
    check_base_fits_config("int4", model.config)
    assert len(quantize_model(model, "int4", 16)) == len(list_decoder_linears(model))
