"""By which plan a run that goes on cuts, and what it is not allowed to go on from."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from prunelit.callbacks import Magnitude
from prunelit.core.plan import PruningPlan
from prunelit.core.saved_plans import CUT_MARK
from prunelit.pruning.resume import find_resumed_plan
from prunelit.runtime.errors import BadPlan
from tests.tiny import tiny


def make_plan(ratio: float = 0.3) -> PruningPlan:
    return Magnitude(ratio, align=8).plan_model(tiny("llama"))


def mark(plan: PruningPlan) -> dict[str, Any]:
    text = json.dumps([plan.to_json()])
    return {"state_dict": {CUT_MARK: torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)}}


def test_the_plan_of_its_own_callback_comes_first(tmp_path: Path) -> None:
    plan = make_plan()
    content = {"callbacks": {"Magnitude": {"plan": plan.to_json()}}}
    found = find_resumed_plan(Magnitude(0.3, align=8), tmp_path / "x.ckpt", content, {"plan": plan.to_json()}, True)
    assert found == plan


def test_weights_alone_say_in_their_mark_how_they_were_cut(tmp_path: Path) -> None:
    plan = make_plan()
    assert find_resumed_plan(Magnitude(0.3, align=8), tmp_path / "x.ckpt", mark(plan), {}, True) == plan


def test_the_plan_of_another_method_is_not_taken(tmp_path: Path) -> None:
    plan = make_plan()
    content = {"callbacks": {"LLMBIP": {"plan": plan.to_json(), "repaired": None, "cut_weights": None}}}
    with pytest.raises(BadPlan, match="its model was cut by LLMBIP, this run cuts by Magnitude"):
        find_resumed_plan(Magnitude(0.3, align=8), tmp_path / "x.ckpt", content, {}, True)


@pytest.mark.parametrize("where", ["inside", "beside"])
def test_a_sharded_checkpoint_has_its_plan_in_a_file(tmp_path: Path, where: str) -> None:
    plan, checkpoint = make_plan(), tmp_path / "x.ckpt"
    checkpoint.mkdir()
    plan.save((checkpoint if where == "inside" else tmp_path) / "plan.magnitude.json")
    assert find_resumed_plan(Magnitude(0.3, align=8), checkpoint, {}, {}, False) == plan


def test_without_a_plan_adapters_are_scored_again_and_weights_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    method, checkpoint, content = Magnitude(0.3), tmp_path / "x.ckpt", {"callbacks": {"EarlyStopping": {}}}
    caplog.set_level("INFO", "prunelit")
    assert find_resumed_plan(method, checkpoint, content, {}, False) is None
    assert "checkpoint x.ckpt holds no plan of magnitude: scoring again" in caplog.text
    with pytest.raises(BadPlan, match=r"x\.ckpt: expected one of a run that cut its model, got the weights of a model"):
        find_resumed_plan(method, checkpoint, content, {}, True)


def test_a_plan_file_may_differ_in_biases_and_in_nothing_else(tmp_path: Path) -> None:
    plan = make_plan()
    with_biases = replace(plan, layers=tuple(replace(layer, mlp_bias=True) for layer in plan.layers))
    with_biases.save(tmp_path / "plan.json")
    method = Magnitude(0.3, plan_file=str(tmp_path / "plan.json"))
    assert find_resumed_plan(method, tmp_path / "x.ckpt", mark(plan), {}, True) == plan
    other = make_plan(0.4)
    with pytest.raises(BadPlan, match=rf"its plan is {other.digest}, that of plan_file is {with_biases.digest}"):
        find_resumed_plan(method, tmp_path / "x.ckpt", mark(other), {}, True)


def test_options_that_only_one_version_knows_are_not_compared(tmp_path: Path) -> None:
    plan = make_plan()
    older = replace(plan, options={name: value for name, value in plan.options.items() if name != "align"} | {"old": 1})
    assert find_resumed_plan(Magnitude(0.3, align=16), tmp_path / "x.ckpt", mark(older), {}, True) == older
    with pytest.raises(BadPlan, match="its plan was made with align 8, this run asks for 16"):
        find_resumed_plan(Magnitude(0.3, align=16), tmp_path / "x.ckpt", mark(plan), {}, True)
