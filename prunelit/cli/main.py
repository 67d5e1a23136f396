"""python -m prunelit: looks the command up and runs it. What needs no model is answered without importing torch."""

import os
import signal
import sys
import traceback

from prunelit import __version__
from prunelit.cli import method_cards
from prunelit.cli.signals import EndedBySignal, unwind_on_signals
from prunelit.runtime import progress
from prunelit.runtime.errors import BadOption, PrunelitError, suggest_name
from prunelit.runtime.text_files import escape_controls

_TQDM_VARIABLE = "TQDM_DISABLE"  # transformers has bars that nothing else turns off
FLAG_VARIABLES = (progress.VERBOSE_VARIABLE, progress.QUIET_VARIABLE, progress.LOG_VARIABLE, _TQDM_VARIABLE)
"""What the flags of every command set, for the time of the command."""
COMMANDS = {
    "fit": "prune, recover, measure and save a whole run            --config quickstart",
    "validate": "validation loop of a run's module and data              --config quickstart",
    "plan": "what a cut would leave and what serves it; show, diff  --model M --ratio 0.2 --out plan.json",
    "prune": "cut a model and save it, no training                    --model M --method llm_bip --ratio 0.2 --out DIR",
    "export": "write a model in another format, with its proof      --model DIR --format padded --out PATH",
    "evaluate": "perplexity, zero-shot tasks, speed, text of any model   --model M --text T --json FILE",
    "compare": "methods x ratios x seeds, as tables and pictures        --config compare-quick",
    "report": "how two runs differ: options, cut, size, quality  diff RUN_A RUN_B [--html FILE]",
    "dashboard": "lay out a W&B project for pruning runs          --project P [--out FILE]",
    "init": "copy the YAML files that come with prunelit             init DIR, init --list",
    "completion": "script that completes commands and options in a shell    completion bash",
    "methods": "list the pruning methods, or print the card of one      methods llm_bip",
}


def render_usage() -> str:
    """Write the text of `--help`.

    Example:
        >>> render_usage().splitlines()[2]
        'usage: python -m prunelit COMMAND [options]'
    """
    lines = [f"  {name:10} {description}" for name, description in COMMANDS.items()]
    return "\n".join(
        [
            f"prunelit {__version__}: make large language models structurally smaller and win their quality back",
            "",
            "usage: python -m prunelit COMMAND [options]",
            "",
            *lines,
            "",
            "What reads or writes models takes --config FILE_OR_NAME, --print_config and --help. Every command takes",
            "  --verbose, -v   stages with their seconds, what libraries say, and the traceback of an error",
            "  --quiet, -q     warnings and the result only",
            "  --log json      on stderr one JSON object a line: stages, messages, warnings, the error, the result",
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: command line; None reads sys.argv.

    Returns:
        The exit code: 0 on success, 2 on bad input with one line on stderr, 130 on Ctrl-C, 143 on SIGTERM.

    Example:
        >>> main(["--version"]) == 0
        0.1.0
        True
    """
    previous = {name: os.environ.get(name) for name in FLAG_VARIABLES}
    try:
        if arguments is None:
            sys.argv[1:], settings = take_flags(sys.argv[1:])  # Lightning reads sys.argv, and starts ranks with it
            arguments = sys.argv[1:]
        else:
            arguments, settings = take_flags(arguments)
        os.environ.update(settings)
        with unwind_on_signals():
            return _run_command(arguments)
    except PrunelitError as error:
        if progress.is_verbose() and not progress.writes_json():
            sys.stderr.write(escape_controls(traceback.format_exc()))
        return _report_end(" ".join(str(error).split()), 2, "error: ")
    except KeyboardInterrupt:
        return _report_signal(signal.SIGINT)
    except EndedBySignal as end:
        return _report_signal(end.number)
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):  # Lightning makes exit code 1 of Ctrl-C
            return _report_signal(signal.SIGINT)
        raise
    except BrokenPipeError:  # `| head` closed the pipe
        return 0
    finally:
        for name, value in previous.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _report_end(message: str, code: int, kind: str = "") -> int:
    """Say on stderr why a command ended early, as a line or as a JSON object; returns its exit code."""
    if progress.writes_json():
        progress.write_event("error", message=message, code=code)
    else:
        sys.stderr.write(escape_controls(f"prunelit: {kind}{message}") + "\n")
    return code


def _report_signal(number: int) -> int:
    name = signal.Signals(number).name
    return _report_end("interrupted" if name == "SIGINT" else f"ended by {name}", 128 + number)


def take_flags(arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    """Take the flags that every command has out of a command line.

    Args:
        arguments: the whole command line.

    Returns:
        The rest, and environment variables to set, which further ranks and new processes inherit.

    Raises:
        BadOption: --quiet and --verbose together, or --log with another word.

    Example:
        >>> take_flags(["prune", "-q", "--log=json", "--out", "a"])
        (['prune', '--out', 'a'], {'PRUNELIT_QUIET': '1', 'TQDM_DISABLE': '1', 'PRUNELIT_LOG': 'json'})
    """
    rest: list[str] = []
    settings: dict[str, str] = {}
    words = iter(arguments)
    for word in words:
        if word in ("--verbose", "-v"):
            settings[progress.VERBOSE_VARIABLE] = "1"
        elif word in ("--quiet", "-q"):
            settings[progress.QUIET_VARIABLE] = "1"
            settings[_TQDM_VARIABLE] = "1"
        elif word == "--log" or word.startswith("--log="):
            kind = word[6:] if "=" in word else next(words, "nothing")
            if kind not in ("json", "text"):
                raise BadOption(f"log: expected json or text, got {kind!r:.40}{suggest_name(kind, ('json', 'text'))}")
            settings[progress.LOG_VARIABLE] = kind
        else:
            rest.append(word)
    if {progress.VERBOSE_VARIABLE, progress.QUIET_VARIABLE} <= settings.keys():
        raise BadOption("quiet: expected it without --verbose, got both; leave one of them out")
    return rest, settings


def _run_command(arguments: list[str]) -> int:
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command in ("-h", "--help", "help"):
        sys.stdout.write(render_usage() + "\n")
    elif command == "--version":
        sys.stdout.write(__version__ + "\n")
    elif command == "methods":
        sys.stdout.write(method_cards.answer_methods_command(rest) + "\n")
    elif command == "init":
        from prunelit.cli.init import command as init_command

        sys.stdout.write(init_command.answer_init_command(rest) + "\n")
    elif command == "completion":
        from prunelit.cli.parsing import completion

        sys.stdout.write(completion.answer_completion_command(rest, COMMANDS) + "\n")
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
