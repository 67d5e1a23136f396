"""Families with graphs of their own run in llama.cpp as in transformers; what those compute otherwise is refused."""

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from tokenizers import AddedToken

from prunelit.export import save, write_model
from prunelit.export.formats import ExportJob
from prunelit.export.gguf import writer
from prunelit.model import surgery
from prunelit.runtime.errors import DoesNotFit
from tests.export.alike import uniform
from tests.export.gguf.test_writer import build, field, tensors
from tests.export.tokenizers_of import tokenizer
from tests.tiny import cut

# Settings with which llama.cpp computes the family: windows and layers without rope in the usual places. The window is
# shorter than what the proof writes.
SETTINGS: dict[str, dict[str, Any]] = {
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 8, "sliding_window": 32},
    "gemma3_text": {
        "query_pre_attn_scalar": 8,
        "sliding_window": 32,
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
    },
    "granite": {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "attention_multiplier": 0.2},
    "phi3": {},
    "smollm3": {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]},
}
GRAPHS = {"gemma3_text": "gemma3"}
_GELU_TABLE = 3e-3  # llama.cpp looks the GELU up in a table of float16


def build_family(family: str, **config: Any) -> Any:
    return build(family, **SETTINGS[family] | config)


def tokenizer_of(family: str) -> Any:
    """llama.cpp expects Phi-3's special tokens in a file for its graph."""
    if family != "phi3":
        return tokenizer()
    found = tokenizer("sentencepiece")
    found.add_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
    return found


@pytest.mark.parametrize(
    ("family", "groups", "heads"),
    [(family, *kind) for family in SETTINGS for kind in ((None, None), (2, None), (None, 2)) if family != "phi3"]
    + [("phi3", None, None)],
)
def test_llama_cpp_writes_the_same_text(family: str, groups: int | None, heads: int | None, tmp_path: Path) -> None:
    model = build_family(family)
    surgery.apply(model, uniform(model, groups, heads))
    made = write_model(model, tmp_path / "m.gguf", tokenizer_of(family), format="gguf", kind="f32")
    assert made.facts["architecture"] == GRAPHS.get(family, family)
    assert made.proof["exact"]["same_text"] and made.proof["tokens"] == 3 * 64
    assert made.proof["exact"]["largest_difference"] < (_GELU_TABLE if family.startswith("gemma") else 1e-5)


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
@pytest.mark.parametrize("family", ["phi3", "gemma2"])
def test_types(family: str, kind: str, tmp_path: Path) -> None:
    """Channels of zeros fill up gate and up also where they are one tensor."""
    model = build_family(family, hidden_size=64, num_attention_heads=8, num_key_value_heads=4)
    surgery.apply(model, uniform(model))
    made = write_model(model, tmp_path / "m.gguf", tokenizer_of(family), format="gguf", kind=kind)
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    assert made.proof["passed"] and field(reader, "feed_forward_length") == 64
    if family == "phi3":
        assert tensors(reader)["blk.1.ffn_up.weight"].shape == (128, 64)


def test_linear_rope_of_layers_without_a_window(tmp_path: Path) -> None:
    ropes = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    }
    model = build_family("gemma3_text", rope_parameters=ropes)
    made = write_model(model, tmp_path / "m.gguf", tokenizer(), format="gguf", kind="f32")
    assert made.proof["exact"]["same_text"] and made.proof["exact"]["largest_difference"] < _GELU_TABLE


def test_two_ropes_of_a_model_in_bfloat16(tmp_path: Path) -> None:
    model = build_family("gemma3_text").bfloat16()
    made = write_model(model, tmp_path / "m.gguf", tokenizer(), format="gguf", kind="bf16")
    assert made.proof["exact"]["largest_difference"] < _GELU_TABLE


def test_norms_hold_the_factor_itself(tmp_path: Path) -> None:
    model = build_family("gemma3_text")
    writer.write_gguf(ExportJob(model, tmp_path / "m.gguf", tokenizer(), kind="f32"))
    found, layer = tensors(gguf.GGUFReader(tmp_path / "m.gguf")), model.model.layers[1]
    expected = {
        "blk.1.attn_norm": layer.input_layernorm,
        "blk.1.post_attention_norm": layer.post_attention_layernorm,
        "blk.1.ffn_norm": layer.pre_feedforward_layernorm,
        "blk.1.post_ffw_norm": layer.post_feedforward_layernorm,
        "blk.1.attn_q_norm": layer.self_attn.q_norm,
        "output_norm": model.model.norm,
    }
    for name, norm in expected.items():
        assert torch.equal(found[f"{name}.weight"], norm.weight + 1), name


def test_gemma2_without_a_layer_is_written_up_to_its_window(tmp_path: Path) -> None:
    model = build_family("gemma2", sliding_window=128)
    surgery.apply(model, cut(model, "layer"))
    made = write_model(model, tmp_path / "m.gguf", tokenizer(), format="gguf", kind="f32")
    assert made.proof["exact"]["same_text"]
    assert field(gguf.GGUFReader(tmp_path / "m.gguf"), "context_length") == 128


def cut_family(family: str, kind: str) -> Any:
    model = build_family(family)
    surgery.apply(model, cut(model, kind))
    return model


@pytest.mark.parametrize(
    ("model", "why"),
    [
        *((lambda f=f: cut_family(f, "channel"), f"{f} graph needs, got layers that differ") for f in SETTINGS),
        *((lambda f=f: cut_family(f, "mlp"), f"{f} graph needs, got layers that differ") for f in SETTINGS),
        (lambda: cut_family("smollm3", "layer"), r"expected no_rope_layers = \[1, 1, 1\], which .* smollm3 graph"),
        (lambda: cut_family("gemma3_text", "layer"), "expected every layer but each 6th with a sliding window"),
        (lambda: build_family("gemma2", query_pre_attn_scalar=9), "expected query_pre_attn_scalar = 8, .* got 9"),
        (lambda: build_family("gemma2", attn_logit_softcapping=None), "expected attn_logit_softcapping and final"),
        (
            lambda: build_family("gemma3_text", final_logit_softcapping=30.0),
            "final_logit_softcapping = None, .* got 30",
        ),
        (lambda: build_family("gemma", tie_word_embeddings=False), "expected an output head that is the token table"),
        (lambda: build_family("gemma", hidden_act="silu"), "expected hidden_act 'gelu_pytorch_tanh', got 'silu'"),
        (lambda: build_family("smollm3", attention_bias=True), "smollm3 graph does not read biases on k, o, q, v"),
    ],
)
def test_what_llama_cpp_can_not_compute(model: Any, why: str, tmp_path: Path) -> None:
    with pytest.raises(DoesNotFit, match=why) as raised:
        save(model(), tmp_path / "m.gguf", tokenizer(), format="gguf")
    assert "\n" not in str(raised.value) and not list(tmp_path.iterdir())


def test_heads_of_phi3_fill_the_hidden_size(tmp_path: Path) -> None:
    model = build_family("phi3")
    surgery.apply(model, uniform(model, 2))
    with pytest.raises(DoesNotFit, match="phi3 graph does not read 6 query heads in 2 KV groups of size 8 at hidden"):
        save(model, tmp_path / "m.gguf", tokenizer_of("phi3"), format="gguf")
