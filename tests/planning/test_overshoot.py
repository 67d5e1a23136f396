"""What a plan removes beyond its ratio is named, with an option that removes less and still enough."""

import re
from pathlib import Path
from typing import Any

import pytest

from prunelit.callbacks import Random, ShortGPT
from prunelit.planning.overshoot import describe_overshoot, format_asked_share, measure_overshoot
from tests.cli.test_fit import call, small
from tests.cli.test_fit import words as words  # a fixture
from tests.tiny import tiny, tokens

EXPERTS = {"kinds": ["experts"]}


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
