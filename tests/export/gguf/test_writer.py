"""GGUF files run in llama.cpp as the model does in transformers; what no graph there computes is refused."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from prunelit.data import loading
from prunelit.export import save, write_model
from prunelit.export.formats import ExportJob
from prunelit.export.gguf import layout, writer
from prunelit.export.gguf.proof import MEAN_LOGPROB_LIMITS
from prunelit.model import surgery
from prunelit.model.decoder import Decoder
from prunelit.planning.serving import LLAMA_LIKE_FAMILIES
from prunelit.runtime.errors import DoesNotFit, NotProved
from tests.cli.test_fit import call, refused
from tests.export.alike import compensate, plan_with
from tests.export.tokenizers_of import VOCABULARY, tokenizer
from tests.tiny import cut, keep, tiny

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.5, "original_max_position_embeddings": 64}


def build(family: str, kind: str | None = None, **config: Any) -> Any:
    """A tiny model with room for the prompts of the proof, cut if `kind` says so."""
    model = tiny(family, **{"vocab_size": VOCABULARY, "max_position_embeddings": 160} | config)
    if kind is not None:
        surgery.apply(model, cut(model, kind))
    return model


def written(model: Any, place: Path, kind: str = "f32") -> gguf.GGUFReader:
    """The file of a model, not proved."""
    writer.write_gguf(ExportJob(model, place, tokenizer(), kind=kind))
    return gguf.GGUFReader(place)


def tensors(reader: gguf.GGUFReader) -> dict[str, torch.Tensor]:
    return {x.name: torch.tensor(gguf.quants.dequantize(x.data, x.tensor_type)) for x in reader.tensors}


def field(reader: gguf.GGUFReader, name: str) -> Any:
    return reader.get_field(f"{field_of(reader, 'general.architecture')}.{name}").contents()


def field_of(reader: gguf.GGUFReader, name: str) -> Any:
    return reader.get_field(name).contents()


def halves(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a file whose graph rotates neighbours, in transformers' order: one head, one row at a time."""
    dim, found = len(x) // heads, torch.empty_like(x)
    for row in range(len(x)):
        head, place = divmod(row, dim)
        pair, second = divmod(place, 2)
        found[head * dim + second * dim // 2 + pair] = x[row]
    return found


# What is in the file --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama-biases", "qwen2"])
def test_every_tensor_of_a_cut_model(family: str, tmp_path: Path) -> None:
    model = build(family, "mixed")
    reader = written(model, tmp_path / "m.gguf")
    found, layers = tensors(reader), Decoder(model).layers
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    names |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
    names |= {"mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    for name, expected in model.state_dict().items():
        if name.startswith("model.layers."):
            index, rest = name.removeprefix("model.layers.").split(".", 1)
            part, _, last = rest.rpartition(".")
            shape, x = layers[int(index)].shape, found.pop(f"blk.{index}.{names[part]}.{last}")
            heads = {"self_attn.q_proj": shape.query_heads, "self_attn.k_proj": shape.kv_groups}.get(part)
            assert torch.equal(halves(x, heads) if heads else x, expected), name
    assert torch.equal(found.pop("token_embd.weight"), model.model.embed_tokens.weight)
    assert torch.equal(found.pop("output_norm.weight"), model.model.norm.weight)
    assert torch.equal(found.pop("output.weight"), model.lm_head.weight)
    assert all("norm" in name or not x.any() for name, x in found.items()), "only zeros are left"


def test_sizes_of_a_cut_model(tmp_path: Path) -> None:
    model = build("llama")
    first, second, third = Decoder(model).shape.layers
    plan = plan_with(model, keep(first, (0, 2), channels=()), keep(second, ()), keep(third, (1,), (0, 2), (3, 4, 5)))
    surgery.apply(model, plan)
    reader = written(model, tmp_path / "m.gguf")
    assert field_of(reader, "general.architecture") == "deci"
    assert field(reader, "attention.head_count") == [6, 0, 2]
    assert field(reader, "attention.head_count_kv") == [2, 0, 1]
    assert field(reader, "feed_forward_length") == [32, 96, 3]
    assert field(reader, "attention.key_length") == field(reader, "attention.value_length") == 8
    names = {x.name for x in reader.tensors}
    assert not any(name.startswith("blk.1.attn") for name in names) and "blk.1.ffn_up.weight" in names


@pytest.mark.parametrize(("kind", "matrix"), [("f16", "F16"), ("bf16", "BF16"), ("q8_0", "Q8_0"), ("f32", "F32")])
def test_types(kind: str, matrix: str, tmp_path: Path) -> None:
    model = build("llama", hidden_size=64, num_attention_heads=8, num_key_value_heads=4)
    plan = plan_with(model, *(keep(shape, channels=tuple(range(50))) for shape in Decoder(model).shape.layers))
    surgery.apply(model, plan)
    reader = written(model, tmp_path / "m.gguf", kind)
    types = {x.name: x.tensor_type.name for x in reader.tensors}
    assert {found for name, found in types.items() if "norm" in name} == {"F32"}
    assert {found for name, found in types.items() if "norm" not in name} == {matrix}
    assert field(reader, "feed_forward_length") == (64 if kind == "q8_0" else 50)
    assert field_of(reader, "general.file_type") == {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}[kind]  # GGUF's numbers
    found, step = tensors(reader)["blk.0.ffn_down.weight"][:, :50], {"f16": 2**-11, "bf16": 2**-8, "q8_0": 1 / 127}
    expected = model.model.layers[0].mlp.down_proj.weight
    assert (found - expected).abs().max() <= step.get(kind, 0) * expected.abs().max()


def test_rows_that_make_no_blocks_stay_float16(tmp_path: Path) -> None:
    facts = writer.write_gguf(ExportJob(build("llama"), tmp_path / "m.gguf", tokenizer(), kind="q8_0"))
    # H = 72 is no multiple of 32; but 96 channels are
    assert facts["matrices_left_f16"] == 2 + 3 * 6 and "18" not in facts["note"] and "20 matrices" in facts["note"]


def test_a_model_of_one_layer_and_its_name(tmp_path: Path) -> None:
    model = build("llama", num_hidden_layers=1)
    model.config.name_or_path = "owner/small"
    reader = written(model, tmp_path / "m.gguf")
    assert field_of(reader, "general.name") == "small"
    expected = {"block_count": 1, "feed_forward_length": 96, "vocab_size": VOCABULARY, "embedding_length": 72}
    expected |= {"attention.head_count": 9, "attention.head_count_kv": 3, "rope.dimension_count": 8}
    expected |= {"attention.key_length": 8, "attention.value_length": 8}
    assert {name: field(reader, name) for name in expected} == expected


def test_tied_embeddings_are_there_once(tmp_path: Path) -> None:
    tied, untied = build("llama", tie_word_embeddings=True), build("llama", tie_word_embeddings=False)
    assert "output.weight" not in tensors(written(tied, tmp_path / "a.gguf"))
    assert "output.weight" in tensors(written(untied, tmp_path / "b.gguf"))


def test_the_context_is_that_of_a_sliding_window(tmp_path: Path) -> None:
    assert field(written(build("mistral-sliding"), tmp_path / "a.gguf"), "context_length") == 4
    assert field(written(build("mistral", sliding_window=None), tmp_path / "b.gguf"), "context_length") == 160


# In llama.cpp ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "kind", "graph"),
    [
        ("llama", None, "llama"),
        ("llama", "mixed", "deci"),
        ("llama", "attention", "deci"),  # of layer 0, among others
        ("llama", "mlp", "deci"),
        ("llama-biases", "mixed", "deci"),
        ("mistral", "kv_group", "deci"),
        ("mistral", "layer", "llama"),
        ("qwen2", None, "qwen2"),
        ("qwen2", "query_head", "llama"),  # the qwen2 graph takes Q * D = H only
        ("qwen2", "mixed", "deci"),
        ("qwen3", "query_head", "qwen3"),
        ("qwen3-wide_heads", "layer", "qwen3"),
    ],
)
def test_llama_cpp_writes_the_same_text(family: str, kind: str | None, graph: str, tmp_path: Path) -> None:
    made = write_model(build(family, kind), tmp_path / "m.gguf", tokenizer(), format="gguf", kind="f32")
    assert made.facts["architecture"] == graph
    assert made.proof["exact"]["same_text"]
    assert made.proof["exact"]["largest_difference"] < 1e-5
    assert made.proof["tokens"] == 3 * 64


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(LLAMA_LIKE_FAMILIES))
def test_families_whose_layers_are_those_of_llama(family: str, tmp_path: Path) -> None:
    longer = {"cwm": {"max_position_embeddings": 131072}}.get(family, {})
    for kind in (None, "mixed"):
        made = write_model(build(family, kind, **longer), tmp_path / f"{kind}.gguf", tokenizer(), format="gguf")
        assert made.proof["exact"]["largest_difference"] < 1e-5


@pytest.mark.parametrize(("family", "rope"), [("llama", LLAMA3), ("qwen2", LLAMA3), ("llama", LINEAR)])
def test_scaled_rope(family: str, rope: dict[str, Any], tmp_path: Path) -> None:
    made = write_model(build(family, rope_parameters=rope), tmp_path / "m.gguf", tokenizer(), format="gguf")
    assert made.facts["architecture"] == "llama"
    assert made.proof["exact"]["largest_difference"] < 1e-5


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_biases_that_repair_added(family: str, tmp_path: Path) -> None:
    model = build(family)
    compensate(model, cut(model, "mixed"))
    made = write_model(model, tmp_path / "m.gguf", tokenizer(), format="gguf")
    assert made.proof["exact"]["largest_difference"] < 1e-5


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0"])
def test_a_type_costs_what_is_allowed(kind: str, tmp_path: Path) -> None:
    model = build("llama", hidden_size=64, num_attention_heads=8, num_key_value_heads=4)
    surgery.apply(model, cut(model, "mixed"))
    made = write_model(model, tmp_path / "m.gguf", tokenizer(), format="gguf", kind=kind)
    assert made.proof["exact"]["largest_difference"] < 1e-5
    assert 1e-6 < made.proof["as_it_is"]["mean_difference"] < MEAN_LOGPROB_LIMITS[kind] / 5


def test_a_model_in_bfloat16(tmp_path: Path) -> None:
    made = write_model(build("llama", "mixed").bfloat16(), tmp_path / "m.gguf", tokenizer(), format="gguf", kind="bf16")
    assert made.proof["exact"]["largest_difference"] < 1e-5


@pytest.mark.slow
def test_real_widths(tmp_path: Path) -> None:
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "head_dim": 64}
    model = build("llama", "mixed", **sizes, num_attention_heads=9, num_key_value_heads=3)
    made = write_model(model, tmp_path / "m.gguf", tokenizer(), format="gguf", kind="f16")
    assert made.proof["exact"]["same_text"] and made.proof["exact"]["largest_difference"] < 1e-4


# What fails -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("_interleave_rotary_rows", lambda x, heads: x),
        ("compute_rope_factors", lambda decoder, format: torch.full((4,), 1.01)),
    ],
)
def test_a_wrong_file_is_not_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, wrong: Any) -> None:
    monkeypatch.setattr(layout, name, wrong)
    with pytest.raises(NotProved, match="in float32, a log-probability differs by"):
        save(build("llama", "mixed"), tmp_path / "m.gguf", tokenizer(), format="gguf")
    assert not list(tmp_path.iterdir())


def test_a_file_that_llama_cpp_can_not_load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(layout._TENSOR_NAMES, "o", "attn_out")
    with pytest.raises(NotProved, match=r"llama.cpp cannot run the file: .*attn_output.*nothing was"):
        save(build("llama"), tmp_path / "m.gguf", tokenizer(), format="gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (lambda: build("cohere"), "expected a model of .*, got 'cohere'"),
        (lambda: build("qwen3", "channel"), "qwen3 graph needs, got layers that differ; export format 'padded'"),
        (lambda: build("qwen3", rope_parameters=LINEAR), "qwen3 graph does not read a scaled rope"),
        (lambda: build("qwen3", attention_bias=True), "qwen3 graph does not read biases on k, o, q, v"),
        (lambda: build("llama", rope_parameters=YARN), "expected rope_type default, linear, llama3, got 'yarn'"),
        (lambda: build("llama", hidden_act="gelu"), "expected hidden_act 'silu', got 'gelu'"),
        (lambda: build("mistral-sliding"), "context of more than .* tokens for the proof, got 4"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_llama_cpp_can_not_compute(model: Any, why: str, tmp_path: Path) -> None:
    with pytest.raises(DoesNotFit, match=why):
        save(model(), tmp_path / "m.gguf", tokenizer(), format="gguf")
    assert not list(tmp_path.iterdir())


def test_padded_is_the_way_for_layers_that_differ(tmp_path: Path) -> None:
    save(build("qwen3", "mixed"), tmp_path / "padded", tokenizer(), format="padded")
    again = loading.load(tmp_path / "padded")
    made = write_model(again, tmp_path / "m.gguf", tokenizer(), format="gguf")
    assert made.facts["architecture"] == "qwen3" and made.proof["exact"]["largest_difference"] < 1e-5


def test_a_weight_beyond_float16(tmp_path: Path) -> None:
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = -70000.0
    with pytest.raises(DoesNotFit, match=r"blk.1.ffn_up.weight: expected weights up to 65504 for f16, got 7e\+04"):
        save(model, tmp_path / "m.gguf", tokenizer(), format="gguf", kind="f16")
    assert tensors(written(model, tmp_path / "m.gguf", "bf16"))["blk.1.ffn_up.weight"][3, 5] == -70144
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = -65504.0  # the largest that there is
    assert tensors(written(model, tmp_path / "f16.gguf", "f16"))["blk.1.ffn_up.weight"][3, 5] == -65504


def test_activations_beyond_float16(tmp_path: Path) -> None:
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight *= 1e4  # what goes into down_proj, and then as much less
        model.model.layers[1].post_attention_layernorm.weight *= 1e3
        model.model.layers[1].mlp.down_proj.weight *= 1e-10
    with pytest.raises(NotProved, match=r"in f16, log-probabilities differ by .* beyond float16: pass --type bf16"):
        save(model, tmp_path / "m.gguf", tokenizer(), format="gguf", kind="f16")
    assert save(model, tmp_path / "m.gguf", tokenizer(), format="gguf", kind="bf16") == "gguf"


def test_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(DoesNotFit, match="expected a model with a tokenizer, got none"):
        save(build("llama"), tmp_path / "m.gguf", format="gguf")


# The command ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> str:
    save(build("llama", "mixed"), tmp_path / "cut", tokenizer(), format="hetero")
    return str(tmp_path / "cut")


def without_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "xllamacpp" else real(name))


def test_a_file(capsys: pytest.CaptureFixture[str], folder: str, tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    code, said, err = call(capsys, "export", "--model", folder, "--format", "gguf", "--type", "q8_0", "--out", str(out))
    assert code == 0, err
    assert "proved: llama.cpp (xllamacpp) in a new process" in said and "in float32: the same greedy text" in said
    assert "graph 'deci', q8_0" in err
    assert {path.name for path in tmp_path.iterdir()} == {"cut", "m.gguf", "m.proof.json"}
    assert json.loads((tmp_path / "m.proof.json").read_text())["passed"] is True
    refused(call(capsys, "export", "--model", folder, "--format", "gguf", "--out", str(out)), "expected a new file")


def test_a_folder_with_a_card(capsys: pytest.CaptureFixture[str], folder: str, tmp_path: Path) -> None:
    out = tmp_path / "m"
    code, _, err = call(capsys, "export", "--model", folder, "--format", "gguf", "--out", str(out))
    assert code == 0, err
    assert {path.name for path in out.iterdir()} >= {"model.gguf", "proof.json", "README.md"}
    assert "in float32: the same greedy text" in (out / "README.md").read_text()


def test_where_llama_cpp_is_not_installed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: str, tmp_path: Path
) -> None:
    without_llama_cpp(monkeypatch)
    options = ["export", "--model", folder, "--format", "gguf", "--out", str(tmp_path / "m.gguf")]
    refused(call(capsys, *options), "not proved", "pip install 'prunelit[llamacpp]'", "--unproved true")
    assert not (tmp_path / "m.gguf").exists()
    code, said, err = call(capsys, *options, "--unproved", "true")
    assert code == 0, err
    assert "not proved, as asked" in said and (tmp_path / "m.gguf").is_file()
    assert json.loads((tmp_path / "m.proof.json").read_text())["passed"] is None
    rounded = [*options[:-1], str(tmp_path / "q.gguf"), "--type", "q4_k_m", "--unproved", "true"]
    refused(
        call(capsys, *rounded), "type q4_k_m: expected llama.cpp, which rounds to it", "'prunelit[llamacpp]'", "q8_0"
    )
