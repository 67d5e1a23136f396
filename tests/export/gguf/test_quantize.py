"""Types of few bits: each tensor gets the type that llama.cpp's quantiser gives it, and llama.cpp runs the file."""

import types
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from prunelit.data import loading
from prunelit.export import write_model
from prunelit.export.gguf import quantize
from prunelit.export.gguf.proof import MEAN_LOGPROB_LIMITS
from prunelit.model import surgery
from prunelit.model.decoder import Decoder
from prunelit.runtime.errors import PrunelitError
from tests.export.alike import plan_with
from tests.export.gguf.test_mixtures import build_mixture
from tests.export.gguf.test_writer import build
from tests.export.tokenizers_of import tokenizer
from tests.tiny import keep

BLOCKS_FIT = {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 512}


def cut_model(**config: Any) -> Any:
    """Eight layers of 512 channels and 32 x 8 heads; some with other channels, and one with fewer heads."""
    model = build("llama", **BLOCKS_FIT | {"head_dim": 32, "num_hidden_layers": 8} | config)
    shapes = Decoder(model).shape.layers
    widths = (512, 256, 300, 512, 512, 288, 512, 512)
    layers = [keep(shape, channels=tuple(range(width))) for shape, width in zip(shapes, widths, strict=True)]
    layers[4] = keep(shapes[4], groups=(0, 1, 2))
    surgery.apply(model, plan_with(model, *layers))
    return model


def list_types(file: Path) -> dict[str, str]:
    return {x.name.removesuffix(".weight"): x.tensor_type.name for x in gguf.GGUFReader(file).tensors}


@pytest.mark.parametrize("kind", quantize.K_TYPES)
def test_llama_cpp_runs_a_cut_model(kind: str, tmp_path: Path) -> None:
    usual, sensitive = quantize.K_TYPES[kind]
    fallback = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}[usual]
    made = write_model(cut_model(), tmp_path / "m.gguf", tokenizer(), format="gguf", kind=kind)
    assert made.proof["exact"]["largest_difference"] < 1e-4
    assert made.proof["as_it_is"]["mean_difference"] < MEAN_LOGPROB_LIMITS[kind] / 3
    found = list_types(tmp_path / "m.gguf")
    # As llama-quantize of 2026-05 types a file of these shapes. Of eight layers 0, 3, 6 and 7 get more bits.
    assert {i for i in range(8) if found[f"blk.{i}.attn_v"] == sensitive} >= {0, 3, 6, 7}
    assert found["blk.1.attn_v"] == found["blk.1.ffn_down"] == found["token_embd"] == usual
    assert found["output"] == found["blk.0.ffn_down"] == sensitive and found["blk.0.attn_norm"] == "F32"
    assert found["blk.2.ffn_down"] == found["blk.5.ffn_down"] == found["blk.4.attn_output"] == fallback
    others = {
        "ffn_down, rows of 320": fallback,
        "ffn_down, rows of 288": fallback,
        "attn_output, rows of 192": fallback,
    }
    assert made.facts["other_types"] == others
    assert f"256 does not divide their rows: ffn_down, rows of 320: {fallback};" in made.facts["note"]


def test_a_tied_table_is_the_head(tmp_path: Path) -> None:
    model = build("llama", **BLOCKS_FIT, tie_word_embeddings=True)
    write_model(model, tmp_path / "m.gguf", tokenizer(), format="gguf", kind="q4_k_m", unproved=True)
    assert list_types(tmp_path / "m.gguf")["token_embd"] == "Q6_K"
    field = gguf.GGUFReader(tmp_path / "m.gguf").get_field("general.file_type")
    assert field is not None and field.contents() == gguf.LlamaFileType.MOSTLY_Q4_K_M


def test_a_mixture(tmp_path: Path) -> None:
    model = build_mixture("qwen3_moe", hidden_size=256, num_attention_heads=8, num_key_value_heads=4)
    made = write_model(model, tmp_path / "m.gguf", tokenizer(), format="gguf", kind="q4_k_m")
    assert made.proof["exact"]["largest_difference"] < 1e-4
    found = list_types(tmp_path / "m.gguf")
    assert found["blk.0.ffn_gate_exps"] == "Q4_K" and found["blk.0.ffn_gate_inp"] == "F32"


def test_a_file_of_few_bits_is_a_source(tmp_path: Path) -> None:
    model = cut_model()
    write_model(model, tmp_path / "m.gguf", tokenizer(), format="gguf", kind="q6_k", unproved=True)
    found = loading.load(tmp_path / "m.gguf").model.layers[1].mlp.up_proj.weight
    expected = model.model.layers[1].mlp.up_proj.weight
    assert found.dtype is torch.float16 and 0 < (found - expected).abs().max() < expected.abs().max() / 16


@pytest.mark.parametrize("name", ["Q4_K", "Q5_K", "Q6_K"])
def test_rounding_moves_a_number_by_half_a_step(name: str) -> None:
    values = np.random.default_rng(0).standard_normal((3, 512)).astype(np.float32)
    kind = gguf.GGMLQuantizationType[name]
    error = np.abs(gguf.quants.dequantize(quantize.quantize_rows(values, kind), kind) - values).max()
    assert 0 < error < {"Q4_K": 0.4, "Q5_K": 0.2, "Q6_K": 0.15}[name]


def test_a_wheel_without_the_function(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    place = types.SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(quantize.importlib.util, "find_spec", lambda name: place)
    quantize._load_quantizer.cache_clear()
    with pytest.raises(
        PrunelitError, match=r"expected llama\.cpp's ggml_quantize_chunk in the package xllamacpp, got none"
    ):
        quantize.quantize_rows(np.ones((1, 256), np.float32), gguf.GGMLQuantizationType.Q4_K)
    quantize._load_quantizer.cache_clear()


def test_without_llama_cpp_it_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = quantize.importlib.util.find_spec
    monkeypatch.setattr(quantize.importlib.util, "find_spec", lambda name: None if name == "xllamacpp" else find(name))
    with pytest.raises(PrunelitError, match=r"type q4_k_m: expected llama\.cpp, which rounds to it, got none"):
        write_model(cut_model(), tmp_path / "m.gguf", tokenizer(), format="gguf", kind="q4_k_m")
    assert not list(tmp_path.iterdir())
