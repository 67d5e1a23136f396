"""What a plan removes beyond its ratio is named, with an option that removes less and still enough."""

import re
from pathlib import Path
from typing import Any

import pytest

from prunelit.callbacks import Random, ShortGPT
from prunelit.core.plan import LayerPlan, LayerShape, ModelShape, PruningPlan
from prunelit.planning.overshoot import describe_overshoot, format_asked_share, measure_overshoot
from tests.cli.test_fit import call, small
from tests.cli.test_fit import words as words  # a fixture
from tests.tiny import tiny, tokens

EXPERTS = {"kinds": ["experts"]}
WIDE = LayerShape(4, 2, 8, 1024, 3, 256, 256, 48, 1552, 49168)  # 50,720 parameters
HEADS_IN_LARGE_GROUPS = LayerShape(16, 2, 8, 32, 3, 256, 256, 48, 4608, 1552)  # 6,160 parameters


def plan_of(shape: LayerShape, kept: LayerPlan, options: dict[str, Any], **calibration: Any) -> PruningPlan:
    model = ModelShape("llama", "tiny", 16, 100_000, 0, 4, "", (shape,))
    return PruningPlan("random", model, (kept,), options, calibration=calibration)


@pytest.mark.parametrize(
    ("family", "options", "part"),
    [
        ("llama", {}, "steps of kv_group and FFN widths in multiples of align 64, in every layer alike; --align"),
        ("gpt2", {"scope": "global"}, "steps of kv_group and FFN widths in multiples of align 64; --align"),
        ("llama", {"budget": "macs"}, "of macs are removed"),
        ("gpt2", {"budget": "kv_bytes"}, "steps of kv_group, in every layer alike; --scope global"),
        (
            "mixtral",
            {**EXPERTS, "scope": "global"},
            "steps of whole experts; no option makes finer ones",
        ),
    ],
    ids=["layer", "global", "macs", "kv_bytes", "experts"],
)
def test_the_option_that_is_named_keeps_its_word(family: str, options: dict[str, Any], part: str) -> None:
    plan = Random(0.25, **options).plan_model(tiny(family))
    overshoot, reason = measure_overshoot(plan), describe_overshoot(plan)
    assert overshoot is not None and overshoot.excess > 0.01
    assert part in reason
    if change := re.search(r"; --(?!rounding)(\w+) (\w+) would remove about ([\d.]+)%", reason):
        name, value = change[1], int(change[2]) if change[2].isdecimal() else change[2]
        other = measure_overshoot(Random(0.25, **(options | {name: value})).plan_model(tiny(family)))
        assert other is not None and 0.25 <= other.achieved < overshoot.achieved
        # Unequal scores order the steps of scope "global" otherwise, by at most one of them.
        assert other.achieved == pytest.approx(float(change[3]) / 100, abs=0.01)
    if change := re.search(r"; --rounding below would remove about ([\d.]+)%", reason):
        below = Random(0.25, rounding="below", **options).plan_model(tiny(family))
        other = measure_overshoot(below)
        assert other is not None and other.achieved <= 0.25
        if options.get("scope") != "global":
            assert other.achieved == pytest.approx(float(change[1]) / 100, abs=6e-4)
        if options.get("budget", "parameters") == "parameters":
            assert format_asked_share(below) == " (asked: at most 25.00%)"


def narrow_until_reached(ratio: float, align: int) -> tuple[int, float]:
    """Width of the layer's FFN, cut in steps of `align`, and the share of parameters that is removed."""
    width = 1024
    while (1024 - width) * 48 < ratio * 50_720:
        width -= align
    return width, (1024 - width) * 48 / 50_720


@pytest.mark.parametrize(("ratio", "align"), [(0.2, 8), (0.33, 32), (0.6, 128), (0.65, 16)])
def test_the_first_align_within_a_point_is_named(ratio: float, align: int) -> None:
    """It need not be the finest one."""
    width, _ = narrow_until_reached(ratio, 256)
    plan = plan_of(WIDE, LayerPlan((0, 1, 2, 3), (0, 1), tuple(range(width))), {"ratio": ratio, "align": 256})
    shares = {finer: narrow_until_reached(ratio, finer)[1] for finer in (128, 64, 32, 16, 8, 4, 2, 1)}
    assert align == next(finer for finer, share in shares.items() if share - ratio <= 0.01)
    assert shares[1] < shares[align]
    assert f"; --align {align} would remove about {shares[align]:.1%}" in describe_overshoot(plan)


@pytest.mark.parametrize(
    ("budget", "named"),
    [
        # Of each group 3 heads of 256 parameters: 3 * 2 * 256 of 6,160 are the first such share above a fifth.
        ("parameters", "steps of kv_group; --unit query_head would remove about 24.9%"),
        ("kv_bytes", "steps of kv_group; no option makes finer ones"),
    ],
)
def test_single_heads_are_finer_than_groups_but_save_no_cache(budget: str, named: str) -> None:
    kept = LayerPlan(tuple(range(8)), (0,), tuple(range(32)))
    options = {"ratio": 0.2, "unit": "kv_group", "budget": budget}
    assert named in describe_overshoot(plan_of(HEADS_IN_LARGE_GROUPS, kept, options))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, ""),
        ({"ratio": None}, ""),
        ({"ratio": True}, ""),
        ({"ratio": "0.2"}, ""),
        ({"ratio": 0.2, "budget": "latency"}, ""),
        ({"ratio": 0.2}, "memory: 1.0 MiB"),
    ],
    ids=str,
)
def test_what_is_no_ratio_is_not_measured(options: dict[str, Any], said: str) -> None:
    kept = LayerPlan((0, 1), (0,), tuple(range(256)))
    plan = plan_of(WIDE, kept, options, **({"target": {"said": said}} if said else {}))
    assert measure_overshoot(plan) is None
    assert describe_overshoot(plan) == ""
    assert format_asked_share(plan) == (f" (asked: {said})" if said else "")


def test_a_ratio_of_another_budget_stands_behind_no_share_of_parameters() -> None:
    kept = LayerPlan((0, 1), (0,), tuple(range(1024)))
    plan = plan_of(WIDE, kept, {"ratio": 0.2, "budget": "kv_bytes"})
    overshoot = measure_overshoot(plan)
    assert overshoot is not None and overshoot.achieved == 0.5
    assert format_asked_share(plan) == ""


def test_a_plan_near_its_ratio_is_not_remarked_on() -> None:
    plan = Random(0.25, align=1, scope="global").plan_model(tiny("llama"))
    overshoot = measure_overshoot(plan)
    assert overshoot is not None and 0 <= overshoot.excess <= 0.01
    assert overshoot.achieved == plan.predicted["ratio_of_block_parameters"]
    assert describe_overshoot(plan) == ""


@pytest.mark.parametrize("family", ["lfm2", "deepseek_v2"])
def test_layers_that_never_had_a_block_have_lost_none(family: str) -> None:
    reason = describe_overshoot(Random(0.02, kinds=["channels"]).plan_model(tiny(family)))
    assert "whole blocks" not in reason and "in multiples of align 64" in reason


def test_removed_blocks_are_named() -> None:
    plan = ShortGPT(0.2).plan_model(tiny("llama"), [{"input_ids": tokens()}])
    assert "since whole blocks are removed" in describe_overshoot(plan)


@pytest.mark.parametrize(("align", "warned"), [("64", True), ("1", False)])
def test_prune_says_what_was_asked_for(
    capsys: pytest.CaptureFixture[str], source: str, words: str, tmp_path: Path, align: str, warned: bool
) -> None:
    command = small(source, words, tmp_path / "out", "--method", "magnitude", "--align", align)
    code, printed, err = call(capsys, *command)
    assert code == 0, err
    assert re.search(r"removed \d\d\.\d\d% \(asked: 30\.00%\) of block parameters", printed)
    assert ("ratio 0.3: " in err) == warned
    assert not warned or re.search(r"points more, since .* align 64.*; --align \d+ would remove", err)
