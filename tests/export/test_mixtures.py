"""Mixtures of experts in every format: saved equals loaded, by the stock class where one holds the shapes."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from prunelit.core.architectures import ARCHITECTURES
from prunelit.core.plan import LayerPlan, LayerShape, PruningPlan
from prunelit.data import loading
from prunelit.export import save
from prunelit.export.formats import ExportJob
from prunelit.export.proof.compare import prove_folder
from prunelit.model import surgery
from prunelit.model.decoder import Decoder
from prunelit.runtime.errors import DoesNotFit
from tests.export.alike import generated, logits, plan_with
from tests.tiny import EXPERT_KINDS, KINDS, MIXTURES, cut, find_row, keep, tiny, tokens

# Router by softmax, groups with a correction, transposed and interleaved, a shared expert, weights on the input.
FAST = ("mixtral", "deepseek_v3", "gpt_oss", "qwen2_moe", "llama4_text")
EACH_MIXTURE = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in MIXTURES]
# Families whose config has one value for the width of an expert and that of another FFN.
ONE_WIDTH = {"jamba": "dense", "llama4_text": "shared"}


def keep_last_experts(shape: LayerShape) -> LayerPlan:
    """The last experts in every group of the router: all but one, or half of them where there are several groups."""
    size = shape.experts // shape.expert_groups
    kept = size - 1 if shape.expert_groups == 1 else size // 2
    experts = (group * size + expert for group in range(shape.expert_groups) for expert in range(size - kept, size))
    return replace(LayerPlan.dense(shape), experts=tuple(experts))


def keep_expert_channels(shape: LayerShape) -> LayerPlan:
    return replace(LayerPlan.dense(shape), expert_channels=tuple(range(8, 24)))


def keep_last_groups(shape: LayerShape) -> LayerPlan:
    return keep(shape, groups=tuple(range(1, shape.kv_groups))) if shape.heads_prunable else LayerPlan.dense(shape)


def keep_channels(shape: LayerShape) -> LayerPlan:
    """Dense FFNs lose a third of their channels, shared ones half: a multiple of an expert's."""
    cut_away = shape.ffn_channels // 2 if shape.experts else shape.ffn_channels // 3
    return replace(LayerPlan.dense(shape), ffn_channels=tuple(range(cut_away, shape.ffn_channels)))


CUTS: dict[str, Callable[[LayerShape], LayerPlan]] = {
    "experts": lambda shape: keep_last_experts(shape) if shape.experts else LayerPlan.dense(shape),
    "expert_channels": lambda shape: keep_expert_channels(shape) if shape.experts else LayerPlan.dense(shape),
    "groups": keep_last_groups,
    "channels": keep_channels,
}


def plan_alike(model: Any, kind: str) -> PruningPlan:
    """A plan that cuts all layers in the same way, or removes a whole layer ("layer 1")."""
    shapes = Decoder(model).shape.layers
    if kind in CUTS:
        return plan_with(model, *map(CUTS[kind], shapes))
    gone = int(kind.removeprefix("layer "))
    whole = (keep(shape, (), channels=(), mixer=False) if i == gone else None for i, shape in enumerate(shapes))
    return plan_with(model, *(plan or LayerPlan.dense(shape) for plan, shape in zip(whole, shapes, strict=True)))


def changes_something(plan: PruningPlan) -> bool:
    return plan.layers != tuple(map(LayerPlan.dense, plan.model.layers))


def assert_same_model(found: Any, expected: Any) -> None:
    torch.testing.assert_close(logits(found), logits(expected), rtol=0, atol=1e-5)
    assert generated(found) == generated(expected)
    cached = found.generate(tokens(), max_new_tokens=4, do_sample=False, use_cache=True)
    assert torch.equal(cached, found.generate(tokens(), max_new_tokens=4, do_sample=False, use_cache=False))


# Format uniform -------------------------------------------------------------------------------------------------------


def is_stock(family: str, kind: str) -> bool:
    """Whether a stock class can have such widths."""
    return not (family in ONE_WIDTH and kind in ("expert_channels", "channels"))


@pytest.mark.parametrize("kind", [*CUTS, "layer 0", "layer 1"])
@pytest.mark.parametrize("family", EACH_MIXTURE)
def test_layers_alike_become_a_stock_class(family: str, kind: str, tmp_path: Path) -> None:
    if kind.startswith("layer") and "layer" in find_row(family).lacks:
        pytest.skip("no layer of this family can go")
    model = tiny(family)
    stock, plan = type(model), plan_alike(model, kind)
    if not changes_something(plan):
        pytest.skip("the family has no such units")
    surgery.apply(model, plan)
    written = save(model, tmp_path / "m", plan=plan)
    assert written == ("uniform" if is_stock(family, kind) else "hetero")
    if written == "hetero":
        assert_same_model(loading.load(tmp_path / "m"), model)
        return
    assert not list((tmp_path / "m").glob("*.py"))
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert type(again) is stock and not info["missing_keys"] and not info["unexpected_keys"]
    assert_same_model(again, model)
    # The rotary table of a type of layers that is gone is not built again.
    assert dict(again.named_buffers()).keys() <= dict(model.named_buffers()).keys()


@pytest.mark.parametrize("family", ONE_WIDTH)
def test_widths_that_share_a_config_value_stay_stock_where_they_are_cut_alike(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    shapes, channels = Decoder(model).shape.layers, tuple(range(8, 24))
    with_value = {"dense": lambda shape: not shape.experts, "shared": lambda shape: shape.experts > 0}[
        ONE_WIDTH[family]
    ]
    plans = (
        replace(
            LayerPlan.dense(shape),
            ffn_channels=channels if with_value(shape) and shape.ffn_channels else tuple(range(shape.ffn_channels)),
            expert_channels=channels if shape.experts else (),
        )
        for shape in shapes
    )
    surgery.apply(model, plan_with(model, *plans))
    assert save(model, tmp_path / "m") == "uniform"
    assert_same_model(AutoModelForCausalLM.from_pretrained(tmp_path / "m"), model)


@pytest.mark.parametrize(
    ("family", "removed", "expected"),
    [
        ("glm4_moe", (0,), {"first_k_dense_replace": 0, "num_hidden_layers": 2}),
        ("glm4_moe", (1, 2), {"first_k_dense_replace": 1, "num_hidden_layers": 1}),
        ("qwen2_moe", (0,), {"mlp_only_layers": [], "num_hidden_layers": 2}),
        ("qwen2_moe", (1, 2), {"mlp_only_layers": [0], "num_hidden_layers": 1}),
        ("llama4_text", (1,), {"moe_layers": [1], "layer_types": ["chunked_attention", "chunked_attention"]}),
        ("dots1", (1,), {"first_k_dense_replace": 1, "layer_types": ["sliding_attention", "sliding_attention"]}),
    ],
)
def test_config_says_which_of_the_remaining_layers_have_experts(
    family: str, removed: tuple[int, ...], expected: dict[str, Any], tmp_path: Path
) -> None:
    model = tiny(family)
    shapes = Decoder(model).shape.layers
    plans = (keep(shape, (), channels=()) if i in removed else LayerPlan.dense(shape) for i, shape in enumerate(shapes))
    surgery.apply(model, plan_with(model, *plans))
    assert save(model, tmp_path / "m") == "uniform"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert {name: getattr(again.config, name) for name in expected} == expected
    assert_same_model(again, model)


def test_uneven_experts_are_named_where_a_stock_class_is_asked_for(tmp_path: Path) -> None:
    model = tiny("qwen2_moe")
    surgery.apply(model, cut(model, "expert"))
    with pytest.raises(
        DoesNotFit, match=r"3 experts of 40 channels in layer 1, .* 2 experts of 40 channels in layer 2"
    ):
        save(model, tmp_path / "m", format="uniform")
    assert not list(tmp_path.iterdir())


# Format hetero --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*EXPERT_KINDS, "mixed", *KINDS])
@pytest.mark.parametrize("family", EACH_MIXTURE)
def test_layers_of_different_shape_load_both_ways(family: str, kind: str, tmp_path: Path) -> None:
    if kind in find_row(family).lacks:
        pytest.skip("the family has no such units")
    model = tiny(family)
    plan = cut(model, kind)
    surgery.apply(model, plan)
    assert save(model, tmp_path / "m", plan=plan, format="hetero") == "hetero"
    ours = loading.load(tmp_path / "m")
    assert [layer.shape for layer in Decoder(ours)] == [layer.shape for layer in Decoder(model)]
    assert_same_model(ours, model)
    assert_same_model(AutoModelForCausalLM.from_pretrained(tmp_path / "m", trust_remote_code=True), model)


@pytest.mark.parametrize("family", ["glm4_moe", "gpt_oss", "granitemoe", "qwen2_moe"])
def test_a_loaded_mixture_is_cut_and_saved_again(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    surgery.apply(model, cut(model, "mixed"))
    save(model, tmp_path / "once")
    for each in (model, loading.load(tmp_path / "once")):
        shapes = Decoder(each).shape.layers
        plans = [keep_expert_channels(shape) if shape.experts else LayerPlan.dense(shape) for shape in shapes]
        surgery.apply(each, plan_with(each, *plans))
        assert save(each, tmp_path / "twice", overwrite=True) == "hetero"
        assert_same_model(loading.load(tmp_path / "twice"), model)


def test_a_folder_of_mixtures_alike_becomes_stock_again(tmp_path: Path) -> None:
    model = tiny("qwen2_moe")
    surgery.apply(model, plan_alike(model, "experts"))
    assert save(model, tmp_path / "once", format="hetero") == "hetero"
    assert save(loading.load(tmp_path / "once"), tmp_path / "twice") == "uniform"
    assert "mixture_widths" not in json.loads((tmp_path / "twice" / "config.json").read_text())
    assert_same_model(AutoModelForCausalLM.from_pretrained(tmp_path / "twice"), model)


@pytest.mark.slow
@pytest.mark.new_process
@pytest.mark.parametrize(("family", "kind"), [("deepseek_v3", "experts"), ("gpt_oss", "mixed")])
def test_the_proof_runs_on_mixtures_in_a_new_process(family: str, kind: str, tmp_path: Path) -> None:
    model = tiny(family)
    surgery.apply(model, plan_alike(model, kind) if kind == "experts" else cut(model, kind))
    folder = tmp_path / "m"
    written = save(model, folder, fresh_process=True)
    assert json.loads((folder / "proof.json").read_text())["passed"]
    with torch.no_grad():  # and it fails on another router
        next(layer.experts for layer in Decoder(model) if layer.experts is not None).router.weight.neg_()
    verdict = prove_folder(ExportJob(model, folder, fresh_process=True), remote_code=written == "hetero")
    assert not verdict["passed"] and "does not read back equal" in verdict["why"]


# Other formats --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", EACH_MIXTURE)
def test_padded_fills_up_what_is_no_expert(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    stock = type(model)
    surgery.apply(model, cut(model, "channel" if "channel" not in find_row(family).lacks else "mlp"))
    save(model, tmp_path / "m", format="padded")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert type(again) is stock
    assert_same_model(again, model)


@pytest.mark.parametrize("kind", EXPERT_KINDS)
@pytest.mark.parametrize("family", ["mixtral", "glm4_moe"])
def test_padded_refuses_uneven_mixtures(family: str, kind: str, tmp_path: Path) -> None:
    model = tiny(family)
    surgery.apply(model, cut(model, kind))
    with pytest.raises(
        DoesNotFit, match=r"format 'padded': expected mixtures of one shape, got .* use format 'hetero'"
    ):
        save(model, tmp_path / "m", format="padded")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_deci_has_no_experts(family: str, tmp_path: Path) -> None:
    with pytest.raises(DoesNotFit, match=f"format 'deci': expected a model of .*, got '{family}'; use 'hetero'"):
        save(tiny(family), tmp_path / "m", format="deci")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", ["mixtral", "llama4_text"])
def test_int4_has_no_experts(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    with pytest.raises(DoesNotFit, match="format 'int4': expected weights in linears only, got a mixture of experts"):
        save(model, tmp_path / "m", format="int4")
    assert not list(tmp_path.iterdir())


def test_every_mixture_is_tested() -> None:
    declared = {family for family, names in ARCHITECTURES.items() if names.mixture is not None}
    assert {row.model_type for row in MIXTURES.values()} <= declared
