"""Every recipe is parsed by the real parser and planned on the shape of its model, without weights or text."""

import re
from pathlib import Path

import pytest

from prunelit.data import loading, text
from prunelit.report.format_numbers import format_duration
from tests.cli.test_fit import ROOT, call
from tests.recipe_shapes import PARAMETERS, SHAPES, write_shape

GPU_RATE = 1e14  # multiply-accumulates a second
RECIPES = {path.stem: path for path in sorted((ROOT / "configs" / "recipes").glob("*.yaml"))}


def summarise(printed: str) -> str:
    """What an estimate says, in the lines that a recipe has in its head."""
    asked = re.search(r"^asked: (.*)$", printed, re.MULTILINE)
    planned = re.search(r"^memory, planned: (.*)$", printed, re.MULTILINE)
    work = re.search(r"^scoring: .* passes, (.*?) multiply-accumulates.*; weights (.*)$", printed, re.MULTILINE)
    assert asked and planned and work, printed
    count, unit = work[1].split()
    seconds = float(count) * {"T": 1e12, "P": 1e15}[unit] / GPU_RATE
    parts = (
        asked[1],
        f"leaves {planned[1]}",
        f"scoring: {work[1]} multiply-accumulates, weights {work[2]}",
        f"that takes {format_duration(seconds)} at 100 T a second, a fifth of an H100's bfloat16 peak",
    )
    return "\n#     ".join(parts)


def test_every_model_has_a_recipe() -> None:
    assert RECIPES.keys() == SHAPES.keys() == PARAMETERS.keys()
    for path in RECIPES.values():
        head = path.read_text(encoding="utf-8").partition("\nmodel:")[0]
        assert "has never run at this size here" in head
        assert f"plan --config configs/recipes/{path.name} --estimate true" in head


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_planned_on_the_shape_of_its_model(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "load", lambda *a: pytest.fail("the model was loaded"))
    monkeypatch.setattr(text, "draw_windows", lambda *a: pytest.fail("text was read"))
    folder, path = write_shape(name, tmp_path), RECIPES[name]
    code, printed, err = call(
        capsys, "plan", "--config", str(path), "--model", str(folder), "--estimate", "true", "--device", "cpu"
    )
    assert code == 0, err
    parameters = re.search(r"^parameters +([\d,]+)", printed, re.MULTILINE)
    assert parameters and int(parameters[1].replace(",", "")) == pytest.approx(PARAMETERS[name], rel=2e-3)
    assert f"# Estimate: {summarise(printed)}\n" in path.read_text(encoding="utf-8")
