"""padded: a stock class of the largest widths, exact, that says what the zeros cost."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM, MistralForCausalLM

from prunelit.core.plan import LayerPlan
from prunelit.data import loading
from prunelit.export import save, write_model
from prunelit.model import surgery
from prunelit.model.decoder import Decoder
from prunelit.runtime.errors import DoesNotFit
from tests.export.alike import compensate, generated, logits, plan_with, uniform
from tests.tiny import FAMILIES, KINDS, NEVER_STOCK, SLIDING, cut, keep, tiny, tokens

TOLERANCE = 4e-6  # of logits


def assert_padded(found: Any, expected: Any) -> None:
    """Equal but for the order of sums, and the same text."""
    torch.testing.assert_close(logits(found), logits(expected), rtol=0, atol=TOLERANCE)
    assert generated(found) == generated(expected)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in NEVER_STOCK])
def test_every_family_loads_in_its_stock_class(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    stock, plan = type(model), cut(model, "mixed")
    surgery.apply(model, plan)
    written = write_model(model, tmp_path / "m", plan=plan, format="padded", fresh_process=True)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert type(again) is stock and not list((tmp_path / "m").glob("*.py"))
    assert_padded(again, model)
    assert again.num_parameters() == written.size["parameters"]
    assert written.proof["largest_difference"] <= TOLERANCE


@pytest.mark.parametrize("family", NEVER_STOCK)
def test_heads_of_two_sizes_do_not_fit(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    surgery.apply(model, cut(model, "channel"))
    with pytest.raises(DoesNotFit, match="use format 'hetero'"):
        save(model, tmp_path / "m", format="padded")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "falcon", "phi3", "stablelm-qk_layernorm", "cohere-qk_norm"])
def test_every_kind_of_cut(family: str, kind: str, tmp_path: Path) -> None:
    model = tiny(family)
    surgery.apply(model, cut(model, kind))
    save(model, tmp_path / "m", format="padded")
    assert_padded(AutoModelForCausalLM.from_pretrained(tmp_path / "m"), model)


def test_zeros_stand_where_smaller_layers_have_nothing(tmp_path: Path) -> None:
    """3 groups of 1 head in one layer, 1 group of 3 in another: both in 3 groups of 3, zeros behind a group's heads."""
    model = tiny("llama")
    first, second, third = Decoder(model).shape.layers
    plan = plan_with(
        model,
        keep(first, heads_in_group=(2,), channels=tuple(range(20))),
        keep(second, groups=(1,), channels=tuple(range(30))),
        keep(third, groups=(), channels=tuple(range(25))),
    )
    surgery.apply(model, plan)
    save(model, tmp_path / "m", format="padded")
    config = loading.load(tmp_path / "m").config
    assert (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size) == (9, 3, 30)
    found, own = load_file(tmp_path / "m" / "model.safetensors"), model.state_dict()

    def rows(layer: int, name: str) -> list[int]:
        weight = found[f"model.layers.{layer}.self_attn.{name}.weight"]
        return [head for head, x in enumerate(weight.view(-1, 8, 72)) if x.any()]

    assert [rows(0, name) for name in ("q_proj", "k_proj", "v_proj")] == [[0, 3, 6], [0, 1, 2], [0, 1, 2]]
    assert [rows(1, name) for name in ("q_proj", "k_proj", "v_proj")] == [[0, 1, 2], [0], [0]]
    assert not any(x.any() for name, x in found.items() if name.startswith("model.layers.2.self_attn."))
    assert torch.equal(found["model.layers.0.mlp.down_proj.weight"][:, :20], own["model.layers.0.mlp.down_proj.weight"])
    assert not found["model.layers.0.mlp.down_proj.weight"][:, 20:].any()
    output = found["model.layers.0.self_attn.o_proj.weight"].view(72, 9, 8)
    assert torch.equal(output[:, ::3].flatten(1), own["model.layers.0.self_attn.o_proj.weight"])
    assert_padded(loading.load(tmp_path / "m"), model)


def test_a_llama_whose_heads_do_not_divide_its_width_becomes_a_mistral(tmp_path: Path) -> None:
    model = tiny("llama-mha")
    surgery.apply(
        model, plan_with(model, *(keep(s, tuple(range(5 - i))) for i, s in enumerate(Decoder(model).shape.layers)))
    )
    save(model, tmp_path / "m", format="padded")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert type(again) is MistralForCausalLM and again.config.num_attention_heads == 5
    assert_padded(again, model)


@pytest.mark.parametrize("family", ["gpt_neox", "opt", "falcon"])
def test_heads_that_a_config_derives_come_back_as_zeros(family: str, tmp_path: Path) -> None:
    """Their head size is the hidden size over the heads, so there are as many as before."""
    model = tiny(family)
    surgery.apply(model, uniform(model, groups=2))
    save(model, tmp_path / "m", format="padded")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert {layer.shape.query_heads for layer in Decoder(again)} == {9}
    assert_padded(again, model)


@pytest.mark.parametrize("family", ["llama", "granite", "gpt2", "opt", "phi"])
def test_added_biases_where_the_class_can_have_them(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    compensate(model, cut(model, "mixed"))
    save(model, tmp_path / "m", format="padded")
    assert_padded(AutoModelForCausalLM.from_pretrained(tmp_path / "m"), model)


def test_added_biases_where_it_can_not(tmp_path: Path) -> None:
    model = tiny("qwen2")
    compensate(model, cut(model, "mixed"))
    with pytest.raises(DoesNotFit, match=r"no qwen2 of transformers .* use format 'hetero'"):
        save(model, tmp_path / "m", format="padded")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", SLIDING)
def test_long_generation_with_windows_and_removed_attention(family: str, tmp_path: Path) -> None:
    """The cache of a removed attention comes back with it; texts outgrow the window of 4."""
    model = tiny(family)
    shapes = Decoder(model).shape.layers
    surgery.apply(model, plan_with(model, keep(shapes[0], ()), *map(LayerPlan.dense, shapes[1:])))
    save(model, tmp_path / "m", format="padded")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    texts = [m.generate(tokens(), max_new_tokens=20, do_sample=False).tolist() for m in (again, model)]
    assert texts[0] == texts[1]


def test_what_a_hetero_folder_holds_is_padded(tmp_path: Path) -> None:
    model = tiny("llama")
    surgery.apply(model, cut(model, "mixed"))
    save(model, tmp_path / "hetero")
    save(loading.load(tmp_path / "hetero"), tmp_path / "m", format="padded")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert type(again) is LlamaForCausalLM
    assert_padded(again, model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dtype_is_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    save(tiny("llama"), tmp_path / "dense")
    model = loading.load(tmp_path / "dense", dtype)
    surgery.apply(model, cut(model, "mixed"))
    save(model, tmp_path / "m", format="padded")
    assert {parameter.dtype for parameter in loading.load(tmp_path / "m").parameters()} == {dtype}
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}  # of the model that was compared in float32
    assert_padded(loading.load(tmp_path / "m", "float32"), model.float())


def test_it_says_what_the_zeros_cost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny("llama")
    shapes = Decoder(model).shape.layers
    widths = (32, 48, 64)
    plan = plan_with(
        model, *(keep(shape, channels=tuple(range(width))) for shape, width in zip(shapes, widths, strict=True))
    )
    surgery.apply(model, plan)
    with caplog.at_level(logging.INFO, "prunelit"):
        written = write_model(model, tmp_path / "m", plan=plan, format="padded")
    channel, dense = shapes[0].channel_cost, plan.model.parameters
    assert dense - written.size["parameters"] == 3 * 32 * channel
    assert written.facts["saved_of_dense"] == pytest.approx(3 * 32 * channel / dense)
    assert written.facts["kept_of_saving"] == pytest.approx(3 * 32 / (64 + 48 + 32))
    said = f"{48 * channel:,} of them zeros again"
    assert said in caplog.text and "33% of the saving is given up" in caplog.text
    assert said in (tmp_path / "m" / "README.md").read_text()


def test_where_one_layer_is_whole_nothing_is_saved(tmp_path: Path) -> None:
    model = tiny("llama")
    shapes = Decoder(model).shape.layers
    plan = plan_with(model, keep(shapes[0], channels=(0, 1)), *map(LayerPlan.dense, shapes[1:]))
    surgery.apply(model, plan)
    written = write_model(model, tmp_path / "m", plan=plan, format="padded")
    assert "not smaller than the dense model" in written.facts["note"]
    assert (written.facts["saved_of_dense"], written.facts["kept_of_saving"]) == (0, 0)
