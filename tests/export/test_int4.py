"""The int4 writer: transformers reads what was in memory, at every group size and width; nothing is unpacked."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import prunelit
from prunelit.core.plan import PruningPlan
from prunelit.export import write_model
from prunelit.export.formats import ExportJob
from prunelit.export.four_bits import folder as four_bits
from prunelit.model import surgery
from prunelit.model.decoder import Decoder
from prunelit.quantization import int4, quantize
from prunelit.quantization.int4 import GROUP_SIZES, Int4Linear
from prunelit.quantization.int4_layouts import METAL
from prunelit.quantization.linears import list_decoder_linears
from prunelit.recovery.lora import add_lora
from prunelit.recovery.merge import merge_adapters
from prunelit.runtime.errors import DoesNotFit, NotProved
from tests.tiny import FAMILIES, cut, keep, tiny, tokens

WIDE = {"hidden_size": 128, "head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 2}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens(), use_cache=False).logits


def by_transformers(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    options: Any = {"device_map": "cpu", "trust_remote_code": True, "output_loading_info": True}
    model, loading = AutoModelForCausalLM.from_pretrained(folder, **options)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    return model


def odd(family: str, more: int = 0, **sizes: Any) -> Any:
    """A model with 37 FFN channels, and `more` of them from layer to layer."""
    model = tiny(family, **sizes)
    shape = Decoder(model).shape
    layers = tuple(
        keep(layer, channels=tuple(range(min(37 + more * i, layer.ffn_channels))))
        for i, layer in enumerate(shape.layers)
    )
    surgery.apply(model, PruningPlan("test", shape, layers))
    return model


def with_adapters(model: Any) -> Any:
    """Adapters merged into the zeros."""
    adapted = add_lora(model, 4, 8, 0.0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return merge_adapters(adapted)


@pytest.mark.parametrize("size", GROUP_SIZES)
@pytest.mark.parametrize("more", [0, 25])
def test_transformers_reads_every_group_size(size: int, more: int, tmp_path: Path) -> None:
    model = odd("llama", more, **WIDE)
    quantize.quantize_model(model, "int4", size)
    model = with_adapters(model)
    written = write_model(model, tmp_path / "m", format="int4")
    settings = json.loads((tmp_path / "m" / "config.json").read_text())
    assert settings["quantization_config"]["group_size"] == written.facts["group_size"] == size
    again = by_transformers(tmp_path / "m")
    assert (logits(again) - logits(model)).abs().max() <= 1e-6 * logits(model).abs().max()
    widths = [layer.shape.ffn_channels for layer in Decoder(again)]
    assert widths == [-(-(37 + more * i) // size) * size for i in range(3)]
    assert ("auto_map" in settings) == (len(set(widths)) > 1)  # filled up, layers may be alike
    assert written.size["parameters"] == sum(p.numel() for p in again.parameters())


@pytest.mark.parametrize("family", ["llama", "phi3", "opt", "qwen2", "falcon-one_norm", "gemma2"])
def test_families_of_every_layout(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    surgery.apply(model, cut(model, "mixed"))
    quantize.quantize_model(model, "int4", 16)
    prunelit.save(model, tmp_path / "m")
    assert torch.equal(logits(by_transformers(tmp_path / "m")), logits(model))


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"gpt2"}))
def test_every_family_with_widths_that_do_not_divide(family: str, tmp_path: Path) -> None:
    model = odd(family, 25)
    quantize.quantize_model(model, "int4", 16)
    prunelit.save(model, tmp_path / "m", format="int4")
    difference = (logits(by_transformers(tmp_path / "m")) - logits(model)).abs().max()
    assert difference <= 2e-5 * logits(model).abs().max()


@pytest.mark.slow
@pytest.mark.new_process
def test_a_new_process_reads_the_same_and_generates(tmp_path: Path) -> None:
    model = odd("llama", 8, **WIDE)
    quantize.quantize_model(model, "int4", 16)
    proof = write_model(with_adapters(model), tmp_path / "m", format="int4", fresh_process=True).proof
    assert proof["passed"] and proof["largest_difference"] <= 1e-6 * proof["largest_logit"]
    assert proof["limit"] == pytest.approx(1e-4 * proof["largest_logit"])
    assert proof["same_text_without_cache"] and "new process" in proof["loader"]
    assert 'device_map="cpu"' in proof["loader"]
    assert json.loads((tmp_path / "m" / "proof.json").read_text()) == proof
    assert "device_map" in (tmp_path / "m" / "README.md").read_text()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_scales_and_says_so(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny("llama", **WIDE).to(dtype)
    quantize.quantize_model(model, "int4", 32)
    proof = write_model(model, tmp_path / "m", format="int4").proof
    assert 0 < proof["largest_difference"] <= proof["limit"]
    assert proof["limit"] == pytest.approx(8 * torch.finfo(dtype).eps * proof["largest_logit"])
    again = by_transformers(tmp_path / "m")
    assert {parameter.dtype for parameter in again.parameters()} == {dtype}


def test_the_folder_is_4_bit_and_in_shards_where_it_is_large(tmp_path: Path) -> None:
    model = tiny("llama", **WIDE, intermediate_size=512)
    quantize.quantize_model(model, "int4", 32)
    written = write_model(model, tmp_path / "m", format="int4", max_shard_size="100KB")
    files = list((tmp_path / "m").glob("model-*.safetensors"))
    assert len(files) > 1 and (tmp_path / "m" / "model.safetensors.index.json").is_file()
    linears: list[Any] = [linear.module for linear in list_decoder_linears(model)]
    count = sum(linear.in_features * linear.out_features for linear in linears)
    rest = sum(parameter.numel() * 4 for parameter in model.parameters())
    assert written.facts["bytes_per_weight"] == 0.5 + 2 * 4 / 32
    headers = sum(path.stat().st_size for path in files) - 0.75 * count - rest
    assert 0 < headers < 20_000
    assert torch.equal(logits(prunelit.load(tmp_path / "m")), logits(model))


def test_no_linear_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = odd("llama", 8)
    quantize.quantize_model(model, "int4", 16)
    monkeypatch.setattr(int4, "_unpack_weight", lambda *args: pytest.fail("unpacked"))
    four_bits.write_4_bits(ExportJob(model, tmp_path), "int4", METAL)
    assert (tmp_path / "model.safetensors").is_file()


def test_a_wrong_folder_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    quantize.quantize_model(model, "int4", 16)
    whole = four_bits._collect_int4_tensors

    def wrong(*args: Any) -> Any:
        weights, facts = whole(*args)
        name = next(name for name in weights if name.endswith("qbiases"))
        return weights | {name: weights[name] + 0.5}, facts

    monkeypatch.setattr(four_bits, "_collect_int4_tensors", wrong)
    with pytest.raises(NotProved, match="does not read back equal"):
        prunelit.save(model, tmp_path / "m", format="int4")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("family", "base", "format", "reason"),
    [
        ("llama", "none", "int4", r"expected linears in 4 bits, got plain ones; .*export --format int4"),
        ("llama", "int4", "uniform", "expected plain linears, got int4"),
        ("gpt2", "int4", "int4", "got Conv1D.*use format uniform or hetero"),
    ],
)
def test_what_does_not_fit(family: str, base: Any, format: str, reason: str, tmp_path: Path) -> None:
    model = tiny(family)
    quantize.quantize_model(model, base, 16)
    with pytest.raises(DoesNotFit, match=reason):
        prunelit.save(model, tmp_path / "m", format=format)
    assert not any(tmp_path.iterdir())


def test_saving_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = odd("llama")
    quantize.quantize_model(model, "int4", 16)
    before, config = logits(model), model.config.to_dict()
    prunelit.save(model, tmp_path / "m")
    assert torch.equal(logits(model), before) and model.config.to_dict() == config
    assert all(isinstance(linear.module, Int4Linear) for linear in list_decoder_linears(model))
