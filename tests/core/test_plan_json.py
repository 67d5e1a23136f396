"""A plan's file is written for people: ranges in and out, and every slip of the hand is named in one line."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunelit.core import plan_json
from prunelit.core.plan import LayerPlan, PruningPlan
from prunelit.report.plan_card import render_plan_card
from prunelit.runtime.errors import BadPlan
from tests.core.test_plan import DENSE, edit, plan_of, plans, without

PLAN = plan_of(LayerPlan((0, 1, 4, 5), (0, 2), tuple(range(3, 90))), LayerPlan((), (), (1, 2)))
LAYER = ("layers", 0, "attention")


@given(st.sets(st.integers(0, 300), min_size=1))
def test_ranges_say_the_same_indices(kept: set[int]) -> None:
    ordered = tuple(sorted(kept))
    text = plan_json.format_index_ranges(ordered)
    assert plan_json.parse_index_ranges("x", text, 301) == ordered
    assert plan_json.parse_index_ranges("x", text.replace(" ", ""), 301) == ordered
    assert plan_json.parse_index_ranges("x", list(ordered), 301) == ordered


def test_ranges_are_short() -> None:
    assert plan_json.format_index_ranges((0, 1, 2, 5, 7, 8)) == "0-2, 5, 7-8"
    assert len(plan_json.format_index_ranges(tuple(range(1536)))) == len("0-1535")


@given(plans())
def test_files_with_lists_of_numbers_still_load(plan: PruningPlan) -> None:
    data = json.loads(plan.to_json())
    for layer, kept in zip(data["layers"], plan.layers, strict=True):
        if layer["attention"]:
            layer["attention"] |= {"kv_groups": list(kept.kv_groups), "query_heads": list(kept.query_heads)}
        if layer["mlp"]:
            layer["mlp"] |= {"channels": list(kept.ffn_channels)}
    assert PruningPlan.from_json(json.dumps(data)) == plan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edit(*LAYER, "kv_groups", to="0, 4"), r"layer 0: attention: kv_groups: .*\[0, 4\)"),
        (edit(*LAYER, "kv_groups", to=[0, 9]), r"layer 0: attention: kv_groups: expected indices in \[0, 4\), got 9"),
        (edit(*LAYER, "kv_groups", to=[-1, 0]), r"layer 0: attention: kv_groups: .*got -1"),
        (
            edit(*LAYER, "query_heads", to="0-1, 4-5, 5"),
            "layer 0: query_heads: expected sorted indices without repeats",
        ),
        (edit(*LAYER, "query_heads", to="4-5, 0-1"), "layer 0: query_heads: expected sorted"),
        (edit(*LAYER, "query_heads", to="0, 4-5"), "layer 0: expected the same number of query heads in every kept KV"),
        (edit(*LAYER, "query_heads", to="0-1, 2-3"), "layer 0: query head 2 belongs to KV group 1, which is cut"),
        (edit(*LAYER, "query_heads", to=[0.0, 1.0]), r"layer 0: attention: query_heads: expected integers, got 0\.0"),
        (edit(*LAYER, "query_heads", to=[True, 4]), "layer 0: attention: query_heads: expected integers, got True"),
        (edit(*LAYER, "query_heads", to="5-4"), "layer 0: attention: query_heads: expected ranges upwards"),
        (edit(*LAYER, "query_heads", to="0-99999999999999999999"), "query_heads: expected indices like"),
        (edit(*LAYER, "query_heads", to="0-999999999"), r"layer 0: attention: query_heads: .*\[0, 8\)"),
        (edit(*LAYER, "query_heads", to="one"), "layer 0: attention: query_heads: expected indices like"),
        (edit(*LAYER, "query_heads", to={"0": 1}), "layer 0: attention: query_heads: expected indices as text"),
        (edit(*LAYER, "kv_groups", to=[]), "layer 0: attention: kv_groups: expected at least one .* null"),
        (edit("layers", 0, "mlp", to={"chanels": "0-7"}), "layer 0: mlp .*'chanels'.*did you mean 'channels'"),
        (edit("layers", 0, "mpl", to=None), "layer 0: unknown name 'mpl'.*did you mean 'mlp'"),
        (without("layers", 2, "mlp"), "layer 2: mlp: expected it to be there"),
        (edit("layers", 1, to=None), "layer 1: expected an object with attention, mlp, got None"),
        (without("layers", 1), "layers: expected 3, one per dense layer, got 2"),
        (lambda data: [layer.update(attention=None) for layer in data["layers"]], "every attention block is removed"),
        (edit("mehtod", to="x"), "unknown name 'mehtod'.*did you mean 'method'"),
        (edit("model", "hiden_size", to=64), "model: unknown name 'hiden_size'.*did you mean 'hidden_size'"),
        (edit("model", "weights", to=7), "model: weights: expected text, got 7"),
        (edit("dense_layers", 1, "ffn_channels", to=48.0), r"dense layer 1: ffn_channels: expected a count, got 48\.0"),
        (edit("dense_layers", 1, "channel_cost", to=10**9), "dense layer 1: .* cost more than the block"),
        (edit("dense_layers", 1, "heads_prunable", to=1), "dense layer 1: heads_prunable: expected true or false"),
        (edit("dense_layers", 0, "ffn_channels", to=8), r"layer 0: mlp: channels: .*\[0, 8\)"),
        (edit("method", to="\ud800"), "half of a character"),
    ],
)
def test_what_is_wrong_is_named(change: Callable[[dict[str, Any]], object], message: str) -> None:
    data = json.loads(PLAN.to_json())
    change(data)
    with pytest.raises(BadPlan, match=message) as caught:
        PruningPlan.from_json(json.dumps(data))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"seed": 0', '"seed": NaN', "expected numbers, got NaN"),
        ('"seed": 0', '"seed": 0, "seed": 1', "'seed': expected once, got it twice"),
        ('"seed": 0,', '"seed": 0', "not JSON: .*line"),
        ('"method": "test"', '"method": ' + "[" * 100_000, "lists in lists"),
    ],
)
def test_what_is_not_json_is_named(old: str, new: str, message: str) -> None:
    with pytest.raises(BadPlan, match=message):
        PruningPlan.from_json(PLAN.to_json().replace(old, new, 1))


@given(st.integers(0, len(PLAN.to_json()) - 3))
def test_a_file_cut_short_is_refused(length: int) -> None:
    with pytest.raises(BadPlan):
        PruningPlan.from_json(PLAN.to_json()[:length])


NONSENSE = (
    st.none()
    | st.booleans()
    | st.integers(-3, 200)
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["0-3", "3, 1", "0-95", "1-2, 2", "", "null"])
    | st.lists(st.integers(-1, 9), max_size=4)
    | st.just({})
)


@st.composite
def edited(draw: st.DrawFn) -> str:
    """The file of a valid plan after one to three edits anywhere, or after a cut through its text."""
    data = json.loads(draw(plans()).to_json())
    for _ in range(draw(st.integers(1, 3))):
        node: Any = data
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(node[key], dict | list) and node[key] and draw(st.integers(0, 5)):
                node = node[key]
                continue
            change = draw(st.sampled_from(["set", "set", "delete", "add"]))
            if change == "set":
                node[key] = draw(NONSENSE)
            elif change == "delete":
                del node[key]
            elif isinstance(node, dict):
                node[draw(st.text(max_size=5))] = draw(NONSENSE)
            else:
                node.insert(key, draw(NONSENSE))
            break
    text = json.dumps(data)
    return text if draw(st.integers(0, 9)) else text[: draw(st.integers(0, len(text)))]


@pytest.mark.slow
@given(edited())
@settings(max_examples=250)
def test_an_edited_file_is_a_plan_or_one_line(text: str) -> None:
    try:
        plan = PruningPlan.from_json(text)
    except BadPlan as error:
        said = str(error)
    else:
        check_valid(plan)
        return
    assert "\n" not in said and len(said) < 400


def check_valid(plan: PruningPlan) -> None:
    again = PruningPlan.from_json(plan.to_json())
    assert again == plan and again.digest == plan.digest
    assert 0 < plan.predicted["parameters"] <= plan.model.parameters
    assert 0 <= plan.predicted["ratio_of_block_parameters"] <= 1
    assert plan.digest in render_plan_card(plan).encode().decode()


def test_the_dense_plan_of_a_wide_layer_is_a_short_file() -> None:
    text = plan_of(model=DENSE).to_json()
    assert max(len(line) for line in text.splitlines() if line.startswith('  {"attention"')) < 100
