"""Reports of a mixture show experts, their channels and active parameters; those of other models do not."""

import csv
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger

from prunelit.calibration import metrics
from prunelit.core.plan import PruningPlan
from prunelit.core.plan_diff import find_plan_differences
from prunelit.monitoring import loggers
from prunelit.monitoring.dashboard import Dashboard
from prunelit.pruning.registry import method_class
from prunelit.pruning.resume import _list_remaining_units
from prunelit.report.figures import draw_picture
from prunelit.report.page.summary import summarize_picture
from prunelit.report.plan_card import list_layer_rows, render_plan_card, render_plan_difference
from prunelit.report.record import Record
from prunelit.report.run_page import render_run_page
from tests.monitoring.test_dashboard import trainer
from tests.tiny import cut, tiny, tokens

BATCHES = [{"input_ids": tokens(8, 16)}]


def record_run(method: str, family: str, **options: Any) -> tuple[Record, PruningPlan]:
    record, model = Record(title="tiny"), tiny(family)
    pruner = method_class(method)(**options)
    pruner.listeners = [record]
    record.on_event("measured", {"name": "dense", "row": metrics.measure_model_size(model)})
    plan = pruner.prune(model, BATCHES if pruner.reads_text else ())
    record.on_event("measured", {"name": "pruned", "row": metrics.measure_model_size(model)})
    return record, plan


def test_the_card_has_experts_active_parameters_and_coverage() -> None:
    _, plan = record_run("reap", "qwen2_moe", ratio=0.25)
    head, dense, mixtures = list_layer_rows(plan)
    assert head == ["layers", "query heads", "KV groups", "FFN channels", "experts", "channels of an expert", ""]
    kept = len(plan.layers[1].experts)
    assert dense == ["0", "9/9", "3/3", "96/96", "-", "-", "whole"]
    assert mixtures == ["1-2", "9/9", "3/3", "48/48", f"{kept}/6", "40/40", ""]
    card = render_plan_card(plan)
    active = next(line.split() for line in card.splitlines() if line.startswith("active parameters"))
    size = metrics.compute_dense_size(plan.model)
    planned = int(plan.predicted["active_parameters"])
    assert active[2:4] == [f"{size['active_parameters']:,}", f"{planned:,}"] and planned < size["active_parameters"]
    unreached = plan.calibration["experts_without_tokens"]
    assert f"coverage: no token of the text reached {unreached} of 12 experts" in card


def test_the_card_of_another_model_says_nothing_of_experts() -> None:
    _, plan = record_run("magnitude", "llama", ratio=0.3, align=8)
    card = render_plan_card(plan)
    assert "expert" not in card and "active" not in card and "coverage" not in card
    assert "active_parameters" not in metrics.compute_dense_size(plan.model)


def test_channels_of_experts_are_shown() -> None:
    _, plan = record_run("magnitude", "mixtral", ratio=0.3, align=8, kinds=["expert_channels"])
    remain = len(plan.layers[0].expert_channels)
    assert [row[-3:-1] for row in list_layer_rows(plan)[1:]] == [["6/6", f"{remain}/96"]]
    assert plan.predicted["active_parameters"] < metrics.compute_dense_size(plan.model)["active_parameters"]


@pytest.mark.parametrize(
    ("kinds", "shown"), [(None, "experts"), (["expert_channels"], "expert_channels")], ids=["experts", "channels"]
)
def test_the_record_splits_scores_where_the_plan_does(kinds: Any, shown: str) -> None:
    record, plan = record_run("magnitude", "qwen2_moe", ratio=0.25, align=8, kinds=kinds)
    assert set(record.scores) == {"heads", "channels", "experts", "expert_channels"}
    for found, kept, shape in zip(record.scores[shown], plan.layers, plan.model.layers, strict=True):
        if not shape.experts:
            assert found is None
            continue
        assert found is not None
        assert sum(found.kept) == len(getattr(kept, shown))
        assert sum(found.removed) == getattr(shape, shown) - sum(found.kept) > 0
    assert Record.from_json(record.to_json()) == record
    other = "expert_channels" if shown == "experts" else "experts"
    assert not any(record.scores[other])


def test_the_record_of_another_model_has_heads_and_channels_alone() -> None:
    record, _ = record_run("magnitude", "llama", ratio=0.3, align=8)
    assert list(record.scores) == ["heads", "channels"]


def test_figures_and_their_sentences_have_experts() -> None:
    record, plan = record_run("magnitude", "qwen2_moe", ratio=0.25, align=8)
    panels = [axes.get_xlabel() for axes in draw_picture("kept", record).axes]
    assert panels == ["KV groups", "query heads", "experts", "channels of experts, %", "FFN channels, %"]
    grid = draw_picture("kept", record).axes[2].images[0].get_array()
    for row, kept, shape in zip(grid.tolist(), plan.layers, plan.model.layers, strict=True):
        assert row == [0 if not shape.experts else 1 if unit in kept.experts else 2 for unit in range(6)]
    kept_count = sum(len(kept.experts) for kept in plan.layers)
    assert f"{kept_count} of 12 experts" in summarize_picture("kept", record)
    assert f"{12 - kept_count} of 12 experts removed" in summarize_picture("scores", record)
    labels = [axes.get_xlabel().partition("\n")[0] for axes in draw_picture("scores", record).axes]
    assert "score of an expert" in labels


def test_a_mixture_without_dense_ffns_has_no_panel_of_them() -> None:
    record, _ = record_run("reap", "mixtral", ratio=0.25)
    panels = [axes.get_xlabel() for axes in draw_picture("kept", record).axes]
    assert panels == ["KV groups", "query heads", "experts", "channels of experts, %"]


def test_experts_that_went_with_their_block_have_its_colour() -> None:
    record = Record(plan=cut(tiny("qwen2_moe"), "mlp"))
    assert set(draw_picture("kept", record).axes[2].images[0].get_array()[2].tolist()) == {3}


def test_the_page_has_active_parameters_and_coverage() -> None:
    record, plan = record_run("reap", "qwen2_moe", ratio=0.25)
    page = render_run_page(record)
    assert "Active parameters" in page and "active parameters: those that a token passes" in page
    assert f"{int(plan.predicted['active_parameters']):,}" in page
    assert f"{plan.calibration['experts_without_tokens']} of 12 experts" in page
    other = render_run_page(record_run("magnitude", "llama", ratio=0.3, align=8)[0])
    assert "ctive parameters" not in other and "expert" not in other


def test_plans_differ_in_experts_and_their_channels() -> None:
    model = tiny("qwen2_moe")
    first = cut(model, "expert")
    second = first.replace_layer(1, experts=[1, 2, 5], expert_channels="0-31")
    found = find_plan_differences(first, second)
    assert [(difference.layer, difference.kind) for difference in found] == [(1, "experts"), (1, "expert_channels")]
    assert found[0].only_first == tuple(sorted(set(first.layers[1].experts) - {1, 2, 5}))
    assert found[1].widths == (40, 32) and found[1].only_first == tuple(range(32, 40))
    text = render_plan_difference(first, second, found, ("a", "b"))
    assert "expert channels" in text and "40 -> 32" in text and "1 of 3 layers differ" in text


def test_plans_that_keep_other_experts_are_not_those_of_one_run() -> None:
    first = cut(tiny("mixtral"), "expert")
    second = first.replace_layer(0, experts=[4, 5])
    assert _list_remaining_units(first) == _list_remaining_units(first.replace_layer(0))
    assert _list_remaining_units(first) != _list_remaining_units(second)
    assert _list_remaining_units(first) != _list_remaining_units(first.replace_layer(0, expert_channels="0-63"))


def test_the_dashboard_logs_experts_and_active_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables: dict[str, Any] = {}
    monkeypatch.setattr(
        loggers, "log_table", lambda _, name, columns, rows, step: tables.update({name: (columns, rows)})
    )
    _, plan = record_run("reap", "qwen2_moe", ratio=0.25)
    dashboard, logger = Dashboard(artifacts="none"), CSVLogger(tmp_path)
    job = trainer(tmp_path, logger)
    dashboard._trainer = job
    dashboard.on_event("planned", {"plan": plan})
    logger.save()
    with open(next(tmp_path.rglob("metrics.csv")), encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    logged = {name: float(value) for row in rows for name, value in row.items() if value}
    assert logged["prune/active_parameters"] == plan.predicted["active_parameters"]
    columns, table = tables["prune/layers"]
    row = dict(zip(columns, table[1], strict=True))
    assert (row["experts kept"], row["experts, dense"]) == (len(plan.layers[1].experts), 6)
    assert (row["channels of an expert kept"], row["channels of an expert, dense"]) == (40, 40)
