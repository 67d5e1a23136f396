"""Folders whose config.json and files contradict each other, or hold another kind of model: refused before loading."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from prunelit.callbacks import Magnitude
from prunelit.data import loading, offloaded
from prunelit.data.sources import check_prunable_source, resolve_model_source
from prunelit.export.write import save
from prunelit.model.stored.folder import SafetensorsFolder
from prunelit.runtime.errors import BadQuantisation, SourceNotFound
from tests.tiny import tiny

WEIGHTS = "model.safetensors"
UP = "model.layers.1.mlp.up_proj.weight"
ADAPTER = json.dumps({"base_model_name_or_path": "own/base", "peft_type": "LORA"})
Change = Callable[[Path], None]


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    tiny("llama").save_pretrained(folder)
    return folder


def set_config(**values: Any) -> Change:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def set_tensors(*removed: str, prefix: str = "", **added: torch.Tensor) -> Change:
    def change(folder: Path) -> None:
        tensors = {prefix + name: x for name, x in load_file(folder / WEIGHTS).items() if name not in removed}
        more = {name.replace("__", "."): x for name, x in added.items()}
        save_file(tensors | more, folder / WEIGHTS, {"format": "pt"})

    return change


def store_as(dtype: torch.dtype, name: str = UP) -> Change:
    return set_tensors(UP, **{name.replace(".", "__"): torch.zeros(96, 36, dtype=dtype)})


def name_files(*names: Any, weights: str = WEIGHTS) -> Change:
    def change(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).rename(folder.parent / "x.safetensors")
        places = {name: names[number % len(names)] for number, name in enumerate(tensors)}
        (folder / f"{weights}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))

    return change


def replace_weights(name: str, content: bytes) -> Change:
    def change(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        (folder / name).write_bytes(content)

    return change


def both(*changes: Change) -> Change:
    def change(folder: Path) -> None:
        for each in changes:
            each(folder)

    return change


def write_deep_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)


def leave_adapter(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(ADAPTER)


def save_base_model(folder: Path) -> None:
    set_tensors("lm_head.weight")(folder)
    set_config(architectures=["LlamaModel"])(folder)


NO_CLASS = set_config(architectures=None)
SCORE = set_tensors("lm_head.weight", score__weight=torch.zeros(2, 36))
OTHERS = "model.safetensors.index.json: expected names of files in this folder, got "
REFUSED: dict[str, tuple[Change, str]] = {
    "a million layers": (set_config(num_hidden_layers=10**6), "num_hidden_layers: expected at most .* got 1,000,000"),
    "no layers": (set_config(num_hidden_layers=-1), "num_hidden_layers: expected a positive whole number, got -1"),
    "layers in words": (set_config(num_hidden_layers="two"), "expected a positive whole number, got 'two'"),
    "a million experts": (set_config(num_local_experts=10**6), "num_local_experts: expected at most"),
    "endless width": (set_config(hidden_size=10**9), "hidden_size: expected at most what the weight files hold"),
    "endless vocabulary": (set_config(vocab_size=10**12), "vocab_size: expected at most what the weight files hold"),
    "deep config": (write_deep_config, "config.json: expected plain settings, got JSON that is nested too deeply"),
    "file above": (name_files("../x.safetensors"), OTHERS + r"'\.\./x\.safetensors'"),
    "file below and above": (name_files("a/../../x.safetensors"), OTHERS),
    "file elsewhere": (name_files("/etc/x.safetensors"), OTHERS + "'/etc/x.safetensors'"),
    "bin above": (name_files("../x.bin", weights="pytorch_model.bin"), "names of files in this folder, got"),
    "file without name": (name_files(3), "expected a weight_map from tensors to files"),
    "file not there": (name_files("model-00001-of-00002.safetensors"), "which is not in the folder"),
    "header too long": (replace_weights(WEIGHTS, b"\xff" * 8 + b"{}"), "model.safetensors: it is cut short or damaged"),
    "header is a list": (replace_weights(WEIGHTS, (2).to_bytes(8, "little") + b"[]"), "cut short or damaged"),
    "archive cut short": (replace_weights("pytorch_model.bin", b"PK\x03\x04" * 50), "pytorch_model.bin: it is cut"),
    "pickle": (replace_weights("pytorch_model.bin", b"\x80\x02 damaged"), "pytorch_model.bin: it is cut short"),
    "adapter": (leave_adapter, "LoRA adapters of 'own/base'; merge them first: python -m prunelit export --model own"),
    "classifier": (both(NO_CLASS, SCORE), r"expected a causal LM, got a classifier \(score.weight\)"),
    "without a head": (save_base_model, "expected a causal LM, got LlamaModel, a decoder without lm_head"),
    "adapters inside": (set_tensors(prefix="base_model.model."), "adapters that were not merged"),
    "compiled": (set_tensors(prefix="_orig_mod."), "a model that torch.compile wrapped"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_folder_is_refused_before_it_is_loaded(untied: Path, tmp_path: Path, name: str) -> None:
    change, message = REFUSED[name]
    folder = tmp_path / "model"
    shutil.copytree(untied, folder)
    change(folder)
    start = time.perf_counter()
    for check in (check_prunable_source, resolve_model_source):
        with pytest.raises(SourceNotFound, match=message) as caught:
            check(str(folder))
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (store_as(torch.uint32), "expected plain weights, got U32 in model.layers.1.mlp.up_proj.weight"),  # of MLX
        (store_as(torch.float8_e4m3fn), "expected plain weights, got F8_E4M3 in model.layers.1.mlp.up_proj"),
        (store_as(torch.int32, UP.replace("weight", "qweight")), "expected plain weights, got I32 in .*qweight"),
    ],
    ids=["mlx", "fp8", "gptq"],
)
def test_weights_in_few_bits_are_refused_where_config_json_is_silent(
    untied: Path, tmp_path: Path, change: Change, message: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(untied, folder)
    change(folder)
    with pytest.raises(BadQuantisation, match=message):
        check_prunable_source(str(folder))


def test_the_reader_of_tensors_stays_in_its_folder(untied: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(untied, folder)
    name_files("../x.safetensors")(folder)
    with pytest.raises(SourceNotFound, match="expected names of files in this folder"):
        SafetensorsFolder(folder)


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2"])
@pytest.mark.parametrize("shards", ["one", "several"])
def test_folders_as_they_are_saved_are_accepted(tmp_path: Path, family: str, shards: str) -> None:
    tiny(family).save_pretrained(tmp_path / "model", max_shard_size="5GB" if shards == "one" else "50KB")
    check_prunable_source(str(tmp_path / "model"))
    assert loading.load(tmp_path / "model").config.model_type == family


def test_a_tied_head_that_is_stored_too_is_accepted(tmp_path: Path) -> None:
    model = tiny("gemma")
    model.save_pretrained(tmp_path)
    set_tensors(lm_head__weight=model.get_input_embeddings().weight.detach().clone())(tmp_path)
    check_prunable_source(str(tmp_path))
    assert loading.load(tmp_path).config.tie_word_embeddings is True


@pytest.mark.parametrize("streamed", [False, True])
def test_a_head_that_differs_from_a_tied_embedding_is_cut_and_saved_apart(
    untied: Path, tmp_path: Path, streamed: bool
) -> None:
    folder = tmp_path / "merged"
    shutil.copytree(untied, folder)
    set_config(tie_word_embeddings=True)(folder)  # as PEFT leaves it when adapters on a tied head are merged
    check_prunable_source(str(folder))
    model = offloaded.load_offloaded(folder) if streamed else loading.load(folder)
    plan = Magnitude(0.3, align=8).prune(model, [])
    save(model, tmp_path / "cut", plan=plan)
    assert json.loads((tmp_path / "cut" / "config.json").read_text())["tie_word_embeddings"] is False
    head = loading.load(tmp_path / "cut").get_output_embeddings().weight
    assert torch.equal(head, load_file(untied / WEIGHTS)["lm_head.weight"])


def test_files_in_a_folder_below_and_a_second_number_of_layers_are_accepted(untied: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(untied, folder)
    tensors = load_file(folder / WEIGHTS)
    (folder / "weights").mkdir()
    (folder / WEIGHTS).rename(folder / "weights" / "one.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "weights/one.safetensors")}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    set_config(num_layers=0)(folder)
    check_prunable_source(str(folder))


@pytest.mark.parametrize("zipped", [True, False])
def test_bin_files_are_accepted(untied: Path, tmp_path: Path, zipped: bool) -> None:
    folder = tmp_path / "model"
    shutil.copytree(untied, folder)
    (folder / WEIGHTS).unlink()
    torch.save(load_file(untied / WEIGHTS), folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    check_prunable_source(str(folder))
    assert torch.equal(
        loading.load(folder).get_output_embeddings().weight, load_file(untied / WEIGHTS)["lm_head.weight"]
    )


def test_a_folder_of_a_run_is_answered_with_the_model_inside(untied: Path, tmp_path: Path) -> None:
    shutil.copytree(untied, tmp_path / "run" / "model")
    with pytest.raises(SourceNotFound, match=r"expected a folder with config.json, got model; pass '.*run/model'"):
        check_prunable_source(str(tmp_path / "run"))
