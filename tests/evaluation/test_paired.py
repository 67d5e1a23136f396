"""Intervals equal SciPy-free oracles: the textbook formula by hand, and the bootstrap they approximate."""

import math
import random

import pytest

from prunelit.evaluation.paired import average_differences, compute_paired_difference
from prunelit.runtime.errors import BadOption


def test_by_hand() -> None:
    found = compute_paired_difference([1, 0, 1, 1], [1, 1, 0, 0])  # differences 0, -1, 1, 1: mean 1/4, variance 11/12
    stderr = math.sqrt(11 / 12 / 4)
    assert found["difference"] == 0.25
    assert found["stderr"] == pytest.approx(stderr)
    assert (found["low"], found["high"]) == pytest.approx((0.25 - 1.95996 * stderr, 0.25 + 1.95996 * stderr), abs=1e-4)


def test_the_interval_is_that_of_a_bootstrap_over_items() -> None:
    chance = random.Random(0)
    dense = [float(chance.random() < 0.6) for _ in range(400)]
    cut = [right if chance.random() < 0.8 else float(chance.random() < 0.3) for right in dense]
    items = [a - b for a, b in zip(cut, dense, strict=True)]
    means = sorted(sum(chance.choices(items, k=len(items))) / len(items) for _ in range(4000))
    found = compute_paired_difference(cut, dense)
    assert (found["low"], found["high"]) == pytest.approx((means[99], means[3899]), abs=0.006)
    apart = math.sqrt(sum(p * (1 - p) / 400 for p in (sum(dense) / 400, sum(cut) / 400)))
    assert found["stderr"] < apart  # pairing is worth something


def test_the_average_of_independent_tasks() -> None:
    tasks = [compute_paired_difference([1, 0, 1, 1], [1, 1, 0, 0]), compute_paired_difference([0, 0, 1], [1, 1, 1])]
    found = average_differences(tasks)
    assert found["difference"] == pytest.approx((0.25 - 2 / 3) / 2)
    assert found["stderr"] == pytest.approx(math.hypot(tasks[0]["stderr"], tasks[1]["stderr"]) / 2)


def test_equal_models_differ_by_nothing() -> None:
    assert compute_paired_difference([1, 0, 1], [1, 0, 1]) == {"difference": 0, "stderr": 0, "low": 0, "high": 0}


@pytest.mark.parametrize(("mine", "theirs"), [([1, 0], [1]), ([], [])])
def test_other_items_are_refused(mine: list[float], theirs: list[float]) -> None:
    with pytest.raises(BadOption, match="same items"):
        compute_paired_difference(mine, theirs)
