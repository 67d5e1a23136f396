"""Every method does to tiny models what it did when digests.json was written; see record_digests.py.

Plans must be equal. Weights are compared by their statistics, because another CPU rounds differently; with
`python -m tests.compatibility.record_digests --check` the machine that wrote the file compares every byte.
"""

import pytest

from tests.compatibility import record_digests
from tests.compatibility.record_digests import Case

# The systems of equations of "two_step" are nearly singular on so little text, so rounding shows in the result.
TOLERANCES = {"two_step": 2e-2}
RECORDED = record_digests.read()["cases"]
CASES = {case.name: case for case in record_digests.cases()}


def test_every_case_is_recorded() -> None:
    assert list(CASES) == list(RECORDED)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=() if case.family == record_digests.FAMILIES[0] else pytest.mark.slow)
        for name, case in CASES.items()
    ],
)
def test_plan_and_weights_are_those_recorded(case: Case) -> None:
    wanted = RECORDED[case.name]
    found = record_digests.row(*record_digests.carried_out(case))
    assert (found["kept"], found["plan"]) == (wanted["kept"], wanted["plan"])
    ours, theirs = found["statistics"], wanted["statistics"]
    assert record_digests.alike(ours, theirs, TOLERANCES.get(case.options.get("repair"), 1e-4)), (ours, theirs)
