"""`python -m prunelit completion SHELL`: the script that completes commands and options at a Tab, by shtab."""

import importlib.util
from collections.abc import Iterable

from jsonargparse import ArgumentParser

from prunelit.cli.parsing import fit_options, parsers
from prunelit.pruning.registry import methods
from prunelit.runtime.errors import BadOption, PrunelitError, suggest_name

SHELLS = ("bash", "zsh", "tcsh", "fish")
USAGE = """usage: python -m prunelit completion SHELL     SHELL: bash, zsh, tcsh or fish; needs pip install shtab

bash:  prunelit completion bash > ~/.local/share/bash-completion/completions/prunelit
zsh:   prunelit completion zsh > DIR/_prunelit, where DIR is in $fpath
fish:  prunelit completion fish > ~/.config/fish/completions/prunelit.fish"""


def answer_completion_command(arguments: list[str], commands: Iterable[str]) -> str:
    """Write what `python -m prunelit completion` prints.

    Args:
        arguments: command line after it: the name of a shell.
        commands: all commands.

    Returns:
        The script for the program `prunelit`.

    Raises:
        BadOption: no such shell.
        PrunelitError: shtab is not installed.

    Example:
        >>> answer_completion_command(["--help"], []).splitlines()[0][:40]
        'usage: python -m prunelit completion SHE'
    """
    if arguments and arguments[0] in ("-h", "--help"):
        return USAGE
    shell = " ".join(arguments) or "nothing"
    if shell not in SHELLS:
        expected = ", ".join(SHELLS)
        raise BadOption(f"completion: expected one of {expected}, got {shell!r:.40}{suggest_name(shell, SHELLS)}")
    if importlib.util.find_spec("shtab") is None:
        raise PrunelitError("completion: needs the package shtab: pip install shtab")
    script: str = build_whole_parser(commands).get_completion_script(f"shtab-{shell}")
    return script


def build_whole_parser(commands: Iterable[str]) -> ArgumentParser:
    """Build one parser of all commands and their options, from which the script is made.

    Args:
        commands: all commands.

    Example:
        >>> build_whole_parser(["prune", "fit"]).prog
        'prunelit'
    """
    parser = ArgumentParser(prog="prunelit", exit_on_error=False)
    subcommands = parser.add_subcommands(dest="command")
    for command in commands:
        if command in parsers.PARSERS:
            part = parsers.build_command_parser(command, [])
        else:
            part = ArgumentParser(prog=f"prunelit {command}", description=command, exit_on_error=False)
            if command in ("fit", "validate"):
                part.add_argument("--config", help="YAML file with options")
                for option in fit_options.list_fit_options(command).values():
                    if option.name != "verbose":  # every command has it
                        part.add_argument(f"--{option.name}", help=option.what.replace("%", "%%"))
            elif command == "methods":
                part.add_argument("name", nargs="?", choices=sorted(methods()))
        for flag, what in (("--verbose", "say more"), ("--quiet", "say less")):
            part.add_argument(flag, action="store_true", help=what)
        part.add_argument("--log", choices=["json", "text"], help="what stderr holds")
        subcommands.add_subcommand(command, part)
    return parser
