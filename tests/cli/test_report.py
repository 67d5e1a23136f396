"""`report diff` says how two runs differ, from their files alone, and refuses what is no run in one line."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prunelit.cli.main import main
from prunelit.core.plan import PruningPlan
from prunelit.report.run_summary import summarize_result
from prunelit.runtime.errors import BadOption
from tests.cli.test_fit import ROOT, call, refused
from tests.compare.test_run import handmade
from tests.core.test_plan import DENSE, plan_of
from tests.report.test_page import Read, foreign
from tests.tiny import keep

CELL = {"key": {"method": "flap", "options": {"ratio": 0.2}, "texts": {"wiki": {"windows": 4}}}, "size": {}}
EVALUATION: dict[str, Any] = {
    "command": "python -m prunelit evaluate",
    "model": {"source": "m", "adapter": None, "parameters": 10},
    "perplexity": {"wiki": {"protocol": {"windows": 4}, "model": {"nll": 2.0}}},
}


def write_run(folder: Path, ratio: float, perplexity: float | None = 12.5, windows: int = 4) -> PruningPlan:
    """A folder as `fit` leaves it, of a run that is finished where `perplexity` is given."""
    folder.mkdir()
    shape = DENSE.layers[0]
    plan = replace(plan_of(keep(shape, channels=tuple(range(int(10 * ratio)))), keep(shape)), options={"ratio": ratio})
    plan.save(folder / "plan.json")
    row = {"perplexity": 10.0, "parameters": 2000}
    report: dict[str, Any] = {"protocol": {"windows": windows, "tokens": 7}, "fingerprints": {}, "dense": row}
    report |= {"pruned": row | {"perplexity": 20.0, "parameters": 1500}, "seconds": {"train": 100 * ratio}}
    if perplexity:
        report |= {"trained_steps": 3, "recovered": report["pruned"] | {"perplexity": perplexity}}
    (folder / "report.json").write_text(json.dumps(report | {"versions": {}, "seed": 1}))
    callback = {"class_path": "prunelit.callbacks.FLAP", "init_args": {"ratio": ratio}}
    (folder / "config.yaml").write_text(json.dumps({"trainer": {"callbacks": [callback]}, "seed_everything": 1}))
    return plan


def test_two_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    write_run(tmp_path / "a", 0.2)
    write_run(tmp_path / "b", 0.3, perplexity=15.0, windows=8)
    page = tmp_path / "difference.html"
    code, said, _ = call(capsys, "report", "diff", str(tmp_path / "a"), str(tmp_path / "b"), "--html", str(page))
    assert code == 1
    lines = [line.split() for line in said.splitlines()]
    assert ["trainer.callbacks.FLAP.ratio", "0.2", "0.3"] in lines
    assert ["perplexity,", "recovered", "12.5", "15", "+20.0%"] in lines
    assert ["parameters", "1,500", "1,500", "same"] in lines
    assert ["train", "20", "s", "30", "s", "+50.0%"] in lines
    assert ["0", "ffn", "channels", "2", "->", "3", "2"] in lines
    assert f"1 of {len(DENSE.layers)} layers differ" in said and "do not compare" in said and "windows: 4 and 8" in said
    content = page.read_text(encoding="utf-8")
    assert foreign(content) == [] and "trainer.callbacks.FLAP.ratio" in Read(content).text
    refused(
        call(capsys, "report", "diff", str(tmp_path / "a"), str(tmp_path / "b"), "--html", str(page)), "--overwrite"
    )


def test_the_same_run_and_one_that_was_killed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    plan = write_run(tmp_path / "a", 0.2)
    write_run(tmp_path / "b", 0.2)
    write_run(tmp_path / "killed", 0.2, perplexity=None)
    code, said, _ = call(capsys, "report", "diff", str(tmp_path / "a"), str(tmp_path / "b"))
    assert code == 0 and plan.digest in said and "OPTIONS" not in said
    (tmp_path / "b" / "config.yaml").write_text("&a [*a]")  # the options of the plan are taken in its place
    assert main(["report", "diff", str(tmp_path / "a" / "plan.json"), str(tmp_path / "b" / "plan.json")]) == 0
    assert "fit, not finished" in call(capsys, "report", "diff", str(tmp_path / "a"), str(tmp_path / "killed"))[1]


def test_a_plan_of_another_model_leaves_the_rest(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    write_run(tmp_path / "a", 0.2)
    plan_of(model=replace(DENSE, hidden_size=7)).save(tmp_path / "plan.json")
    code, said, _ = call(capsys, "report", "diff", str(tmp_path / "a"), str(tmp_path / "plan.json"))
    assert code == 1 and "Layers are not compared: the plans are for different dense models" in said


def test_comparisons_cells_and_evaluations(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    report = handmade()
    for cell in report["cells"]:
        cell["mean_log_ratio"] = 0.5
    (tmp_path / "compare.json").write_text(json.dumps(report))
    report["cells"][0]["mean_log_ratio"] = 0.75
    report["cells"].pop()
    (tmp_path / "other.json").write_text(json.dumps(report))
    said = call(capsys, "report", "diff", str(tmp_path), str(tmp_path / "other.json"))[1]
    assert "x|y at 10%, seed 0, nats" in said and "+0.250" in said
    pairs = {
        "cell": [CELL | {"texts": {"wiki": {"nll": nll}}} for nll in (2.0, 1000.0)],
        "evaluation": [EVALUATION, EVALUATION | {"speed": {"protocol": {}, "model": {"peak_bytes": 2.0}}}],
        "short": [
            {"perplexity": 9.0, "nll": nll, "protocol": {"windows": 4}, "seconds": 2, "model": "m"} for nll in (2, 3)
        ],
    }
    for name, contents in pairs.items():
        for number, content in enumerate(contents):
            (tmp_path / f"{name}{number}.json").write_text(json.dumps(content))
        said = call(capsys, "report", "diff", *(str(tmp_path / f"{name}{number}.json") for number in (0, 1)))[1]
        assert "7.389" in said and "do not compare" not in said.replace("speed", ""), name


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["show", "a", "b"], "expected diff, got 'show'"),
        (["diff", "a"], "expected two runs"),
        (["diff", "a", "b", "--out", "c"], "expected two runs, got --out"),
        (["diff", "a", "gone"], "no such file or folder"),
        (["diff", "a", "empty"], "expected a folder with one of compare.json"),
        (["diff", "a", "list.json"], "expected a JSON object, got list"),
        (["diff", "a", "deep.json"], "cannot be read"),
        (["diff", "a", "other.json"], "got an object with hello"),
        (["diff", "a", "broken.json"], "expected a file as prunelit wrote it"),
        (["diff", "a", "a", "--html", "empty"], "expected a file, got the folder"),
        (["diff", "a", "a", "--html", "gone/x.html"], "no folder 'gone'"),
        (["diff", "a", "a", "--html"], "expected a file to write"),
    ],
)
def test_what_is_no_run_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], expected: str
) -> None:
    write_run(tmp_path / "a", 0.2)
    (tmp_path / "empty").mkdir()
    contents = {"list": "[]", "deep": "[" * 100_000, "other": '{"hello": 1}'}
    contents["broken"] = '{"key": 1, "texts": {"wiki": 2}}'
    for name, content in contents.items():
        (tmp_path / f"{name}.json").write_text(content)
    monkeypatch.chdir(tmp_path)
    refused(call(capsys, "report", *words), expected)


def test_numbers_that_are_none_are_refused() -> None:
    with pytest.raises(BadOption, match="cannot be read"):
        summarize_result("a", CELL | {"texts": {"wiki": {"nll": None}}})


def test_it_loads_no_torch(tmp_path: Path) -> None:
    write_run(tmp_path / "a", 0.2)
    path = str(tmp_path / "a")
    code = (
        "import sys; from prunelit.cli.main import main;"
        f"code = main(['report', 'diff', {path!r}, {path!r}]);"
        "sys.exit(code or len({'torch', 'transformers', 'lightning'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
