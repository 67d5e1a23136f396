"""What an evaluation measures, checked before any model is loaded."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NotRequired, TypedDict

from torch import Tensor

from prunelit.data.eval_texts import resolve_text_sources
from prunelit.data.rows.text_rows import TextRows
from prunelit.evaluation import tasks
from prunelit.evaluation.perplexities import Text
from prunelit.evaluation.samples import Samples
from prunelit.evaluation.speed import Speed
from prunelit.runtime.errors import BadOption


@dataclass(frozen=True)
class EvaluationRequest:
    """What is measured; every value has been checked.

    Attributes:
        texts: texts for perplexity.
        data: folder of their files; None where they come from elsewhere.
        sources: the texts' sources, resolved against `data`; or rows, or windows of token ids [N, S].
        definitions: {task: path of its YAML}.
        files: {task: its local file}; empty where rows come from the hub.
        limit: items of each task; None for all.
        batch_size: requests of a task per forward pass.
        speed: what is timed; None: nothing.
        vllm_python: Python of an environment with vLLM, in which the models are timed too; None: they are not.
        samples: which prompts are completed; None: none.

    Example:
        >>> EvaluationRequest(**prepare_text_request({}, data=None)).batch_size
        8
    """

    texts: Mapping[str, Text] = field(default_factory=dict)
    data: str | None = None
    sources: Mapping[str, list[str] | TextRows | Tensor] = field(default_factory=dict)
    definitions: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, Path] = field(default_factory=dict)
    limit: int | None = None
    batch_size: int = 8
    speed: Speed | None = None
    vllm_python: str | None = None
    samples: Samples | None = None


class TextRequest(TypedDict):
    """The arguments of `EvaluationRequest` about texts.

    Example: see `EvaluationRequest`.
    """

    texts: dict[str, Text]
    data: str | None
    sources: dict[str, list[str]]


class TaskRequest(TypedDict):
    """The arguments of `EvaluationRequest` about tasks.

    Example: see `prepare_task_request`.
    """

    limit: int | None
    batch_size: int
    definitions: NotRequired[dict[str, str]]
    files: NotRequired[dict[str, Path]]


def prepare_text_request(texts: Mapping[str, object], data: str | None) -> TextRequest:
    """Check the texts for perplexity and resolve their sources.

    Args:
        texts: {name: {text, file, seqlen, windows, stride}}, or {name: source}.
        data: folder of text files whose paths are relative.

    Returns:
        The arguments of `EvaluationRequest` about texts.

    Raises:
        BadOption: an unknown option or a value outside its range.
        SourceNotFound: no such file.

    Example: see `EvaluationRequest`.
    """
    checked = {str(name): Text.from_option(str(name), options) for name, options in texts.items()}
    resolved = {
        name: resolve_text_sources(f"texts.{name}", text.list_sources(data), data) for name, text in checked.items()
    }
    return {"texts": checked, "data": data, "sources": resolved}


def prepare_task_request(
    names: list[str], folder: str | None, definitions: Path, limit: int | None, batch_size: int
) -> TaskRequest:
    """Check the zero-shot tasks and find their rows.

    Args:
        names: of tasks, or "all".
        folder: of the tasks' files; None: rows come from the hub.
        definitions: folder in which YAML files for local rows are written.
        limit: items of each task; None for all.
        batch_size: requests per forward pass.

    Returns:
        The arguments of `EvaluationRequest` about tasks.

    Raises:
        BadOption: an unknown task, a number below 1, or lm-evaluation-harness is not installed.
        SourceNotFound: rows are missing, or lack a field that their task reads.

    Example:
        >>> prepare_task_request([], None, Path("tasks"), limit=10, batch_size=4)
        {'limit': 10, 'batch_size': 4}
    """
    for name, value in (("limit", limit), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise BadOption(f"{name}: expected at least 1, got {value}" + "; null takes all" * (name == "limit"))
    chosen = tasks.select_tasks(names)
    request: TaskRequest = {"limit": limit, "batch_size": batch_size}
    if not chosen:
        return request
    harness_tasks = tasks.find_harness_tasks()
    if folder is None:
        tasks.check_rows_available(chosen)
        return request | {"definitions": tasks.list_stock_definitions(chosen, harness_tasks)}
    files = tasks.find_task_files(chosen, folder)
    return request | {"definitions": tasks.write_task_definitions(files, harness_tasks, definitions), "files": files}
