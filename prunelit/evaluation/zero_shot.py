"""Zero-shot accuracy by lm-evaluation-harness itself, one task at a time, with what every item was answered.

Calling the harness directly on the same folder, task, batch size and dtype gives the same numbers.
"""

import logging
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from typing import Any

from prunelit.calibration.fingerprints import compute_digest
from prunelit.data.text import describe_error, silence_datasets
from prunelit.evaluation import paired
from prunelit.runtime.errors import SourceNotFound
from prunelit.runtime.progress import show_stage

METRICS = ("acc", "acc_norm")
AVERAGES = {
    "acc": "acc",
    "acc_norm": "acc_norm, and acc where the harness defines no acc_norm",
}


class ZeroShotEvaluator:
    """A model behind the harness' interface.

    Args:
        network: a causal LM, on the device where it is to run.
        tokenizer: its tokenizer.
        batch_size: requests per forward pass; in half precision it moves numbers in their last digits.
    """

    def __init__(self, network: Any, tokenizer: Any, batch_size: int):
        with _silence_harness():
            from lm_eval.models.huggingface import HFLM

            class Model(HFLM):  # type: ignore[misc]
                """The harness' model, whose bar shows on a terminal only."""

                def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
                    return super().loglikelihood(requests, disable_tqdm or not sys.stderr.isatty())

            self._model = Model(pretrained=network, backend="causal", tokenizer=tokenizer, batch_size=batch_size)

    def run_task(self, name: str, definition: str, limit: int | None) -> dict[str, Any]:
        """One task.

        Args:
            name: of the task.
            definition: path of its YAML.
            limit: the first so many items; None for all.

        Returns:
            {"items", "metrics": {"acc", "acc_stderr", ...}, "right": {"acc": one 0 or 1 per item, ...}, "version",
            "fingerprint" (of the items)}.

        Raises:
            SourceNotFound: its rows can not be read or fetched.
        """
        import datasets
        from lm_eval.evaluator import evaluate
        from lm_eval.tasks import TaskManager

        with _silence_harness():
            try:
                with show_stage(f"reading {name}"):
                    loaded = TaskManager(include_defaults=False).load([definition])
            except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
                raise SourceNotFound(f"task {name!r}: its rows can not be read: {describe_error(error)}") from error
            for task in loaded["tasks"].values():  # as `simple_evaluate` has it
                task.set_config(key="num_fewshot", value=0)
            found: Any = evaluate(self._model, loaded, limit=limit, log_samples=True)
        numbers, samples = found["results"][name], found["samples"][name]
        kinds = [metric for metric in METRICS if f"{metric},none" in numbers]
        metrics: dict[str, float | None] = {}
        for kind in kinds:
            metrics[kind] = float(numbers[f"{kind},none"])
            metrics[f"{kind}_stderr"] = _parse_harness_number(numbers[f"{kind}_stderr,none"])
        return {
            "items": len(samples),
            "metrics": metrics,
            "right": {kind: [float(sample[kind]) for sample in samples] for kind in kinds},
            "version": str(found["versions"][name]),
            "fingerprint": compute_digest(" ".join(sample["doc_hash"] for sample in samples)),
        }


def get_harness_version() -> str:
    """Of the installed lm-evaluation-harness."""
    return metadata.version("lm_eval")


def compute_metric_differences(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """{metric: paired difference} of two results of `ZeroShotEvaluator.run` on the same items."""
    return {
        kind: paired.compute_paired_difference(mine["right"][kind], theirs["right"][kind]) for kind in mine["right"]
    }


def average_over_tasks(tasks: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Means over tasks, every task weighing the same, in both conventions of the field.

    Args:
        tasks: {"model": result} of each; with {"against": result, "difference": of `compute_metric_differences`} where there are two.

    Returns:
        {"acc" or "acc_norm": {"model", "against", "difference"}}.
    """
    found: dict[str, dict[str, Any]] = {}
    for kind in AVERAGES:
        used = [kind if kind in task["model"]["metrics"] else "acc" for task in tasks]
        found[kind] = {
            who: math.fsum(task[who]["metrics"][own] for task, own in zip(tasks, used, strict=True)) / len(tasks)
            for who in ("model", "against")
            if who in tasks[0]
        }
        if "against" in found[kind]:
            each = [task["difference"][own] for task, own in zip(tasks, used, strict=True)]
            found[kind]["difference"] = paired.average_differences(each)
    return found


def _parse_harness_number(given: Any) -> float | None:
    """A number of the harness, which writes "N/A" for an error of one item."""
    return float(given) if isinstance(given, int | float) and math.isfinite(given) else None


@contextmanager
def _silence_harness() -> Iterator[None]:
    """Silence the harness' log, and the one bar that it gives no option for: of putting prompts together."""
    from lm_eval.api import task

    log, bar = logging.getLogger("lm_eval"), task.tqdm
    level = log.level
    log.setLevel(logging.ERROR)
    task.tqdm = lambda items, **_: items
    try:
        with silence_datasets():
            yield
    finally:
        log.setLevel(level)
        task.tqdm = bar
