"""Headline numbers are those that were measured; a run that is not finished says how it goes on."""

import math

import pytest

from prunelit.report.headlines import compute_regained_share, list_headline_facts, list_next_steps
from prunelit.report.page.parts import Code
from prunelit.report.record import Record
from prunelit.report.run_page import render_run_page
from tests.report.test_page import Read

PROTOCOL = {
    "text": ["a.txt"],
    "windows": 2,
    "sequence_length": 8,
    "stride": 8,
    "mean": "over tokens",
    "dtype": "float32",
}


def fitted(**facts: object) -> Record:
    record = Record(kind="fit", title="tiny", facts={"protocol": PROTOCOL | {"tokens": 1000}, **facts})
    for name, perplexity, seconds in (("dense", 10.0, 2.0), ("pruned", 40.0, 1.6), ("recovered", 20.0, 1.0)):
        record.on_event("measured", {"name": name, "row": {"perplexity": perplexity, "parameters": 1000}})
        record.on_event("stage", {"name": f"evaluate_{name}", "seconds": seconds})
    return record


def test_share_of_the_lost_quality() -> None:
    assert compute_regained_share(10.0, 40.0, 20.0) == 0.5
    assert compute_regained_share(10.0, 40.0, 5.0) == 1.5  # better than dense
    assert compute_regained_share(10.0, 40.0, 80.0) == -0.5  # worse than the cut itself
    for unknown in ((10.0, 10.01, 10.0), (10.0, None, 9.0), (10.0, math.inf, 9.0)):
        assert compute_regained_share(*unknown) is None


def test_what_was_measured_is_on_top() -> None:
    facts = {fact.name: fact for fact in list_headline_facts(fitted(disk_bytes={"dense": 2e9, "recovered": 2.5e9}))}
    assert facts["Quality regained"].value == "50%"
    assert (facts["Size on the disk"].value, facts["Size on the disk"].note) == ("2.5 GB", "dense 2 GB; 25.0% more")
    assert facts["Times as fast"].value == "2.00"
    assert facts["Times as fast"].note.startswith("1,000 tokens/s in the perplexity pass, dense 500")


def test_what_was_not_measured_is_left_out() -> None:
    record = fitted()
    record.measured = {name: {"perplexity": None, "parameters": 1000} for name in record.measured}
    record.stages = record.stages[1:]  # of a resumed run, whose dense model was measured before
    assert [fact.name for fact in list_headline_facts(record)] == ["Parameters"]
    assert list(list_headline_facts(Record())) == []


@pytest.mark.parametrize("ended_by", [None, "format: expected uniform; pass --report.format hetero"])
def test_a_run_that_is_not_finished_says_what_next(ended_by: str | None) -> None:
    command = "python -m prunelit fit --config runs/a/config.yaml --ckpt_path last"
    record = fitted(resume=command, ended_by=ended_by)
    steps = list(list_next_steps(record))
    assert isinstance(steps[-1], Code) and steps[-1].text == command
    text = Read(render_run_page(record)).text
    assert "What next" in text and command in text and (ended_by or "What next") in text
    record.facts["trained_steps"] = 3
    assert "What next" not in Read(render_run_page(record)).text
