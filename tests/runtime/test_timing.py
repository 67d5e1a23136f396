"""Calls take turns forwards and backwards, one round of them does not count, and seconds are those of the call."""

import time

import pytest
import torch

from prunelit.runtime import timing


def test_seconds_are_those_of_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [5.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    assert timing.measure_seconds(lambda: now.__setitem__(0, 7.5), torch.device("cpu")) == 2.5


def test_rounds_go_forwards_and_backwards_and_the_first_does_not_count() -> None:
    log: list[str] = []

    def call(name: str) -> str:
        log.append(name)
        return f"{name}{log.count(name)}"

    found = timing.run_in_rounds([lambda: call("a"), lambda: call("b"), lambda: call("c")], 3, "turns")
    assert "".join(log) == "abc" + "abc" + "cba" + "abc"
    assert found == [["a2", "a3", "a4"], ["b2", "b3", "b4"], ["c2", "c3", "c4"]]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_seconds_on_a_gpu_wait_for_its_work() -> None:
    device = torch.device("cuda")
    x = torch.ones(4096, 4096, device=device)
    assert timing.measure_seconds(lambda: [x @ x for _ in range(50)], device) > timing.measure_seconds(
        lambda: None, device
    )
