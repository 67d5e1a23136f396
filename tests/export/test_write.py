"""What is saved loads again equal, in plain transformers and in prunelit; what cannot be saved leaves nothing."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM, MistralForCausalLM

from prunelit.calibration import metrics
from prunelit.core.plan import LayerPlan, PruningPlan
from prunelit.data import loading
from prunelit.export import hetero, save
from prunelit.export.formats import FORMATS, load_export_format
from prunelit.export.uniform import build_if_shapes_match
from prunelit.export.write import check_format_fits
from prunelit.model import surgery
from prunelit.model.decoder import Decoder
from prunelit.runtime.errors import DoesNotFit, OutputNotWritable, PrunelitError
from tests.export.alike import assert_equal, compensate, logits, plan_with, uniform
from tests.runtime.test_atomic_files import old
from tests.tiny import FAMILIES, NEVER_STOCK, cut, keep, tiny, tiny_tokenizer, tokens


class Saved(NamedTuple):
    model: Any
    plan: PruningPlan
    folder: Path


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def shorter(model: Any) -> PruningPlan:
    """Fewer channels everywhere, and one whole layer gone where the family allows it."""
    channels = tuple(range(8, 72))
    return plan_with(
        model,
        *(
            keep(shape, (), channels=(), mixer=False)
            if index == 1 and not shape.fixed
            else keep(shape, channels=channels if shape.ffn_channels else None)
            for index, shape in enumerate(Decoder(model).shape.layers)
        ),
    )


@pytest.fixture
def hetero_folder(tmp_path: Path) -> Path:
    model = tiny("llama")
    plan = cut(model, "mixed")
    surgery.apply(model, plan)
    assert save(model, tmp_path / "hetero", plan=plan) == "hetero"
    return tmp_path / "hetero"


# Every family --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in NEVER_STOCK])
def test_layers_alike_become_a_stock_class(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    stock = type(model)
    surgery.apply(model, shorter(model))
    assert save(model, tmp_path / "m") == "uniform"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert type(again) is stock and again.config.num_hidden_layers == len(Decoder(model).layers)
    assert not list((tmp_path / "m").glob("*.py"))
    assert_equal(again, model)


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A model of every family whose layers differ in everything, and its folder."""
    model = tiny(request.param)
    plan = cut(model, "mixed")
    surgery.apply(model, plan)
    folder = tmp_path_factory.mktemp("saved") / request.param
    # Layers of one block each are gone with their block, and what remains is a stock class.
    assert save(model, folder, plan=plan) == ("uniform" if plan.is_uniform else "hetero")
    return Saved(model, plan, folder)


def test_plain_transformers_loads_layers_of_different_shape(saved: Saved) -> None:
    assert_equal(AutoModelForCausalLM.from_pretrained(saved.folder, trust_remote_code=True), saved.model)


def test_prunelit_loads_layers_of_different_shape(saved: Saved) -> None:
    ours = loading.load(saved.folder)
    torch.testing.assert_close(logits(ours), logits(saved.model), rtol=0, atol=0)
    assert [layer.shape for layer in Decoder(ours)] == [layer.shape for layer in Decoder(saved.model)]
    assert PruningPlan.load(saved.folder / "plan.json") == saved.plan


@pytest.mark.slow
def test_saving_again_writes_the_same_files(saved: Saved, tmp_path: Path) -> None:
    save(loading.load(saved.folder), tmp_path / "again", plan=saved.plan)
    assert files(tmp_path / "again") == files(saved.folder)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_loaded_model_is_cut_and_saved_again(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    surgery.apply(model, cut(model, "mixed"))
    save(model, tmp_path / "once")
    for each in (model, loading.load(tmp_path / "once")):
        shapes = Decoder(each).shape.layers
        kept = (LayerPlan.dense(shapes[0]), keep(shapes[1], channels=tuple(range(8))), LayerPlan.dense(shapes[2]))
        surgery.apply(each, plan_with(each, *kept))
        assert save(each, tmp_path / "twice", overwrite=True) == "hetero"
        assert_equal(loading.load(tmp_path / "twice"), model)


@pytest.mark.parametrize("removed", [(0,), (1,)], ids=str)
@pytest.mark.parametrize("family", ["cohere2", "gemma2", "mistral-sliding"])
def test_removed_attention_and_sliding_windows(family: str, removed: tuple[int, ...], tmp_path: Path) -> None:
    model = tiny(family)
    shapes = Decoder(model).shape.layers
    surgery.apply(model, plan_with(model, *(keep(s, () if i in removed else None) for i, s in enumerate(shapes))))
    assert save(model, tmp_path / "m") == "hetero"
    assert_equal(loading.load(tmp_path / "m"), model)


# Heads cut alike -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family", ["cohere-qk_norm", "glm", "llama", "mistral", "phi", "phi3", "qwen2", "qwen3-wide_heads"]
)
@pytest.mark.parametrize("cut_to", [{"groups": 2}, {"heads_in_group": 2}], ids=str)
def test_heads_cut_alike_stay_stock(family: str, cut_to: dict[str, int], tmp_path: Path) -> None:
    model = tiny(family)
    surgery.apply(model, uniform(model, **cut_to))
    assert save(model, tmp_path / "m") == "uniform"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["num_attention_heads"] == cut_to.get("groups", 3) * cut_to.get("heads_in_group", 3)
    assert_equal(again, model)


def test_llama_whose_heads_do_not_divide_its_width_becomes_a_mistral(tmp_path: Path) -> None:
    model = tiny("llama-mha", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0})
    surgery.apply(model, uniform(model, groups=5))
    assert model.config.hidden_size % 5
    assert save(model, tmp_path / "m") == "uniform"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert type(again) is MistralForCausalLM and again.config.sliding_window is None
    assert_equal(again, model)
    assert save(again, tmp_path / "again") == "uniform"
    assert_equal(loading.load(tmp_path / "again"), model)


def test_biases_that_no_mistral_has_are_kept(tmp_path: Path) -> None:
    model = tiny("llama-biases", num_key_value_heads=9)
    surgery.apply(model, uniform(model, groups=5))
    assert save(model, tmp_path / "m") == "hetero"
    assert_equal(loading.load(tmp_path / "m"), model)


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    model = tiny("llama", tie_word_embeddings=True)
    surgery.apply(model, cut(model, "mixed"))
    save(model, tmp_path / "m")
    again = loading.load(tmp_path / "m")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert "lm_head.weight" not in load_file(tmp_path / "m" / "model.safetensors")
    assert_equal(again, model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dtype_is_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    save(tiny("llama"), tmp_path / "dense")
    model = loading.load(tmp_path / "dense", dtype=dtype)
    surgery.apply(model, cut(model, "mixed"))
    save(model, tmp_path / "m")
    again = loading.load(tmp_path / "m")
    assert {parameter.dtype for parameter in again.parameters()} == {dtype}
    assert_equal(again, model)


def test_model_cast_after_loading_is_saved(tmp_path: Path) -> None:
    """As Lightning's precision "bf16-true" casts it: `.to` also casts the rotary frequencies, which no file holds."""
    model = tiny("llama").to(torch.bfloat16)
    assert save(model, tmp_path / "m") == "uniform"
    expected = {name: tensor.tolist() for name, tensor in model.state_dict().items()}
    assert {name: tensor.tolist() for name, tensor in loading.load(tmp_path / "m").state_dict().items()} == expected


def test_saving_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = tiny("llama").train()
    model.model.layers[0].eval()
    surgery.apply(model, cut(model, "channel"))
    modes = [module.training for module in model.modules()]
    before = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    save(model, tmp_path / "m")
    assert {name: (id(p), p.requires_grad) for name, p in model.named_parameters()} == before
    assert [module.training for module in model.modules()] == modes


# Without prunelit, without trust -------------------------------------------------------------------------------------

_PLAIN = """
import sys
sys.modules["prunelit"] = None  # any import of it fails, even where it is installed
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
with torch.no_grad():
    torch.save(model(input_ids=torch.load(sys.argv[2])).logits, sys.argv[3])
assert [name for name in sys.modules if name.startswith("prunelit")] == ["prunelit"]
"""


@pytest.mark.slow
def test_folder_loads_where_prunelit_is_not_installed(hetero_folder: Path, tmp_path: Path) -> None:
    torch.save(tokens(), tmp_path / "ids.pt")
    command = [sys.executable, "-I", "-c", _PLAIN, *map(str, (hetero_folder, tmp_path / "ids.pt", tmp_path / "out.pt"))]
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), logits(loading.load(hetero_folder)), rtol=0, atol=0)


def test_plain_transformers_saves_what_it_loaded(hetero_folder: Path, tmp_path: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(hetero_folder, trust_remote_code=True)
    plain.save_pretrained(tmp_path / "again")
    assert_equal(loading.load(tmp_path / "again"), plain)
    assert_equal(AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True), plain)
    with pytest.raises((ValueError, RuntimeError)):
        LlamaForCausalLM.from_pretrained(tmp_path / "again")


def test_untrusted_folder_is_refused(hetero_folder: Path) -> None:
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        AutoModelForCausalLM.from_pretrained(hetero_folder, trust_remote_code=False)


def test_tokenizer_of_the_folder_is_read_without_questions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = tiny("llama"), tiny_tokenizer()
    surgery.apply(model, cut(model, "mixed"))
    assert save(model, tmp_path / "m", tokenizer) == "hetero"
    capsys.readouterr()
    again = loading.load_tokenizer(tmp_path / "m")
    assert capsys.readouterr().out == ""  # transformers asks there whether it may run the folder's code
    assert again("what it says").input_ids == tokenizer("what it says").input_ids


def test_stock_class_refuses_the_folder(hetero_folder: Path) -> None:
    """Missing blocks must not be filled with random weights."""
    with pytest.raises((ValueError, RuntimeError)):
        LlamaForCausalLM.from_pretrained(hetero_folder)


def test_prunelit_runs_no_code_from_the_folder(hetero_folder: Path) -> None:
    expected = logits(loading.load(hetero_folder))
    (hetero_folder / "modeling_pruned.py").write_text("raise SystemExit('code from the folder was run')\n")
    torch.testing.assert_close(logits(loading.load(hetero_folder)), expected, rtol=0, atol=0)


# Added biases --------------------------------------------------------------------------------------------------------


SOME = ("llama", "phi3", "gpt2", "gemma2", "cohere", "olmo2", "falcon", "qwen2", "opt")


def biases_of(model: Any) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict().items() if name.endswith(".bias")}


@pytest.mark.parametrize("family", [f if f in SOME else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES])
@pytest.mark.parametrize("kind", ["mixed", "alike"])
def test_added_biases_are_saved(family: str, kind: str, tmp_path: Path) -> None:
    model = tiny(family)
    plan = compensate(model, cut(model, "mixed") if kind == "mixed" else uniform(model))
    size = metrics.measure_model_size(model)
    assert size == {name: plan.predicted[name] for name in size}
    written = save(model, tmp_path / "m", plan=plan)
    assert written == "hetero" or kind == "alike"
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "m", trust_remote_code=written == "hetero")
    ours = loading.load(tmp_path / "m")
    assert_equal(plain, model)
    assert_equal(ours, model)
    found, expected = biases_of(ours), biases_of(model)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert not any(value.any() for name, value in found.items() if name not in expected)
    if written == "hetero":
        assert found.keys() == expected.keys() and metrics.measure_model_size(ours) == size
    assert PruningPlan.load(tmp_path / "m" / "plan.json") == plan


@pytest.mark.parametrize("heads", [{}, {"groups": 2}, {"heads_in_group": 2}], ids=str)
@pytest.mark.parametrize("family", ["llama", "granite", "smollm3", "seed_oss", "hyperclovax"])
def test_a_config_that_can_have_biases_stays_stock(family: str, heads: dict[str, int], tmp_path: Path) -> None:
    model = tiny(family)
    stock = type(model)
    compensate(model, uniform(model, **heads))
    assert save(model, tmp_path / "m") == "uniform"
    assert not list((tmp_path / "m").glob("*.py"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    names = Decoder(model).architecture
    assert type(again) is stock and getattr(again.config, names.config_mlp_bias)
    assert getattr(again.config, names.config_attention_bias) is bool(heads)
    assert_equal(again, model)
    assert save(again, tmp_path / "again") == "uniform"


@pytest.mark.parametrize("family", ["mistral", "qwen2", "gemma2"])
def test_a_config_that_can_not_have_them_becomes_hetero(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    compensate(model, uniform(model))
    with pytest.raises(PrunelitError, match="'hetero'"):
        save(model, tmp_path / "u", format="uniform")
    assert save(model, tmp_path / "m") == "hetero"
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["per_layer_config"] == {str(layer): {"added_biases": ["mlp"]} for layer in range(3)}
    assert config["added_biases"] == []  # of layers that say nothing


def test_only_biases_may_be_spare() -> None:
    """Zeros stand for them; the gains of norms that a model lacks cannot be made up."""
    model, other = tiny("llama"), tiny("qwen3", rope_parameters={"rope_theta": 10000.0, "rope_type": "default"})
    surplus = {name.rsplit(".", 2)[1] for name in other.state_dict().keys() - model.state_dict().keys()}
    assert surplus == {"q_norm", "k_norm"} and not model.state_dict().keys() - other.state_dict().keys()
    assert build_if_shapes_match(type(other), other.config, model, spare_biases=True) is None
    biased = tiny("llama-biases")
    assert build_if_shapes_match(type(biased), biased.config, model, spare_biases=True) is not None
    assert build_if_shapes_match(type(biased), biased.config, model) is None


def test_layers_without_an_added_bias_have_none(tmp_path: Path) -> None:
    model = tiny("llama")
    first, *others = Decoder(model).shape.layers
    compensate(model, plan_with(model, keep(first, channels=tuple(range(40))), *map(LayerPlan.dense, others)))
    assert save(model, tmp_path / "m") == "hetero"
    assert list(biases_of(loading.load(tmp_path / "m"))) == ["model.layers.0.mlp.down_proj.bias"]


@pytest.mark.parametrize("family", ["mistral", "llama-mha", "gpt_neox", "falcon"])
def test_what_was_read_is_written_again(family: str, tmp_path: Path) -> None:
    """Also where the layers are alike, and only biases or head counts keep the folder from being a stock one."""
    model = tiny(family)
    compensate(model, uniform(model, groups=7 if family in ("llama-mha", "gpt_neox") else 2))
    assert save(model, tmp_path / "once") == "hetero"
    assert save(loading.load(tmp_path / "once"), tmp_path / "twice") == "hetero"
    assert_equal(AutoModelForCausalLM.from_pretrained(tmp_path / "twice", trust_remote_code=True), model)
    assert files(tmp_path / "once").keys() == files(tmp_path / "twice").keys()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "once", trust_remote_code=True)
    plain.save_pretrained(tmp_path / "plain")
    assert_equal(loading.load(tmp_path / "plain"), model)


def test_a_hetero_folder_of_layers_alike_becomes_stock_again(tmp_path: Path) -> None:
    model = tiny("llama")
    surgery.apply(model, uniform(model, groups=2))
    assert save(model, tmp_path / "once", format="hetero") == "hetero"
    assert save(loading.load(tmp_path / "once"), tmp_path / "twice") == "uniform"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "twice")
    assert type(again) is LlamaForCausalLM
    assert_equal(again, model)


@pytest.mark.parametrize("family", ["llama", "mistral", "phi3"])
def test_a_loaded_model_with_added_biases_is_cut_again(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    compensate(model, cut(model, "mixed"))
    save(model, tmp_path / "once")
    for each in (model, loading.load(tmp_path / "once")):
        shapes = Decoder(each).shape.layers
        kept = (LayerPlan.dense(shapes[0]), keep(shapes[1], channels=tuple(range(8))), LayerPlan.dense(shapes[2]))
        plan = compensate(each, plan_with(each, *kept))
        assert metrics.measure_model_size(each)["parameters"] == plan.predicted["parameters"]
        assert not any(layer.mlp_bias for layer in plan.layers)  # it has one by now
        assert save(each, tmp_path / "twice", overwrite=True) == "hetero"
        assert_equal(loading.load(tmp_path / "twice"), each)
        torch.testing.assert_close(logits(each), logits(model), rtol=0, atol=2e-6)  # means were summed twice


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_added_biases_keep_the_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    save(tiny("llama"), tmp_path / "dense")
    for name, plan in (("mixed", lambda m: cut(m, "mixed")), ("alike", uniform)):
        model = loading.load(tmp_path / "dense", dtype=dtype)
        compensate(model, plan(model))
        save(model, tmp_path / name)
        again = loading.load(tmp_path / name)
        assert {parameter.dtype for parameter in again.parameters()} == {dtype}
        assert_equal(again, model)


# Nothing half done ---------------------------------------------------------------------------------------------------


def test_folder_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputNotWritable, match="--overwrite"):
        save(tiny("llama"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_overwrite_replaces_the_folder(tmp_path: Path) -> None:
    target = tmp_path / "m"
    old(target)
    save(tiny("llama"), target, overwrite=True)
    assert not (target / "old.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert_equal(loading.load(target), tiny("llama"))


def test_empty_folder_is_used(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    assert save(tiny("llama"), tmp_path / "m") == "uniform"


def test_the_current_folder_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m").mkdir()
    monkeypatch.chdir(tmp_path / "m")
    assert save(tiny("llama"), ".") == "uniform"
    assert (tmp_path / "m" / "config.json").is_file()


def test_link_to_a_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk" / "m").mkdir(parents=True)
    (tmp_path / "m").symlink_to(tmp_path / "disk" / "m")
    save(tiny("llama"), tmp_path / "m")
    assert (tmp_path / "disk" / "m" / "config.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "m"]


def test_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m").write_text("a file")
    for target in (tmp_path / "m", tmp_path / "m" / "below"):
        with pytest.raises(OutputNotWritable, match="m"):
            save(tiny("llama"), target, overwrite=True)


@pytest.mark.parametrize("kind", ["channel", "mixed"])
def test_what_does_not_read_back_equal_leaves_nothing(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = loading.load

    def damaged(*args: Any, **kwargs: Any) -> Any:
        model = load(*args, **kwargs)
        model.get_output_embeddings().weight.data[:, 0] += 1.0
        return model

    monkeypatch.setattr(loading, "load", damaged)
    model = tiny("llama")
    surgery.apply(model, cut(model, kind))
    with pytest.raises(PrunelitError, match="does not read back equal"):
        save(model, tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_old_folder_survives_a_failed_overwrite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old(tmp_path / "m")
    model = tiny("llama")
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(PrunelitError):
        save(model, tmp_path / "m", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert (tmp_path / "m" / "old.txt").read_text() == "old"


@pytest.mark.parametrize(
    ("format", "family", "fits"),
    [
        ("uniform", "llama", False),
        ("hetero", "llama", True),
        ("padded", "llama", True),
        ("deci", "llama", True),
        ("deci", "gpt2", False),
        ("gguf", "qwen3", False),
    ],
)
def test_what_a_format_can_hold_is_known_before_anything_is_written(format: str, family: str, fits: bool) -> None:
    model = tiny(family)
    surgery.apply(model, cut(model, "mixed"))
    with nullcontext() if fits else pytest.raises(DoesNotFit, match=f"^format '{format}': expected"):
        check_format_fits(model, tiny_tokenizer(), format)


@pytest.mark.parametrize("format", FORMATS)
def test_two_formats_are_written_from_disk(format: str) -> None:
    assert load_export_format(format).accepts_streamed == (format in ("uniform", "hetero"))


def test_a_head_size_that_no_config_gives_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hetero, "build_if_shapes_match", lambda *arguments: None)
    with pytest.raises(DoesNotFit, match="no dense LlamaForCausalLM has heads of size 8; prune channels or"):
        hetero.build_per_layer_model(tiny("llama"))


def test_uniform_can_not_be_forced(tmp_path: Path) -> None:
    model = tiny("llama")
    surgery.apply(model, cut(model, "mixed"))
    with pytest.raises(PrunelitError, match="'hetero'"):
        save(model, tmp_path / "m", format="uniform")
    assert not list(tmp_path.iterdir())


def test_hetero_can_be_asked_for(tmp_path: Path) -> None:
    model = tiny("llama")
    surgery.apply(model, uniform(model))
    assert save(model, tmp_path / "m", format="hetero") == "hetero"
    assert_equal(loading.load(tmp_path / "m"), model)
