"""Zero-shot tasks of lm-evaluation-harness, from the hub or from local files, checked before a model is loaded.

The definition of a task (prompt, choices, metrics) is always the harness' own. For a local file, a small YAML includes
that definition and replaces only the source of the rows. `lm_eval --include_path FOLDER` reads these YAML files too.
"""

import gzip
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import yaml

from prunelit.data import sources
from prunelit.evaluation.harness_tasks import find_harness_task
from prunelit.runtime.errors import BadOption, SourceNotFound
from prunelit.runtime.text_files import write_text

_SUFFIXES = (".jsonl.gz", ".jsonl")
TaskRow = Mapping[str, Any]
"""A JSON object of a task's file."""


@dataclass(frozen=True)
class Task:
    """A zero-shot task.

    Attributes:
        definition: the harness' YAML, relative to lm_eval/tasks.
        dataset: hub id of the rows.
        split: the split that the harness scores.
        fields: the fields of a row that the definition reads.

    Example:
        >>> TASKS["boolq"].split
        'validation'
    """

    definition: str
    dataset: str
    split: str
    fields: Mapping[str, "TaskField"]


@dataclass(frozen=True)
class TaskField:
    """What a field of a row must hold.

    Attributes:
        description: shown to the user.
        accepts: checks a value; it is given the whole row too.

    Example:
        >>> TASKS["boolq"].fields["label"].accepts(1, {})
        True
    """

    description: str
    accepts: Callable[[object, TaskRow], bool]


def _is_text(value: object, row: TaskRow) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _accept_numbers_below(count: Callable[[TaskRow], int]) -> Callable[[object, TaskRow], bool]:
    def accepts(value: object, row: TaskRow) -> bool:
        number = int(value) if isinstance(value, str) and value.strip().isdigit() else value
        return isinstance(number, int) and not isinstance(number, bool) and 0 <= number < count(row)

    return accepts


def _are_choices(value: object, row: TaskRow) -> bool:
    texts, labels = (value.get("text"), value.get("label")) if isinstance(value, Mapping) else (None, None)
    if not isinstance(texts, list) or not isinstance(labels, list):
        return False
    return len(texts) == len(labels) > 1 and all(isinstance(word, str) for word in texts + labels)


def _is_choice_label(value: object, row: TaskRow) -> bool:
    return isinstance(value, str) and _are_choices(row.get("choices"), row) and value.strip() in row["choices"]["label"]


_TEXT = TaskField("text", _is_text)
_BINARY = TaskField("0 or 1", _accept_numbers_below(lambda row: 2))
_CHOICE_FIELDS = {
    "choices": TaskField("{text: [...], label: [...]} of one length", _are_choices),
    "answerKey": TaskField("one of choices.label", _is_choice_label),
}
_TEXT_WITH_GAP = TaskField("text with a gap _", lambda value, row: _is_text(value, row) and "_" in str(value))
_ENDINGS_LIST = TaskField(
    "a list of two texts or more",
    lambda value, row: isinstance(value, list) and len(value) > 1 and all(_is_text(text, row) for text in value),
)
_ENDING_INDEX = TaskField(
    "the number of an ending",
    _accept_numbers_below(lambda row: len(row["endings"]) if isinstance(row.get("endings"), list) else 0),
)

TASKS: dict[str, Task] = {
    "piqa": Task(
        "piqa/piqa.yaml", "baber/piqa", "validation", {"goal": _TEXT, "sol1": _TEXT, "sol2": _TEXT, "label": _BINARY}
    ),
    "hellaswag": Task(
        "hellaswag/hellaswag.yaml",
        "Rowan/hellaswag",
        "validation",
        {
            **dict.fromkeys(("ctx_a", "activity_label"), _TEXT),
            "ctx_b": TaskField("text, may be empty", lambda value, row: isinstance(value, str)),
            "endings": _ENDINGS_LIST,
            "label": _ENDING_INDEX,
        },
    ),
    "winogrande": Task(
        "winogrande/default.yaml",
        "allenai/winogrande",
        "validation",
        {
            "sentence": _TEXT_WITH_GAP,
            "option1": _TEXT,
            "option2": _TEXT,
            "answer": TaskField('"1" or "2"', lambda value, row: value in ("1", "2")),
        },
    ),
    "arc_easy": Task("arc/arc_easy.yaml", "allenai/ai2_arc", "test", {"question": _TEXT, **_CHOICE_FIELDS}),
    "arc_challenge": Task("arc/arc_challenge.yaml", "allenai/ai2_arc", "test", {"question": _TEXT, **_CHOICE_FIELDS}),
    "boolq": Task(
        "super_glue/boolq/default.yaml",
        "aps/super_glue",
        "validation",
        {"passage": _TEXT, "question": _TEXT, "label": _BINARY},
    ),
    "openbookqa": Task(
        "openbookqa/openbookqa.yaml", "allenai/openbookqa", "test", {"question_stem": _TEXT, **_CHOICE_FIELDS}
    ),
}


def select_tasks(names: Sequence[str]) -> list[str]:
    """Select tasks by name.

    Args:
        names: of tasks; "all" selects those of `TASKS`. Any other one is looked up in the harness.

    Raises:
        BadOption: no such task, one that is not scored by accuracy, or one twice.

    Example:
        >>> select_tasks(["piqa", "boolq"])
        ['piqa', 'boolq']
    """
    for name in names:
        if name != "all":
            find_task(name)
    selected = list(TASKS) if "all" in names else list(names)
    if len(set(selected)) < len(selected):
        raise BadOption(f"tasks: expected each once, got {selected}")
    return selected


def find_task(name: str) -> Task:
    """Find a task by name: one of `TASKS`, whose local rows are checked field by field, or any of the harness.

    Args:
        name: of the task.

    Raises:
        BadOption: no such task, or one that is not scored by accuracy.

    Example:
        >>> find_task("piqa").dataset
        'baber/piqa'
    """
    if name in TASKS:
        return TASKS[name]
    harness = find_harness_tasks()
    task = find_harness_task(name, harness)
    return Task(str(task.definition.relative_to(harness)), task.dataset, task.split, {})


def find_harness_tasks() -> Path:
    """Find the folder of the harness' own task definitions.

    Raises:
        BadOption: lm-evaluation-harness is not installed.

    Example: see `list_stock_definitions`.
    """
    package = importlib.util.find_spec("lm_eval")
    if package is None or not package.submodule_search_locations:
        raise BadOption("tasks: zero-shot tasks need lm-evaluation-harness: pip install 'prunelit[zeroshot]'")
    return Path(package.submodule_search_locations[0]) / "tasks"


def find_task_files(names: Sequence[str], folder: str) -> dict[str, Path]:
    """Find the local file of each task and check all of its rows.

    Args:
        names: of tasks.
        folder: holds NAME.jsonl or NAME.jsonl.gz.

    Returns:
        {task: path of its file}.

    Raises:
        SourceNotFound: no such folder or file, or a row lacks a field that the task reads; names line and field.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     _ = (Path(folder) / "boolq.jsonl").write_text('{"passage": "p", "question": "q", "label": 1}')
        ...     find_task_files(["boolq"], folder)["boolq"].name
        'boolq.jsonl'
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise SourceNotFound(f"tasks_folder {folder!r}: expected a folder with NAME.jsonl or NAME.jsonl.gz, got none")
    files = {}
    for name in names:
        paths = [path for ending in _SUFFIXES if (path := root / f"{name}{ending}").is_file()]
        if not paths:
            content = ", ".join(sorted(path.name for path in root.iterdir())[:8]) or "nothing"
            raise SourceNotFound(f"tasks_folder {folder!r}: expected {name}.jsonl or {name}.jsonl.gz, got {content}")
        _check_task_rows(name, paths[0])
        files[name] = paths[0].resolve()
    return files


def _check_task_rows(name: str, path: Path) -> None:
    """Check every row of a task file; the message names line and field."""
    open_file: Callable[..., IO[str]] = gzip.open if path.suffix == ".gz" else open
    fields = find_task(name).fields
    line_number = 0
    try:
        with open_file(path, "rt", encoding="utf-8") as file:
            for line_number, line in enumerate(file, 1):
                where = f"task file {str(path)!r}: line {line_number}"
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise SourceNotFound(
                        f"{where}: expected one JSON object a line, got {line.strip()!r:.60}"
                    ) from error
                if not isinstance(row, dict):
                    raise SourceNotFound(f"{where}: expected a JSON object, got {row!r:.60}")
                for field, expected in fields.items():
                    if field not in row:
                        raise SourceNotFound(
                            f"{where}: expected a field {field!r} ({expected.description}), got {sorted(row)}"
                        )
                    if not expected.accepts(row[field], row):
                        raise SourceNotFound(
                            f"{where}: {field}: expected {expected.description}, got {row[field]!r:.60}"
                        )
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise SourceNotFound(f"task file {str(path)!r}: cannot be read: {type(error).__name__}: {error}") from error
    if not line_number:
        raise SourceNotFound(f"task file {str(path)!r}: expected rows, got an empty file")


def check_rows_available(names: Sequence[str]) -> None:
    """Check within seconds that the rows of tasks are in the local cache or can be downloaded.

    Args:
        names: of tasks.

    Raises:
        SourceNotFound: they are neither.

    Example: see `prunelit.evaluation.request.prepare_task_request`.
    """
    for name in names:
        try:
            sources.check_hub_access(find_task(name).dataset, "text", f"--tasks_folder DIR with {name}.jsonl.gz")
        except SourceNotFound as error:
            raise SourceNotFound(f"task {name!r}: {error}") from error


def write_task_definitions(files: Mapping[str, Path], harness: Path, folder: Path) -> dict[str, str]:
    """Write a YAML for each task that includes the harness' definition and reads its rows from a local file.

    Args:
        files: result of `find_task_files`.
        harness: result of `find_harness_tasks`.
        folder: where NAME.yaml is written.

    Returns:
        {task: path of its YAML}.

    Raises:
        OutputNotWritable: the disk refused.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     written = write_task_definitions({"piqa": Path("piqa.jsonl")}, Path("lm_eval/tasks"), Path(folder))
        ...     yaml.safe_load(Path(written["piqa"]).read_text())["include"]
        'lm_eval/tasks/piqa/piqa.yaml'
    """
    definitions = {}
    for name, path in files.items():
        task = find_task(name)
        splits = dict.fromkeys(("training_split", "validation_split", "test_split"))
        splits[f"{task.split}_split"] = task.split
        content = {
            "include": str(harness / task.definition),
            "task": name,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {task.split: str(path)}},
            **splits,
        }
        target = folder / f"{name}.yaml"
        write_text(target, yaml.safe_dump(content, sort_keys=False))
        definitions[name] = str(target)
    return definitions


def list_stock_definitions(names: Sequence[str], harness: Path) -> dict[str, str]:
    """List the harness' own YAML of each task, which downloads rows from the hub.

    Args:
        names: of tasks.
        harness: result of `find_harness_tasks`.

    Returns:
        {task: path of its YAML}.

    Example:
        >>> list_stock_definitions(["piqa"], Path("lm_eval/tasks"))
        {'piqa': 'lm_eval/tasks/piqa/piqa.yaml'}
    """
    return {name: str(harness / find_task(name).definition) for name in names}
