"""The layout of a W&B project for pruning runs: a workspace and a report, built from code.

Both show what `prunelit.monitoring.dashboard` logs, with its lists of names. The tests build the workspace and read it
back as data; the rendering by W&B's server was never checked, and `save_workspace` needs that server.
"""

import json
from typing import TYPE_CHECKING

from prunelit.monitoring.dashboard import AXES, METRICS
from prunelit.report.record import STATES
from prunelit.runtime.errors import BadOption, get_first_line
from prunelit.runtime.text_files import JsonObject

if TYPE_CHECKING:
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws
    from wandb_workspaces.reports.v2.interface import BlockTypes, PanelTypes

NAME = "prunelit"
_TITLES = {
    "quality": "Quality",
    "structure": "What is left",
    "search": "Block search",
    "recovery": "Recovery",
    "cost": "Cost",
}
_JOB_METRICS = {"recovery": ("train_loss", "val_perplexity")}
"""Names that prunelit's RecoveryModule logs itself."""
_PICTURES = {
    "quality": ("quality/quality",),
    "structure": ("prune/kept", "prune/scores"),
    "search": ("prune/search",),
    "recovery": ("quality/training", "quality/speed"),
    "cost": ("quality/stages",),
}


def build_panels(section: str) -> "list[PanelTypes]":
    """Build the panels of a section: its figures, then a line or bar for each number.

    Args:
        section: a key of `prunelit.monitoring.dashboard.METRICS`.

    Returns:
        Panels of `wandb_workspaces.reports.v2`.

    Example: see `dump_workspace`.
    """
    import wandb_workspaces.reports.v2 as wr

    panels: list[PanelTypes] = [wr.MediaBrowser(title=key, media_keys=[key]) for key in _PICTURES[section]]
    if section == "quality":
        for quantity in ("perplexity", "parameters"):
            names = [f"quality/{state}_{quantity}" for state in STATES]
            panels.append(
                wr.BarPlot(
                    title=f"{quantity}: dense, pruned, recovered", metrics=[wr.SummaryMetric(name) for name in names]
                )
            )
    if section == "structure":
        panels += [wr.ScalarChart(title=name, metric=wr.SummaryMetric(name)) for name in METRICS[section]]
        return [*panels, wr.MediaBrowser(title="layers and completions", media_keys=["prune/layers", "samples"])]
    # The bars above show the other numbers of the quality.
    curves = METRICS[section][-1:] if section == "quality" else METRICS[section]
    for name in (*_JOB_METRICS.get(section, ()), *curves):
        log_scale = "perplexity" in name or None
        panels.append(wr.LinePlot(title=name, x=AXES.get(name, "trainer/global_step"), y=[name], log_y=log_scale))
    return panels


def build_workspace(entity: str, project: str) -> "ws.Workspace":
    """Build a `wandb_workspaces.workspaces.Workspace`; its `save()` creates it on the server.

    Args:
        entity: user or team.
        project: name of the W&B project.

    Example: see `dump_workspace`.
    """
    import wandb_workspaces.workspaces as ws

    sections = [ws.Section(name=title, panels=build_panels(name), is_open=True) for name, title in _TITLES.items()]
    return ws.Workspace(entity=entity, project=project, name=NAME, sections=sections)


def build_wandb_report(entity: str, project: str) -> "wr.Report":
    """Build a `wandb_workspaces.reports.v2.Report` with a heading and the panels of each section.

    Args:
        entity: user or team.
        project: name of the W&B project.

    Example: see `save_workspace`.
    """
    import wandb_workspaces.reports.v2 as wr

    runs = wr.Runset(entity=entity, project=project)
    blocks: list[BlockTypes] = [wr.P("What was cut, what it cost, and what came back.")]
    for name, title in _TITLES.items():
        blocks += [wr.H2(title), wr.PanelGrid(runsets=[runs], panels=build_panels(name))]
    return wr.Report(entity=entity, project=project, title=f"{NAME}: {project}", blocks=blocks)


def dump_workspace(entity: str, project: str) -> JsonObject:
    """Return the workspace as the JSON that the server would receive. (Writing out a report needs an API key.)

    Args:
        entity: user or team.
        project: name of the W&B project.

    Example: see `prunelit.cli.dashboard.create_dashboard`.
    """
    # `_to_model` is private, but the only way to get a layout without a server; a test notices if it disappears.
    content: JsonObject = json.loads(
        build_workspace(entity, project)._to_model().model_dump_json(by_alias=True, exclude_none=True)
    )
    return content


def save_workspace(entity: str, project: str) -> list[str]:
    """Create the workspace and the report on the server.

    Args:
        entity: user or team.
        project: name of the W&B project.

    Returns:
        Their two addresses.

    Raises:
        BadOption: no key, no network, or no such entity; the message has one line.

    Example: see `prunelit.cli.dashboard.create_dashboard`.
    """
    addresses = []
    for build in (build_workspace, build_wandb_report):
        try:
            addresses.append(str(build(entity, project).save().url))
        except Exception as error:  # what W&B and its transport raise has no common type
            reason = get_first_line(error)
            raise BadOption(
                f"project {project!r}: W&B refuses: {reason}; run `wandb login`, or write the layout with --out FILE"
            ) from error
    return addresses
