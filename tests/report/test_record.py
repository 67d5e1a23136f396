"""A record holds what a run told, and nothing that JSON cannot."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as some
from lightning.pytorch import Trainer

from prunelit.calibration.batches import split_into_batches
from prunelit.data.text import draw_windows
from prunelit.monitoring.recorder import Recorder
from prunelit.pruning.registry import method_class
from prunelit.report.record import Histogram, Record
from tests.foreign_job import ForeignData, ForeignModule
from tests.tiny import tiny, tiny_tokenizer


def told(method: str, **options: object) -> Record:
    record = Record(title="tiny")
    pruner = method_class(method)(**options)
    pruner.listeners = [record]
    model = tiny("llama")
    ids = draw_windows("builtin:python-docs", tiny_tokenizer(), 16, 8, seed=0) % model.config.vocab_size
    pruner.prune(model, split_into_batches(ids))
    assert record.plan == pruner.applied_plan
    return record


def test_scores_are_split_where_the_plan_splits_them() -> None:
    record = told("magnitude", ratio=0.3, align=8)
    assert record.plan is not None
    for found, kept, shape in zip(record.scores["channels"], record.plan.layers, record.plan.model.layers, strict=True):
        assert found is not None
        assert sum(found.kept) == len(kept.ffn_channels)
        assert sum(found.removed) == shape.ffn_channels - len(kept.ffn_channels) > 0
        assert found.cut is not None and found.low <= found.cut <= found.high
    assert [stage["name"] for stage in record.stages] == ["score_and_plan", "cut"]
    assert all(stage["seconds"] > 0 and stage["memory_mib"]["process"] > 0 for stage in record.stages)


def test_the_scores_told_are_those_of_the_method_not_an_order_made_of_them() -> None:
    similar = told("greedy_output", ratio=0.3, align=8, scope="global", criterion_heads="similarity")
    plain = told("greedy_output", ratio=0.3, align=8, scope="global", criterion_heads="second_moment")
    for found, wanted in zip(similar.scores["heads"], plain.scores["heads"], strict=True):
        assert found is not None and wanted is not None
        assert (found.low, found.high) == (wanted.low, wanted.high)


def test_a_search_is_told_as_it_happens() -> None:
    record = told("block_pruner", count=2)
    assert [len(step["order"]) for step in record.decided] == [0, 1, 2]
    assert record.decided[0]["perplexity"] > 0 and not any(record.scores.values())
    values = {frozenset(e["removed"] + e["candidate"]): e["perplexity"] for e in record.search if e["exact"]}
    for step in record.decided:
        assert values[frozenset(step["order"])] == step["perplexity"]


@pytest.mark.parametrize("method", ["flap", "block_pruner"])
def test_json_holds_all_of_it(method: str) -> None:
    record = told(method, ratio=0.3)
    for step, values in ((1, {"train_loss": 2.0}), (2, {"train_loss": 1.5}), (2, {"val_perplexity": 9.0})):
        record.on_event("step", {"step": step, "values": values})
    record.on_event("measured", {"name": "dense", "row": {"perplexity": 3.0}})
    record.on_event("completions", {"prompts": ["a", "b"], "name": "dense", "texts": ["x", "y"]})
    record.on_event("completions", {"prompts": ["b"], "name": "pruned", "texts": ["z"]})
    record.on_event("of a later version", {"anything": 1})
    assert record.training[1] == {"step": 2, "train_loss": 1.5, "val_perplexity": 9.0}
    assert record.completions == [{"prompt": "a", "dense": "x"}, {"prompt": "b", "dense": "y", "pruned": "z"}]
    again = Record.from_json(record.to_json())
    assert again == record and again.to_json() == record.to_json()


def test_something_else_is_refused() -> None:
    for text in ("", "{}", '{"format": "other"}'):
        with pytest.raises((ValueError, KeyError)):
            Record.from_json(text)


@example([(1.0, False), (2.2250738585e-313, False)])  # their ratio overflows
@given(some.lists(some.tuples(some.floats(-1e6, 1e6), some.booleans()), min_size=1, max_size=60))
def test_every_unit_is_in_one_bin(units: list[tuple[float, bool]]) -> None:
    scores, stays = zip(*units, strict=True)
    found = Histogram.from_scores(scores, stays)
    assert (sum(found.kept), sum(found.removed)) == (sum(stays), len(stays) - sum(stays))
    assert found.low >= min(scores) and found.edges == sorted(found.edges)
    if found.cut is not None:
        assert all((score >= found.cut) == kept or score == found.cut for score, kept in units)


@pytest.mark.parametrize("first", [True, False])
def test_callbacks_of_a_job_are_told_whatever_their_order(first: bool) -> None:
    recorder, pruner = Recorder(), method_class("flap")(ratio=0.3, align=8, windows=4)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=5,
        log_every_n_steps=2,
        val_check_interval=4,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[recorder, pruner] if first else [pruner, recorder],
    )
    trainer.fit(ForeignModule(), datamodule=ForeignData())
    record = recorder.record
    assert record.plan == pruner.applied_plan and any(record.scores["channels"])
    assert [stage["name"] for stage in record.stages] == ["text", "score_and_plan", "cut"]
    assert [entry["step"] for entry in record.training] == [2, 4, 5]
    assert all(
        {"loss", "learning_rate"} <= entry.keys() and entry["tokens_per_second"] > 0 for entry in record.training
    )
    assert [entry["step"] for entry in record.training if "val_loss" in entry] == [4]
