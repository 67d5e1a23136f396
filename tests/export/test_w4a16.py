"""The w4a16 writer: compressed-tensors' layout, as transformers and prunelit read it; loss is said, never hidden."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import prunelit
from prunelit.cli.export import export_model
from prunelit.core.plan import PruningPlan
from prunelit.data import loading
from prunelit.export import write_model
from prunelit.model import surgery
from prunelit.model.decoder import Decoder
from prunelit.quantization import integer_zeros, quantize
from prunelit.quantization.linears import get_quantization, list_decoder_linears
from prunelit.runtime.errors import BadOption, DoesNotFit
from tests.cli.test_fit import call, refused
from tests.export.test_int4 import WIDE, by_transformers, logits, odd, with_adapters
from tests.tiny import cut, tiny, tiny_tokenizer


def quantized(model: Any, size: int = 32) -> Any:
    quantize.quantize_model(model, "int4", size, zeros="integer")
    return model


def list_4_bit_tensors(model: Any) -> list[list[Any]]:
    modules = [linear.module for linear in list_decoder_linears(model)]
    return [[tensor.tolist() for tensor in (each.packed, each.scale, each.zero)] for each in modules]


@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("more", [0, 25])
def test_transformers_reads_every_group_size(size: int, more: int, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    model = quantized(odd("llama", more, **WIDE), size)
    written = write_model(model, tmp_path / "m", format="w4a16")
    settings = json.loads((tmp_path / "m" / "config.json").read_text())
    weights = settings["quantization_config"]["config_groups"]["group_0"]["weights"]
    assert weights["group_size"] == written.facts["group_size"] == size
    assert settings["quantization_config"]["ignore"] == ["lm_head"]
    again = by_transformers(tmp_path / "m")
    assert (logits(again) - logits(model)).abs().max() <= 1e-6 * logits(model).abs().max()
    widths = [layer.shape.ffn_channels for layer in Decoder(again)]
    assert widths == [-(-(37 + more * i) // size) * size for i in range(3)]
    assert ("auto_map" in settings) == (len(set(widths)) > 1)


@pytest.mark.parametrize("family", ["llama", "phi3", "opt", "qwen2", "gemma2"])
def test_families_of_every_layout(family: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    sizes = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32}
    model = tiny(family, **{name: size for name, size in sizes.items() if family != "opt" or "key" not in name})
    surgery.apply(model, cut(model, "mlp"))
    prunelit.save(quantized(model), tmp_path / "m", format="w4a16")
    expected = logits(model)
    for stored in (by_transformers(tmp_path / "m"), loading.load(tmp_path / "m")):
        assert (logits(stored) - expected).abs().max() <= 5e-6 * expected.abs().max()


def test_prunelit_reads_it_without_a_package_and_keeps_the_bits(tmp_path: Path) -> None:
    model = quantized(tiny("llama", **WIDE, tie_word_embeddings=True).to(torch.bfloat16))
    write_model(model, tmp_path / "m", format="w4a16", unproved=True)
    again = loading.load(tmp_path / "m", four_bit=True)
    stored = load_file(tmp_path / "m" / "model.safetensors")
    assert not [name for name in stored if name.endswith("proj.weight")]
    assert "vllm serve PATH" in (tmp_path / "m" / "README.md").read_text()
    assert get_quantization(again) == "int4" and integer_zeros.find_float_zeros(again) is None
    assert list_4_bit_tensors(again) == list_4_bit_tensors(model)
    assert write_model(again, tmp_path / "n", format="int4").format == "int4"  # float zeros hold whole steps too


@pytest.mark.slow
@pytest.mark.new_process
def test_a_new_process_reads_the_same_and_generates(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    proof = write_model(quantized(odd("llama", 8, **WIDE)), tmp_path / "m", format="w4a16", fresh_process=True).proof
    assert proof["passed"] and proof["largest_difference"] <= 1e-6 * proof["largest_logit"]
    assert proof["same_text_without_cache"] and "new process" in proof["loader"]
    assert "compressed-tensors" in (tmp_path / "m" / "README.md").read_text()


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    model = tiny("llama", **WIDE)
    with pytest.raises(DoesNotFit, match="'w4a16': expected linears in 4 bits, got plain ones"):
        write_model(model, tmp_path / "m", format="w4a16", unproved=True)
    quantize.quantize_model(model, "int4", 32)
    with pytest.raises(DoesNotFit, match="q_proj: expected zeros that are codes, got float zeros"):
        write_model(model, tmp_path / "m", format="w4a16", unproved=True)
    narrow = quantized(tiny("llama", hidden_size=48, head_dim=16, num_attention_heads=4, num_key_value_heads=2))
    with pytest.raises(DoesNotFit, match="expected inputs and groups in multiples of 32, got such of 16"):
        write_model(narrow, tmp_path / "m", format="w4a16", unproved=True)
    fine = quantized(tiny("llama", **WIDE), 16)
    with pytest.raises(DoesNotFit, match="got such of 16"):
        write_model(fine, tmp_path / "m", format="w4a16", unproved=True)
    few_rows = tiny("llama", hidden_size=32, head_dim=4, num_attention_heads=8, num_key_value_heads=1)
    with pytest.raises(DoesNotFit, match="k_proj: expected outputs in multiples of 8, got 4"):
        write_model(quantized(few_rows), tmp_path / "m", format="w4a16", unproved=True)
    assert not (tmp_path / "m").exists()


def test_the_command_rounds_and_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = tiny("llama", **WIDE)
    prunelit.save(model, tmp_path / "plain", tiny_tokenizer())
    asked = ["export", "--model", str(tmp_path / "plain"), "--format", "w4a16", "--unproved"]
    code, printed, error = call(capsys, *asked, "--out", str(tmp_path / "a"), "--group_size", "64")
    assert code == 0, error
    assert "rounded to nearest in groups of 64, which is not lossless" in printed
    assert not torch.equal(logits(loading.load(tmp_path / "a")), logits(model))
    quantize.quantize_model(model, "int4", 32)
    prunelit.save(with_adapters(model), tmp_path / "int4", tiny_tokenizer(), format="int4")
    asked[2] = str(tmp_path / "int4")
    code, printed, error = call(capsys, *asked, "--out", str(tmp_path / "b"))
    assert code == 0 and "zeros of the groups rounded to codes, which is not lossless" in printed, error
    code, printed, error = call(
        capsys,
        *("export", "--model", str(tmp_path / "b"), "--format", "w4a16", "--unproved", "--out", str(tmp_path / "c")),
    )
    assert code == 0 and "lossless" not in printed, error
    files = [tmp_path / name / "model.safetensors" for name in "bc"]
    assert files[0].read_bytes() == files[1].read_bytes()
    refused(
        call(capsys, "export", "--model", str(tmp_path / "b"), "--group_size", "32", *asked[3:], "--out", "d"),
        "group_size: expected format int4 or w4a16 and a model in full precision",
    )


def test_where_it_cannot_be_asked_for(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prunelit.save(tiny("llama", **WIDE), tmp_path / "plain")
    words = ["prune", "--model", str(tmp_path / "plain"), "--ratio", "0.2", "--out", str(tmp_path / "o")]
    refused(call(capsys, *words, "--format", "w4a16"), "got w4a16; prune, then `export --format w4a16`")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BadOption, match=r"its proof needs compressed-tensors.*prunelit\[w4a16\].*--unproved"):
        export_model(str(tmp_path / "plain"), str(tmp_path / "o"), "w4a16")


def test_the_plan_of_a_cut_model_goes_along(tmp_path: Path) -> None:
    model = tiny("llama", **WIDE)
    plan: PruningPlan = cut(model, "mlp")
    surgery.apply(model, plan)
    write_model(quantized(model), tmp_path / "m", plan=plan, format="w4a16", unproved=True)
    assert PruningPlan.load(tmp_path / "m" / "plan.json") == plan
