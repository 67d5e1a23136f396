"""`python -m prunelit compare`: methods x ratios x seeds from one YAML, as tables and pictures."""

from dataclasses import fields
from pathlib import Path

from prunelit.cli.console import say
from prunelit.cli.options import parse, parser_of
from prunelit.compare.config import Calibration, Latency
from prunelit.compare.run import compare


def run(command: str, arguments: list[str]) -> int:
    """`python -m prunelit compare`; 1 where a cell failed."""
    parser = parser_of(command, "methods x ratios x seeds from one YAML, as tables and pictures")
    parser.add_function_arguments(compare, None, sub_configs=False)
    inner = [field.name for kind in (Latency, Calibration) for field in fields(kind)]
    options = parser.instantiate(parse(parser, arguments, inner))
    report = compare(**{name: value for name, value in vars(options).items() if name != "config"})
    say((Path(options.out) / "compare.md").read_text(encoding="utf-8"))
    failed = sum(cell["status"] == "failed" for cell in report["cells"])
    say(
        f"{options.out}/: report.html, compare.md, compare.json, cells/"
        + (f"; {failed} cells failed" if failed else "")
    )
    return 1 if failed else 0
