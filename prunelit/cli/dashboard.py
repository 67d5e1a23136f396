"""`python -m prunelit dashboard`: create a W&B workspace and a report for pruning runs."""

from pathlib import Path

from prunelit.cli.console import print_result, report_result
from prunelit.cli.parsing.parsers import parse_command
from prunelit.monitoring import workspace
from prunelit.runtime.errors import BadOption
from prunelit.runtime.text_files import write_json
from prunelit.runtime.wandb_settings import check_wandb_installed


def create_dashboard(project: str, entity: str = "", out: str | None = None) -> list[str]:
    """Create a workspace and a report in a W&B project, laid out for what the Dashboard callback logs.

    Args:
        project: name of the W&B project; it may still be empty.
        entity: user or team that owns it; "" for the key's default.
        out: write the workspace's layout to this JSON file, or into this folder, instead; needs no key and no network.

    Returns:
        The addresses of workspace and report, or the path of the file.

    Raises:
        BadOption: wandb is not installed, or refuses.

    Example:
        python -m prunelit dashboard --project prunelit --out workspace.json
    """
    if not project.strip():
        raise BadOption(f"project: expected a name, got {project!r}")
    check_wandb_installed("dashboard")
    if out is None:
        return workspace.save_workspace(entity, project)
    if Path(out).is_dir() or out.endswith("/"):
        out = str(Path(out) / "layout.json")
    write_json(Path(out), workspace.dump_workspace(entity, project))
    return [out]


def run(command: str, arguments: list[str]) -> int:
    """Run `python -m prunelit dashboard`.

    Args:
        command: "dashboard".
        arguments: command line after it.

    Returns:
        The exit code.

    Example: see `tests/cli/test_dashboard.py`.
    """
    options = parse_command(command, arguments)
    addresses = create_dashboard(options.project, options.entity, options.out)
    for address in addresses:
        print_result(address)
    report_result(command, addresses=addresses)
    return 0
