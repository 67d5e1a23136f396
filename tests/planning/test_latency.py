"""A latency table says what was measured, linear in between and never falling; the model is left alone."""

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from prunelit.callbacks.magnitude import Magnitude
from prunelit.core.plan import LayerShape, PruningPlan
from prunelit.core.scores import LayerScores
from prunelit.model import surgery
from prunelit.model.decoder import Decoder
from prunelit.planning import latency
from prunelit.planning.budget import select_units
from prunelit.planning.latency import measure_latency_table
from prunelit.runtime.errors import BadOption, InfeasibleBudget
from tests.tiny import FAMILIES, cut, tiny, tokens


def machine(shape: LayerShape) -> float:
    """A made-up machine: 5 for a layer, 2 for a query head, 3 for a KV group, 0.25 for a channel."""
    return 5 + 2 * shape.query_heads + 3 * shape.kv_groups + 0.25 * shape.ffn_channels


class Fake:
    """A `latency.Timer` that computes: `seconds` of the shape that it is given, and `noise` of its run."""

    def __init__(
        self,
        seconds: Callable[[LayerShape], float] = machine,
        noise: Callable[[int], float] = lambda number: 0.0,
    ):
        self.seconds, self.noise = seconds, noise
        self.shapes: list[LayerShape] = []
        self.log: list[int] = []

    def __call__(self, model: nn.Module, index: int) -> Callable[[], float]:
        shape, timer, runs = Decoder(model).layers[index].shape, len(self.shapes), 0
        self.shapes.append(shape)

        def run() -> float:
            nonlocal runs
            runs += 1
            self.log.append(timer)
            return self.seconds(shape) + self.noise(runs)

        return run


# What the table says --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "falcon-multi_query", "gemma2"])
def test_a_linear_machine_is_found_at_every_width(family: str) -> None:
    decoder = Decoder(tiny(family))
    (shape,) = {layer.shape for layer in decoder}
    table = measure_latency_table(decoder, align=8, points=3, timer=Fake())
    size = shape.group_size
    for groups in range(1, shape.kv_groups + 1):
        for channels in range(8, 97, 4):
            found = table.estimate_seconds(shape, groups * size, groups, channels)
            assert found == pytest.approx(5 + (2 * size + 3) * groups + 0.25 * channels)


def test_query_heads_are_measured_on_their_own_path() -> None:
    decoder = Decoder(tiny("llama"))
    (shape,) = {layer.shape for layer in decoder}
    table = measure_latency_table(decoder, "query_head", align=8, timer=Fake())
    for heads in (3, 6, 9):
        assert table.estimate_seconds(shape, heads, 3, 96) == pytest.approx(5 + 2 * heads + 3 * 3 + 0.25 * 96)


def test_a_removed_block_takes_no_time() -> None:
    decoder = Decoder(tiny("llama"))
    (shape,) = {layer.shape for layer in decoder}
    table = measure_latency_table(decoder, align=8, timer=Fake())
    assert table.estimate_seconds(shape, 0, 0, 96) == pytest.approx(0.25 * 96)
    assert table.estimate_seconds(shape, 9, 3, 0) == pytest.approx(5 + 2 * 9 + 3 * 3)
    assert table.estimate_seconds(shape, 0, 0, 0) == 0


def test_between_points_it_is_linear_and_at_points_it_is_exact() -> None:
    """Squares: 8, 24, 48, 72 and 96 channels are measured with four points and an alignment of 8."""
    decoder = Decoder(tiny("llama"))
    (shape,) = {layer.shape for layer in decoder}
    table = measure_latency_table(
        decoder, align=8, points=4, timer=Fake(lambda s: float(s.query_heads + s.ffn_channels**2))
    )
    assert [width for width, _ in table.record["tables"][0]["channels_seconds"]] == [0, 8, 24, 48, 72, 96]
    for width in (8, 24, 48, 72, 96):
        assert table.estimate_seconds(shape, 0, 0, width) == pytest.approx(width**2)
    assert table.estimate_seconds(shape, 0, 0, 64) == pytest.approx((48**2 + 2 * 72**2) / 3)
    assert table.estimate_seconds(shape, 0, 0, 4) == pytest.approx(8**2 / 2)


def test_it_never_falls_with_the_width() -> None:
    """Out of order, 8 channels take 9 and 16 take 5: both count 7, the nearest that does not fall."""
    slow = {0: 0.0, 8: 9.0, 16: 5.0, 32: 8.0, 40: 4.0, 64: 20.0, 96: 20.0}
    decoder = Decoder(tiny("llama", intermediate_size=64))
    (shape,) = {layer.shape for layer in decoder}
    table = measure_latency_table(decoder, align=8, points=4, timer=Fake(lambda s: slow.get(s.ffn_channels, 8.0)))
    found = dict(map(tuple, table.record["tables"][0]["channels_seconds"]))
    assert found == {0: 0.0, 8: 7.0, 16: 7.0, 32: 8.0, 48: 8.0, 64: 20.0}
    seconds = [table.estimate_seconds(shape, 9, 3, width) for width in range(65)]
    assert seconds == sorted(seconds)


def test_the_median_of_rounds_counts() -> None:
    """Every width has its turn in every round, so a slow moment hits all; one in four runs is slow, and the first."""
    decoder = Decoder(tiny("llama"))
    (shape,) = {layer.shape for layer in decoder}
    fake = Fake(noise=lambda number: 1000.0 if number == 1 or number % 4 == 0 else 0.0)
    table = measure_latency_table(decoder, align=8, points=3, repeats=5, timer=fake)
    assert table.estimate_seconds(shape, 9, 3, 96) == pytest.approx(machine(shape))
    widths = len(fake.shapes)
    forth = list(range(widths))
    assert fake.log == forth + forth + 2 * (forth[::-1] + forth)  # to warm up, and five rounds


def test_one_layer_of_each_shape_is_measured() -> None:
    model = tiny("llama")
    surgery.apply(model, cut(model, "mixed"))
    decoder, fake = Decoder(model), Fake()
    table = measure_latency_table(decoder, align=8, points=2, timer=fake)
    assert len(table.curves) == 3
    assert [each["layers"] for each in table.record["tables"]] == [[0], [1], [2]]
    for layer in decoder:
        shape = layer.shape
        widths = (shape.query_heads, shape.kv_groups, shape.ffn_channels)
        # The constant 5 of a layer counts with its attention, or with its FFN where it has none.
        assert table.estimate_seconds(shape, *widths) == pytest.approx(machine(shape))
    alike = Fake()
    measure_latency_table(Decoder(tiny("llama")), align=8, points=2, timer=alike)
    assert len(alike.shapes) < len(fake.shapes)


@pytest.mark.parametrize("family", ["olmo2", "falcon-multi_query"])
def test_heads_that_can_not_go_are_measured_whole(family: str) -> None:
    decoder, fake = Decoder(tiny(family)), Fake()
    measure_latency_table(decoder, align=8, timer=fake)
    assert {shape.query_heads for shape in fake.shapes} == {9}


def test_the_record_is_plain_data() -> None:
    model = tiny("llama").bfloat16()
    record = measure_latency_table(Decoder(model), align=8, tokens=16, timer=Fake()).record
    assert json.loads(json.dumps(record)) == record
    assert {name: record[name] for name in ("mode", "tokens", "device", "dtype", "unit")} == {
        "mode": "prefill",
        "tokens": 16,
        "device": "cpu",
        "dtype": "bfloat16",
        "unit": "kv_group",
    }
    assert (
        measure_latency_table(Decoder(model), tokens=512, timer=Fake()).record["tokens"] == 64 - 9 - 1
    )  # it has 64 positions


@pytest.mark.parametrize("option", [{"tokens": 0}, {"points": 0}, {"repeats": 0}, {"mode": "train"}], ids=str)
def test_bad_option_is_named(option: dict[str, Any]) -> None:
    with pytest.raises(BadOption, match=next(iter(option))):
        measure_latency_table(Decoder(tiny("llama")), timer=Fake(), **option)


# The real clock -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["prefill", "decode"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2", "falcon", "phi3", "cohere2", "olmo2"])
def test_the_clock_runs_on_every_kind_of_family(family: str, mode: Any) -> None:
    decoder = Decoder(tiny(family))
    table = measure_latency_table(decoder, align=32, mode=mode, tokens=12, points=2, repeats=2)
    for shape, (attention, ffn) in table.curves.items():
        assert attention[-1][0] == shape.query_heads and ffn[-1][0] == shape.ffn_channels
        assert 0 < table.estimate_seconds(shape, shape.query_heads, shape.kv_groups, shape.ffn_channels) < 60


@pytest.mark.parametrize(
    "family",
    [family for family, row in FAMILIES.items() if "attention" not in row.lacks and row.model_type != "nemotron_h"],
)
def test_layers_are_cut_as_asked_in_every_family(family: str) -> None:
    model, fake = tiny(family), Fake()
    surgery.apply(model, cut(model, "attention"))
    decoder = Decoder(model)
    measure_latency_table(decoder, align=8, points=2, timer=fake)
    assert {shape.ffn_channels for shape in fake.shapes if not shape.kv_groups} == {8, 48, 96}
    assert {shape.ffn_channels for shape in fake.shapes if shape.kv_groups} == {0, 8, 48, 96}


@pytest.mark.parametrize("mode", ["prefill", "decode"])
def test_the_model_is_left_alone(mode: Any) -> None:
    model = tiny("gemma2").train()
    surgery.apply(model, cut(model, "mixed"))
    model.model.layers[0].eval()
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad = number % 2 > 0
    seen: list[int] = []
    model.model.layers[1].register_forward_hook(lambda *args: seen.append(1))
    config = copy.deepcopy(model.config.to_dict())
    parameters = {name: (id(p), p.requires_grad, p.clone()) for name, p in model.named_parameters()}
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    measure_latency_table(Decoder(model), align=8, mode=mode, tokens=8, points=2, repeats=1)
    assert model.config.to_dict() == config and torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    for name, parameter in model.named_parameters():
        identity, wanted, value = parameters[name]
        assert id(parameter) == identity and parameter.requires_grad is wanted and torch.equal(parameter, value)
        assert parameter.grad is None
    assert sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()) == 1


# As a budget ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["layer", "global", "layer_mean"])
def test_a_latency_is_a_budget(scope: Any) -> None:
    decoder = Decoder(tiny("llama"))
    shapes = decoder.shape.layers
    table = measure_latency_table(decoder, align=8, timer=Fake())
    scores = [LayerScores(torch.rand(9), torch.rand(96)) for _ in shapes]
    plans = select_units(shapes, scores, 0.3, scope, align=8, budget="latency", cost=table.estimate_seconds)
    left = [5 + 2 * h + 3 * g + 0.25 * c for h, g, c in (plan.widths for plan in plans)]
    assert sum(left) <= 0.7 * sum(map(machine, shapes)) < sum(left) + 9  # a KV group takes 9, a step of channels 2


def test_a_callback_measures_once_and_records_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fake(decoder: Decoder, unit: Any, align: int) -> Any:
        calls.append((unit, align))
        return measure_latency_table(decoder, unit, align, timer=Fake())

    monkeypatch.setattr(latency, "measure_latency_table", fake)
    model = tiny("llama")
    plan = Magnitude(0.3, budget="latency", scope="global", align=8).prune(model)
    assert calls == [("kv_group", 8)]
    assert plan.calibration["latency"]["tables"][0]["heads_seconds"][-1] == [9, 32.0]
    assert PruningPlan.from_json(plan.to_json()) == plan
    dense = sum(map(machine, plan.model.layers))
    assert sum(machine(layer.shape) for layer in Decoder(model)) <= 0.7 * dense
    assert torch.isfinite(model(input_ids=tokens()).logits).all()


def test_a_flat_machine_has_nothing_to_save(monkeypatch: pytest.MonkeyPatch) -> None:
    def flat(decoder: Decoder, unit: Any, align: int) -> Any:
        return measure_latency_table(decoder, unit, align, timer=Fake(lambda shape: 1.0))

    monkeypatch.setattr(latency, "measure_latency_table", flat)
    with pytest.raises(InfeasibleBudget, match=r"ratio 0\.3 of latency: expected at most 0\.0000"):
        Magnitude(0.3, budget="latency", align=8).prune(tiny("llama"))


def rank_table(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    table = measure_latency_table(
        Decoder(tiny("llama")), align=8, timer=Fake(lambda shape: machine(shape) * (1 + rank))
    )
    torch.save(table.record, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_rank_zero_measures_for_all(tmp_path: Any) -> None:
    mp.spawn(rank_table, (str(tmp_path),), nprocs=2)
    expected = measure_latency_table(Decoder(tiny("llama")), align=8, timer=Fake()).record
    assert torch.load(tmp_path / "0.pt") == torch.load(tmp_path / "1.pt") == expected
