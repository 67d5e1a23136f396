"""A comparison as a Weights & Biases run: one table, the figures, and the measure of every cell.

Nothing is sent unless a project is named. Texts, tokens and paths of this machine are never sent.
"""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from prunelit.compare.report_content import ComparisonReport
from prunelit.compare.tables import compute_mean_log_ratio
from prunelit.report.format_numbers import exponentiate_nll, format_percent
from prunelit.runtime.errors import BadOption, get_first_line
from prunelit.runtime.wandb_settings import WANDB_QUIET

if TYPE_CHECKING:
    from wandb.sdk.wandb_run import Run


def open_wandb_run(project: str, name: str, folder: Path, stack: ExitStack) -> "Run":
    """Open a run before the long work, so that a missing key is found at once. An error later closes it as failed.

    Args:
        project: name of the W&B project.
        name: of the run.
        folder: where wandb keeps its files.
        stack: closes the run.

    Returns:
        A `wandb.sdk.wandb_run.Run`.

    Raises:
        BadOption: wandb refuses.

    Example: see `prunelit.compare.run.compare_methods`.
    """
    import wandb

    try:
        settings = wandb.Settings(**WANDB_QUIET)
        run = wandb.init(project=project, name=name, job_type="compare", dir=str(folder), settings=settings)
    except wandb.Error as error:
        reason = get_first_line(error)
        raise BadOption(
            f"wandb_project {project!r}: wandb refuses: {reason}; run `wandb login`, or set WANDB_MODE=offline"
        ) from error
    stack.push(lambda error_type, error, traceback: run.finish(exit_code=int(error_type is not None)))
    return run


def log_comparison(run: "Run", report: ComparisonReport, pictures: Sequence[Path]) -> None:
    """Log a finished comparison to an open run.

    Args:
        run: result of `open_wandb_run`.
        report: content of compare.json.
        pictures: image files; those that end in .png are logged.

    Example: see `prunelit.compare.run.compare_methods`.
    """
    import wandb

    texts, dense = list(report["texts"]), report["dense"]
    protocol_keys = ("windows", "sequence_length", "dtype", "fingerprint")
    content: dict[str, object] = dict(report)
    run.config.update(
        {name: content[name] for name in ("model", "ratios", "seeds", "latency", "versions")}
        | {"texts": {text: {name: report["texts"][text][name] for name in protocol_keys} for text in texts}}
    )
    columns: list[str | int] = [
        *("method", "ratio", "seed", "status", "parameters", "removed", "mean log ratio", "prune seconds"),
        *["speed-up"] * bool(report["latency"]),
        *(f"perplexity {text}" for text in texts),
    ]
    table = wandb.Table(columns=columns)
    table.add_data(
        *("dense", 0.0, None, "finished", dense["size"]["parameters"], 0.0, 0.0, 0.0, *[1.0] * bool(report["latency"])),
        *(_replace_non_finite(exponentiate_nll(dense["texts"][text])) for text in texts),
    )
    for cell in report["cells"]:
        identity = cell["label"], cell["ratio"], cell["seed"], cell["status"]
        if cell["status"] != "finished":
            table.add_data(*identity, *[None] * (len(columns) - len(identity)))
            continue
        measure = compute_mean_log_ratio(cell, dense)
        table.add_data(
            *identity,
            *(cell["size"]["parameters"], cell["ratio_of_block_parameters"], measure, cell["seconds"]["prune"]),
            *([cell["latency"]["speedup"]] if report["latency"] else []),
            *(_replace_non_finite(exponentiate_nll(cell["texts"][text])) for text in texts),
        )
        run.summary[f"mean_log_ratio/{cell['label']}/{format_percent(cell['ratio'])}/seed {cell['seed']}"] = measure
    images = {path.stem: wandb.Image(str(path)) for path in pictures if path.suffix == ".png"}
    run.log({"comparison": table, **images})


def _replace_non_finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
