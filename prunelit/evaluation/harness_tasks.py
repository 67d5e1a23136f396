"""Tasks of lm-evaluation-harness by name, read from its YAML files; the harness itself is not imported."""

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from prunelit.runtime.errors import BadOption, suggest_name

_TASK_LINE = re.compile(r"""^["']?(task|group)["']?\s*:\s*["']?([^\s"'\[#]+)["']?\s*$""", re.MULTILINE)
_DEFAULT_METRICS = {"multiple_choice": ["acc", "acc_norm"], "loglikelihood": ["perplexity", "acc"]}
"""Metrics of a definition that names none, by its output type."""


class HarnessTask(NamedTuple):
    """A task as the harness defines it.

    Attributes:
        definition: path of its YAML.
        dataset: hub id of the rows.
        split: that is scored.

    Example: see `find_harness_task`.
    """

    definition: Path
    dataset: str
    split: str


class _DefinitionLoader(yaml.SafeLoader):
    """Reads a definition; what it names of Python stays text."""


_DefinitionLoader.add_multi_constructor("!", lambda loader, suffix, node: str(node.value))


@cache
def index_definitions(harness: Path) -> tuple[Mapping[str, Path], Mapping[str, Path]]:
    """Index the definitions of the harness by name.

    Args:
        harness: its folder of tasks.

    Returns:
        {task: its YAML} and {group of tasks: its YAML}.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     _ = Path(folder, "a.yaml").write_text("task: riddles")
        ...     list(index_definitions(Path(folder))[0])
        ['riddles']
    """
    paths: dict[str, dict[str, Path]] = {"task": {}, "group": {}}
    for path in sorted(harness.rglob("*.yaml")):
        for kind, name in _TASK_LINE.findall(path.read_text(encoding="utf-8", errors="replace")):
            paths[kind].setdefault(name, path)
    return paths["task"], paths["group"]


def find_harness_task(name: str, harness: Path) -> HarnessTask:
    """Find a task by its name, and check that it is scored as the others are: by accuracy, item by item.

    Args:
        name: of the task.
        harness: folder of the harness' tasks.

    Raises:
        BadOption: no such task, a group of tasks, or one that generates text or is scored otherwise.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     text = "task: riddles\\ndataset_path: o/r\\ntest_split: test\\noutput_type: multiple_choice"
        ...     _ = Path(folder, "a.yaml").write_text(text)
        ...     find_harness_task("riddles", Path(folder)).dataset
        'o/r'
    """
    definitions, groups = index_definitions(harness)
    if name in groups and name not in definitions:
        members = sorted(task for task in definitions if task.startswith(f"{name}_"))
        such_as = f", such as {', '.join(members[:4])}" if members else f"; they stand in {groups[name].name}"
        raise BadOption(f"tasks: {name!r} is a group of tasks; expected single ones{such_as}")
    if name not in definitions:
        raise BadOption(
            f"tasks: expected all, or names of lm-evaluation-harness ({len(definitions):,} tasks), got "
            f"{name!r}{suggest_name(name, definitions)}"
        )
    content = _read_definition(definitions[name])
    kind = str(content.get("output_type", "generate_until"))
    listed = content.get("metric_list")
    metrics = [str(entry.get("metric")) for entry in listed] if listed else _DEFAULT_METRICS.get(kind, [])
    if kind not in _DEFAULT_METRICS or "acc" not in metrics:
        raise BadOption(
            f"tasks: {name!r} is {kind}, scored by {', '.join(metrics) or 'code of its own'}; expected one scored by "
            "acc; run it with lm_eval itself, which loads the saved folder"
        )
    split = content.get("test_split") or content.get("validation_split")
    if not split or not content.get("dataset_path"):
        raise BadOption(f"tasks: {name!r} names no dataset or no split to score; run it with lm_eval itself")
    return HarnessTask(definitions[name], str(content["dataset_path"]), str(split))


def _read_definition(path: Path) -> dict[str, Any]:
    """Read a definition together with the one that it includes."""
    content: dict[str, Any] = yaml.load(path.read_text(encoding="utf-8"), _DefinitionLoader)
    included = content.get("include")
    return (_read_definition((path.parent / included).resolve()) if included else {}) | content
