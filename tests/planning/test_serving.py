"""What the table says of a plan is what the writers find by building the class; the rest follows what was read."""

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from prunelit.core.plan import LayerPlan, LayerShape, ModelShape, PruningPlan
from prunelit.export import padded
from prunelit.export.hetero import build_per_layer_model
from prunelit.export.uniform import build_stock_model
from prunelit.model import surgery
from prunelit.model.decoder import Decoder
from prunelit.planning import serving as serving_file
from prunelit.planning.serving import ServingRow, compute_deci_sizes, list_serving_notes, list_serving_options
from prunelit.planning.stock_shapes import compute_padded_mixture, compute_padded_widths
from prunelit.quantization.int4 import GROUP_SIZES
from prunelit.quantization.int4_folder import CODES_PER_WORD
from prunelit.repair import bias
from prunelit.runtime.errors import DoesNotFit
from tests.core.test_plan import layer_shape, model_shape
from tests.export.test_mixtures import CUTS, EACH_MIXTURE
from tests.tiny import EXPERT_KINDS, FAMILIES, KINDS, cut, find_row, keep, tiny

STOCK, HETERO = "transformers, stock class", "transformers, per-layer shapes"
PADDED = "transformers, padded"


def row(plan: PruningPlan, target: str) -> ServingRow:
    (found,) = (each for each in list_serving_options(plan) if each.target == target)
    return found


def ways(shape: LayerShape) -> Iterator[tuple[str, dict[str, tuple[int, ...]]]]:
    """Cuts that all layers can share: what `keep` takes."""
    yield "dense", {}
    yield "channels", {"channels": tuple(range(40))}
    if shape.heads_prunable:
        for groups in range(1, shape.kv_groups):
            yield f"{groups} groups", {"groups": tuple(range(groups)), "channels": tuple(range(48))}
        for heads in range(1, shape.group_size):
            yield f"{heads} heads of a group", {"heads_in_group": tuple(range(heads))}


def keep_in(shape: LayerShape, kept: dict[str, tuple[int, ...]]) -> LayerPlan:
    """What a layer keeps of the blocks that it has."""
    lacking = {"channels"} if not shape.ffn_channels else set()
    lacking |= {"groups", "heads_in_group"} if not shape.kv_groups else set()
    there = kept | {"channels": tuple(c for c in kept.get("channels", ()) if c < shape.ffn_channels)}
    return keep(shape, **{name: there[name] for name in kept if name not in lacking})


def uniform_plans(model: Any) -> Iterator[tuple[str, PruningPlan]]:
    shape = Decoder(model).shape
    for name, kept in ways(next((layer for layer in shape.layers if layer.kv_groups), shape.layers[0])):
        yield name, PruningPlan("test", shape, tuple(keep_in(layer, kept) for layer in shape.layers))
    if shape.has_experts:
        for name in ("experts", "expert_channels", "channels"):
            yield f"{name} of mixtures", PruningPlan("test", shape, tuple(map(CUTS[name], shape.layers)))


def carried_out(model: Any, plan: PruningPlan) -> Any:
    """The model cut, with the biases that the plan declares, all zeros."""
    surgery.apply(model, plan)
    for layer, kept in zip(Decoder(model), (k for k in plan.layers if not k.removed), strict=True):
        pairs = [(kept.attention_bias, getattr(layer, "output", None)), (kept.mlp_bias, getattr(layer, "down", None))]
        for added, linear in pairs:
            if added:
                linear.bias = nn.Parameter(torch.zeros(model.config.hidden_size))
    return model


def check(build: Any, plan: PruningPlan, what: str) -> None:
    model = carried_out(build(), plan)
    said = row(plan, STOCK)
    assert (said.answer == "yes") == (build_stock_model(model) is not None), (what, said)
    assert (row(plan, HETERO).answer == "yes") == (build_per_layer_model(model) is not None), what
    try:
        layers = [layer.shape for layer in Decoder(padded._build_padded_shell(model)[0])]
    except DoesNotFit:
        assert row(plan, PADDED).answer == "no", what
    else:
        assert row(plan, PADDED).answer == "yes", what
        dense = max((shape.ffn_channels for shape in layers if not shape.experts), default=0)
        heads = tuple(max(getattr(shape, name) for shape in layers) for name in ("query_heads", "kv_groups"))
        assert heads == compute_padded_widths(plan)[:2], what
        assert dense in (0, compute_padded_widths(plan)[2]), what
        mixtures = {(s.experts, s.expert_channels, s.ffn_channels) for s in layers if s.experts}
        assert mixtures <= {compute_padded_mixture(plan)}, what


@pytest.mark.parametrize("family", [*FAMILIES, *EACH_MIXTURE])
def test_transformers_rows_are_what_the_writers_find(family: str) -> None:
    def build() -> Any:
        return tiny(family)

    for name, plan in uniform_plans(build()):
        check(build, plan, name)
        check(build, bias.declare_biases(Decoder(build()), plan, True), f"{name}, with biases")
    for kind in (*KINDS, *(EXPERT_KINDS if Decoder(build()).shape.has_experts else ()), "mixed"):
        if kind not in find_row(family).lacks:
            check(build, cut(build(), kind), kind)
            check(build, bias.declare_biases(Decoder(build()), cut(build(), kind), True), f"{kind}, with biases")


def other_heads(family: str) -> bool:
    """Whether the family says its number of heads as most do, and can lose some."""
    row = FAMILIES[family]
    return "num_attention_heads" in row.sizes and "kv_group" not in row.lacks


@pytest.mark.parametrize("family", [f for f in FAMILIES if other_heads(f)])
def test_heads_that_do_not_divide_the_hidden_size(family: str) -> None:
    sizes = FAMILIES[family].sizes

    def build() -> Any:
        groups = {"num_key_value_heads": 6} if "num_key_value_heads" in sizes else {}
        head_dim = {"head_dim": 6} if "head_dim" in sizes else {}
        return tiny(family, num_attention_heads=12, **groups, **head_dim)

    for name, plan in uniform_plans(build()):
        if name.startswith(("5 groups", "7 groups", "4 groups")):
            check(build, plan, name)


# What the rest of the table says, on Llamas of 9 heads in 3 groups ---------------------------------------------------

SHAPE = layer_shape(9, 3, 8, 96, hidden=72)
LLAMA = model_shape(*[SHAPE] * 3, hidden=72)
DENSE = LayerPlan.dense(SHAPE)
NARROW = keep(SHAPE, channels=tuple(range(64)))
FEWER = keep(SHAPE, groups=(0, 1))
WIDER = layer_shape(9, 3, 8, 512, hidden=72)
WIDE, WIDE_FEWER = LayerPlan.dense(WIDER), keep(WIDER, groups=(0, 1), channels=tuple(range(256)))
WIDE_NO_ATTENTION, WIDE_NO_FFN = keep(WIDER, groups=()), keep(WIDER, channels=())
NO_ATTENTION, NO_FFN, GONE = keep(SHAPE, groups=()), keep(SHAPE, channels=()), keep(SHAPE, groups=(), channels=())

WIDES = (WIDE, WIDE_FEWER, WIDE_NO_ATTENTION)


def plan_of(*layers: LayerPlan, model: ModelShape = LLAMA, family: str = "llama") -> PruningPlan:
    return PruningPlan("test", replace(model, model_type=family), layers)


@pytest.mark.parametrize(
    ("target", "layers", "family", "answer", "says"),
    [
        (STOCK, (DENSE, GONE, DENSE), "llama", "yes", "alike"),
        (STOCK, (DENSE, NARROW, DENSE), "llama", "no", "FFN widths differ.*scope: layer"),
        (STOCK, (DENSE, FEWER, NARROW), "llama", "no", "heads and FFN widths differ.*scope: layer"),
        (STOCK, (DENSE, NO_FFN, DENSE), "llama", "no", "M1.*cuts widths"),
        (STOCK, (FEWER,) * 3, "gpt_neox", "no", r"head size.*ratio below 0\.333"),
        (STOCK, (DENSE,) * 3, "mpt", "?", "mpt"),
        ("vLLM, stock class", (FEWER,) * 3, "llama", "yes", ""),
        ("vLLM, stock class", (FEWER,) * 3, "qwen2", "yes", "--model-impl transformers: its qwen2 takes head size"),
        ("vLLM, stock class", (NARROW,) * 3, "qwen2", "yes", ""),
        ("vLLM, stock class", (FEWER,) * 3, "granite", "yes", "--model-impl transformers: whether"),
        ("vLLM, stock class", (DENSE, FEWER, DENSE), "llama", "no", "scope: layer"),
        ("vLLM, stock class", (NARROW,) * 3, "helium", "?", "no class"),
        ("vLLM, DeciLM", (WIDE, WIDE_NO_ATTENTION, WIDE_NO_FFN), "llama", "yes", "as it is"),
        (
            "vLLM, DeciLM",
            (WIDE, WIDE_FEWER, WIDE),
            "llama",
            "yes",
            "filled up with zeros: saves.* uniform_heads: true$",
        ),
        ("vLLM, DeciLM", (WIDE_NO_ATTENTION, WIDE, WIDE), "llama", "yes", r"zeros.* protect: \[0\]$"),
        ("vLLM, DeciLM", (DENSE, NARROW, DENSE), "llama", "yes", "as it is"),
        ("vLLM, DeciLM", (DENSE, NARROW, DENSE), "qwen3", "no", "qwen3.*scope: layer"),
        ("llama.cpp, own graph", (FEWER,) * 3, "mistral", "yes", "as llama"),
        ("llama.cpp, own graph", (DENSE, FEWER, DENSE), "llama", "no", "scope: layer"),
        ("llama.cpp, own graph", (DENSE,) * 3, "cohere", "?", "cohere"),
        ("llama.cpp, own graph", (FEWER,) * 3, "gemma", "yes", "as gemma"),
        ("llama.cpp, own graph", (FEWER,) * 3, "phi3", "no", "all the hidden size"),
        ("llama.cpp, deci graph", (DENSE, NO_FFN, FEWER), "llama", "yes", "32 channels of zeros"),
        ("llama.cpp, deci graph", (DENSE, NARROW, FEWER), "qwen3", "no", "qwen3.*scope: layer"),
        ("TensorRT-LLM", (NARROW,) * 3, "llama", "yes", ""),
        ("TensorRT-LLM", (FEWER,) * 3, "llama", "?", "not looked up"),
        ("TensorRT-LLM", (DENSE, NARROW, DENSE), "llama", "no", "scope: layer"),
        ("INT4, groups of 32", (DENSE,) * 3, "llama", "yes", "in groups of 8 .hidden size: 72"),
        ("INT4, groups of 32", (DENSE,) * 3, "gpt2", "no", "stored"),
    ],
)
def test_the_table(target: str, layers: tuple[LayerPlan, ...], family: str, answer: str, says: str) -> None:
    model = model_shape(*[WIDER if layers[1] in WIDES else SHAPE] * 3, hidden=72)
    found = row(plan_of(*layers, family=family, model=model), target)
    assert found.answer == answer
    assert re.search(says, f"{found.why} {found.option}"), found
    assert (found.known == "unread") == (answer == "?")
    assert found.answer != "yes" or "scope" not in found.option


def test_int4_rows_are_what_the_writer_takes() -> None:
    assert (serving_file.GROUP_SIZES, serving_file._CODES_PER_WORD) == (GROUP_SIZES, CODES_PER_WORD)


def test_int4_groups_name_the_width_that_does_not_divide() -> None:
    shape = layer_shape(9, 3, 64, 1536, hidden=576)
    model = model_shape(*[shape] * 2, hidden=576)
    odd = keep(shape, groups=(0,), channels=tuple(range(1500)))
    plan = plan_of(LayerPlan.dense(shape), odd, model=model)
    said = {each.target: each for each in list_serving_options(plan) if each.target.startswith("INT4")}
    assert {each.answer for each in said.values()} == {"yes"}
    assert said["INT4, groups of 64"].option == "align: 64" and "in 1 layer" in said["INT4, groups of 64"].why
    assert said["INT4, groups of 128"].why.startswith("in groups of 64 (hidden size: 576 inputs); channels of zeros")
    narrow = layer_shape(9, 3, 4, 96, hidden=36)
    few = row(plan_of(LayerPlan.dense(narrow), model=model_shape(narrow, hidden=36)), "INT4, groups of 32")
    assert (few.answer, few.why) == ("no", "hidden size: 36 inputs, no multiple of 8")


def test_padding_to_the_widest_layer_says_what_it_still_saves() -> None:
    plan = plan_of(FEWER, NARROW, NO_FFN)
    assert compute_padded_widths(plan) == (9, 3, 96)
    narrow = plan_of(keep(SHAPE, groups=(1,), channels=tuple(range(48))), GONE, keep(SHAPE, channels=tuple(range(64))))
    assert compute_padded_widths(narrow) == (9, 3, 64)
    left = 2 * SHAPE.parameters_at(9, 3, 64)
    assert f"saves {1 - left / LLAMA.block_parameters:.1%}" in row(narrow, "transformers, padded").why
    larger = serving_file._describe_savings(serving_file.PrunedShape(narrow), -0.996)
    assert larger == "saves nothing: zeros make the layers 2 times as large as the dense ones"
    assert compute_padded_widths(plan_of(FEWER, FEWER, FEWER, family="gpt_neox")) == (
        9,
        3,
        96,
    )  # its head size is 72 / heads


def test_notes_on_widths_and_gpus() -> None:
    eight = layer_shape(8, 4, 8, 128)
    model = model_shape(*[eight] * 2)
    whole = plan_of(*[LayerPlan.dense(eight)] * 2, model=model)
    assert list_serving_notes(whole) == [
        "tensor parallel over 2, 4, 8 GPUs: heads, KV groups (or copies of them) and channels divide"
    ]
    odd = plan_of(LayerPlan.dense(eight), keep(eight, groups=(0, 1, 2), channels=tuple(range(100))), model=model)
    width, parallel = list_serving_notes(odd)
    assert "1 layer (1)" in width and "align: 64" in width
    assert parallel.startswith("tensor parallel: no number of GPUs from 2 to 8 divides heads, KV groups and channels")


def test_the_option_named_makes_it_serve() -> None:
    """DeciLM takes a global cut with zeros; with `uniform_heads` heads need none; with `scope: layer` all take it."""
    from tests.callbacks.test_contract import pruned

    plans = {
        name: pruned("magnitude", tiny("llama"), ratio=0.5, align=8, **options)
        for name, options in {
            "global": {"scope": "global"},
            "uniform_heads": {"scope": "global", "uniform_heads": True},
            "layer": {"scope": "layer"},
        }.items()
    }
    said = {name: {each.target: each for each in list_serving_options(plan)} for name, plan in plans.items()}
    assert said["global"][STOCK].answer == "no"
    assert "uniform_heads: true" in said["global"]["vLLM, DeciLM"].option
    assert "uniform_heads" not in said["uniform_heads"]["vLLM, DeciLM"].option
    for target in (STOCK, "vLLM, stock class", "llama.cpp, own graph"):
        assert said["layer"][target].answer == "yes"


def test_sizes_of_a_folder_for_decilm() -> None:
    eight = layer_shape(8, 4, 8, 300)
    few = keep(eight, groups=(0, 1, 2), channels=tuple(range(200)))
    ones = keep(eight, heads_in_group=(0,))
    model = model_shape(*[eight] * 3)
    assert compute_deci_sizes(plan_of(LayerPlan.dense(eight), few, ones, model=model)) == [
        (8, 4, 300),
        (8, 4, 200),
        (8, 4, 300),
    ]
    gone = keep(eight, groups=())
    assert compute_deci_sizes(plan_of(gone, few, few, model=model)) == [(6, 1, 300), (6, 3, 200), (6, 3, 200)]
    assert compute_deci_sizes(plan_of(few, gone, few, model=model))[1] == (0, 0, 300)


def test_vllm_takes_mixtures_with_fewer_experts_that_it_was_tried_with() -> None:
    def judge(family: str, kind: str) -> Any:
        rows = {row.target: row for row in list_serving_options(cut(tiny(family), kind))}
        return rows["vLLM, stock class"]

    plan = cut(tiny("mixtral"), "expert")
    alike = replace(plan, layers=(plan.layers[0],) * len(plan.layers))
    row = {row.target: row for row in list_serving_options(alike)}["vLLM, stock class"]
    assert row.answer == "yes" and "fewer experts" in row.why
    assert judge("mixtral", "kv_group").answer in ("?", "no")
    assert judge("mixtral", "expert").answer == "no"  # other numbers in every layer
