"""Pictures show what the record says, whatever the model's size, and draw nothing where there is nothing."""

import re
from dataclasses import replace

import pytest

from prunelit.core.plan import LayerPlan, LayerShape, PruningPlan
from prunelit.report.figures import PICTURES, draw_picture, encode_png, encode_svg
from prunelit.report.figures.style import BLOCK, KEPT, REMOVED
from prunelit.report.record import Record
from tests.report.test_record import told


def plan_of(layers: int, heads: int, groups: int, channels: int = 64) -> PruningPlan:
    shape = LayerShape(heads, groups, 8, channels, 3, 1, 1, 1, heads + groups, channels)
    size = heads // groups
    kept = LayerPlan(tuple(range(heads - size)), tuple(range(groups - 1)), tuple(range(channels // 2)))
    gone = replace(kept, query_heads=(), kv_groups=())
    dense = told("magnitude", ratio=0.3, align=8).plan
    assert dense is not None
    model = replace(dense.model, layers=(shape,) * layers, parameters=layers * shape.parameters)
    return PruningPlan("x", model, (kept,) * (layers - 1) + (gone,))


@pytest.fixture(scope="module")
def full() -> Record:
    record = told("block_pruner", count=2)
    record.scores = told("flap", ratio=0.3, align=8).scores
    for name, perplexity, parameters in (("dense", 22.9, 2000), ("pruned", 37.5, 1500), ("recovered", 27.5, 1500)):
        record.on_event("measured", {"name": name, "row": {"perplexity": perplexity, "parameters": parameters}})
    for step in (1, 2, 3):
        values = {"train_loss": 3 - step / 2, "tokens_per_second": 100 + step, "val_perplexity": 30 - step}
        record.on_event("step", {"step": step, "values": values})
    return record


def words(text: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", text)


def test_each_picture_shows_the_record(full: Record) -> None:
    drawn = {name: encode_svg(draw_picture(name, full)) for name in PICTURES}
    said = {name: words(text) for name, text in drawn.items()}
    assert {"dense 22.9", "pruned 37.5", "recovered 27.5"} <= set(said["quality"])
    assert ["dense", *full.decided[-1]["order"]] == said["search"][: len(full.decided[-1]["order"]) + 1]
    assert {"KV groups", "query heads", "layer", "whole block removed"} <= set(said["kept"])
    assert BLOCK in drawn["kept"] and KEPT in drawn["scores"] and REMOVED in drawn["scores"]
    assert {"score and plan", "cut"} <= set(said["stages"])
    assert {"training loss", "perplexity", "dense", "pruned"} <= set(said["training"])
    figure = draw_picture("training", full)
    assert [list(line.get_ydata()) for line in figure.axes[0].lines] == [[2.5, 2.0, 1.5]]
    assert [list(line.get_ydata()) for line in figure.axes[1].lines][1] == [37.5, 29, 28, 27]
    assert list(draw_picture("speed", full).axes[0].lines[0].get_ydata()) == [101, 102, 103]


def test_a_histogram_is_drawn_with_its_counts(full: Record) -> None:
    panel = draw_picture("scores", full).axes[-1]
    one = full.scores["channels"][0]
    assert one is not None
    most = max(a + b for a, b in zip(one.kept, one.removed, strict=True))
    goes, stays = panel.patches[:2]
    for patch, counts in ((goes, one.removed), (stays, one.kept)):
        data = patch.get_data()
        heights = [(low - top) * most / 0.9 for top, low in zip(data.values, data.baseline, strict=True)]
        assert sum(heights) == pytest.approx(sum(counts))


@pytest.mark.parametrize("size", [(2, 2, 2), (2, 4, 4), (80, 128, 8), (30, 9, 3)])
def test_small_and_large_models(size: tuple[int, int, int]) -> None:
    record = Record(plan=plan_of(*size))
    figure = draw_picture("kept", record)
    text = encode_svg(figure)
    assert len(text) < 400_000
    grids = [image.get_array() for panel in figure.axes for image in panel.images]
    assert [grid.shape for grid in grids][-1] == (size[0], size[1])
    assert int((grids[-1] == 3).sum()) == size[1]  # the last layer's attention is gone
    assert figure.get_size_inches()[1] <= 7.5


def test_long_runs_leave_small_files() -> None:
    record = Record(decided=[{"order": ["A1"] * n, "perplexity": 20.0 + n, "after": 1000 * n} for n in range(20)])
    for number in range(20_000):
        record.search.append({"removed": [], "candidate": ["A1"], "perplexity": 20 + number % 7, "exact": True})
        record.training.append({"step": number, "train_loss": 3.0 + number % 5, "tokens_per_second": 9.0 + number % 3})
    for name in ("search", "training", "speed"):
        text = encode_svg(draw_picture(name, record))
        assert len(text) < 700_000, name
        assert ("<image" in text) == (name == "search")


def test_nothing_to_draw_is_no_picture() -> None:
    assert all(draw_picture(name, Record()) is None for name in PICTURES)
    odd = Record(decided=[{"order": [], "perplexity": float("inf"), "after": 1}], training=[{"step": 1, "x": 1.0}])
    odd.on_event("measured", {"name": "dense", "row": {"perplexity": None, "parameters": 5}})
    assert all(draw_picture(name, odd) is None for name in PICTURES)


def test_equal_records_give_equal_files(full: Record) -> None:
    for name in PICTURES:
        assert encode_svg(draw_picture(name, full)) == encode_svg(draw_picture(name, Record.from_json(full.to_json())))
        assert encode_png(draw_picture(name, full)).startswith(b"\x89PNG")
