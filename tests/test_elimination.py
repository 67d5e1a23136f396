"""Optimal Brain Surgeon over columns, against least squares done by hand."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunelit.elimination import eliminate


def problem(outputs, inputs, tokens=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, inputs, generator=generator, dtype=torch.float64) @ mix
    return torch.randn(outputs, inputs, generator=generator, dtype=torch.float64), x


def error(weight, x, kept):
    """Squared error of the best linear map from the kept inputs to the dense outputs."""
    target = x @ weight.T
    solution = torch.linalg.lstsq(x[:, kept], target).solution
    return (target - x[:, kept] @ solution).square().sum().item()


@pytest.mark.parametrize("unit_size", [1, 3])
def test_the_first_unit_to_go_is_the_one_brute_force_finds(unit_size):
    weight, x = problem(5, 12)
    units = 12 // unit_size

    def without(unit):
        return error(weight, x, [i for i in range(12) if i // unit_size != unit])

    order, costs = eliminate(weight, x.T @ x, unit_size, stop=units - 1, ridge=0)
    best = min(range(units), key=without)
    assert order == [best]
    assert costs[0] == pytest.approx(without(best), rel=1e-6)


@pytest.mark.parametrize("at_once", [1, 4])
def test_costs_add_up_to_the_error_of_what_is_left(at_once):
    weight, x = problem(4, 16)
    order, costs = eliminate(weight, x.T @ x, stop=4, at_once=at_once, ridge=0)
    assert len(order) == len(set(order)) == 12
    kept = sorted(set(range(16)) - set(order))
    assert costs == sorted(costs)
    assert sum(costs) >= error(weight, x, kept) * (1 - 1e-6)
    exact = sum(costs) == pytest.approx(error(weight, x, kept), rel=1e-6)
    assert exact or at_once == 1  # single steps are levelled where a later one is cheaper


def test_a_copy_of_an_input_costs_nothing_however_large():
    weight, x = problem(4, 6)
    x[:, 5] = x[:, 2] * 10
    order, costs = eliminate(weight, x.T @ x, stop=5, ridge=1e-9)
    assert order[0] in (2, 5)
    assert costs[0] < 1e-3 * error(weight, x, [i for i in range(6) if i not in (0,)])


def test_an_input_that_never_moves_goes_first():
    weight, x = problem(4, 6)
    x[:, 3] = 0
    assert eliminate(weight, x.T @ x, stop=5)[0] == [3]
    assert eliminate(weight, torch.zeros(6, 6), stop=1)[1] == pytest.approx([0] * 5, abs=1e-20)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 3))
def test_greedy_is_never_better_than_the_best_set(seed, gone):
    weight, x = problem(3, 6, seed=seed)
    order, _ = eliminate(weight, x.T @ x, stop=6 - gone, ridge=0)
    found = error(weight, x, [i for i in range(6) if i not in order])
    best = min(error(weight, x, [i for i in range(6) if i not in s]) for s in itertools.combinations(range(6), gone))
    assert found >= best * (1 - 1e-9)
    assert found <= error(weight, x, []) * (1 + 1e-9)
