"""Weights & Biases: is it installed, and which settings keep it from sending what nobody asked it to send."""

from typing import Literal, TypedDict

from prunelit.runtime.errors import BadOption


class QuietSettings(TypedDict):
    """The settings in `WANDB_QUIET`, by the names of `wandb.Settings`.

    Example: see `prunelit.compare.wandb`, which uses it.
    """

    console: Literal["off"]
    disable_code: bool
    disable_git: bool
    x_disable_meta: bool
    x_save_requirements: bool
    host: str


WANDB_QUIET: QuietSettings = {
    "console": "off",
    "disable_code": True,
    "disable_git": True,
    "x_disable_meta": True,
    "x_save_requirements": False,
    "host": "-",
}
"""Settings that stop W&B from sending the command line, the host name, the installed packages and printed text."""


def check_wandb_installed(option: str) -> None:
    """Check that wandb is installed, before any work is done.

    Args:
        option: the option that needs wandb, for the message.

    Raises:
        BadOption: it is not installed.

    Example: see `prunelit.cli.dashboard.create_dashboard`.
    """
    try:
        import wandb  # noqa: F401
    except ImportError as error:
        raise BadOption(f"{option}: expected wandb to be installed: pip install 'prunelit[wandb]'") from error
