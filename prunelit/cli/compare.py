"""`python -m prunelit compare`: methods x ratios x seeds from one YAML, as tables and figures."""

from dataclasses import fields
from pathlib import Path

from prunelit.cli.console import print_result
from prunelit.cli.options import build_parser, parse_command_line
from prunelit.compare.config import Calibration, Latency
from prunelit.compare.run import compare_methods


def run(command: str, arguments: list[str]) -> int:
    """Run `python -m prunelit compare`.

    Args:
        command: "compare".
        arguments: command line after it.

    Returns:
        The exit code: 1 where a cell failed.

    Example:
        python -m prunelit compare --config configs/compare-quick.yaml
    """
    parser = build_parser(command, "methods x ratios x seeds from one YAML, as tables and figures")
    parser.add_function_arguments(compare_methods, None, sub_configs=False)
    nested_options = [field.name for kind in (Latency, Calibration) for field in fields(kind)]
    options = parser.instantiate(parse_command_line(parser, arguments, nested_options))
    report = compare_methods(**{name: value for name, value in vars(options).items() if name != "config"})
    print_result((Path(options.out) / "compare.md").read_text(encoding="utf-8"))
    failed = sum(cell["status"] == "failed" for cell in report["cells"])
    print_result(
        f"{options.out}/: report.html, compare.md, compare.json, cells/"
        + (f"; {failed} cells failed" if failed else "")
    )
    return 1 if failed else 0
