"""lm-evaluation-harness called directly on the folder gives the same numbers, item by item."""

from pathlib import Path
from typing import Any

import pytest

from prunelit.data import loading
from prunelit.evaluation import tasks, zero_shot
from prunelit.runtime.errors import BadOption, SourceNotFound
from tests.evaluation.rows import rows, write

NAMES = ("piqa", "hellaswag", "boolq")


@pytest.fixture
def definitions(tmp_path: Path) -> dict[str, str]:
    for name in NAMES:
        write(tmp_path, name, rows(name, 11))
    files = tasks.find_task_files(NAMES, str(tmp_path))
    return tasks.write_task_definitions(files, tasks.find_harness_tasks(), tmp_path / "definitions")


def run(source: str, definitions: dict[str, str], limit: int | None = None, batch_size: int = 4) -> dict[str, Any]:
    engine = zero_shot.ZeroShotEvaluator(loading.load(source), loading.load_tokenizer(source), batch_size)
    return {name: engine.run_task(name, definition, limit) for name, definition in definitions.items()}


@pytest.mark.parametrize(("which", "limit"), [("dense", None), ("smaller", 7)])
def test_the_harness_called_directly_gives_the_same(
    which: str, limit: int | None, definitions: dict[str, str], request: pytest.FixtureRequest
) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    folder = request.getfixturevalue(which)
    mine = run(folder, definitions, limit)
    theirs: Any = simple_evaluate(
        model="hf",
        model_args={"pretrained": folder, "trust_remote_code": True},
        tasks=list(NAMES),
        task_manager=TaskManager(include_path=str(Path(definitions["piqa"]).parent), include_defaults=False),
        limit=limit,
        batch_size=4,
        device="cpu",
    )
    for name, found in mine.items():
        expected = {key: theirs["results"][name][f"{key},none"] for key in found["metrics"]}
        assert found["metrics"] == expected
        assert found["items"] == (limit or 11) == len(theirs["samples"][name])
        for kind, right in found["right"].items():
            assert right == [sample[kind] for sample in theirs["samples"][name]]
    assert {"acc_norm", "acc_norm_stderr"} <= set(mine["piqa"]["metrics"])
    assert set(mine["boolq"]["metrics"]) == {"acc", "acc_stderr"}
    assert len({tuple(found["right"]["acc"]) for found in mine.values()}) > 1  # the model does not always say the same


def test_one_item_has_no_error(dense: str, definitions: dict[str, str]) -> None:
    (found,) = run(dense, {"boolq": definitions["boolq"]}, limit=1).values()
    assert found["metrics"]["acc"] in (0.0, 1.0)
    assert found["metrics"]["acc_stderr"] in (None, 0.0)


def test_the_harness_says_nothing_meanwhile(
    dense: str, definitions: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    run(dense, {"boolq": definitions["boolq"]}, limit=3)
    assert "".join(capfd.readouterr()) == ""


def test_items_are_paired_and_told_apart(dense: str, smaller: str, definitions: dict[str, str]) -> None:
    one, other = (run(folder, definitions) for folder in (smaller, dense))
    for name in NAMES:
        assert one[name]["fingerprint"] == other[name]["fingerprint"]
        for kind, found in zero_shot.compute_metric_differences(one[name], other[name]).items():
            means = [run["metrics"][kind] for run in (one[name], other[name])]
            assert found["difference"] == pytest.approx(means[0] - means[1])
    few = run(dense, {"piqa": definitions["piqa"]}, limit=5)["piqa"]
    assert few["fingerprint"] != one["piqa"]["fingerprint"]
    with pytest.raises(BadOption, match="same items"):
        zero_shot.compute_metric_differences(few, one["piqa"])


def test_averages_in_both_conventions() -> None:
    def task(**metrics: float) -> dict[str, Any]:
        result = {"metrics": metrics, "right": {kind: [1.0, 0.0] for kind in metrics}}
        return {"model": result, "against": result, "difference": zero_shot.compute_metric_differences(result, result)}

    found = zero_shot.average_over_tasks([task(acc=0.5, acc_norm=0.9), task(acc=0.7)])
    assert found["acc"]["model"] == pytest.approx(0.6)
    assert found["acc_norm"]["against"] == pytest.approx(0.8)
    assert found["acc_norm"]["difference"]["difference"] == 0
    alone = zero_shot.average_over_tasks([{"model": task(acc=0.5)["model"]}])
    assert alone["acc"] == {"model": 0.5}


def test_rows_that_can_not_be_read_are_one_line(dense: str, definitions: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "piqa.jsonl").unlink()
    with pytest.raises(SourceNotFound, match="task 'piqa': its rows cannot be read") as error:
        run(dense, {"piqa": definitions["piqa"]})
    assert "\n" not in str(error.value)
