"""Rounds, ratios and promises against numbers worked out by hand; the cache's bytes against its tensors."""

import time
from typing import Any

import pytest
import torch

from prunelit.evaluation import speed
from prunelit.evaluation.speed import ModelTimer, Speed
from prunelit.model import surgery
from prunelit.runtime.errors import BadOption
from tests.tiny import FAMILIES, cut, tiny

SMALL = Speed(prompt=6, new_tokens=3, context=5, batch=2, repeats=3)


def test_the_rounds_of_both_models_alternate(monkeypatch: pytest.MonkeyPatch) -> None:
    now, log = [0.0], []
    pair = {"model": tiny("llama"), "against": tiny("llama")}
    for name, model in pair.items():

        def ran(module: Any, args: Any, kwargs: Any, out: Any, name: str = name) -> None:
            length = kwargs["input_ids"].shape[1]
            log.append((name, length))
            now[0] += {"model": 1.0, "against": 2.0 if length > 1 else 4.0}[name]

        model.register_forward_hook(ran, with_kwargs=True)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    found = speed.measure_speed(pair, SMALL)
    one = [6, 1, 1, 1]
    order = ["model", "against", "model", "against", "against", "model", "model", "against"]
    assert (
        log
        == [("model", 5), ("against", 5)]
        + [(who, length) for who in ["model", "against", *order] for length in one][8:]
    )
    assert found["model"]["prefill_seconds"] == [1.0] * 3
    assert found["against"]["decode_seconds"] == [12.0] * 3
    assert found["model"]["prefill_tokens_per_second"] == 2 * 6 / 1.0
    assert found["against"]["decode_tokens_per_second"] == 2 * 3 / 12.0
    assert found["against"]["time_to_first_token_seconds"] == 2.0
    ratios = speed.compute_speed_ratios(found["model"], found["against"])
    assert (ratios["prefill"]["median"], ratios["decode"]["median"]) == (2.0, 4.0)
    assert (ratios["decode"]["promised"], ratios["prefill"]["promised"]) == (1.0, 1.0)  # the same model


def test_ratios_are_of_one_round_and_spread_over_them() -> None:
    model = {"prefill_seconds": [1.0, 2.0, 1.0], "decode_seconds": [1.0] * 3, "prefill_macs": 80, "decode_bytes": 50}
    dense = {"prefill_seconds": [2.0, 4.4, 1.8], "decode_seconds": [1.1] * 3, "prefill_macs": 100, "decode_bytes": 100}
    found = speed.compute_speed_ratios(model, dense)
    assert found["prefill"]["rounds"] == pytest.approx([2.0, 2.2, 1.8])
    low, median, high = (found["prefill"][name] for name in ("low", "median", "high"))
    assert (low, median, high) == pytest.approx((1.9, 2.0, 2.1))
    assert found["prefill"]["promised"] == 1.25
    assert "removed but not faster" not in found["prefill"]["said"]
    assert found["decode"]["said"].startswith("decode: removed but not faster: 1.10 times")
    assert found["decode"]["said"].endswith("the bytes read promise 2.00")


@pytest.mark.parametrize(
    ("median", "promised", "slow"), [(1.0, 1.01, False), (1.0, 1.2, True), (1.09, 1.2, True), (1.11, 1.2, False)]
)
def test_less_than_half_of_the_promise_is_said(median: float, promised: float, slow: bool) -> None:
    assert (
        "removed but not faster" in speed.describe_speed_ratio("decode", median, median, median, promised, "MACs")
    ) == slow


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gemma2"])
def test_the_cache_holds_what_was_predicted(family: str) -> None:
    """Below its window a sliding layer (Gemma 2: 4 tokens) holds all of the context."""
    model = tiny(family, tie_word_embeddings=False) if family == "llama" else tiny(family)
    surgery.apply(model, cut(model, "mixed" if family in ("llama", "qwen3") else "channel"))
    wanted = Speed(prompt=4, new_tokens=2, context=3, batch=2, repeats=1)
    (found,) = speed.measure_speed({"model": model}, wanted).values()
    assert found["kv_bytes"] == found["kv_bytes_predicted"] > 0


def test_falcon_keeps_keys_and_values_once_for_every_query_head() -> None:
    """transformers repeats them before they go into the cache: the measured bytes say so, the predicted ones do not."""
    (found,) = speed.measure_speed({"model": tiny("falcon")}, Speed(prompt=4, new_tokens=2, repeats=1)).values()
    assert found["kv_bytes"] == 3 * found["kv_bytes_predicted"]


def test_a_sliding_cache_is_smaller_than_predicted() -> None:
    (found,) = speed.measure_speed({"model": tiny("gemma2")}, Speed(prompt=12, new_tokens=2, repeats=1)).values()
    assert 0 < found["kv_bytes"] < found["kv_bytes_predicted"]


@pytest.mark.parametrize("tied", [True, False])
def test_the_promise_by_hand(tied: bool) -> None:
    """Vocabulary 96, hidden 72, 9 heads in 3 groups of size 8, 96 channels, 3 layers, float32."""
    model = tiny("llama", tie_word_embeddings=tied)
    (found,) = speed.measure_speed({"model": model}, SMALL).values()
    layer = 72 * (72 + 2 * 24) + 72 * 72 + 3 * 72 * 96
    assert found["prefill_macs"] == 2 * (6 * 3 * layer + 96 * 72)  # logits of the last token alone
    weights = 4 * (3 * (layer + 2 * 72) + 72 + 96 * 72)  # the input embedding is read only where it is the output too
    assert found["decode_bytes"] == weights + 2 * 5 * 3 * 2 * 24 * 4
    assert found["weight_bytes"] == weights + (0 if tied else 4 * 96 * 72)


@pytest.mark.parametrize("family", FAMILIES)
def test_decode_with_the_cache_writes_what_a_model_without_one_would(family: str) -> None:
    model = tiny(family)
    runner = ModelTimer(model, Speed(prompt=6, new_tokens=3, repeats=1))
    token, _ = runner.prefill(6)
    with torch.no_grad():
        expected = model(input_ids=runner.token_ids, use_cache=False).logits[:, -1:].argmax(-1)
    assert token.equal(expected)
    before = runner.context.get_seq_length()
    runner.measure_seconds()
    assert runner.context.get_seq_length() == before == 6  # a round works on a copy


@pytest.mark.parametrize("name", ["prompt", "new_tokens", "context", "batch", "repeats"])
def test_counts_below_one(name: str) -> None:
    with pytest.raises(BadOption, match=rf"speed.{name}: expected at least 1"):
        Speed(**{name: 0})


def test_more_tokens_than_positions() -> None:
    with pytest.raises(BadOption, match=r"at most 64 tokens, the model's positions, got 66"):
        ModelTimer(tiny("llama"), Speed(prompt=8, context=60, new_tokens=6))
