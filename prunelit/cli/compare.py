"""`python -m prunelit compare`: methods x ratios x seeds from one YAML, as tables and pictures."""

from dataclasses import fields
from pathlib import Path

from prunelit.cli.console import print_result
from prunelit.cli.options import build_parser, parse_command_line
from prunelit.compare.config import Calibration, Latency
from prunelit.compare.run import compare_methods


def run(command: str, arguments: list[str]) -> int:
    """`python -m prunelit compare`; 1 where a cell failed."""
    parser = build_parser(command, "methods x ratios x seeds from one YAML, as tables and pictures")
    parser.add_function_arguments(compare_methods, None, sub_configs=False)
    inner = [field.name for kind in (Latency, Calibration) for field in fields(kind)]
    options = parser.instantiate(parse_command_line(parser, arguments, inner))
    report = compare_methods(**{name: value for name, value in vars(options).items() if name != "config"})
    print_result((Path(options.out) / "compare.md").read_text(encoding="utf-8"))
    failed = sum(cell["status"] == "failed" for cell in report["cells"])
    print_result(
        f"{options.out}/: report.html, compare.md, compare.json, cells/"
        + (f"; {failed} cells failed" if failed else "")
    )
    return 1 if failed else 0
