"""Local definitions are the harness' own but for their rows; a bad file is named by line and field."""

import json
from pathlib import Path
from typing import Any

import pytest

from prunelit.data import sources
from prunelit.evaluation import tasks
from prunelit.evaluation.tasks import TASKS
from prunelit.runtime.errors import BadOption, SourceNotFound
from tests.evaluation.rows import rows, write

_OF_ROWS = ("dataset_path", "dataset_name", "dataset_kwargs", "training_split", "validation_split", "test_split")


def local(names: list[str], folder: Path, packed: bool = False) -> dict[str, str]:
    for name in names:
        write(folder, name, rows(name), packed)
    return tasks.write_task_definitions(
        tasks.find_task_files(names, str(folder)), tasks.find_harness_tasks(), folder / "definitions"
    )


def loaded(definition: str) -> Any:
    from lm_eval.tasks import TaskManager

    (task,) = TaskManager(include_defaults=False).load([definition])["tasks"].values()
    task.set_config(key="num_fewshot", value=0)
    return task


@pytest.mark.parametrize("name", TASKS)
def test_a_definition_is_the_harness_own_but_for_the_rows(name: str, tmp_path: Path) -> None:
    from lm_eval.tasks._yaml_loader import load_yaml

    harness = tasks.find_harness_tasks()
    theirs = load_yaml(tasks.list_stock_definitions([name], harness)[name])
    mine = load_yaml(local([name], tmp_path)[name])
    assert theirs["dataset_path"] == TASKS[name].dataset
    assert (theirs["test_split"] if theirs.get("test_split") else theirs["validation_split"]) == TASKS[name].split
    assert {key: mine[key] for key in mine if key not in _OF_ROWS} == {
        key: theirs[key] for key in theirs if key not in _OF_ROWS
    }


@pytest.mark.parametrize("name", TASKS)
def test_prompts_are_those_of_the_stock_task_on_the_same_rows(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    mine = loaded(local([name], tmp_path, packed=True)[name])
    table = datasets.Dataset.from_list(rows(name))
    as_on_the_hub = datasets.DatasetDict(dict.fromkeys(("train", "validation", "test"), table))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: as_on_the_hub)
    theirs = loaded(tasks.list_stock_definitions([name], tasks.find_harness_tasks())[name])
    requests = []
    for task in (mine, theirs):
        task.build_all_requests(limit=None, rank=0, world_size=1)
        requests.append([(one.doc_id, one.arguments) for one in task.instances])
    assert requests[0] == requests[1]
    targets = [
        [task.doc_to_target(doc) for _, doc in task.doc_iterator(rank=0, world_size=1)] for task in (mine, theirs)
    ]
    assert targets[0] == targets[1]
    assert len(set(map(str, targets[0]))) > 1


def test_names() -> None:
    assert tasks.select_tasks(["all"]) == list(TASKS)
    assert tasks.select_tasks(["piqa", "boolq"]) == ["piqa", "boolq"]
    with pytest.raises(BadOption, match="did you mean 'arc_easy'"):
        tasks.select_tasks(["arc_eazy"])
    with pytest.raises(BadOption, match="each once"):
        tasks.select_tasks(["piqa", "piqa"])


def test_any_task_of_the_harness_that_is_scored_by_accuracy(tmp_path: Path) -> None:
    assert tasks.select_tasks(["sciq", "mmlu_anatomy"]) == ["sciq", "mmlu_anatomy"]
    assert tasks.find_task("mmlu_anatomy").dataset == "cais/mmlu"  # from the definition that it includes
    for name, part in (
        ("gsm8k", "generate_until, scored by exact_match; expected one scored by acc"),
        ("mmlu", "is a group of tasks; expected single ones, such as mmlu_"),
        ("sciqq", "did you mean 'sciq'"),
    ):
        with pytest.raises(BadOption, match=part):
            tasks.select_tasks([name])
    row = {name: f"the {name}" for name in ("support", "question", "correct_answer")}
    row |= {f"distractor{number}": f"wrong {number}" for number in (1, 2, 3)}
    (tmp_path / "sciq.jsonl").write_text(json.dumps(row))
    files = tasks.find_task_files(["sciq"], str(tmp_path))
    task = loaded(tasks.write_task_definitions(files, tasks.find_harness_tasks(), tmp_path)["sciq"])
    task.build_all_requests(limit=None, rank=0, world_size=1)
    assert [one.arguments[1] for one in task.instances] == [" wrong 1", " wrong 2", " wrong 3", " the correct_answer"]


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("piqa", "goal", None),
        ("piqa", "label", 2),
        ("piqa", "sol2", " "),
        ("hellaswag", "label", "4"),
        ("hellaswag", "endings", ["one"]),
        ("hellaswag", "endings", "text"),
        ("winogrande", "sentence", "no gap"),
        ("winogrande", "answer", 1),
        ("arc_easy", "choices", ["a", "b"]),
        ("arc_easy", "choices", {"text": ["a", "b"], "label": ["A"]}),
        ("arc_challenge", "answerKey", "E"),
        ("boolq", "label", True),
        ("openbookqa", "question_stem", 3),
    ],
)
def test_a_wrong_field_is_named_with_its_line(name: str, field: str, value: Any, tmp_path: Path) -> None:
    content = rows(name)
    content[4][field] = value
    write(tmp_path, name, content)
    with pytest.raises(SourceNotFound, match=rf"{name}.jsonl': line 5: {field}: expected ") as error:
        tasks.find_task_files([name], str(tmp_path))
    assert "\n" not in str(error.value)
    del content[4][field]
    write(tmp_path, name, content)
    with pytest.raises(SourceNotFound, match=rf"line 5: expected a field '{field}'"):
        tasks.find_task_files([name], str(tmp_path))


def test_rows_of_every_task_are_right_as_they_are(tmp_path: Path) -> None:
    for number, name in enumerate(TASKS):
        write(tmp_path, name, rows(name), packed=bool(number % 2))
    assert list(tasks.find_task_files(list(TASKS), str(tmp_path))) == list(TASKS)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "got an empty file"),
        (b"[1]\n", "line 1: expected a JSON object"),
        (b"goal: x\n", "line 1: expected one JSON object a line"),
        (b"\xff\xfe\n", "cannot be read: UnicodeDecodeError"),
    ],
)
def test_files_that_hold_no_rows(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "piqa.jsonl").write_bytes(content)
    with pytest.raises(SourceNotFound, match=said):
        tasks.find_task_files(["piqa"], str(tmp_path))


def test_a_packed_file_that_was_cut_short(tmp_path: Path) -> None:
    path = write(tmp_path, "piqa", rows("piqa", 200), packed=True)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(SourceNotFound, match="EOFError"):
        tasks.find_task_files(["piqa"], str(tmp_path))


def test_missing_files_and_folders(tmp_path: Path) -> None:
    write(tmp_path, "piqa", rows("piqa"))
    with pytest.raises(SourceNotFound, match=r"expected boolq.jsonl or boolq.jsonl.gz, got piqa.jsonl"):
        tasks.find_task_files(["boolq"], str(tmp_path))
    with pytest.raises(SourceNotFound, match="expected a folder"):
        tasks.find_task_files(["boolq"], str(tmp_path / "nowhere"))


def test_without_the_harness_the_command_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadOption, match=r"pip install 'prunelit\[zeroshot\]'"):
        tasks.find_harness_tasks()


def test_without_a_network_the_way_to_local_files(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def nowhere(name: str, what: str, instead: str) -> None:
        asked.append(name)
        raise SourceNotFound(f"{what} {name!r}: not there; pass {instead}")

    monkeypatch.setattr(sources, "check_hub_access", nowhere)
    with pytest.raises(SourceNotFound, match=r"task 'piqa': .*--tasks_folder DIR"):
        tasks.check_rows_available(["piqa"])
    assert asked == ["baber/piqa"]
