"""Adapters in PEFT's format: PEFT itself reads them onto the saved base, and a folder merges into any base it fits."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import prunelit
from prunelit.core.plan import PruningPlan
from prunelit.data import loading
from prunelit.model import surgery
from prunelit.model.decoder import Decoder
from prunelit.quantization import quantize, views
from prunelit.quantization.int4_folder import find_common_group_size
from prunelit.quantization.linears import get_quantization
from prunelit.recovery import adapter_files, merge
from prunelit.recovery.lora import add_lora
from prunelit.recovery.merge import merge_adapters
from prunelit.runtime.errors import BadAdapter, SourceNotFound
from tests.tiny import keep, tiny, tokens

# Loads base and adapter as their users will: without prunelit.
_PEFT = """
import sys
sys.modules["prunelit"] = None
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    base = AutoModelForCausalLM.from_pretrained(folder + "/base", device_map="cpu", trust_remote_code=True)
    model = PeftModel.from_pretrained(base, folder + "/adapter").eval()
    with torch.no_grad():
        torch.save(model(input_ids=torch.load(folder + "/ids.pt"), use_cache=False).logits, folder + "/logits.pt")
"""


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens(), use_cache=False).logits


def near(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    return bool((got - wanted).norm() <= 1e-5 * wanted.norm())


def adapted(family: str, base: Any, size: int = 16, more: int = 25) -> Any:
    """A cut model whose FFN widths nothing divides, with adapters of two ranks that do something."""
    model = tiny(family)
    shape = Decoder(model).shape
    layers = tuple(keep(layer, channels=tuple(range(37 + more * i))) for i, layer in enumerate(shape.layers))
    surgery.apply(model, PruningPlan("test", shape, layers))
    quantize.quantize_model(model, base, size)
    model = add_lora(model, 4, 8, 0.0, {"ffn": 6}).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def saved(model: Any, folder: Path) -> Path:
    """The model's base and adapters, as `fit` leaves them."""
    base, wide = views.view_without_adapters(model), None
    if get_quantization(base) == "int4":
        wide = views.view_as_plain_linears(base, find_common_group_size(base))
    prunelit.save(base, folder / "base")
    (folder / "adapter").mkdir()
    adapter_files.write_adapter(model, folder / "adapter", str(folder / "base"), wide)
    return folder


@pytest.mark.slow
def test_peft_reads_them_in_a_new_process(tmp_path: Path) -> None:
    wanted = {}
    for name, (family, base) in {
        "a": ("llama", "none"),
        "b": ("llama", "int4"),
        "c": ("phi3", "int4"),
        "d": ("gpt2", "none"),
    }.items():
        model = adapted(family, base)
        saved(model, tmp_path / name)
        torch.save(tokens(), tmp_path / name / "ids.pt")
        wanted[name] = logits(model), logits(merge_adapters(model))
    command = [sys.executable, "-c", _PEFT, *(str(tmp_path / name) for name in wanted)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for name, expected in wanted.items():
        found = torch.load(tmp_path / name / "logits.pt")
        assert near(found, expected[0]) and near(found, expected[1]), name
        settings = json.loads((tmp_path / name / "adapter" / "adapter_config.json").read_text())
        assert settings["base_model_name_or_path"] == str(tmp_path / name / "base")


@pytest.mark.parametrize("size", [16, 128])
@pytest.mark.parametrize("family", ["llama", "phi3", "opt"])
def test_group_adapters_merge_into_zeros_from_their_folder(family: str, size: int, tmp_path: Path) -> None:
    model = adapted(family, "int4", size)
    folder, wanted = saved(model, tmp_path / "run"), logits(model)
    adapter_files.check_adapter(folder / "adapter", str(folder / "base"))
    four_bit = loading.load(folder / "base", four_bit=True)
    codes = [module.packed.clone() for module in four_bit.modules() if hasattr(module, "packed")]
    again = merge.merge_adapter_folder(four_bit, folder / "adapter")
    assert get_quantization(again) == "int4" and near(logits(again), wanted)
    after = [module.packed for module in again.modules() if hasattr(module, "packed")]
    assert all(torch.equal(a, b) for a, b in zip(codes, after, strict=True))
    assert near(logits(merge.merge_adapter_folder(loading.load(folder / "base"), folder / "adapter")), wanted)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_plain_adapters_merge_from_their_folder(family: str, tmp_path: Path) -> None:
    model = adapted(family, "none")
    folder, wanted = saved(model, tmp_path / "run"), logits(model)
    adapter_files.check_adapter(folder / "adapter", str(folder / "base"))
    assert near(logits(merge.merge_adapter_folder(loading.load(folder / "base"), folder / "adapter")), wanted)


def test_an_adapter_that_tells_a_group_apart_is_not_merged_into_zeros(tmp_path: Path) -> None:
    folder = saved(adapted("llama", "none", more=0), tmp_path / "run")
    base = loading.load(folder / "base")
    quantize.quantize_model(base, "int4", 16)
    before = logits(base)
    with pytest.raises(BadAdapter, match="one value for all inputs of an INT4 group of 16, got several"):
        merge.merge_adapter_folder(base, folder / "adapter")
    assert torch.equal(logits(base), before)


@pytest.mark.parametrize("base", ["none", "int4"])
def test_another_cut_is_refused_before_a_model_is_loaded(
    base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = saved(adapted("llama", base), tmp_path / "mine")
    other = saved(adapted("llama", base, more=8), tmp_path / "other")
    model = loading.load(other / "base")
    monkeypatch.setattr(loading, "load", lambda *a, **k: pytest.fail("the model was loaded"))
    reason = r"layers\.1\.mlp\.\w+: expected a linear of \[.*\] in .*, got \[.*\]; it was made for another cut"
    with pytest.raises(BadAdapter, match=reason):
        adapter_files.check_adapter(mine / "adapter", str(other / "base"))
    with pytest.raises(BadAdapter, match=reason):  # where the source is no folder
        merge.merge_adapter_folder(model, mine / "adapter")
    adapter_files.check_adapter(mine / "adapter", "owner/name")


def _edit(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (lambda folder: (folder / "adapter_config.json").unlink(), "expected a folder with adapter_config.json and"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "adapter_config.json cannot be read"),
        (lambda folder: _edit(folder, peft_type="IA3"), "expected peft_type LORA, got 'IA3'"),
        (lambda folder: _edit(folder, use_dora=True), "expected plain LoRA, got DoRA or biases"),
        (lambda folder: _edit(folder, bias="all"), "expected plain LoRA, got DoRA or biases"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"x" * 40), "safetensors cannot be read"),
        (lambda folder: save_file({"x": torch.zeros(1)}, folder / "adapter_model.safetensors"), "pairs of lora_A and"),
    ],
)
def test_broken_adapters_are_said(break_it: Any, reason: str, tmp_path: Path) -> None:
    folder = saved(adapted("llama", "none"), tmp_path / "run") / "adapter"
    break_it(folder)
    with pytest.raises(BadAdapter, match=reason):
        adapter_files.check_adapter(folder, str(tmp_path / "run" / "base"))


def test_rank_stabilised_scaling_is_pefts(tmp_path: Path) -> None:
    folder = saved(adapted("llama", "int4", more=0), tmp_path / "run")
    _edit(folder / "adapter", use_rslora=True)
    plain = logits(merge.merge_adapter_folder(loading.load(folder / "base"), folder / "adapter"))
    zeros = logits(merge.merge_adapter_folder(loading.load(folder / "base", four_bit=True), folder / "adapter"))
    assert near(zeros, plain)


@pytest.mark.parametrize("change", [lambda x: x[:9000], lambda x: b""])
def test_a_damaged_base_is_one_line(change: Any, tmp_path: Path) -> None:
    folder = saved(adapted("llama", "none"), tmp_path / "run")
    file = folder / "base" / "model.safetensors"
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(SourceNotFound, match=r"cannot be loaded: model\.safetensors") as error:
        adapter_files.check_adapter(folder / "adapter", str(folder / "base"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("base", ["none", "int4"])
def test_names_stand_in_one_order_in_every_process(base: str, tmp_path: Path) -> None:
    """PEFT holds them in a set."""
    adapter_files.write_adapter(adapted("llama", base), tmp_path, "base")
    names = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert len(names) == 7 and names == sorted(names)
