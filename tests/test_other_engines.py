"""What the guide says of other engines is what the benchmark wrote down."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
REPORT = json.loads((ROOT / "benchmarks/results/other_engines.json").read_text(encoding="utf-8"))


def load_benchmark() -> Any:
    specification = importlib.util.spec_from_file_location("other_engines", ROOT / "benchmarks/other_engines.py")
    assert specification is not None and specification.loader is not None
    benchmark = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(benchmark)
    return benchmark


def test_the_table_of_the_guide_is_that_of_the_results() -> None:
    guide = (ROOT / "docs/howto/serve.md").read_text(encoding="utf-8")
    assert load_benchmark().format_table(REPORT) in guide


def test_results_hold_no_path_of_a_machine() -> None:
    text = json.dumps(REPORT)
    assert [place for place in ("/tmp", "/root", "/home", "site-packages") if place in text] == []


@pytest.mark.parametrize(
    ("result", "cell"),
    [
        ({"runs": True, "passed": True, "largest_logprob_difference": 2.4e-6}, "ran, 2e-06"),
        ({"runs": True, "passed": False, "largest_logprob_difference": 2.4}, "another text"),
        ({"runs": False, "message": "Error: no"}, "no: `Error: no`"),
        ({"not_written": "expected layers of one shape"}, "not tried"),
    ],
    ids=["ran", "wrong", "refused", "not_written"],
)
def test_a_cell_says_what_happened(result: dict[str, Any], cell: str) -> None:
    assert load_benchmark().format_cell({"llama uniform alike": result}, "uniform") == cell


def test_a_cell_names_the_kinds_that_needed_a_second_way() -> None:
    ran = {"runs": True, "passed": True, "largest_logprob_difference": 2e-6}
    results = {"llama hetero mixed": ran | {"by": "another way"}, "llama hetero kv_group": ran}
    cell = load_benchmark().format_cell(results, "hetero")
    assert cell.startswith("ran, 2e-06; cuts of kind mixed with ")
