"""`python -m prunelit compare`: methods x ratios x seeds from one YAML, as tables and figures."""

from pathlib import Path
from typing import Any

from prunelit.cli.console import print_result, report_result
from prunelit.cli.parsing.parsers import build_options
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
    options: dict[str, Any] = build_options(command, arguments)
    report, out = compare_methods(**options), options["out"]
    print_result((Path(out) / "compare.md").read_text(encoding="utf-8"))
    failed = sum(cell["status"] == "failed" for cell in report["cells"])
    print_result(
        f"{out}/: report.html, compare.md, compare.json, cells/" + (f"; {failed} cells failed" if failed else "")
    )
    report_result(command, out=out, cells=report["cells"])
    return 1 if failed else 0
