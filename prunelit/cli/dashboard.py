"""`python -m prunelit dashboard`: lay out a W&B project for pruning runs."""

from pathlib import Path

from prunelit.cli.console import print_result
from prunelit.cli.options import build_parser, parse_command_line
from prunelit.monitoring import workspace
from prunelit.monitoring.loggers import check_wandb_installed
from prunelit.runtime.errors import BadOption
from prunelit.runtime.text_files import write_json


def create_dashboard(project: str, entity: str = "", out: str | None = None) -> list[str]:
    """Make a workspace and a report in a W&B project, laid out for what the Dashboard callback logs.

    Args:
        project: name of the W&B project; its runs need not be there yet.
        entity: user or team that it belongs to; "" for the default of the key.
        out: write the workspace's layout to this JSON file instead; needs no key and no network.

    Returns:
        Addresses of what was made, or the file's path.

    Raises:
        BadOption: wandb is not installed, or refuses.
    """
    if not project.strip():
        raise BadOption(f"project: expected a name, got {project!r}")
    check_wandb_installed("dashboard")
    if out is None:
        return workspace.save_workspace(entity, project)
    write_json(Path(out), workspace.dump_workspace(entity, project))
    return [out]


def run(command: str, arguments: list[str]) -> int:
    """`python -m prunelit dashboard`."""
    parser = build_parser(command, "lay out a W&B project for pruning runs: workspace and report")
    parser.add_function_arguments(create_dashboard, None, sub_configs=False)
    options = parse_command_line(parser, arguments)
    for made in create_dashboard(options.project, options.entity, options.out):
        print_result(made)
    return 0
