"""A plan is what it says: equal after JSON, right about what it leaves, and refused when it contradicts itself."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunelit.core.plan import LayerPlan, LayerShape, ModelShape, PruningPlan
from prunelit.runtime.errors import BadPlan


def layer_shape(heads: int = 8, groups: int = 4, dim: int = 8, channels: int = 96, hidden: int = 64) -> LayerShape:
    """A layer without biases, one RMS norm before each block; 0 heads or 0 channels: the block is not there."""
    attention = 2 * hidden * dim * (heads + groups) + hidden if heads else 0
    mlp = 3 * hidden * channels + hidden if channels else 0
    return LayerShape(heads, groups, dim, channels, 3, 2 * hidden * dim, 2 * hidden * dim, 3 * hidden, attention, mlp)


def model_shape(*layers: LayerShape, hidden: int = 64, vocabulary: int = 96) -> ModelShape:
    """A model with embedding, final norm and output projection, in half precision."""
    parameters = sum(layer.parameters for layer in layers) + 2 * vocabulary * hidden + hidden
    return ModelShape("llama", "tiny", hidden, parameters, vocabulary * hidden, 2, "0123456789abcdef", layers)


@st.composite
def plans(draw: st.DrawFn) -> PruningPlan:
    shapes, layers = [], []
    for index in range(draw(st.integers(1, 4))):
        groups, size, channels = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(0, 12))
        shapes.append(layer_shape(groups * size, groups, 8, channels))
        chance = random.Random(draw(st.integers(0, 999)))
        kept = sorted(chance.sample(range(groups), chance.randint(1 if index == 0 else 0, groups)))
        each = chance.randint(1, size)
        heads = [group * size + head for group in kept for head in sorted(chance.sample(range(size), each))]
        ffn = sorted(chance.sample(range(channels), chance.randint(0, channels)))
        layers.append(LayerPlan(tuple(heads), tuple(kept), tuple(ffn)))
    value = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.lists(st.integers())
    table = st.dictionaries(st.text(), value, max_size=3)
    return PruningPlan(
        draw(st.text()), model_shape(*shapes), tuple(layers), draw(table), draw(st.integers()), draw(table)
    )


DENSE = model_shape(layer_shape(), layer_shape(), layer_shape())


def plan_of(*layers: LayerPlan, model: ModelShape = DENSE, **rest: Any) -> PruningPlan:
    kept = layers + tuple(LayerPlan.dense(shape) for shape in model.layers[len(layers) :])
    return PruningPlan("test", model, kept, **rest)


# JSON -----------------------------------------------------------------------------------------------------------------


@given(plans())
def test_json_keeps_everything(plan: PruningPlan) -> None:
    again = PruningPlan.from_json(plan.to_json())
    assert again == plan and again.digest == plan.digest
    assert again.to_json() == plan.to_json()


def test_file_keeps_everything(tmp_path: Path) -> None:
    plan = plan_of(LayerPlan((0, 1), (0,), (1, 5)), options={"ratio": 0.2}, seed=3, calibration={"source": "é"})
    plan.save(tmp_path / "new" / "plan.json")
    assert PruningPlan.load(tmp_path / "new" / "plan.json") == plan
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["plan.json"]


def test_json_has_one_layer_a_line_and_null_for_what_is_gone() -> None:
    text = plan_of(LayerPlan((), (), (1, 2)), LayerPlan((0, 1), (0,), ())).to_json()
    assert '\n  {"attention": null, "mlp": {"channels": "1-2"}},\n' in text
    assert '\n  {"attention": {"kv_groups": "0", "query_heads": "0-1"}, "mlp": null},\n' in text


def test_json_states_added_biases_only_where_there_are_any() -> None:
    kept = LayerPlan((0, 1), (0,), (1, 5))
    plan = plan_of(replace(kept, attention_bias=True), replace(kept, mlp_bias=True))
    text = plan.to_json()
    assert (
        '{"attention": {"kv_groups": "0", "query_heads": "0-1", "added_bias": true}, "mlp": {"channels": "1, 5"}}'
        in text
    )
    assert '"mlp": {"channels": "1, 5", "added_bias": true}' in text
    assert PruningPlan.from_json(text) == plan
    assert "added_bias" not in plan_of(kept).to_json()


def test_a_plan_written_before_biases_could_be_added_has_its_digest() -> None:
    plan = plan_of(LayerPlan((0, 1), (0,), (1, 5)), LayerPlan((), (), (1, 2)))
    assert plan.digest == "ad167e97e8e565e0"


def test_predicted_is_computed_not_read() -> None:
    data = json.loads(plan_of().to_json())
    data["predicted"]["parameters"] = 1
    assert PruningPlan.from_json(json.dumps(data)).predicted["parameters"] == DENSE.parameters


def test_digest_is_of_what_is_kept_and_from_which_weights() -> None:
    plan = plan_of(LayerPlan((0, 1), (0,), (1, 5)))
    assert (
        replace(plan, method="other", options={"ratio": 0.5}, seed=9, calibration={"tokens": 1}).digest == plan.digest
    )
    others = [
        plan_of(LayerPlan((2, 3), (1,), (1, 5))),
        plan_of(LayerPlan((0, 1), (0,), (1, 6))),
        plan_of(LayerPlan((0, 1), (0,), ())),
        replace(plan, model=replace(DENSE, weights="fedcba9876543210")),
    ]
    assert len({plan.digest, *(other.digest for other in others)}) == 5


# What it leaves -------------------------------------------------------------------------------------------------------


def test_dense_plan_removes_nothing() -> None:
    assert plan_of().predicted == {
        "parameters": DENSE.parameters,
        "block_parameters": DENSE.block_parameters,
        "macs_per_token": 3 * (2 * 64 * 8 * (8 + 4) + 3 * 64 * 96) + 96 * 64,
        "kv_bytes_per_token": 3 * 2 * 4 * 8 * 2,
        "ratio_of_block_parameters": 0,
        "ratio_of_all_parameters": 0,
    }


def test_predicted_counts_what_each_cut_removes() -> None:
    plan = plan_of(LayerPlan((2, 3, 6, 7), (1, 3), tuple(range(90))), LayerPlan((0, 2, 4, 6), (0, 1, 2, 3), ()))
    head = 2 * 64 * 8  # rows of q and columns of o; also rows of k and of v
    removed = (4 * head + 2 * head + 6 * 3 * 64) + (4 * head) + (3 * 64 * 96 + 64)
    assert plan.predicted["parameters"] == DENSE.parameters - removed
    assert plan.predicted["block_parameters"] == plan.kept_block_parameters == DENSE.block_parameters - removed
    assert plan.predicted["ratio_of_block_parameters"] == removed / DENSE.block_parameters
    assert plan.predicted["ratio_of_all_parameters"] == removed / DENSE.parameters
    assert plan.predicted["kv_bytes_per_token"] == 2 * 8 * (2 + 4 + 4) * 2
    assert plan.predicted["macs_per_token"] == 96 * 64 + 64 * (2 * 8 * (6 + 8 + 12) + 3 * (90 + 0 + 96))


@given(plans())
def test_predicted_is_what_a_model_of_the_kept_shapes_has(plan: PruningPlan) -> None:
    cut = [layer_shape(len(kept.query_heads), len(kept.kv_groups), 8, len(kept.ffn_channels)) for kept in plan.layers]
    smaller = model_shape(*cut)
    as_it_is = plan_of(model=smaller).predicted
    for name in ("parameters", "block_parameters", "macs_per_token", "kv_bytes_per_token"):
        assert plan.predicted[name] == as_it_is[name]


def test_an_added_bias_costs_the_hidden_size() -> None:
    kept = LayerPlan((0, 1), (0,), (1, 5))
    bare, biased = plan_of(kept), plan_of(replace(kept, attention_bias=True, mlp_bias=True), kept)
    assert biased.kept_block_parameters == plan_of(kept, kept).kept_block_parameters + 2 * 64
    assert biased.predicted["macs_per_token"] == plan_of(kept, kept).predicted["macs_per_token"]
    one = plan_of(replace(kept, mlp_bias=True))
    assert one.predicted["parameters"] == bare.predicted["parameters"] + 64
    assert one.digest != bare.digest and one.is_uniform == bare.is_uniform


@given(plans())
def test_costs_at_widths_are_those_of_a_layer_of_these_widths(plan: PruningPlan) -> None:
    for kept, shape in zip(plan.layers, plan.model.layers, strict=True):
        smaller = layer_shape(*kept.widths[:2], 8, kept.widths[2])
        assert shape.parameters_at(*kept.widths) == smaller.parameters
        assert shape.macs_at(64, *kept.widths) == smaller.macs_at(64, *kept.widths)
        assert shape.kv_elements_at(kept.widths[1]) == 2 * 8 * smaller.kv_groups
        assert shape.parameters_at(*LayerPlan.dense(shape).widths) == shape.parameters


def test_shared_norm_goes_only_with_the_whole_layer() -> None:
    shape = replace(layer_shape(), shared_cost=128)
    model = model_shape(shape, shape)
    dense = LayerPlan.dense(shape)
    no_attention, no_mlp = replace(dense, query_heads=(), kv_groups=()), replace(dense, ffn_channels=())
    left = {
        "attention": plan_of(no_attention, model=model).kept_block_parameters,
        "mlp": plan_of(no_mlp, model=model).kept_block_parameters,
        "both": plan_of(LayerPlan((), (), ()), model=model).kept_block_parameters,
    }
    assert left == {
        "attention": model.block_parameters - shape.attention_cost,
        "mlp": model.block_parameters - shape.mlp_cost,
        "both": model.block_parameters - shape.attention_cost - shape.mlp_cost - 128,
    }


def test_llama_2_7b_without_12_attention_and_5_mlp_blocks() -> None:
    layer = layer_shape(32, 32, 128, 11008, 4096)
    model = model_shape(*[layer] * 32, hidden=4096, vocabulary=32000)
    assert model.parameters == 6_738_415_616
    dense = LayerPlan.dense(layer)
    layers = [
        replace(
            dense,
            **({"query_heads": (), "kv_groups": ()} if i >= 20 else {}),
            **({"ffn_channels": ()} if 9 < i < 15 else {}),
        )
        for i in range(32)
    ]
    predicted = plan_of(*layers, model=model).predicted
    assert round(100 * predicted["ratio_of_all_parameters"], 3) == 21.989
    assert predicted["kv_bytes_per_token"] == 2 * 20 * 32 * 128 * 2
    assert predicted["macs_per_token"] == 20 * 4 * 4096**2 + 27 * 3 * 4096 * 11008 + 32000 * 4096


@pytest.mark.parametrize(
    ("layers", "uniform"),
    [
        ([], True),
        ([LayerPlan((), (), ())], True),
        ([LayerPlan((0, 1), (0,), (1, 2))], False),
        ([LayerPlan((0, 1), (0,), (1, 2)), LayerPlan((4, 5), (2,), (3, 4)), LayerPlan((), (), ())], True),
        ([LayerPlan((0, 1), (0,), ())] * 3, False),
        ([LayerPlan((), (), (1, 2))], False),
    ],
    ids=str,
)
def test_uniform_means_alike_in_all_layers_that_stay(layers: list[LayerPlan], uniform: bool) -> None:
    assert plan_of(*layers).is_uniform is uniform


# Contradictions -------------------------------------------------------------------------------------------------------

_CHANNELS = tuple(range(96))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (LayerPlan((1, 0), (0,), _CHANNELS), "layer 1: query_heads: expected sorted"),
        (LayerPlan((0, 1), (0,), (1, 1)), "layer 1: ffn_channels: expected sorted indices without repeats"),
        (LayerPlan((0, 1), (0,), (0, 96)), r"layer 1: ffn_channels: expected indices in \[0, 96\), got 0\.\.96"),
        (LayerPlan((-1, 0), (0,), _CHANNELS), r"layer 1: query_heads: expected indices in \[0, 8\)"),
        (LayerPlan((6, 7), (3, 4), _CHANNELS), r"layer 1: kv_groups: expected indices in \[0, 4\)"),
        (LayerPlan((0, 1), (0,), (0.0, 1.0)), "layer 1: ffn_channels: expected integers"),  # type: ignore[arg-type]
        (LayerPlan((0, True), (0,), _CHANNELS), "layer 1: query_heads: expected integers"),
        (LayerPlan((), (0,), _CHANNELS), "layer 1: expected KV groups and query heads.*got 1 groups and 0 heads"),
        (LayerPlan((0, 1), (), _CHANNELS), "layer 1: expected KV groups and query heads.*got 0 groups and 2 heads"),
        (LayerPlan((0, 1, 2), (0,), _CHANNELS), "layer 1: query head 2 belongs to KV group 1, which is cut"),
        (LayerPlan((0, 1, 2), (0, 1), _CHANNELS), "layer 1: expected the same number of query heads"),
        (LayerPlan((0, 1), (0, 1), _CHANNELS), "layer 1: expected the same number of query heads"),
        (LayerPlan((), (), _CHANNELS, attention_bias=True), "layer 1: attention: added_bias: .*removed block"),
        (LayerPlan((0, 1), (0,), (), mlp_bias=True), "layer 1: mlp: added_bias: .*removed block"),
        (LayerPlan((0, 1), (0,), _CHANNELS, mlp_bias=1), "added_bias: expected true or false"),  # type: ignore[arg-type]
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_contradiction_is_named(layer: LayerPlan, message: str) -> None:
    with pytest.raises(BadPlan, match=message):
        plan_of(LayerPlan.dense(DENSE.layers[0]), layer)


def test_number_of_layers_must_be_that_of_the_model() -> None:
    with pytest.raises(BadPlan, match="expected 3 layers, got 2"):
        PruningPlan("test", DENSE, (LayerPlan.dense(DENSE.layers[0]),) * 2)


def test_one_attention_block_must_stay() -> None:
    with pytest.raises(BadPlan, match="every attention block is removed"):
        plan_of(*[LayerPlan((), (), _CHANNELS)] * 3)


def test_tied_heads_go_together_or_not_at_all() -> None:
    model = model_shape(*[replace(layer_shape(), heads_prunable=False)] * 2)
    with pytest.raises(BadPlan, match=r"layer 0: .*tied by a norm.*all 8 heads or none, got 2"):
        plan_of(LayerPlan((0, 1), (0,), _CHANNELS), model=model)
    assert plan_of(LayerPlan((), (), _CHANNELS), model=model).layers[0].attention_removed


# Files edited by hand -------------------------------------------------------------------------------------------------


def edit(*path: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    """An edit that sets the value at a path of keys."""

    def change(data: dict[str, Any]) -> None:
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = to

    return change


def without(*path: Any) -> Callable[[dict[str, Any]], None]:
    """An edit that removes the last key of a path."""

    def change(data: dict[str, Any]) -> None:
        for key in path[:-1]:
            data = data[key]
        del data[path[-1]]

    return change


@pytest.mark.parametrize(
    "change",
    {
        "other format": edit("format", to="prunelit-plan/3"),
        "no format": without("format"),
        "no method": without("method"),
        "no model": without("model"),
        "model is a name": edit("model", to="llama"),
        "unknown field of the model": edit("model", "heads", to=8),
        "size of the model is text": edit("model", "hidden_size", to="64"),
        "parameters of the model are none": edit("model", "parameters", to=0),
        "no layers": without("layers"),
        "layers are a table": edit("layers", to={"0": None}),
        "layers are none at all": lambda data: data.update(layers=[], dense_layers=[]),
        "one layer too few": without("layers", 0),
        "layer without mlp": without("layers", 0, "mlp"),
        "layer is a list": edit("layers", 0, to=[1, 2]),
        "added bias is text": edit("layers", 0, "mlp", "added_bias", to="true"),
        "only an added bias": edit("layers", 0, "mlp", to={"added_bias": True}),
        "misspelt channels": edit("layers", 0, "mlp", to={"chanels": [0, 1]}),
        "misspelt kv_groups": edit("layers", 0, "attention", to={"groups": [0], "query_heads": [0, 1]}),
        "mlp is an empty table": edit("layers", 0, "mlp", to={}),
        "mlp is false": edit("layers", 0, "mlp", to=False),
        "channels are a number": edit("layers", 0, "mlp", "channels", to=64),
        "channels are none": edit("layers", 0, "mlp", "channels", to=None),
        "channels are text": edit("layers", 0, "mlp", "channels", to="012"),
        "channels are fractions": edit("layers", 0, "mlp", "channels", to=[0.5, 1.5]),
        "heads out of range": edit("layers", 0, "attention", "query_heads", to=[0, 99]),
        "heads are nested": edit("layers", 0, "attention", "query_heads", to=[[0], [1]]),
        "dense layer without a cost": without("dense_layers", 0, "channel_cost"),
        "dense layer with text": edit("dense_layers", 0, "ffn_channels", to="96"),
        "dense layer without groups": edit("dense_layers", 0, "kv_groups", to=0),
        "options are none": edit("options", to=None),
        "calibration is a number": edit("calibration", to=3),
        "seed is text": edit("seed", to="zero"),
    }.items(),
    ids=lambda change: change[0],
)
def test_nonsense_is_refused(change: tuple[str, Callable[[dict[str, Any]], None]], tmp_path: Path) -> None:
    data = json.loads(plan_of().to_json())
    change[1](data)
    (tmp_path / "plan.json").write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(BadPlan, match=r"plan\.json"):
        PruningPlan.load(tmp_path / "plan.json")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'"text"', b"\xff\xfe\x00", b"PK\x03\x04\x9c"], ids=str)
def test_other_files_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_bytes(content)
    with pytest.raises(BadPlan, match=r"plan\.json"):
        PruningPlan.load(tmp_path / "plan.json")


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadPlan, match=r"missing\.json.*No such file"):
        PruningPlan.load(tmp_path / "missing.json")
    with pytest.raises(BadPlan, match=r"expected a plan\.json"):
        PruningPlan.load(tmp_path)
