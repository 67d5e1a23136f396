"""A plan reads well and takes small edits; an edit that makes no plan is refused."""

import base64
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given

from prunelit.core.plan import LayerPlan, PruningPlan
from prunelit.runtime.errors import BadPlan
from tests.core.test_plan import plan_of, plans


def test_repr_is_one_line_that_says_what_goes() -> None:
    plan = plan_of(LayerPlan((0, 1), (0,), (1, 5)))
    assert repr(plan) == f"<PruningPlan {plan.digest}: test on tiny, 3 layers, 29.46% of their parameters removed>"


@given(plans())
def test_representations_never_fail_and_escape(plan: PruningPlan) -> None:
    assert "\n" not in repr(replace(plan, method="x"))
    HTMLParser().feed(plan.render_table_html())
    assert "<script>" not in replace(plan, method="<script>").render_table_html()


def test_html_joins_layers_that_keep_as_much() -> None:
    html = plan_of(LayerPlan((0, 1), (0,), (1, 5)))._repr_html_()
    assert html.count("<tr><td>") == 2
    assert "<td>0</td><td>2 of 8</td><td>1 of 4</td><td>2 of 96</td>" in html
    assert "<td>1 to 2</td><td>8 of 8</td>" in html


def test_a_plan_is_drawn_and_shown_below_its_table(tmp_path: Path) -> None:
    plan = plan_of(LayerPlan((0, 1), (0,), (1, 5)))
    figure = plan.plot()
    assert {panel.get_xlabel() for panel in figure.axes} == {"KV groups", "query heads", "FFN channels, %"}
    figure.savefig(tmp_path / "plan.png")
    table, _, picture = plan._repr_html_().partition('<img alt="units that stay, layer by layer" src="')
    assert table == plan.render_table_html()
    assert base64.b64decode(picture.removeprefix("data:image/png;base64,").removesuffix('">'))[:4] == b"\x89PNG"


def test_replace_layer_changes_that_layer_alone() -> None:
    plan = plan_of()
    changed = plan.replace_layer(1, ffn_channels="0-9, 20")
    assert changed.layers[1].ffn_channels == (*range(10), 20)
    assert (changed.layers[0], changed.layers[2]) == (plan.layers[0], plan.layers[2])
    assert changed.layers[1].query_heads == plan.layers[1].query_heads
    assert plan == plan_of()  # itself unchanged


@pytest.mark.parametrize(
    ("edit", "heads", "groups"),
    [
        ({"kv_groups": [1, 3]}, (2, 3, 6, 7), (1, 3)),
        ({"query_heads": [0, 3, 4]}, (0, 3, 4), (0, 1, 2)),
        ({"query_heads": "1, 6", "kv_groups": "0, 3"}, (1, 6), (0, 3)),
        ({"kv_groups": []}, (), ()),
    ],
)
def test_heads_and_groups_follow_each_other(edit: dict[str, object], heads: object, groups: object) -> None:
    layer = plan_of().replace_layer(-1, **edit).layers[2]  # type: ignore[arg-type]
    assert (layer.query_heads, layer.kv_groups) == (heads, groups)


@pytest.mark.parametrize(
    ("index", "edit", "expected"),
    [
        (3, {"ffn_channels": [0]}, "replace_layer: expected a layer below 3, got 3"),
        (0, {"ffn_channels": [96]}, r"layer 0: ffn_channels: expected indices in \[0, 96\), got 96"),
        (0, {"ffn_channels": "a-b"}, "layer 0: ffn_channels"),
        (0, {"query_heads": [0, 1, 2]}, "layer 0"),
        (0, {"ffn_channels": [5, 1]}, "layer 0"),
    ],
)
def test_an_edit_that_makes_no_plan_is_refused(index: int, edit: dict[str, object], expected: str) -> None:
    with pytest.raises(BadPlan, match=expected):
        plan_of().replace_layer(index, **edit)  # type: ignore[arg-type]


def test_a_plan_leaves_the_machine_without_paths() -> None:
    options = {
        "text": ["/home/me/a.txt", "C:\\me\\b.txt", "owner"],
        "pair": ("/x/y", 3),
        "ratio": 0.3,
        "file": "/z/q.json",
    }
    left = replace(plan_of(), options=options, calibration={"text": "/home/me/c.txt", "windows": 8}).without_paths()
    assert left.options == {"text": ["a.txt", "b.txt", "owner"], "pair": ["y", 3], "ratio": 0.3, "file": "q.json"}
    assert left.calibration == {"text": "c.txt", "windows": 8}
