"""Peak memory grows with the work, and a process that dies is one line."""

import os
from typing import Any

import pytest

from prunelit.evaluation import memory
from prunelit.evaluation.speed import Speed
from prunelit.evaluation.subject import EvaluatedModel
from prunelit.runtime.errors import PrunelitError


@pytest.mark.slow
def test_more_logits_take_more_memory(dense: str) -> None:
    small, large = (
        memory.measure_peak_memory(EvaluatedModel(dense), Speed(prompt=length, batch=batch, new_tokens=2, repeats=1))
        for length, batch in ((8, 1), (500, 64))
    )
    scores = 64 * 9 * 500 * 8 * 4  # queries of one layer, float32: far less than a layer needs in all
    assert large["peak_bytes"] - small["peak_bytes"] > scores
    assert small["of"] == "process"


def _die(*_: Any) -> None:
    os._exit(9)


@pytest.mark.slow
def test_a_killed_process_is_one_line(dense: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_measure_peak_in_process", _die)
    with pytest.raises(PrunelitError, match="was killed, most likely out of memory") as error:
        memory.measure_peak_memory(EvaluatedModel(dense), Speed())
    assert "\n" not in str(error.value)
