"""Mixtures of experts run in llama.cpp as in transformers; what its graphs do not compute is refused before writing."""

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from prunelit.export import save, write_model
from prunelit.export.formats import ExportJob
from prunelit.export.gguf import layout, writer
from prunelit.model import surgery
from prunelit.planning.serving import LLAMA_CPP_MIXTURES
from prunelit.runtime.errors import DoesNotFit, NotProved
from tests.export.gguf.test_writer import build, field, tensors, written
from tests.export.test_mixtures import plan_alike
from tests.export.tokenizers_of import tokenizer
from tests.tiny import cut

# llama.cpp's graphs have experts in every layer; its olmoe graph has as many KV heads as query heads, as OLMoE has.
ALL_LAYERS: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "olmoe": {"num_key_value_heads": 9},
    "qwen2_moe": {"mlp_only_layers": []},
    "qwen3_moe": {"mlp_only_layers": []},
}
GRAPHS = {"mixtral": "llama", "olmoe": "olmoe", "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe"}
SIZES = ("expert_count", "expert_used_count", "expert_feed_forward_length", "expert_shared_feed_forward_length")


def build_mixture(family: str, kind: str | None = None, **config: Any) -> Any:
    """A tiny mixture with room for the prompts of the proof, all layers cut alike if `kind` says so."""
    model = build(family, **ALL_LAYERS[family] | config)
    if kind is not None:
        surgery.apply(model, plan_alike(model, kind))
    return model


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("mixtral", None),
        ("mixtral", "experts"),
        ("mixtral", "groups"),
        ("olmoe", "expert_channels"),
        ("olmoe", "experts"),
        ("qwen2_moe", "experts"),
        ("qwen2_moe", "channels"),  # of the shared FFN
        ("qwen3_moe", "experts"),
        ("qwen3_moe", "layer 1"),
    ],
)
def test_llama_cpp_writes_the_same_text(family: str, kind: str | None, tmp_path: Path) -> None:
    made = write_model(build_mixture(family, kind), tmp_path / "m.gguf", tokenizer(), format="gguf", kind="f32")
    assert made.facts["architecture"] == GRAPHS[family]
    assert made.proof["exact"]["same_text"]
    assert made.proof["exact"]["largest_difference"] < 1e-5


def test_every_mixture_of_the_writer_is_tested() -> None:
    assert set(ALL_LAYERS) == LLAMA_CPP_MIXTURES


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_types(kind: str, tmp_path: Path) -> None:
    """Experts of 16 channels are filled up with zeros to a block of 32; routers are float32 in every file."""
    model = build_mixture("qwen2_moe", "expert_channels", hidden_size=96, num_attention_heads=12)
    file = tmp_path / "m.gguf"
    made = write_model(model, file, tokenizer(), format="gguf", kind=kind)
    assert made.proof["exact"]["largest_difference"] < 1e-5
    reader = gguf.GGUFReader(file)
    types = {x.name: x.tensor_type.name for x in reader.tensors}
    assert {types[f"blk.0.ffn_{name}_exps.weight"] for name in ("gate", "up", "down")} == {kind.upper()}
    assert {found for name, found in types.items() if "ffn_gate_inp" in name} == {"F32"}
    assert field(reader, "expert_feed_forward_length") == (32 if kind == "q8_0" else 16)


def test_a_mixture_of_one_layer(tmp_path: Path) -> None:
    reader = written(build_mixture("qwen2_moe", num_hidden_layers=1), tmp_path / "m.gguf")
    assert [field(reader, name) for name in SIZES] == [6, 2, 40, 48]


def test_every_tensor_of_a_cut_mixture(tmp_path: Path) -> None:
    model = build_mixture("qwen2_moe", "experts")
    reader = written(model, tmp_path / "m.gguf")
    assert [field(reader, name) for name in SIZES] == [5, 2, 40, 48]
    found, block = tensors(reader), model.model.layers[1].mlp
    expected = {
        "ffn_gate_inp": block.gate.weight,
        "ffn_gate_exps": block.experts.gate_up_proj[:, :40],
        "ffn_up_exps": block.experts.gate_up_proj[:, 40:],
        "ffn_down_exps": block.experts.down_proj,
        "ffn_gate_inp_shexp": block.shared_expert_gate.weight[0],
        "ffn_gate_shexp": block.shared_expert.gate_proj.weight,
        "ffn_up_shexp": block.shared_expert.up_proj.weight,
        "ffn_down_shexp": block.shared_expert.down_proj.weight,
    }
    for name, value in expected.items():
        assert torch.equal(found.pop(f"blk.1.{name}.weight"), value), name
    assert not [name for name in found if name.startswith("blk.1.ffn") and name != "blk.1.ffn_norm.weight"]


def test_experts_in_another_order_are_not_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = layout._arrange_rows
    monkeypatch.setattr(
        layout, "_arrange_rows", lambda x, shape, heads: right(x, shape, heads).flip(0 if len(shape) == 3 else ())
    )
    with pytest.raises(NotProved, match="in float32, a log-probability differs by"):
        save(build_mixture("mixtral"), tmp_path / "m.gguf", tokenizer(), format="gguf")
    assert not list(tmp_path.iterdir())


def cut_unevenly(kind: str) -> Any:
    model = build("mixtral")
    surgery.apply(model, cut(model, kind))
    return model


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (lambda: cut_unevenly("expert"), r"expected one number of experts of one width, got 2 experts .*, 3 of 96 in"),
        (lambda: cut_unevenly("expert_channel"), r"got 6 experts of 48 channels in layer 0, 6 of 56 in layer 1; prune"),
        (lambda: cut_unevenly("kv_group"), "mixtral graph needs, got layers that differ; export format 'padded'"),
        (lambda: cut_unevenly("mlp"), "expected experts in every layer, .* got none in layer 0"),
        (lambda: build("qwen3_moe"), "expected experts in every layer, .* got none in layer 0"),
        (
            lambda: build_mixture("qwen3_moe", norm_topk_prob=False),
            "expected norm_topk_prob = True, which llama.cpp's qwen3_moe graph computes, got False",
        ),
        (lambda: build_mixture("qwen2_moe", norm_topk_prob=True), "expected norm_topk_prob = False"),
        (
            lambda: build_mixture("qwen2_moe", "groups"),
            "does not read 6 query heads in 2 KV groups of size 8 at hidden",
        ),
        (lambda: build("olmoe"), "olmoe graph does not read 9 query heads in 3 KV groups"),
        (lambda: build_mixture("olmoe", clip_qkv=8.0), "expected clip_qkv = None, got 8.0"),
        (lambda: build("glm4_moe"), "expected a model of .*, got 'glm4_moe'"),
    ],
)
def test_what_llama_cpp_can_not_compute(model: Any, why: str, tmp_path: Path) -> None:
    with pytest.raises(DoesNotFit, match=why) as raised:
        save(model(), tmp_path / "m.gguf", tokenizer(), format="gguf")
    assert "\n" not in str(raised.value) and not list(tmp_path.iterdir())


def test_names_of_tensors_are_those_of_the_gguf_package(tmp_path: Path) -> None:
    writer.write_gguf(ExportJob(build_mixture("qwen2_moe"), tmp_path / "m.gguf", tokenizer(), kind="f32"))
    allowed = gguf.MODEL_TENSORS[gguf.MODEL_ARCH.QWEN2MOE]
    names = {f"{gguf.TENSOR_NAMES[tensor]}".format(bid=0) for tensor in allowed}
    found = {x.name.rpartition(".")[0] for x in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert {name for name in found if not name.startswith(("blk.1", "blk.2"))} <= names
