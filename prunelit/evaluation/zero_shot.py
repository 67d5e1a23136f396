"""Zero-shot accuracy by lm-evaluation-harness itself, one task at a time, with the result of every item.

Running the harness directly with the same folder, task, batch size and dtype gives the same numbers.
"""

import logging
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from typing import TYPE_CHECKING, Any, TypedDict

from prunelit.data.rows.tables import silence_datasets
from prunelit.evaluation import paired
from prunelit.runtime.errors import SourceNotFound, describe_error
from prunelit.runtime.fingerprints import compute_digest
from prunelit.runtime.progress import show_stage
from prunelit.runtime.text_files import JsonObject

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

METRICS = ("acc", "acc_norm")
AVERAGES = {
    "acc": "acc",
    "acc_norm": "acc_norm, and acc where the harness defines no acc_norm",
}


class TaskResult(TypedDict):
    """What a model reaches on one task; `right` holds one 0 or 1 per item for each metric.

    Example: see `ZeroShotEvaluator.run_task`.
    """

    items: int
    metrics: dict[str, float | None]
    right: dict[str, list[float]]
    version: str
    fingerprint: str


class ZeroShotEvaluator:
    """Runs tasks of lm-evaluation-harness on a model.

    Args:
        network: a causal LM, on the device where it is to run.
        tokenizer: its tokenizer.
        batch_size: requests per forward pass; in half precision it changes the last digits of the results.

    Example: see `prunelit.evaluation.run.evaluate_model`.
    """

    def __init__(self, network: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", batch_size: int):
        with _silence_harness():
            from lm_eval.models.huggingface import HFLM

            class Model(HFLM):  # type: ignore[misc]
                """The harness' model, which shows its progress bar on a terminal only."""

                def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
                    return super().loglikelihood(requests, disable_tqdm or not sys.stderr.isatty())

            self._model = Model(pretrained=network, backend="causal", tokenizer=tokenizer, batch_size=batch_size)

    def run_task(self, name: str, definition: str, limit: int | None) -> TaskResult:
        """Run one task.

        Args:
            name: of the task.
            definition: path of its YAML.
            limit: use only the first so many items; None for all.

        Returns:
            {"items", "metrics": {"acc", "acc_stderr", ...}, "right": {"acc": one 0 or 1 per item, ...}, "version",
            "fingerprint" (of the items)}.

        Raises:
            SourceNotFound: the task's rows cannot be read or downloaded.
        """
        import datasets
        from lm_eval.evaluator import evaluate
        from lm_eval.tasks import TaskManager

        with _silence_harness():
            try:
                with show_stage(f"reading {name}"):
                    loaded = TaskManager(include_defaults=False).load([definition])
            except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
                raise SourceNotFound(f"task {name!r}: its rows cannot be read: {describe_error(error)}") from error
            for task in loaded["tasks"].values():  # as `simple_evaluate` has it
                task.set_config(key="num_fewshot", value=0)
            results: Any = evaluate(self._model, loaded, limit=limit, log_samples=True)
        numbers, samples = results["results"][name], results["samples"][name]
        names = [metric for metric in METRICS if f"{metric},none" in numbers]
        metrics: dict[str, float | None] = {}
        for metric in names:
            metrics[metric] = float(numbers[f"{metric},none"])
            metrics[f"{metric}_stderr"] = _parse_harness_number(numbers[f"{metric}_stderr,none"])
        return {
            "items": len(samples),
            "metrics": metrics,
            "right": {metric: [float(sample[metric]) for sample in samples] for metric in names},
            "version": str(results["versions"][name]),
            "fingerprint": compute_digest(" ".join(sample["doc_hash"] for sample in samples)),
        }


def get_harness_version() -> str:
    """Return the version of the installed lm-evaluation-harness.

    Example: see `prunelit.evaluation.run.evaluate_model`.
    """
    return metadata.version("lm_eval")


def compute_metric_differences(result: TaskResult, baseline: TaskResult) -> dict[str, dict[str, float]]:
    """Compute the paired difference of two models for each metric.

    Args:
        result: of `ZeroShotEvaluator.run_task`.
        baseline: of the model to compare with, on the same items.

    Returns:
        {metric: result of `prunelit.evaluation.paired.compute_paired_difference`}.

    Example:
        >>> differences = compute_metric_differences({"right": {"acc": [1.0, 0.0]}}, {"right": {"acc": [0.0, 0.0]}})
        >>> differences["acc"]["difference"]
        0.5
    """
    return {
        metric: paired.compute_paired_difference(result["right"][metric], baseline["right"][metric])
        for metric in result["right"]
    }


def average_over_tasks(tasks: Sequence[JsonObject]) -> dict[str, JsonObject]:
    """Average metrics over tasks with equal weights, in the two conventions of the field (see `AVERAGES`).

    Args:
        tasks: {"model": result} of each; with two models also {"against": result, "difference": result of
            `compute_metric_differences`}.

    Returns:
        {"acc" or "acc_norm": {"model", "against", "difference"}}.

    Example:
        >>> averages = average_over_tasks([{"model": {"metrics": {"acc": 0.5}}}, {"model": {"metrics": {"acc": 0.7}}}])
        >>> round(averages["acc"]["model"], 3), round(averages["acc_norm"]["model"], 3)
        (0.6, 0.6)
    """
    averages: dict[str, JsonObject] = {}
    for metric in AVERAGES:
        task_metrics = [metric if metric in task["model"]["metrics"] else "acc" for task in tasks]
        averages[metric] = {
            role: math.fsum(
                task[role]["metrics"][task_metric] for task, task_metric in zip(tasks, task_metrics, strict=True)
            )
            / len(tasks)
            for role in ("model", "against")
            if role in tasks[0]
        }
        if "against" in averages[metric]:
            differences = [
                task["difference"][task_metric] for task, task_metric in zip(tasks, task_metrics, strict=True)
            ]
            averages[metric]["difference"] = paired.average_differences(differences)
    return averages


def _parse_harness_number(value: object) -> float | None:
    """Convert a number of the harness, which writes "N/A" for the standard error of a single item."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


@contextmanager
def _silence_harness() -> Iterator[None]:
    """Silence the harness' log, and its progress bar for building prompts, which no option turns off."""
    from lm_eval.api import task

    log, original_tqdm = logging.getLogger("lm_eval"), task.tqdm
    level = log.level
    log.setLevel(logging.ERROR)
    task.tqdm = lambda items, **_: items
    try:
        with silence_datasets():
            yield
    finally:
        log.setLevel(level)
        task.tqdm = original_tqdm
