"""A model loads the same from a folder of transformers and from what prunelit saved; every error is one line."""

import json

import pytest
import torch

from prunelit.data import loading, sources
from prunelit.export import save
from prunelit.model import surgery
from prunelit.runtime.errors import PrunelitError, SourceNotFound
from tests.tiny import cut, tiny, tiny_tokenizer, tokens


def one_line(error):
    return "\n" not in str(error.value) and len(str(error.value)) > 20


def same_logits(one, other, tolerance=0.0):
    with torch.no_grad():
        difference = one(tokens()).logits.float() - other(tokens()).logits.float()
    return difference.abs().max().item() <= tolerance


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_folder_of_transformers_loads_as_saved(family, tmp_path):
    model = tiny(family)
    model.save_pretrained(tmp_path / "model")
    again = loading.load(tmp_path / "model")
    assert type(again) is type(model) and not again.training and same_logits(model, again)


def test_the_dtype_is_the_saved_one_unless_another_is_asked_for(tmp_path):
    tiny("llama").bfloat16().save_pretrained(tmp_path)
    assert loading.load(tmp_path).dtype is torch.bfloat16
    assert loading.load(str(tmp_path), "float32").dtype is torch.float32
    assert loading.load(tmp_path, torch.float16).dtype is torch.float16


def test_the_tokenizer_beside_a_model_loads(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    found = loading.load_tokenizer(tmp_path)
    assert found("hello").input_ids == tiny_tokenizer()("hello").input_ids


@pytest.mark.parametrize("kind", ["kv_group", "attention", "mlp", "mixed"])
def test_a_folder_with_per_layer_shapes_loads_without_remote_code(kind, tmp_path):
    model = tiny("llama")
    plan = cut(model, kind)
    surgery.apply(model, plan)
    assert save(model, tmp_path / "cut", plan=plan) == "hetero"
    for code in (tmp_path / "cut").glob("*.py"):
        code.write_text("raise SystemExit('code of the folder was run')")
    again = loading.load(tmp_path / "cut")
    assert same_logits(model, again, 1e-6)
    assert [tuple(p.shape) for p in again.parameters()] == [tuple(p.shape) for p in model.parameters()]


@pytest.mark.parametrize("files", [(), ("notes.txt", "weights.bin")])
def test_a_folder_without_a_config_says_what_it_holds(files, tmp_path):
    for name in files:
        (tmp_path / name).touch()
    for attempt in (sources.check_model_source, loading.load, loading.load_tokenizer):
        with pytest.raises(SourceNotFound, match=", ".join(files) or "an empty folder") as error:
            attempt(str(tmp_path))
        assert "config.json" in str(error.value) and one_line(error)


@pytest.mark.parametrize("config", ["{", "[]", '{"model_type": "no_such_model"}', '{"model_type": "llama"}'])
def test_a_damaged_folder_is_one_line(config, tmp_path):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(SourceNotFound, match="cannot be loaded") as error:
        loading.load(tmp_path)
    assert one_line(error)


def test_folders_for_other_programs_are_refused_and_nothing_is_asked(tmp_path):
    for format, wanted in (("deci", "DeciLM"), ("gguf", r"pass '.*model\.gguf'")):
        (tmp_path / format).mkdir()
        (tmp_path / format / {"gguf": "model.gguf"}.get(format, "config.json")).write_text('{"block_configs": []}')
        with pytest.raises(SourceNotFound, match=wanted):
            loading.load(tmp_path / format)
    own_code = edited(
        tmp_path / "code", model_type="mine", auto_map={"AutoConfig": "a.A", "AutoModelForCausalLM": "a.M"}
    )
    with pytest.raises(SourceNotFound, match="custom code") as error:
        loading.load(own_code)
    assert one_line(error)


def edited(folder, **values):
    """A saved tiny Llama with other values in its config."""
    tiny("llama").save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


def test_missing_weights_are_refused_and_not_made_up(tmp_path):
    for name, values in (("deeper", {"num_hidden_layers": 4}), ("other", {"model_type": "bert"})):
        with pytest.raises(SourceNotFound, match="weights") as error:
            loading.load(edited(tmp_path / name, **values))
        assert one_line(error)


@pytest.mark.parametrize(
    "values",
    [
        {"intermediate_size": 64},
        {"hidden_size": "wide"},
        {"model_type": "pruned_llama", "per_layer_config": {}, "architectures": ["PrunedNobodyForCausalLM"]},
        {"model_type": "pruned_llama", "per_layer_config": {}, "architectures": None},
        {"model_type": "pruned_llama", "per_layer_config": {"9": {"intermediate_size": 8}}},
        {"model_type": "pruned_llama", "per_layer_config": "all"},
    ],
)
def test_a_config_that_contradicts_itself_or_the_weights_is_one_line(values, tmp_path):
    with pytest.raises(PrunelitError, match="cannot be loaded") as error:
        loading.load(edited(tmp_path, **values))
    assert one_line(error)


@pytest.mark.parametrize("share", [0, 0.5])
def test_a_truncated_weight_file_is_one_line(share, tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: int(share * weights.stat().st_size)])
    with pytest.raises(SourceNotFound, match="cannot be loaded") as error:
        loading.load(tmp_path)
    assert one_line(error)


def test_an_unknown_dtype_is_refused(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    with pytest.raises(PrunelitError, match="float23"):
        loading.load(tmp_path, "float23")


def test_a_model_without_a_tokenizer_is_one_line(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    with pytest.raises(SourceNotFound, match="its tokenizer cannot be loaded") as error:
        loading.load_tokenizer(tmp_path)
    assert one_line(error)
