"""python -m prunelit: looks the command up and runs it. What needs no model is answered without importing torch."""

import os
import sys
import traceback

from prunelit import __version__
from prunelit.cli import method_cards
from prunelit.runtime import progress
from prunelit.runtime.errors import PrunelitError, suggest_name
from prunelit.runtime.text_files import escape_controls

VERBOSE = "--verbose"
COMMANDS = {
    "fit": "prune, recover, measure and save a whole run            --config configs/quickstart.yaml",
    "validate": "validation loop of a run's module and data              --config configs/quickstart.yaml",
    "plan": "what a cut would leave and what serves it; show, diff  --model M --ratio 0.2 --out plan.json",
    "prune": "cut a model and save it, no training                    --model M --method llm_bip --ratio 0.2 --out DIR",
    "export": "write a model in another format, with its proof      --model DIR --format padded --out PATH",
    "evaluate": "perplexity, zero-shot tasks, speed, text of any model   --model M --text T --json FILE",
    "compare": "methods x ratios x seeds, as tables and pictures        --config configs/compare-quick.yaml",
    "report": "how two runs differ: options, cut, size, quality  diff RUN_A RUN_B [--html FILE]",
    "dashboard": "lay out a W&B project for pruning runs          --project P [--out FILE]",
    "methods": "list the pruning methods, or print the card of one      methods llm_bip",
}


def render_usage() -> str:
    """Write the text of `--help`.

    Example:
        >>> render_usage().splitlines()[2]
        'usage: python -m prunelit COMMAND [options]'
    """
    lines = [f"  {name:9} {description}" for name, description in COMMANDS.items()]
    return "\n".join(
        [
            f"prunelit {__version__}: make large language models structurally smaller and win their quality back",
            "",
            "usage: python -m prunelit COMMAND [options]",
            "",
            *lines,
            "",
            "All but `methods` and `report` take --config FILE, --print_config and --help. --verbose, of any command:",
            "stages with their seconds, what libraries say, and the traceback of an error.",
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: command line; None reads sys.argv.

    Returns:
        The exit code: 0 on success, 2 on bad input with one line on stderr, 130 on Ctrl-C.

    Example:
        >>> main(["--version"]) == 0
        0.1.0
        True
    """
    if arguments is None:
        sys.argv[1:], is_verbose = _remove_flag(
            VERBOSE, sys.argv[1:]
        )  # Lightning reads sys.argv, and starts further ranks with it
        arguments = sys.argv[1:]
    else:
        arguments, is_verbose = _remove_flag(VERBOSE, arguments)
    previous = os.environ.get(progress.VERBOSE_VARIABLE)
    if is_verbose:
        os.environ[progress.VERBOSE_VARIABLE] = "1"
    try:
        return _run_command(arguments)
    except PrunelitError as error:
        if progress.is_verbose():
            sys.stderr.write(escape_controls(traceback.format_exc()))
        sys.stderr.write(escape_controls(f"prunelit: error: {' '.join(str(error).split())}") + "\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("prunelit: interrupted\n")
        return 130
    except BrokenPipeError:  # `| head` closed the pipe
        return 0
    finally:
        if is_verbose and previous is None:
            del os.environ[progress.VERBOSE_VARIABLE]


def _remove_flag(option: str, arguments: list[str]) -> tuple[list[str], bool]:
    """Return the arguments without a flag, and whether it was there."""
    return [argument for argument in arguments if argument != option], option in arguments


def _run_command(arguments: list[str]) -> int:
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command in ("-h", "--help", "help"):
        sys.stdout.write(render_usage() + "\n")
    elif command == "--version":
        sys.stdout.write(__version__ + "\n")
    elif command == "methods":
        sys.stdout.write(method_cards.answer_methods_command(rest) + "\n")
    elif command == "plan" and rest and not rest[0].startswith("-"):
        from prunelit.cli import plan_files

        return plan_files.run_plan_files(rest)
    elif command in COMMANDS:
        from prunelit.cli import dispatch

        return dispatch.run_command(command, rest)
    else:
        raise PrunelitError(
            f"command {command!r}: expected one of {', '.join(COMMANDS)}{suggest_name(command, COMMANDS)}"
        )
    return 0
