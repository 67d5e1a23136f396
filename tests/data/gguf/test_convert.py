"""A GGUF file that prunelit wrote is the model it was written from, whatever was cut; what is not known is one line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from torch import Tensor

from prunelit.data import loading
from prunelit.data.gguf.rope import describe_rope
from prunelit.export import save
from prunelit.export.formats import ExportJob
from prunelit.export.gguf import writer
from prunelit.export.gguf.proof import TEXTS
from prunelit.model import surgery
from prunelit.model.decoder import Decoder
from prunelit.runtime.errors import SourceNotFound
from tests.cli.test_fit import call
from tests.export.alike import compensate, plan_with, uniform
from tests.export.gguf.test_families import SETTINGS, build_family, tokenizer_of
from tests.export.gguf.test_mixtures import build_mixture
from tests.export.gguf.test_writer import LINEAR, LLAMA3, build
from tests.export.tokenizers_of import KINDS, tokenizer
from tests.tiny import cut, keep


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNELIT_CACHE", str(tmp_path / "cache"))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=torch.arange(4, 64).reshape(2, -1), use_cache=False).logits
    return found


def read_back(model: Any, place: Path, kind: str = "f32") -> Any:
    writer.write_gguf(ExportJob(model, place, tokenizer(), kind=kind))
    return loading.load(place)


def assert_same_model(found: Any, expected: Any) -> None:
    torch.testing.assert_close(logits(found), logits(expected), rtol=0, atol=0)
    shapes = [[(s.query_heads, s.kv_groups, s.ffn_channels, s.experts) for s in Decoder(m).shape.layers]
              for m in (found, expected)]  # fmt: skip
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("kind", [None, "query_head", "kv_group", "channel", "attention", "mlp", "layer", "mixed"])
@pytest.mark.parametrize("family", ["llama", "llama-biases", "mistral", "qwen2"])
def test_a_file_is_the_model_it_was_written_from(family: str, kind: str | None, tmp_path: Path) -> None:
    model = build(family, kind)
    assert_same_model(read_back(model, tmp_path / "m.gguf"), model)


@pytest.mark.parametrize("family", ["qwen3", "qwen3-wide_heads"])
@pytest.mark.parametrize("kind", [None, "query_head", "layer"])
def test_heads_of_a_size_that_is_not_hidden_size_by_heads(family: str, kind: str | None, tmp_path: Path) -> None:
    model = build(family, kind)
    assert_same_model(read_back(model, tmp_path / "m.gguf"), model)


@pytest.mark.parametrize("family", ["llama", "llama-biases", "qwen2"])
@pytest.mark.parametrize(("groups", "heads"), [(3, None), (None, 2), (1, 1)])
def test_layers_cut_alike(family: str, groups: int | None, heads: int | None, tmp_path: Path) -> None:
    model = build(family, hidden_size=96, num_attention_heads=12, num_key_value_heads=4, head_dim=8)
    surgery.apply(model, uniform(model, groups, heads))
    assert_same_model(read_back(model, tmp_path / "m.gguf"), model)


def test_heads_that_do_not_divide_the_hidden_size_make_a_mistral(tmp_path: Path) -> None:
    model = build("llama", hidden_size=96, num_attention_heads=12, num_key_value_heads=4, head_dim=8)
    surgery.apply(model, uniform(model, 3))
    found = read_back(model, tmp_path / "m.gguf")
    assert found.config.model_type == "mistral" and found.config.num_attention_heads == 9
    assert_same_model(found, model)


def test_zeros_in_place_of_what_llama_cpp_needs_are_no_blocks(tmp_path: Path) -> None:
    model = build("llama")
    first, second, third = Decoder(model).shape.layers
    surgery.apply(model, plan_with(model, keep(first, ()), keep(second, channels=()), keep(third)))
    found = read_back(model, tmp_path / "m.gguf")
    assert [layer.list_removed_blocks() for layer in Decoder(found)] == [["attention"], ["mlp"], []]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_biases_that_repair_added(family: str, tmp_path: Path) -> None:
    model = build(family)
    compensate(model, cut(model, "mixed"))
    assert_same_model(read_back(model, tmp_path / "m.gguf"), model)


@pytest.mark.parametrize("rope", [LLAMA3, LINEAR, {"rope_type": "default", "rope_theta": 500.0}])
def test_rope(rope: dict[str, Any], tmp_path: Path) -> None:
    model = build("llama", "mixed", rope_parameters=rope)
    found = read_back(model, tmp_path / "m.gguf")
    assert found.config.rope_parameters == rope
    assert_same_model(found, model)


@pytest.mark.parametrize(
    ("family", "kind"),
    [("mixtral", "experts"), ("olmoe", "expert_channels"), ("qwen2_moe", "channels"), ("qwen3_moe", "experts")],
)
def test_mixtures(family: str, kind: str, tmp_path: Path) -> None:
    model = build_mixture(family, kind)
    assert_same_model(read_back(model, tmp_path / "m.gguf"), model)


@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize("family", [name for name in SETTINGS if name != "phi3"])
def test_families_with_graphs_of_their_own(family: str, groups: int | None, tmp_path: Path) -> None:
    model = build_family(family)
    surgery.apply(model, uniform(model, groups))
    assert_same_model(read_back(model, tmp_path / "m.gguf"), model)


def test_phi3_is_left_to_transformers(tmp_path: Path) -> None:
    model = build_family("phi3")
    writer.write_gguf(ExportJob(model, tmp_path / "m.gguf", tokenizer_of("phi3"), kind="f32"))
    assert (logits(loading.load(tmp_path / "m.gguf", "float32")) - logits(model)).abs().max() < 1e-2


@pytest.mark.parametrize(
    ("kind", "dtype", "limit"), [("f16", "float16", 1e-3), ("bf16", "bfloat16", 1e-2), ("q8_0", "float16", 2e-2)]
)
def test_types(kind: str, dtype: str, limit: float, tmp_path: Path) -> None:
    model = build("llama", "mixed", hidden_size=64, num_attention_heads=8, num_key_value_heads=4)
    found = read_back(model, tmp_path / "m.gguf", kind)
    assert found.dtype is getattr(torch, dtype)
    assert 0 < (logits(found.float()) - logits(model)).abs().max() < limit * 3


@pytest.mark.parametrize(
    ("kind", "add_bos"), [*((kind, False) for kind in KINDS), ("llama-bpe", True), ("sentencepiece", True)]
)
def test_the_tokenizer(kind: str, add_bos: bool, tmp_path: Path) -> None:
    expected = tokenizer(kind, add_bos)
    writer.write_gguf(ExportJob(build("llama", "mixed"), tmp_path / "m.gguf", expected, kind="f32"))
    found = loading.load_tokenizer(tmp_path / "m.gguf")
    texts = [*TEXTS, "cafe\N{COMBINING ACUTE ACCENT}", "<|im_start|>user\n12 34<|im_end|>"]
    if kind == "sentencepiece":  # transformers reads it, and puts a space behind special tokens, as llama.cpp does
        texts = texts[:-2]
    assert found(texts).input_ids == expected(texts).input_ids
    assert found.special_tokens_map == expected.special_tokens_map and found.chat_template == expected.chat_template
    assert len(found) <= 384, "no token without a row"


def test_tokens_that_end_a_turn_come_back(tmp_path: Path) -> None:
    model = build("llama", "mixed")
    model.generation_config.eos_token_id = [2, 5]
    assert read_back(model, tmp_path / "m.gguf").generation_config.eos_token_id == [2, 5]


def test_a_file_is_cut_and_written_again(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The file is a source for every command: here it is cut once more, and written again."""
    save(build("llama", "mixed"), tmp_path / "m.gguf", tokenizer(), format="gguf", kind="f32")
    options = ("prune", "--model", str(tmp_path / "m.gguf"), "--method", "magnitude", "--ratio", "0.2", "--align", "1")
    code, _, err = call(capsys, *options, "--out", str(tmp_path / "cut"))
    assert code == 0, err
    code, said, err = call(
        capsys, "export", "--model", str(tmp_path / "cut"), "--format", "gguf", "--out", str(tmp_path / "again.gguf")
    )
    assert code == 0, err
    assert "in float32: the same greedy text" in said


# What is refused ------------------------------------------------------------------------------------------------------


def write_changed(model: Any, place: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> Path:
    """The file of a model with other settings or tensors: `change` gets both by name."""
    writer.write_gguf(ExportJob(model, place.with_suffix(".before"), tokenizer(), kind="f32"))
    reader = gguf.GGUFReader(place.with_suffix(".before"))
    settings = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    values = {name: field.contents() for name, field in settings.items()}
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    change(values, tensors)
    made = gguf.GGUFWriter(place, values.pop("general.architecture"))
    for name, value in values.items():
        if name not in settings:
            (made.add_string if isinstance(value, str) else made.add_float32)(name, value)
            continue
        types = settings[name].types
        made.add_key_value(name, value, types[0], sub_type=types[-1] if types[0] == gguf.GGUFValueType.ARRAY else None)
    for name, tensor in tensors.items():
        made.add_tensor(name, tensor)
    made.write_header_to_file()
    made.write_kv_data_to_file()
    made.write_tensors_to_file()
    made.close()
    return place


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda s, t: s.update({"deci.rope.scaling.type": "yarn"}), "plain, linear or Llama 3 rope, got 'yarn'"),
        (lambda s, t: s.update({"deci.rope.dimension_count": 4}), "rope over all 8 dimensions of a head, got 4"),
        (lambda s, t: t.update({"rope_freqs.weight": torch.tensor([1.0, 3.0, 2.0, 1.0]).numpy()}), "other factors in"),
        (lambda s, t: t.update({"rope_freqs.weight": torch.ones(3).numpy()}), "expected 4 factors of rope, got 3"),
        (lambda s, t: t.update({"blk.0.attn_rot_embd": torch.ones(4).numpy()}), "tensors of llama, got 'blk.0.attn_r"),
        (lambda s, t: t.pop("blk.1.attn_k.weight"), "queries, keys, values and output in layer 1, got no attn_k"),
    ],
)  # fmt: skip
def test_what_no_family_has(change: Callable[[Any, Any], None], why: str, tmp_path: Path) -> None:
    file = write_changed(build("llama", "channel"), tmp_path / "m.gguf", change)
    with pytest.raises(SourceNotFound, match=why) as raised:
        loading.load(file)
    assert "\n" not in str(raised.value) and "m.gguf" in str(raised.value)


def test_linear_rope_that_other_writers_state() -> None:
    for names in ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {"rope.scale_linear": 4.0}):
        expected = {"rope_theta": 100.0, "rope_type": "linear", "factor": 4.0}
        assert describe_rope(names | {"rope.freq_base": 100.0}, None, 8) == expected
