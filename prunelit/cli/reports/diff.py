"""`python -m prunelit report diff A B`: how two finished runs differ, answered from their files without torch.

    report diff runs/a runs/b                      folders of prune, fit, evaluate or compare
    report diff a/plan.json b/report.json          single files, also a cell of a comparison
    report diff runs/a runs/b --html out.html      the same as one page

It exits with 0 where both have the same options and the same plan, with 1 where these differ, with 2 on bad input.
"""

import json
from pathlib import Path

import yaml

from prunelit.cli.console import print_result
from prunelit.core.plan import PruningPlan
from prunelit.data.yaml_text import parse_yaml
from prunelit.report.run_difference import is_same_run, render_difference_page, render_difference_text
from prunelit.report.run_summary import RunSummary, summarize_plan, summarize_result
from prunelit.runtime.errors import BadOption, OutputNotWritable, PrunelitError, SourceNotFound, suggest_file
from prunelit.runtime.text_files import JsonObject, write_text

_USAGE = "usage: python -m prunelit report diff A B [--html FILE] [--overwrite true]"
_RESULTS = ("compare.json", "evaluate.json", "report.json", "plan.json")
"""What is looked for in a folder, in this order."""
_LARGEST_FILE = 2**28


def run(command: str, arguments: list[str]) -> int:
    """Run `python -m prunelit report`.

    Args:
        command: "report".
        arguments: command line after it.

    Returns:
        The exit code: 0 where options and plans are the same, 1 where they differ.

    Raises:
        PrunelitError: other words than `diff A B`, or a path that holds no result.

    Example:
        python -m prunelit report diff runs/a runs/b --html difference.html
    """
    if not arguments or {"-h", "--help"} & {*arguments}:
        print_result(_USAGE)
        return 0
    paths, html_path, overwrite = _parse_arguments(arguments)
    if html_path is not None:
        _check_page(html_path, overwrite)
    first, second = (read_run(path) for path in paths)
    print_result(render_difference_text(first, second))
    if html_path is not None:
        write_text(html_path, render_difference_page(first, second))
        print_result(f"\n{html_path}: the same as a page")
    return 0 if is_same_run(first, second) else 1


def read_run(path: str) -> RunSummary:
    """Read what a path holds: a folder of a run, or one of its JSON files.

    Args:
        path: as given on the command line.

    Raises:
        SourceNotFound: there is nothing, or a folder without a result.
        BadOption: the file is not one of prunelit's.
        BadPlan: it is a damaged plan.

    Example:
        >>> read_run("no such folder")
        Traceback (most recent call last):
        prunelit.runtime.errors.SourceNotFound: report diff: 'no such folder': no such file or folder
    """
    place = Path(path).expanduser()
    if not place.exists():
        raise SourceNotFound(f"report diff: {path!r}: no such file or folder{suggest_file(place)}")
    folder = place if place.is_dir() else place.parent
    file = place
    if place.is_dir():
        found_names = [name for name in _RESULTS if (place / name).is_file()]
        if not found_names:
            raise SourceNotFound(
                f"report diff: {path!r}: expected a folder with one of {', '.join(_RESULTS)}, got none of them; give "
                "the folder of --out or of trainer.default_root_dir"
            )
        file = place / found_names[0]
    content = _read_json(file)
    if "dense_layers" in content:  # only a plan has them
        return summarize_plan(path, PruningPlan.load(file))
    plan = config = None
    if file.name == "report.json":
        plan = PruningPlan.load(folder / "plan.json") if (folder / "plan.json").is_file() else None
        config = _read_config(folder / "config.yaml")
    return summarize_result(path, content, plan, config)


def _parse_arguments(arguments: list[str]) -> tuple[list[str], Path | None, bool]:
    """Return both paths, the page to write, and whether it may replace a file."""
    word, rest = arguments[0], arguments[1:]
    if word != "diff":
        raise BadOption(f"report: expected diff, got {word!r}; {_USAGE}")
    paths: list[str] = []
    options: dict[str, str] = {}
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument.partition("=")
        if name not in ("--html", "--overwrite"):
            paths.append(argument)
        elif equals or (rest and not rest[0].startswith("--")):
            options[name] = value if equals else rest.pop(0)
        else:
            options[name] = "true" if name == "--overwrite" else ""
    unknown = [path for path in paths if path.startswith("-")]
    if unknown or len(paths) != 2:
        raise BadOption(f"report diff: expected two runs, got {' '.join(unknown or paths) or 'nothing'}; {_USAGE}")
    if options.get("--html") == "":
        raise BadOption(f"report diff: --html: expected a file to write, got nothing; {_USAGE}")
    if options.get("--overwrite", "false") not in ("true", "false"):
        raise BadOption(f"report diff: --overwrite: expected true or false, got {options['--overwrite']!r}")
    return paths, Path(options["--html"]) if "--html" in options else None, options.get("--overwrite") == "true"


def _check_page(path: Path, overwrite: bool) -> None:
    if path.is_dir():
        raise OutputNotWritable(f"report diff: --html: expected a file, got the folder {str(path)!r}")
    if path.exists() and not overwrite:
        raise OutputNotWritable(f"report diff: --html: {str(path)!r} is there; pass --overwrite true or another name")
    if not path.absolute().parent.is_dir():
        raise OutputNotWritable(f"report diff: --html: no folder {str(path.parent)!r}; make it first")


def _read_json(file: Path) -> JsonObject:
    try:
        if file.stat().st_size > _LARGEST_FILE:
            raise BadOption(f"report diff: {str(file)!r}: expected a result of a run, got a file of 256 MiB or more")
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadOption(
            f"report diff: {str(file)!r}: expected JSON that prunelit wrote, got a file that cannot be read: {error}"
        ) from error
    if not isinstance(content, dict):
        raise BadOption(f"report diff: {str(file)!r}: expected a JSON object, got {type(content).__name__}")
    return content


def _read_config(file: Path) -> JsonObject | None:
    """Read config.yaml; None where there is none, or where it cannot be read: the plan names the options too."""
    try:
        content = parse_yaml(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError, PrunelitError):
        return None
    return content if isinstance(content, dict) else None
