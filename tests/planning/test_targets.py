"""Sizes of the whole model as limits of a cut: read strictly, met exactly, the tightest of several, refused early."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from prunelit.callbacks import LLMBIP, BlockPruner, Magnitude, Random, ShortGPT
from prunelit.core.plan import PruningPlan
from prunelit.data import loading, text
from prunelit.model.decoder import Decoder
from prunelit.planning import latency
from prunelit.planning.amounts import (
    format_memory_size,
    format_parameter_count,
    parse_memory_size,
    parse_parameter_count,
)
from prunelit.planning.overshoot import measure_overshoot
from prunelit.planning.targets import count_memory, describe_target
from prunelit.pruning.one_call import plan as make_plan
from prunelit.runtime.errors import BadOption, InfeasibleBudget
from tests.cli.test_fit import call, refused, small
from tests.cli.test_fit import words as words  # a fixture
from tests.tiny import tiny, tokens

DENSE = Decoder(tiny("llama")).shape
MIXTURE = Decoder(tiny("mixtral")).shape


def asked_of(shape: Any, share: float) -> int:
    """Parameters of the whole model after so large a share of its layers has gone."""
    return round(shape.parameters - share * shape.block_parameters)


@pytest.mark.parametrize("value", ["6b", "6 B", "B", "6GB", "-6B", "0", "1e999", "6B5", "", True, "nan", "\u0666B"])
def test_a_bad_number_of_parameters_is_refused(value: Any) -> None:
    with pytest.raises(BadOption, match=r"^parameters: expected a number such as 6B, 600M or 1\.5e9, got"):
        parse_parameter_count(value)


@pytest.mark.parametrize("value", ["12", 12, "12gib", "12G", "12 GiB", "GiB", "-1GB", "0GB", "12GiBs", None, True])
def test_a_bad_size_in_memory_is_refused(value: Any) -> None:
    with pytest.raises(BadOption, match="memory: expected a size with its unit, such as 12GiB, 12GB or 800MB, got"):
        parse_memory_size(value)


def test_numbers_need_no_text() -> None:
    assert parse_parameter_count(1.5e9) == parse_parameter_count(1_500_000_000) == parse_parameter_count("1.5B")
    assert parse_memory_size("0.5GiB") == 2**29


def test_every_unit_is_as_large_as_it_is() -> None:
    """In steps of 1000, or of 1024 where it has an i."""
    count = 3
    for unit in ("", "K", "M", "B", "T"):
        assert parse_parameter_count(f"3{unit}") == count
        count *= 1000
    size, binary_size = 3_000_000, 3 * 1024 * 1024
    for letter in "MGT":
        assert (parse_memory_size(f"3{letter}B"), parse_memory_size(f"3{letter}iB")) == (size, binary_size)
        size, binary_size = size * 1000, binary_size * 1024


def test_a_size_is_written_in_the_largest_unit_that_it_fills() -> None:
    counts = (1_000_000_000, 999_900_000, 1_000_000, 999_999)
    assert [format_parameter_count(count) for count in counts] == ["1.00B", "999.9M", "1.0M", "999,999"]
    sizes = (1024**3, 1023 * 1024**2, 1024**2, 1023 * 1024)
    assert [format_memory_size(size) for size in sizes] == ["1.00 GiB", "1023.0 MiB", "1.0 MiB", "1023.0 KiB"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "ratio: expected it, or parameters, memory or speedup, got none"),
        ({"speedup": 1}, "speedup: expected a number above 1"),
        ({"ratio": 0.2, "context": 8}, "context: sizes the KV cache that memory counts"),
        ({"memory": "1MB", "batch": 0}, "batch: expected at least 1"),
        ({"parameters": "6B", "budget": "macs"}, "budget: says what ratio counts"),
        ({"parameters": "6B", "rounding": "below"}, "rounding: expected 'above' with parameters"),
        ({"ratio": 0.2, "rounding": "up"}, "rounding: expected one of above, below"),
    ],
    ids=str,
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadOption, match=message):
        Random(**options)


@pytest.mark.parametrize("scope", ["layer", "global", "layer_mean"])
@pytest.mark.parametrize("repair", ["none", "bias"])
def test_the_whole_model_has_no_more_than_was_asked(scope: Any, repair: Any) -> None:
    most = asked_of(DENSE, 0.3)
    model = tiny("llama")
    method = Magnitude(parameters=most, scope=scope, repair=repair, align=8)
    plan = method.plan_model(model)
    assert most * (0.9 if scope == "layer" else 0.97) < plan.predicted["parameters"] <= most
    assert plan.options["parameters"] == most and plan.options["ratio"] is None
    assert plan.calibration["target"] | {"said": ""} == {
        **{"parameters": most, "tightest": "parameters", "said": ""},
        "ratios": {"parameters": pytest.approx(0.3, abs=1e-5)},
    }
    assert "30.0% of the layers' go" in describe_target(plan)
    assert measure_overshoot(plan) is None
    assert PruningPlan.from_json(plan.to_json()) == plan


def test_a_ratio_alone_is_as_before() -> None:
    plan = Magnitude(0.3, align=8).plan_model(tiny("llama"))
    assert not {"parameters", "memory", "speedup", "context", "batch", "rounding"} & plan.options.keys()
    assert "target" not in plan.calibration


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("context", [1, 2000])
def test_weights_and_cache_fit_into_memory(scope: Any, context: int) -> None:
    method = Random(memory="1GB", context=context, batch=2, align=8, scope=scope)
    dense = count_memory(DENSE, method.size_target)
    assert dense == DENSE.parameters * 4 + 2 * context * 4 * sum(layer.kv_elements_at(3) for layer in DENSE.layers)
    most = int(0.8 * dense)
    plan = Random(memory=f"{most / 1e6:.6f}MB", context=context, batch=2, align=8, scope=scope).plan_model(
        tiny("llama")
    )
    assert (0.85 if scope == "layer" else 0.95) * most < count_memory(DENSE, method.size_target, plan) <= most


@pytest.mark.parametrize(("share", "ratio", "tightest"), [(0.4, 0.2, "parameters"), (0.2, 0.4, "ratio")])
def test_the_tightest_counts_and_is_named(share: float, ratio: float, tightest: str) -> None:
    most = asked_of(DENSE, share)
    plan = Random(ratio, parameters=most, align=8, scope="global").plan_model(tiny("llama"))
    assert plan.predicted["parameters"] <= most
    assert plan.predicted["ratio_of_block_parameters"] >= ratio
    assert describe_target(plan).startswith(tightest) and "the tightest; also" in describe_target(plan)


def test_a_target_in_python_takes_a_name() -> None:
    most = asked_of(DENSE, 0.25)
    plan = make_plan(tiny("llama"), "magnitude", parameters=f"{most / 1e6}M", align=8)
    assert plan.predicted["parameters"] <= most


def test_experts_go_for_a_target() -> None:
    most = asked_of(MIXTURE, 0.2)
    plan = Random(parameters=most, kinds=["experts"], scope="global").plan_model(tiny("mixtral"))
    assert plan.predicted["parameters"] <= most
    with pytest.raises(BadOption, match="speedup: expected parameters or memory for a mixture"):
        Random(speedup=1.5, kinds=["experts"]).plan_model(tiny("mixtral"))


@pytest.mark.parametrize("method", [ShortGPT, BlockPruner])
def test_whole_blocks_go_for_a_target(method: Any) -> None:
    model, batches = tiny("llama"), [{"input_ids": tokens()}]
    most = asked_of(DENSE, 0.3)
    plan = method(parameters=most).plan_model(model, batches)
    assert plan.predicted["parameters"] <= most
    assert plan.calibration["target"]["tightest"] == "parameters"
    with pytest.raises(InfeasibleBudget, match="parameters: the smallest that these options reach is"):
        method(parameters=asked_of(DENSE, 0.999)).check_size_target(DENSE)
    with pytest.raises(BadOption, match="count: expected it alone"):
        method(count=1, parameters=most)
    with pytest.raises(BadOption, match="speedup: expected None"):
        method(speedup=1.5)


def test_a_speedup_is_of_the_whole_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def table(decoder: Decoder, unit: Any, align: int) -> latency.LatencyTable:
        shape = decoder.layers[0].shape
        curves = {shape: ([[0, 0.0], [shape.query_heads, 1.0]], [[0, 0.0], [shape.ffn_channels, 2.0]])}
        return latency.LatencyTable(curves, {"mode": "prefill"})  # type: ignore[arg-type]

    monkeypatch.setattr(latency, "measure_latency_table", table)
    monkeypatch.setattr(latency, "measure_outside_seconds", lambda decoder: 1.0)
    plan = Random(speedup=1.5, align=8, scope="global").plan_model(tiny("llama"))
    shape = DENSE.layers[0]
    seconds = [
        len(kept.query_heads) / shape.query_heads + 2 * len(kept.ffn_channels) / shape.ffn_channels
        for kept in plan.layers
    ]
    dense = 3 * len(DENSE.layers) + 1
    assert 1.5 <= dense / (sum(seconds) + 1) < 1.7
    assert plan.calibration["latency"]["outside_seconds"] == 1.0
    with pytest.raises(InfeasibleBudget, match=r"speedup: expected at most [\d.]+ times the speed, got 50\.00"):
        Random(speedup=50, align=8).plan_model(tiny("llama"))


# Refused before anything is read -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        (["--parameters", "1"], ["parameters: the smallest that these options reach is"]),
        (["--parameters", "1B"], ["parameters: expected less than the model's", "nothing has to go"]),
        (["--memory", "1MB", "--context", "100000"], ["memory: the smallest that these options reach is"]),
        (["--memory", "12"], ["memory: expected a size with its unit"]),
    ],
    ids=str,
)
def test_what_no_cut_reaches_is_refused_before_text_is_read(
    capsys: pytest.CaptureFixture[str],
    source: str,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    more: list[str],
    parts: list[str],
) -> None:
    monkeypatch.setattr(loading, "load", lambda *a: pytest.fail("the model was loaded"))
    monkeypatch.setattr(text, "draw_windows", lambda *a: pytest.fail("text was read"))
    command = small(source, words, tmp_path / "out", *more)
    place = command.index("--ratio")
    refused(call(capsys, *command[:place], *command[place + 2 :]), *parts)


def test_prune_reaches_its_target_and_says_so(
    capsys: pytest.CaptureFixture[str], source: str, words: str, tmp_path: Path
) -> None:
    dense = Decoder(loading.load(source)).shape
    most = asked_of(dense, 0.3)
    command = small(source, words, tmp_path / "out", "--parameters", str(most))
    place = command.index("--ratio")
    code, printed, err = call(capsys, *command[:place], *command[place + 2 :])
    assert code == 0, err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["pruned"]["parameters"] <= most
    assert "30.0% of the layers' go) of block parameters" in printed
    assert "30.0% of the layers' go" in err  # before text was read


def test_plan_says_what_it_would_take(
    capsys: pytest.CaptureFixture[str], source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shape").mkdir()
    (tmp_path / "shape" / "config.json").write_text((Path(source) / "config.json").read_text())
    dense = Decoder(loading.load(source)).shape
    monkeypatch.setattr(loading, "load", lambda *a: pytest.fail("the model was loaded"))
    asked = ["--parameters", str(asked_of(dense, 0.3)), "--align", "8"]
    code, printed, err = call(capsys, "plan", "--model", str(tmp_path / "shape"), *asked)
    assert code == 0, err
    assert "30.0% of the layers' go" in printed and "scoring: 32,768 tokens in forward passes" in printed
    assert f"{dense.parameters:,}" in printed
    refused(call(capsys, "plan", *asked), "model")
    blocks = [*asked[:2], "--method", "shortgpt", "--estimate", "true"]
    refused(call(capsys, "plan", "--model", source, *blocks), "estimate: expected a method that cuts widths")


def test_a_job_refuses_a_target_before_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    method = LLMBIP(parameters=1)
    with pytest.raises(InfeasibleBudget, match="parameters: the smallest that these options reach is"):
        method.check_size_target(DENSE)
    said: list[str] = []
    method = LLMBIP(0.2, parameters=asked_of(DENSE, 0.3), align=8)
    method.say = said.append
    method.check_size_target(DENSE)
    assert "the tightest; also ratio 0.2" in said[0]
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("budget", ["kv_bytes", "macs", "parameters"])
def test_a_ratio_beside_a_target_is_reached_in_its_own_budget(budget: str) -> None:
    plan = Random(0.3, budget=budget, scope="global", align=8, parameters=asked_of(DENSE, 0.3)).plan_model(
        tiny("llama")
    )
    alone = PruningPlan("random", plan.model, plan.layers, {"ratio": 0.3, "budget": budget})
    overshoot = measure_overshoot(alone)
    assert overshoot is not None and overshoot.achieved >= 0.3
    assert plan.predicted["parameters"] <= asked_of(DENSE, 0.3)


def test_a_budget_of_macs_is_estimated_as_it_is_cut() -> None:
    model = tiny("bamba")
    method = Random(0.2, budget="macs", align=8)
    estimated, cut = method.estimate_plan(Decoder(model).shape), method.plan_model(model)
    assert [layer.widths for layer in estimated.layers] == [layer.widths for layer in cut.layers]
