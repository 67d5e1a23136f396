"""The INT4 layout: against transformers' own arithmetic for it, and folders read with their linears in 4 bits."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import prunelit
from prunelit.core.plan import PruningPlan
from prunelit.data import loading
from prunelit.model import surgery
from prunelit.model.decoder import Decoder
from prunelit.quantization import int4_folder, quantize
from prunelit.quantization.int4 import GROUP_SIZES, Int4Linear
from prunelit.quantization.int4_layouts import METAL
from prunelit.quantization.linears import get_quantization, list_decoder_linears
from prunelit.runtime.errors import BadQuantisation, SourceNotFound
from tests.tiny import cut, keep, tiny, tokens

WIDE = {"hidden_size": 128, "head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 2}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens(), use_cache=False).logits


def odd(family: str, **sizes: Any) -> Any:
    """A model whose FFN widths no group size divides, and differ."""
    model = tiny(family, **sizes)
    shape = Decoder(model).shape
    layers = tuple(keep(layer, channels=tuple(range(37 + 25 * i))) for i, layer in enumerate(shape.layers))
    surgery.apply(model, PruningPlan("test", shape, layers))
    return model


@pytest.mark.parametrize("size", GROUP_SIZES)
@pytest.mark.parametrize("finer", [1, 2])
def test_the_layout_is_what_transformers_unpacks(size: int, finer: int) -> None:
    from transformers.integrations.metal_quantization import _affine_dequantize_tensor

    linear = Int4Linear.from_weight(torch.randn(24, 256), None, size)
    linear.zero += torch.randn_like(linear.zero)  # as after a merge
    found = int4_folder.make_int4_tensors(linear, size // finer, 24, 256, 1, torch.float32)
    assert found["weight"].dtype == torch.uint32 and found["weight"].shape == (24, 32)
    assert found["scales"].shape == found["qbiases"].shape == (24, 256 * finer // size)
    theirs = _affine_dequantize_tensor(found["weight"], found["scales"], found["qbiases"], size // finer, 4)
    assert torch.equal(theirs, linear.dequantize_weight())


def test_added_rows_are_zero_and_stand_behind_each_part() -> None:
    from transformers.integrations.metal_quantization import _affine_dequantize_tensor

    bias = torch.nn.Parameter(torch.randn(10))
    linear = Int4Linear.from_weight(torch.randn(10, 20), bias, 16)
    found = int4_folder.make_int4_tensors(linear, 8, 16, 24, 2, torch.float32)
    whole = _affine_dequantize_tensor(found["weight"], found["scales"], found["qbiases"], 8, 4)[:, :20]
    own = linear.dequantize_weight()
    assert torch.equal(whole[:5], own[:5]) and torch.equal(whole[8:13], own[5:])
    assert not whole[5:8].any() and not whole[13:].any()
    assert torch.equal(found["bias"][8:13], bias[5:]) and not found["bias"][[5, 6, 7, 13, 14, 15]].any()


@pytest.mark.parametrize(("size", "wanted"), [(16, 16), (32, 32), (64, 32), (128, 32)])
def test_one_group_size_divides_all_widths_but_those_of_the_ffn(size: int, wanted: int) -> None:
    model = odd("llama", **(WIDE | {"hidden_size": 96, "num_attention_heads": 2}))
    quantize.quantize_model(model, "int4", size)
    assert int4_folder.find_common_group_size(model) == wanted


@pytest.mark.parametrize(
    ("family", "sizes", "reason"),
    [
        ("gpt2", {}, r"c_attn: int4: expected a linear with weights \[out, in\], got Conv1D"),
        ("llama", {"hidden_size": 36, "head_dim": 4}, "q_proj: int4: expected inputs in multiples of 8, got 36"),
    ],
)
def test_what_no_reader_takes_is_said(family: str, sizes: dict[str, int], reason: str) -> None:
    model = tiny(family, **sizes)
    quantize.quantize_model(model, "int4", 16)
    with pytest.raises(BadQuantisation, match=reason + ".*use format uniform or hetero"):
        int4_folder.find_common_group_size(model)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """An int4 model of 128-wide layers, and its folder."""
    model = tiny("llama", **WIDE, tie_word_embeddings=True)
    quantize.quantize_model(model, "int4", 32)
    folder = tmp_path_factory.mktemp("int4") / "model"
    prunelit.save(model, folder, format="int4")
    return model, folder


def test_reads_codes_scales_and_zeros_as_they_were(saved: tuple[Any, Path]) -> None:
    model, folder = saved
    again = loading.load(folder, four_bit=True)
    for mine, theirs in zip(list_decoder_linears(model), list_decoder_linears(again), strict=True):
        for name in ("packed", "scale", "zero"):
            assert torch.equal(getattr(mine.module, name), getattr(theirs.module, name)), theirs.name
    assert torch.equal(logits(again), logits(model))
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert not hasattr(again.config, "quantization_config") and not any(p.requires_grad for p in again.parameters())


def test_load_makes_plain_linears(saved: tuple[Any, Path]) -> None:
    model, folder = saved
    again = loading.load(folder)
    assert get_quantization(again) is None and torch.equal(logits(again), logits(model))
    assert loading.load(folder, "bfloat16").dtype == torch.bfloat16
    assert loading.load(folder, torch.bfloat16, four_bit=True).dtype == torch.bfloat16


def test_a_cut_model_is_read_again(tmp_path: Path) -> None:
    model = tiny("qwen2")
    surgery.apply(model, cut(model, "mixed"))
    quantize.quantize_model(model, "int4", 16)
    assert prunelit.save(model, tmp_path / "a", format="int4") == "int4"
    again = loading.load(tmp_path / "a", four_bit=True)
    assert torch.equal(logits(again), logits(model)) and type(again).__name__ == "PrunedQwen2ForCausalLM"
    prunelit.save(again, tmp_path / "b")
    files = [tmp_path / name / "model.safetensors" for name in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()


def _without(tensors: dict[str, torch.Tensor], last: str) -> dict[str, torch.Tensor]:
    return {name: value for name, value in tensors.items() if not name.endswith(last)}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: _without(t, "layers.1.mlp.up_proj.weight"), "got none for 1 of them .*up_proj"),
        (lambda t: _without(t, "layers.1.mlp.up_proj.scales"), r"up_proj.weight: expected \[96, 128\], got \[96, 16\]"),
        (lambda t: _without(t, "model.norm.weight"), r"got none for 1 of them \(model.norm.weight"),
        (
            lambda t: {k: v[:8] if k.endswith("layers.0.mlp.up_proj.weight") else v for k, v in t.items()},
            r"up_proj.weight: expected \[96, 16\], got \[8, 16\]",
        ),
        (
            lambda t: {k: v[:8] if k.endswith("layers.0.mlp.up_proj.scales") else v for k, v in t.items()},
            r"up_proj: expected scales and qbiases \[96, 4\], got \[8, 4\]",
        ),
    ],
)
def test_damaged_folders_are_refused(saved: tuple[Any, Path], tmp_path: Path, change: Any, reason: str) -> None:
    (tmp_path / "config.json").write_text((saved[1] / "config.json").read_text())
    tensors = change(load_file(saved[1] / "model.safetensors"))
    save_file({name: value.contiguous() for name, value in tensors.items()}, tmp_path / "model.safetensors")
    with pytest.raises(SourceNotFound, match=reason):
        loading.load(tmp_path)


def test_only_folders_in_this_layout_are_taken_for_one(saved: tuple[Any, Path], tmp_path: Path) -> None:
    assert int4_folder.read_stored_int4(saved[1]) == (METAL, 32)
    config = json.loads((saved[1] / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "metal",
        "bits": 4,
        "group_size": 32,
        "modules_to_not_convert": ["lm_head"],
    }
    assert int4_folder.read_stored_int4(tmp_path) is None
    for other in ({}, {"quantization_config": None}, {"quantization_config": {"quant_method": "metal", "bits": 8}}):
        (tmp_path / "config.json").write_text(json.dumps(other))
        assert int4_folder.read_stored_int4(tmp_path) is None


@pytest.mark.parametrize("size", [0, 12, -8, "32", None])
def test_a_group_size_that_is_none_is_said(saved: tuple[Any, Path], tmp_path: Path, size: Any) -> None:
    config = json.loads((saved[1] / "config.json").read_text())
    config["quantization_config"]["group_size"] = size
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceNotFound, match="group_size: expected a multiple of 8"):
        int4_folder.read_stored_int4(tmp_path)
