"""One contract for every multimodal model: its decoder is cut, its tower stays, and the whole model loads again."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

import prunelit
from prunelit.cli.main import main
from prunelit.core.plan import LayerPlan, PruningPlan
from prunelit.export.write import write_model
from prunelit.model import surgery
from prunelit.model.decoder import Decoder
from prunelit.model.text_model import extract_text_model, list_picture_tokens, list_tower_parameters
from prunelit.planning.block_sets import list_blocks
from prunelit.pruning.registry import method_class
from prunelit.runtime.errors import BadPlan
from tests.export.alike import plan_with
from tests.export.tokenizers_of import VOCABULARY, tokenizer
from tests.tiny import cut, keep, tiny_tokenizer, tokens
from tests.tiny_multimodal import inputs_with_picture, tiny_multimodal

TOLERANCE = 1e-5  # of logits
# Further families: tests/core/test_multimodal_decoders.py.
NAMED = ("gemma3", "mistral3", "smolvlm", "idefics3", "internvl", "llava", "qwen2_5_vl", "qwen3_vl")
KINDS = ("kv_group", "query_head", "channel", "attention", "mlp", "layer", "mixed")


@torch.no_grad()
def logits(model: Any, **inputs: Tensor) -> Tensor:
    return model(**inputs, use_cache=False).logits


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", NAMED)
def test_cut_equals_masked_with_a_picture_and_without(family: str, kind: str) -> None:
    model = tiny_multimodal(family)
    plan, masked = cut(model, kind), copy.deepcopy(model)
    dense = logits(model, **inputs_with_picture(family))
    surgery.mask_pruned_units(masked, plan)
    surgery.apply(model, plan)
    with_picture = logits(model, **inputs_with_picture(family))
    assert_close(with_picture, logits(masked, **inputs_with_picture(family)))
    assert (with_picture - dense).abs().max() > 100 * TOLERANCE
    assert_close(logits(model, input_ids=tokens()), logits(masked, input_ids=tokens()))
    assert sum(parameter.numel() for parameter in model.parameters()) == plan.predicted["parameters"]


@pytest.mark.parametrize("family", NAMED)
def test_the_picture_counts(family: str) -> None:
    """Otherwise the other tests would say nothing of the tower."""
    model, inputs = tiny_multimodal(family), inputs_with_picture(family)
    other = inputs | {"pixel_values": inputs["pixel_values"].flip(-1)}
    assert (logits(model, **inputs) - logits(model, **other)).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("family", NAMED)
def test_cache_changes_nothing(family: str) -> None:
    model, inputs = tiny_multimodal(family), inputs_with_picture(family)
    surgery.apply(model, cut(model, "mixed"))
    options = {"max_new_tokens": 3, "do_sample": False, "suppress_tokens": list_picture_tokens(model.config)}
    texts = [model.generate(**inputs, **options, use_cache=use_cache) for use_cache in (True, False)]
    assert torch.equal(*texts)


@pytest.mark.parametrize("family", NAMED)
def test_tower_stays_bit_for_bit(family: str) -> None:
    model = tiny_multimodal(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batches = [inputs_with_picture(family), {"input_ids": tokens(2, 12)}]
    method_class("flap")(ratio=0.25, align=8).prune(model, batches)
    tower = {id(parameter) for parameter in list_tower_parameters(model)}
    names = [name for name, parameter in model.named_parameters() if id(parameter) in tower]
    after = model.state_dict()
    assert names and all(torch.equal(before[name], after[name]) for name in names)
    assert not any("lm_head" in name or "embed_tokens" in name for name in names)


@pytest.mark.parametrize("kind", ["query_head", "mixed"])
@pytest.mark.parametrize("family", NAMED)
def test_saved_equals_loaded(family: str, kind: str, tmp_path: Path) -> None:
    model = tiny_multimodal(family)
    plan = cut(model, kind)
    surgery.apply(model, plan)
    model.config.name_or_path = ""
    name = write_model(model, tmp_path / "out", tiny_tokenizer(), plan).format
    loaded = prunelit.load(tmp_path / "out")
    assert_close(logits(loaded, **inputs_with_picture(family)), logits(model, **inputs_with_picture(family)))
    if name == "uniform":  # the full class, and not one of the decoder alone
        stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
        assert type(stock) is type(model)
        assert_close(logits(stock, **inputs_with_picture(family)), logits(model, **inputs_with_picture(family)))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "AutoModelForImageTextToText" in card and "AutoProcessor" in card


def test_per_layer_folder_names_both_types(tmp_path: Path) -> None:
    model = tiny_multimodal("llava")
    surgery.apply(model, cut(model, "mixed"))
    write_model(model, tmp_path / "out", tiny_tokenizer())
    config = prunelit.load(tmp_path / "out").config
    assert (config.model_type, config.text_config.model_type) == ("pruned_llava", "pruned_llama")


def test_a_hetero_folder_of_layers_alike_becomes_a_stock_class(tmp_path: Path) -> None:
    model = tiny_multimodal("llava")
    surgery.apply(model, cut(model, "channel"))
    write_model(model, tmp_path / "first", tiny_tokenizer())
    again = prunelit.load(tmp_path / "first")
    narrowest = min(shape.ffn_channels for shape in Decoder(again).shape.layers)
    alike = [keep(shape, channels=tuple(range(narrowest))) for shape in Decoder(again).shape.layers]
    surgery.apply(again, plan_with(again, *alike))
    assert write_model(again, tmp_path / "out", tiny_tokenizer()).format == "uniform"
    config = prunelit.load(tmp_path / "out").config
    assert (config.model_type, config.text_config.model_type) == ("llava", "llama")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma3", "llava", "qwen3_vl"])
def test_plain_transformers_loads_layers_that_differ(family: str, tmp_path: Path) -> None:
    model = tiny_multimodal(family)
    surgery.apply(model, cut(model, "mixed"))
    written = write_model(model, tmp_path / "out", tiny_tokenizer(), fresh_process=True)
    assert written.format == "hetero" and written.proof["passed"]
    assert written.proof["loader"].startswith("AutoModelForImageTextToText")


@pytest.mark.parametrize("family", NAMED)
def test_text_model_computes_the_same(family: str, tmp_path: Path) -> None:
    model = tiny_multimodal(family)
    surgery.apply(model, cut(model, "mixed"))
    text_model = extract_text_model(model)
    assert_close(logits(text_model, input_ids=tokens()), logits(model, input_ids=tokens()))
    write_model(model, tmp_path / "out", tiny_tokenizer(), text_only=True)
    loaded = prunelit.load(tmp_path / "out")
    assert_close(logits(loaded, input_ids=tokens()), logits(model, input_ids=tokens()))
    assert not list_tower_parameters(loaded)


def test_parameters_outside_the_decoder_layers_are_told_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_multimodal("llava")
    model.save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    tower = sum(parameter.numel() for parameter in list_tower_parameters(model))
    in_layers = sum(parameter.numel() for parameter in Decoder(model).layer_modules.parameters())
    others = sum(parameter.numel() for parameter in model.parameters()) - in_layers
    given = ["--model", str(tmp_path / "dense"), "--method", "magnitude", "--ratio", "0.3", "--align", "8"]
    assert main(["plan", *given, "--out", str(tmp_path / "plan.json")]) == 0, capsys.readouterr()
    said = capsys.readouterr().out
    assert f"; outside the decoder layers {others:,} stay" in said
    row = next(line for line in said.splitlines() if line.startswith("other parameters"))
    assert row.split()[2:] == [f"{others:,}", f"{others:,}", "1.000"]
    assert main(["prune", *given, "--out", str(tmp_path / "cut")]) == 0, capsys.readouterr()
    apart = f"stay {others - tower:,} of embeddings, last norm and head, {tower:,} of tower and projector"
    assert apart in capsys.readouterr().out
    report = json.loads((tmp_path / "cut" / "report.json").read_text())
    assert report["tower_parameters"] == tower
    assert all(report[row]["parameters"] - report[row]["block_parameters"] == others for row in ("dense", "pruned"))
    page = (tmp_path / "cut" / "report.html").read_text()
    assert "parameters outside of them" in page and f"{others:,}" in page
    assert "tower and projector" in page and f"{tower:,}" in page


def test_layers_that_get_features_by_number_stay() -> None:
    model = tiny_multimodal("qwen3_vl")
    shape = Decoder(model).shape
    assert [layer.fixed for layer in shape.layers] == [True, False, False]
    dense = [LayerPlan.dense(layer) for layer in shape.layers]
    with pytest.raises(BadPlan, match=r"layer 0: expected at least one block"):
        PruningPlan("test", shape, (LayerPlan((), (), ()), *dense[1:]))
    assert list_blocks(shape)
    inputs = inputs_with_picture("qwen3_vl")
    plan = method_class("shortgpt")(count=1, repair="none").prune(model, [inputs])
    assert not plan.layers[0].removed and sum(layer.removed for layer in plan.layers) == 1


@pytest.mark.parametrize("name", ["llm_bip", "wanda_sp", "taylor", "greedy_output", "block_pruner"])
def test_methods_read_pictures(name: str) -> None:
    """A method that dropped the picture would plan as it does without one."""
    inputs = inputs_with_picture("internvl")
    other = inputs | {"pixel_values": 5 * inputs["pixel_values"].flip(-1)}
    results = []
    for each in (inputs, other):
        method, results_of_run = method_class(name)(ratio=0.3), ResultListener()
        method.listeners.append(results_of_run)
        method.prune(tiny_multimodal("internvl"), [each])
        results.append(results_of_run.numbers)
    assert results[0] and results[0] != results[1]


class ResultListener:
    """Holds the scores, or the perplexities of a search, as a run tells them."""

    def __init__(self) -> None:
        self.numbers: list[Any] = []

    def on_event(self, kind: str, data: dict[str, Any]) -> None:
        self.numbers += [data[key] for key in ("heads", "channels", "perplexity") if key in data]


def test_gguf_holds_the_text_model(tmp_path: Path) -> None:
    files = []
    for name, take in (("whole", lambda model: model), ("text", extract_text_model)):
        model = tiny_multimodal("llava")
        surgery.apply(model, cut(model, "query_head"))
        torch.manual_seed(0)
        model.resize_token_embeddings(VOCABULARY)
        file = tmp_path / f"{name}.gguf"
        write_model(take(model), file, tokenizer("smollm"), format="gguf", unproved=True)
        files.append(file.read_bytes())
    assert files[0] == files[1]
