"""The layout of a W&B project for pruning runs: a workspace, and a report to write into, from code.

Both show what `prunelit.monitoring.dashboard` logs, by its own lists of names. What W&B's server draws of it has never
been seen: the workspace is built and read back as data, `save_workspace` needs the server.
"""

import json
from typing import Any

from prunelit.monitoring.dashboard import AXES, METRICS
from prunelit.report.record import STATES
from prunelit.runtime.errors import BadOption

NAME = "prunelit"
_TITLES = {
    "quality": "Quality",
    "structure": "What is left",
    "search": "Block search",
    "recovery": "Recovery",
    "cost": "Cost",
}
_OF_THE_JOB = {"recovery": ("train_loss", "val_perplexity")}
"""Logged by prunelit's RecoveryModule itself."""
_PICTURES = {
    "quality": ("quality/quality",),
    "structure": ("prune/kept", "prune/scores"),
    "search": ("prune/search",),
    "recovery": ("quality/training", "quality/speed"),
    "cost": ("quality/stages",),
}


def build_panels(section: str) -> list[Any]:
    """The panels of a section: its pictures, then a line or bar for each number."""
    import wandb_workspaces.reports.v2 as wr

    made: list[Any] = [wr.MediaBrowser(title=key, media_keys=[key]) for key in _PICTURES[section]]
    if section == "quality":
        for what in ("perplexity", "parameters"):
            names = [f"quality/{state}_{what}" for state in STATES]
            made.append(
                wr.BarPlot(title=f"{what}: dense, pruned, recovered", metrics=[wr.SummaryMetric(n) for n in names])
            )
    if section == "structure":
        made += [wr.ScalarChart(title=name, metric=wr.SummaryMetric(name)) for name in METRICS[section]]
        return [*made, wr.MediaBrowser(title="layers and completions", media_keys=["prune/layers", "samples"])]
    curves = METRICS[section][-1:] if section == "quality" else METRICS[section]  # the others are its bars
    for name in (*_OF_THE_JOB.get(section, ()), *curves):
        log = "perplexity" in name or None
        made.append(wr.LinePlot(title=name, x=AXES.get(name, "trainer/global_step"), y=[name], log_y=log))
    return made


def build_workspace(entity: str, project: str) -> Any:
    """A `wandb_workspaces.workspaces.Workspace`; `save_workspace()` makes it on the server."""
    import wandb_workspaces.workspaces as ws

    sections = [ws.Section(name=title, panels=build_panels(name), is_open=True) for name, title in _TITLES.items()]
    return ws.Workspace(entity=entity, project=project, name=NAME, sections=sections)


def build_wandb_report(entity: str, project: str) -> Any:
    """A `wandb_workspaces.reports.v2.Report`, a heading and the panels of each section."""
    import wandb_workspaces.reports.v2 as wr

    runs = wr.Runset(entity=entity, project=project)
    blocks: list[Any] = [wr.P("What was cut, what it cost, and what came back.")]
    for name, title in _TITLES.items():
        blocks += [wr.H2(title), wr.PanelGrid(runsets=[runs], panels=build_panels(name))]
    return wr.Report(entity=entity, project=project, title=f"{NAME}: {project}", blocks=blocks)


def dump_workspace(entity: str, project: str) -> dict[str, Any]:
    """The workspace as the server would be sent it; a report can not be spelt out without a key."""
    # Private, but the only way to see a layout without a server; a test would notice it going.
    found: dict[str, Any] = json.loads(
        build_workspace(entity, project)._to_model().model_dump_json(by_alias=True, exclude_none=True)
    )
    return found


def save_workspace(entity: str, project: str) -> list[str]:
    """Make both on the server; their addresses.

    Raises:
        BadOption: no key, no network, no such entity, in one line.
    """
    found = []
    for build in (build_workspace, build_wandb_report):
        try:
            found.append(str(build(entity, project).save().url))
        except Exception as error:  # what W&B and its transport raise has no common type
            said = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise BadOption(
                f"project {project!r}: W&B refuses: {said}; run `wandb login`, or write the layout with --out FILE"
            ) from error
    return found
