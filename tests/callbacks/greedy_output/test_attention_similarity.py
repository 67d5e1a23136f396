"""Divergence of heads against explicit loops, and Algorithm 2 with its threshold on matrices made by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prunelit.calibration.paired_streams import PairedStreams
from prunelit.callbacks.greedy_output import attention_similarity
from prunelit.callbacks.greedy_output.attention_similarity import (
    Cell,
    Divergence,
    choose_heads,
    compute_group_divergence,
    find_candidates,
    rank_similar_units,
    select_redundant_units,
)
from prunelit.core.scores import LayerScores
from prunelit.model import surgery
from prunelit.model.decoder import Decoder
from tests.repair.test_reconstruct import text
from tests.tiny import FAMILIES, cut, keep, tiny

# Heads 0 and 2 attend alike, so do 1 and 3, a little less; 0 and 1 are far apart.
FOUR = [[0.00, 0.50, 0.10, 0.60], [0.50, 0.00, 0.55, 0.15], [0.10, 0.55, 0.00, 0.40], [0.60, 0.15, 0.40, 0.00]]


def js_by_hand(p, q):
    """Jensen-Shannon divergence of two lists of probabilities, in nats."""
    total = 0.0
    for a, b in zip(p, q, strict=True):
        middle = (a + b) / 2
        total += 0.5 * (a * math.log(a / middle) if a > 0 else 0.0) + 0.5 * (b * math.log(b / middle) if b > 0 else 0.0)
    return total


def by_hand(model, batches, layer):
    """Mean over real query rows of all windows, one pair of heads and one row at a time."""
    eager = tiny(model, attn_implementation="eager")
    total, rows = None, 0
    for batch in batches:
        with torch.no_grad():
            p = eager(**batch, output_attentions=True).attentions[layer].double()
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        heads = p.shape[1]
        total = torch.zeros(heads, heads).double() if total is None else total
        for window in range(len(p)):
            for row in range(p.shape[2]):
                if mask[window, row]:
                    rows += 1
                    lists = p[window, :, row].tolist()
                    for i in range(heads):
                        for j in range(heads):
                            total[i, j] += js_by_hand(lists[i], lists[j])
    return total / rows


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_divergence_equals_loops_over_rows_and_pairs(family):
    batches = [{name: value[-2:, :9] for name, value in batch.items()} for batch in text()[1:]]
    batches[1]["attention_mask"][1, 6:] = 0
    found = attention_similarity.measure_head_divergence(Decoder(tiny(family)), batches)[1]
    torch.testing.assert_close(found, by_hand(family, batches, 1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_shows_its_probabilities(family):
    model = tiny(family)
    kind = model.config._attn_implementation
    found = attention_similarity.measure_head_divergence(Decoder(model), text())
    for matrix, layer in zip(found, Decoder(model), strict=True):
        if not layer.has_attention:
            assert matrix is None
            continue
        assert matrix.shape == (layer.shape.query_heads,) * 2
        assert torch.equal(matrix, matrix.T) and not matrix.diagonal().any()
        off = matrix[~torch.eye(len(matrix), dtype=torch.bool)]
        assert (off > 0).all() and (off < math.log(2)).all()
    assert model.config._attn_implementation == kind
    assert not any(module._forward_hooks for module in model.modules())


def test_opposite_heads_reach_log_2_and_equal_heads_0():
    p = torch.zeros(1, 3, 2, 4)
    p[:, 0, :, 0] = p[:, 1, :, 3] = p[:, 2, :, 0] = 1
    divergence = Divergence(3)
    divergence.add_rows(p)
    expected = torch.tensor([[0.0, 1, 0], [1, 0, 1], [0, 1, 0]]).double() * math.log(2)
    torch.testing.assert_close(divergence.compute_mean(), expected, rtol=1e-6, atol=1e-7)


def test_block_sizes_do_not_show(monkeypatch):
    model, batches = tiny("llama"), text()
    whole = attention_similarity.measure_head_divergence(Decoder(model), batches)
    monkeypatch.setattr(attention_similarity, "_ELEMENTS_AT_ONCE", 200)
    monkeypatch.setattr(attention_similarity, "_SCORES_AT_ONCE", 1)
    for one, other in zip(whole, attention_similarity.measure_head_divergence(Decoder(model), batches), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_many_windows_are_thinned_out_evenly(monkeypatch):
    monkeypatch.setattr(attention_similarity, "QUERY_ROWS", 120)
    batches = text()
    found = [(number, rows) for number, rows, _ in attention_similarity._sample_windows(batches, 9)]
    assert found == [(0, [0, 3]), (1, [0, 3]), (2, [0, 3])]  # 18 windows, 318 tokens: every third
    assert [batch["input_ids"].shape for *_, batch in attention_similarity._sample_windows(batches, 9)] == [
        (2, 16),
        (2, 21),
        (2, 16),
    ]
    assert all(
        matrix is not None for matrix in attention_similarity.measure_head_divergence(Decoder(tiny("llama")), batches)
    )


def test_half_precision_probabilities_are_normalised():
    model = tiny("llama")
    exact = attention_similarity.measure_head_divergence(Decoder(model), text())
    for one, other in zip(
        exact, attention_similarity.measure_head_divergence(Decoder(model.bfloat16()), text()), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0.05, atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "gemma2"])
def test_one_layer_on_the_carried_stream_equals_the_whole_model(family):
    model, batches = tiny(family), text()
    whole = attention_similarity.measure_head_divergence(Decoder(model), batches)
    lock = PairedStreams(Decoder(model), batches)
    for index in range(3):
        lock.enter_layer(index, ())
        torch.testing.assert_close(
            attention_similarity.measure_layer_divergence(lock, batches), whole[index], rtol=1e-4, atol=1e-7
        )
        lock.leave_layer()


def test_a_layer_without_attention_has_none():
    model = tiny("llama")
    surgery.apply(model, cut(model, "attention"))
    found = attention_similarity.measure_head_divergence(Decoder(model), text())
    assert [matrix is None for matrix in found] == [True, False, True]


def test_hidden_probabilities_are_said_once_and_the_setting_comes_back():
    model = tiny("llama")
    for layer in Decoder(model):
        layer.attention.register_forward_hook(lambda m, args, output: (output[0], None))
    with pytest.warns(UserWarning, match="does not return probabilities") as caught:
        assert attention_similarity.measure_head_divergence(Decoder(model), text()) == [None, None, None]
    assert len(caught) == 1 and model.config._attn_implementation == "sdpa"


def test_a_failure_restores_the_attention():
    model = tiny("llama")
    with pytest.raises(IndexError):
        attention_similarity.measure_head_divergence(Decoder(model), [{"input_ids": torch.full((1, 4), 9999)}])
    assert model.config._attn_implementation == "sdpa"
    assert not any(module._forward_hooks for module in model.modules())


# Groups --------------------------------------------------------------------------------------------------------------


def test_groups_are_as_far_apart_as_the_worse_matched_of_them():
    # Group 0 = heads 0, 1; group 1 = heads 2, 3. From 0: head 0 to 2 (0.1), head 1 to 3 (0.15). From 1: the same pairs.
    assert compute_group_divergence(torch.tensor(FOUR), 2)[0, 1].item() == pytest.approx(0.125)
    lopsided = torch.tensor(FOUR)
    lopsided[1, 3] = lopsided[3, 1] = 0.45  # from group 1, head 3 is now closest to head 1 at 0.45
    assert compute_group_divergence(lopsided, 2).tolist() == [[0, pytest.approx(0.275)], [pytest.approx(0.275), 0]]
    one_way = torch.tensor(FOUR)
    one_way[0, 3] = one_way[3, 0] = 0.02  # heads 2 and 3 both find head 0: (0.1 + 0.02) / 2; 0 finds 3, 1 finds 3
    assert compute_group_divergence(one_way, 2)[0, 1].item() == pytest.approx(max((0.02 + 0.15) / 2, (0.1 + 0.02) / 2))


def test_groups_of_one_head_are_the_heads():
    assert torch.equal(compute_group_divergence(torch.tensor(FOUR), 1), torch.tensor(FOUR))


# Algorithm 2 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tau", "expected"),
    [
        (0.10, []),  # strictly below
        (0.11, [0]),  # 0 is close to 2, and 2 no longer to anything that stays
        (0.16, [0, 1]),
        (0.41, [0, 1, 2]),  # 2 is close to 3
        (9.00, [0, 1, 2]),  # one always stays
    ],
)
def test_algorithm_2_on_four_heads(tau, expected):
    assert list(find_candidates(FOUR, tau)) == expected


def test_of_two_identical_heads_exactly_one_is_a_candidate():
    same = [[0.0, 0.5, 0.0], [0.5, 0.0, 0.5], [0.0, 0.5, 0.0]]
    assert find_candidates(same, 1e-6) == {0: 0.0}


@given(st.integers(1, 7), st.floats(0, 0.8), st.integers(0, 999))
def test_algorithm_2_is_the_scan_that_the_paper_prints(size, tau, seed):
    values = torch.rand(size, size, generator=torch.Generator().manual_seed(seed))
    matrix = ((values + values.T) / 2).tolist()
    expected = []
    for i in range(size):
        for j in range(size):
            if matrix[i][j] < tau and i != j and i not in expected and j not in expected:
                expected.append(i)
    assert list(find_candidates(matrix, tau)) == expected


@given(st.integers(1, 7), st.floats(0, 0.8), st.integers(0, 999))
def test_what_stays_is_far_apart_and_what_goes_was_close_to_something(size, tau, seed):
    values = torch.rand(size, size, generator=torch.Generator().manual_seed(seed))
    matrix = torch.triu(values, 1)
    matrix = (matrix + matrix.T).tolist()
    gone = find_candidates(matrix, tau)
    stays = [unit for unit in range(size) if unit not in gone]
    assert stays
    assert all(matrix[i][j] >= tau for i in stays for j in stays if i != j)
    assert all(min(value for j, value in enumerate(matrix[i]) if j != i) < tau for i in gone)


# The threshold -------------------------------------------------------------------------------------------------------

MOMENTS = [4.0, 1.0, 3.0, 2.0]


@pytest.mark.parametrize(
    ("count", "limit", "expected"),
    [
        (1, math.inf, [0]),
        (2, math.inf, [0, 1]),
        (3, math.inf, [0, 1, 2]),
        (1, 0.2, [0]),
        (3, 0.2, [0, 1, 3]),  # two are similar; of the others, 3 has less second moment than 2
        (3, 0.12, [0, 1, 3]),  # one is similar; then 1, then 3 by second moment
        (2, 0.0, [1, 3]),  # second moments alone
    ],
)
def test_redundant_units_of_one_cell(count, limit, expected):
    found = select_redundant_units([Cell(FOUR, MOMENTS, 3)], count, limit)
    assert sorted(unit for _, unit in found) == expected and len(found) == count


def test_a_jump_in_the_number_of_candidates_is_resolved_by_the_smallest_divergence():
    # 0.2 makes both 0 (close to 1) and 2 (close to 3) candidates at once; 2 is closer.
    matrix = [[0, 0.20, 0.6, 0.6], [0.20, 0, 0.6, 0.6], [0.6, 0.6, 0, 0.19], [0.6, 0.6, 0.19, 0]]
    assert select_redundant_units([Cell(matrix, MOMENTS, 3)], 1, math.inf) == [(0, 2)]
    tied = [[0, 0.2, 0.6, 0.6], [0.2, 0, 0.6, 0.6], [0.6, 0.6, 0, 0.2], [0.6, 0.6, 0.2, 0]]
    assert select_redundant_units([Cell(tied, MOMENTS, 3)], 1, math.inf) == [(0, 0)]


def test_one_threshold_over_cells_takes_more_from_the_more_redundant():
    close = [[value / 10 for value in row] for row in FOUR]
    found = select_redundant_units([Cell(FOUR, MOMENTS, 3), Cell(close, MOMENTS, 3)], 4, math.inf)
    assert sorted(found) == [(0, 0), (1, 0), (1, 1), (1, 2)]
    assert sorted(select_redundant_units([Cell(FOUR, MOMENTS, 3), Cell(close, MOMENTS, 1)], 3, math.inf)) == [
        (0, 0),
        (0, 1),
        (1, 0),
    ]
    assert rank_similar_units([Cell(FOUR, MOMENTS, 3), Cell(close, MOMENTS, 3)], 0.05) == [(1, 0), (1, 1), (1, 2)]


def test_a_cell_that_similar_units_filled_gives_no_unit_of_small_moment():
    apart = Cell([[0.0, 0.5], [0.5, 0.0]], [9.0, 8.0], 1)
    assert select_redundant_units([Cell(FOUR, MOMENTS, 1), apart], 2, 0.12) == [(0, 0), (1, 1)]


@given(
    st.lists(st.integers(2, 5), min_size=1, max_size=4),
    st.integers(0, 999),
    st.sampled_from([0.0, 0.2, math.inf]),
    st.data(),
)
def test_exactly_as_many_go_as_asked_for_and_no_cell_is_emptied(sizes, seed, limit, data):
    generator = torch.Generator().manual_seed(seed)
    cells = []
    for size in sizes:
        values = torch.triu(torch.rand(size, size, generator=generator), 1)
        most = data.draw(st.integers(0, size - 1))
        cells.append(Cell((values + values.T).tolist(), torch.rand(size, generator=generator).tolist(), most))
    count = data.draw(st.integers(0, sum(cell.most for cell in cells)))
    found = select_redundant_units(cells, count, limit)
    assert len(found) == len(set(found)) == count
    for number, cell in enumerate(cells):
        assert sum(of == number for of, _ in found) <= cell.most


def test_heads_are_chosen_in_the_unit_of_the_plan():
    shape = Decoder(tiny("llama")).shape.layers[0]  # 9 heads in 3 groups
    divergence = torch.full((9, 9), 0.5)
    divergence[3:6, 6:9] = divergence[6:9, 3:6] = 0.05  # groups 1 and 2 attend alike
    divergence[0, 2] = divergence[2, 0] = 0.01
    divergence.fill_diagonal_(0)
    scores = LayerScores(torch.arange(9.0))
    by_group = choose_heads(keep(shape, groups=(1, 2)), shape, scores, divergence, 0.2)
    assert by_group.kv_groups == (0, 2) and by_group.query_heads == (0, 1, 2, 6, 7, 8)
    by_head = choose_heads(keep(shape, heads_in_group=(0, 1)), shape, scores, divergence, 0.2)
    assert by_head.query_heads == (1, 2, 4, 5, 7, 8) and by_head.kv_groups == (0, 1, 2)
    assert choose_heads(keep(shape, groups=(1, 2)), shape, scores, None, 0.2).kv_groups == (1, 2)  # second moment
    assert choose_heads(keep(shape, groups=(0, 1)), shape, scores, divergence, 0.0).kv_groups == (1, 2)
