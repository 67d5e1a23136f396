"""The causal LM inside a multimodal model computes what the whole model computes on text, and loads without it."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from prunelit.core.architectures import ARCHITECTURES
from prunelit.core.plan import PruningPlan
from prunelit.export.write import write_model
from prunelit.model import surgery
from prunelit.model.decoder import Decoder
from prunelit.model.text_model import count_tower_parameters, extract_text_model
from prunelit.runtime.errors import DoesNotFit
from tests.export.tokenizers_of import VOCABULARY, tokenizer
from tests.tiny import cut, keep, perturb, tiny_tokenizer, tokens
from tests.tiny_multimodal import MULTIMODAL, tiny_multimodal

TOLERANCE = 1e-5  # of logits
# Decoders that transformers has inside multimodal models only, with the causal LM that computes the same on text.
TEXT_FAMILIES = {
    "glm4v": "glm4",
    "glm_ocr": "glm4",
    "granite4_vision": "granite",
    "granite_docling": "granite",
    "hunyuan_vl": "hunyuan_v1_dense",
    "molmo2": "qwen3",
    "paddleocr_vl": "llama",
    "qwen2_5_omni_thinker": "qwen2",
    "qwen2_vl": "qwen2",
}
WITHOUT_CAUSAL_LM = ("cosmos3_edge", "molmo2-norm_after", "muse_glimmer")


@torch.no_grad()
def compute_logits(model: Any) -> Tensor:
    return model(input_ids=tokens() % 80, use_cache=False).logits


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)


def build_multimodal(family: str, **of_text: Any) -> Any:
    """A tiny model whose decoder has other settings."""
    settings = copy.deepcopy(dict(MULTIMODAL[family].config))
    settings["text_config"] |= of_text
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, **settings)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
        perturb(model)
    return model.eval()


def count_further_tokens(model: Any) -> int:
    """Parameters of tokens that the model reads and never predicts."""
    return model.get_input_embeddings().weight.numel() - model.get_output_embeddings().weight.numel()


def assert_text_model_loads(model: Any, folder: Path, text_family: str) -> None:
    """Cut all FFNs to one width; write, load and compare the causal LM inside."""
    shape = Decoder(model).shape
    surgery.apply(model, PruningPlan("test", shape, tuple(keep(each, channels=range(48)) for each in shape.layers)))
    expected = compute_logits(model)
    written = write_model(model, folder, tiny_tokenizer(), text_only=True)
    assert written.format == "uniform"
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.config.model_type == text_family
    assert_close(compute_logits(loaded), expected)
    left_out = count_tower_parameters(model) + count_further_tokens(model)
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in model.parameters()) - left_out


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_another_causal_lm_computes_the_same(family: str, tmp_path: Path) -> None:
    assert_text_model_loads(tiny_multimodal(family), tmp_path / "out", TEXT_FAMILIES[family])


@pytest.mark.parametrize(
    ("family", "of_text"),
    [
        ("paddleocr_vl", {"use_bias": True}),
        ("hunyuan_vl", {"attention_bias": True}),
        ("molmo2", {"rope_scaling_layers": None, "additional_vocab_size": 8, "vocab_size": 90}),
        ("granite_docling", {"tie_word_embeddings": False, "logits_scaling": 3.0, "embedding_multiplier": 2.0}),
    ],
    ids=["paddleocr_vl", "hunyuan_vl", "molmo2", "granite_docling"],
)
def test_settings_of_the_decoder_go_along(family: str, of_text: dict[str, Any], tmp_path: Path) -> None:
    assert_text_model_loads(build_multimodal(family, **of_text), tmp_path / "out", TEXT_FAMILIES[family])


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_layers_may_differ(family: str, tmp_path: Path) -> None:
    model = tiny_multimodal(family)
    surgery.apply(model, cut(model, "mixed"))
    expected = compute_logits(model)
    assert write_model(model, tmp_path / "out", tiny_tokenizer(), text_only=True).format == "hetero"
    loaded = extract_text_model(model)
    assert_close(compute_logits(loaded), expected)


@pytest.mark.parametrize("family", WITHOUT_CAUSAL_LM)
def test_others_are_refused_in_one_line(family: str) -> None:
    with pytest.raises(
        DoesNotFit, match=r"^text_only: expected a decoder that transformers has a causal LM for, got [^\n]*$"
    ):
        extract_text_model(tiny_multimodal(family))


def test_positions_scaled_in_some_layers_are_refused() -> None:
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    model = build_multimodal("molmo2", rope_parameters=rope, rope_scaling_layers=[0])
    with pytest.raises(DoesNotFit, match=r"^text_only: expected one rotary table for all layers, got .*\[0\] only"):
        extract_text_model(model)


def test_every_declared_text_family_is_tested() -> None:
    declared = {name for name, architecture in ARCHITECTURES.items() if architecture.text_family}
    tested = {dict(MULTIMODAL[family].config)["text_config"]["model_type"] for family in TEXT_FAMILIES}
    assert declared <= tested | {"qwen2_5_vl_text", "qwen3_vl_text"}  # tests/test_multimodal.py


def test_gguf_and_deci_hold_the_llama_inside_paddleocr(tmp_path: Path) -> None:
    """As the table of families says of formats for text models."""
    model = build_multimodal("paddleocr_vl")
    model.resize_token_embeddings(VOCABULARY)
    surgery.apply(model, cut(model, "query_head"))
    write_model(model, tmp_path / "out.gguf", tokenizer("smollm"), format="gguf", unproved=True)
    write_model(model, tmp_path / "deci", format="deci")
    assert (tmp_path / "out.gguf").is_file() and (tmp_path / "deci" / "config.json").is_file()
