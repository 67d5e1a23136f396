"""What is to be measured, checked before a model is loaded."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prunelit.data.eval_texts import resolve_text_sources
from prunelit.evaluation import tasks
from prunelit.evaluation.perplexities import Text
from prunelit.evaluation.samples import Samples
from prunelit.evaluation.speed import Speed
from prunelit.runtime.errors import BadOption


@dataclass(frozen=True)
class EvaluationRequest:
    """What is measured, all of it checked.

    Attributes:
        texts: what perplexity is measured on.
        data: folder of their files; None where they come from elsewhere.
        opened: their sources as they are opened.
        definitions: {task: path of its YAML}.
        files: {task: its local file}; empty where rows come from the hub.
        limit: items of each task; None for all.
        batch_size: requests of a task per forward pass.
        speed: None: not measured.
        samples: None: none are written.
    """

    texts: Mapping[str, Text] = field(default_factory=dict)
    data: str | None = None
    opened: Mapping[str, list[str]] = field(default_factory=dict)
    definitions: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, Path] = field(default_factory=dict)
    limit: int | None = None
    batch_size: int = 8
    speed: Speed | None = None
    samples: Samples | None = None


def prepare_text_request(texts: Mapping[str, Any], data: str | None) -> dict[str, Any]:
    """The part of `EvaluationRequest` about texts.

    Args:
        texts: {name: {text, file, seqlen, windows, stride}}, or a source alone.
        data: folder of text files whose paths are relative.

    Raises:
        BadOption: an unknown option or a value outside its range; SourceNotFound: no such file.
    """
    measured = {str(name): Text.from_option(str(name), given) for name, given in texts.items()}
    opened = {
        name: resolve_text_sources(f"texts.{name}", wanted.list_sources(data), data)
        for name, wanted in measured.items()
    }
    return {"texts": measured, "data": data, "opened": opened}


def prepare_task_request(
    names: list[str], folder: str | None, definitions: Path, limit: int | None, batch_size: int
) -> dict[str, Any]:
    """The part of `EvaluationRequest` about tasks.

    Args:
        names: of tasks, or "all".
        folder: of their files; None: the hub.
        definitions: where YAML files for local rows are written.
        limit: items of each task.
        batch_size: requests per forward pass.

    Raises:
        BadOption: an unknown task, a number below 1, or lm-evaluation-harness is not installed.
        SourceNotFound: rows that are missing, or without what their task reads.
    """
    for name, value in (("limit", limit), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise BadOption(f"{name}: expected at least 1, got {value}" + "; null takes all" * (name == "limit"))
    wanted = tasks.select_tasks(names)
    found: dict[str, Any] = {"limit": limit, "batch_size": batch_size}
    if not wanted:
        return found
    harness = tasks.find_harness_tasks()
    if folder is None:
        tasks.check_rows_available(wanted)
        return found | {"definitions": tasks.list_stock_definitions(wanted, harness)}
    files = tasks.find_task_files(wanted, folder)
    return found | {"definitions": tasks.write_task_definitions(files, harness, definitions), "files": files}
