"""python -m prunelit: a light front. What needs no model is answered here, before torch and Lightning are imported."""

import difflib
import sys

from prunelit import __version__
from prunelit.errors import PrunelitError
from prunelit.report import method_card

COMMANDS = {
    "fit": "prune, recover, measure and save a whole run            --config configs/quickstart.yaml",
    "validate": "validation loop of a run's module and data              --config configs/quickstart.yaml",
    "plan": "what a cut would leave and what serves it; show, diff  --model M --ratio 0.2 --out plan.json",
    "prune": "cut a model and save it, no training                    --model M --method llm_bip --ratio 0.2 --out DIR",
    "export": "write a model in another format, with its proof      --model DIR --format padded --out PATH",
    "evaluate": "perplexity, zero-shot tasks, speed, text of any model   --model M --text T --json FILE",
    "compare": "methods x ratios x seeds, as tables and pictures        --config configs/compare-quick.yaml",
    "methods": "list the pruning methods, or print the card of one      methods llm_bip",
}


def usage() -> str:
    """The text of `--help`."""
    lines = [f"  {name:9} {what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            f"prunelit {__version__}: make large language models structurally smaller and win their quality back",
            "",
            "usage: python -m prunelit COMMAND [options]",
            "",
            *lines,
            "",
            "Every command but `methods` takes --config FILE, --print_config and --help.",
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    """Run one command; 0 on success, 2 on bad input with one line on stderr."""
    arguments = sys.argv[1:] if arguments is None else arguments
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    try:
        if command in ("-h", "--help", "help"):
            sys.stdout.write(usage() + "\n")
        elif command == "--version":
            sys.stdout.write(__version__ + "\n")
        elif command == "methods":
            sys.stdout.write(method_card.answer(rest) + "\n")
        elif command == "plan" and rest[:1] in (["show"], ["diff"]):
            from prunelit.commands import plan_files

            return plan_files.run(rest)
        elif command in COMMANDS:
            from prunelit import cli

            return cli.run(command, rest)
        else:
            near = difflib.get_close_matches(command, COMMANDS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise PrunelitError(f"command {command!r}: expected one of {', '.join(COMMANDS)}{hint}")
    except PrunelitError as error:
        sys.stderr.write(f"prunelit: error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("prunelit: interrupted\n")
        return 130
    except BrokenPipeError:  # `| head` closed the pipe
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
