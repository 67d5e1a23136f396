"""Sizes equal numbers worked out by hand; perplexity equals a plain loop written independently."""

import math

import pytest
import torch

from prunelit.calibration.metrics import describe_protocol, format_text_table, measure_model_size, perplexity
from prunelit.model import surgery
from prunelit.model.modes import use_eval_mode
from prunelit.runtime.errors import NotEnoughText
from tests.tiny import FAMILIES, KINDS, cut, tiny, tokens

# Vocabulary 50, hidden 16, 4 query heads in 2 groups of size 4, 24 channels, 2 layers.
SMALL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
}
LAYER_MACS = 16 * 16 + 2 * (8 * 16) + 16 * 16 + 3 * 16 * 24  # q, k and v, o, FFN
LAYER = LAYER_MACS + 2 * 16  # and two norms


def negative_log_likelihoods(model, windows):
    """One window at a time, one token at a time, in float64."""
    found = []
    for window in windows:
        with torch.no_grad():
            logits = model(window[None]).logits[0].double()
        for position in range(len(window) - 1):
            row = logits[position]
            found.append((torch.logsumexp(row, 0) - row[window[position + 1]]).item())
    return found


@pytest.mark.parametrize("tied", [False, True])
def test_size_of_a_small_llama(tied):
    model = tiny("llama", **SMALL, tie_word_embeddings=tied)
    assert measure_model_size(model) == {
        "parameters": 50 * 16 + 2 * LAYER + 16 + (0 if tied else 50 * 16),
        "block_parameters": 2 * LAYER,
        "macs_per_token": 2 * LAYER_MACS + 50 * 16,
        "kv_bytes_per_token": 2 * 2 * 2 * 4 * 4,  # layers, k and v, groups, head size, bytes
    }
    assert measure_model_size(model)["parameters"] == (4720 if tied else 5520)
    assert measure_model_size(model.bfloat16())["kv_bytes_per_token"] == 64


def test_size_of_a_small_gpt2():
    """Plain FFN with biases, fused q, k, v, tied embeddings, positions."""
    model = tiny("gpt2", vocab_size=50, n_embd=16, n_head=4, n_inner=24, n_layer=2, n_positions=8)
    layer = (3 * 16 * 16 + 3 * 16) + (16 * 16 + 16) + (16 * 24 + 24) + (24 * 16 + 16) + 2 * 2 * 16
    assert measure_model_size(model) == {
        "parameters": 50 * 16 + 8 * 16 + 2 * layer + 2 * 16,
        "block_parameters": 2 * layer,
        "macs_per_token": 2 * (4 * 16 * 16 + 2 * 16 * 24) + 50 * 16,
        "kv_bytes_per_token": 2 * 2 * 16 * 4,
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_size_counts_the_models_own_parameters(family):
    model = tiny(family)
    assert measure_model_size(model)["parameters"] == sum(
        p.numel() for p in {id(p): p for p in model.parameters()}.values()
    )


@pytest.mark.parametrize("kind", KINDS)
def test_size_after_a_cut_is_what_the_plan_predicted(kind):
    model = tiny("lfm2" if kind == "mixer" else "llama")
    plan = cut(model, kind)
    before = measure_model_size(model)
    surgery.apply(model, plan)
    after = measure_model_size(model)
    assert after == {name: plan.predicted[name] for name in after}
    assert after["block_parameters"] < before["block_parameters"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_perplexity_equals_a_plain_loop(family):
    model, windows = tiny(family), tokens(5, 12)
    expected = negative_log_likelihoods(model, windows)
    found = perplexity(model, windows, batch_size=2)
    mean = sum(expected) / len(expected)
    assert found["tokens"] == len(expected) == 5 * 11
    assert found["nll"] == pytest.approx(mean, rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)


def test_perplexity_does_not_depend_on_the_batch_size():
    model, windows = tiny("llama"), tokens(40, 20)  # 40 * 19 logits: more than one chunk
    found = [perplexity(model, windows, batch_size=size)["nll"] for size in (1, 7, 40)]
    assert found == pytest.approx([found[0]] * 3, rel=1e-6)


@pytest.mark.parametrize(("length", "stride"), [(10, 3), (10, 9), (8, 1)])
def test_with_a_stride_every_token_counts_once_with_the_context_of_its_window(length, stride):
    model, text = tiny("llama"), tokens(1, 26)[0]
    windows = text.unfold(0, length, stride)
    expected = negative_log_likelihoods(model, windows[:1])
    for window in windows[1:]:
        expected += negative_log_likelihoods(model, window[None])[-stride:]
    found = perplexity(model, windows, batch_size=2, stride=stride)
    assert found["tokens"] == len(expected) == length - 1 + stride * (len(windows) - 1)
    assert found["nll"] == pytest.approx(sum(expected) / len(expected), rel=1e-6)


def test_a_stride_of_the_whole_window_is_no_overlap():
    model, windows = tiny("llama"), tokens(3, 9)
    assert perplexity(model, windows, stride=9) == perplexity(model, windows)


def test_perplexity_of_uniform_logits_is_the_vocabulary():
    model = tiny("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert perplexity(model, tokens(3, 9))["perplexity"] == pytest.approx(96, rel=1e-5)


def test_perplexity_reads_a_training_model_in_eval_mode_and_puts_it_back():
    model = tiny("gpt2").train()  # has dropout
    model.transformer.h[1].eval()
    modes = [module.training for module in model.modules()]
    with use_eval_mode(model):
        expected = perplexity(model, tokens(2, 9))
    assert perplexity(model, tokens(2, 9)) == expected
    assert [module.training for module in model.modules()] == modes


def test_a_hopeless_model_has_infinite_perplexity():
    model = tiny("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)
    found = perplexity(model, tokens(2, 9))
    assert found["perplexity"] == math.inf and math.isfinite(found["nll"])


@pytest.mark.parametrize("shape", [(3, 1), (0, 8), (8,)])
def test_nothing_to_predict_is_an_error(shape):
    with pytest.raises(NotEnoughText, match=r"\[N, S\]") as error:
        perplexity(tiny("llama"), torch.zeros(shape, dtype=torch.long))
    assert "\n" not in str(error.value)


def test_protocol_says_what_makes_two_numbers_comparable():
    found = describe_protocol(["a.txt"], tokens(5, 12), "bfloat16")
    assert (found["text"], found["windows"], found["sequence_length"], found["stride"]) == (["a.txt"], 5, 12, 12)
    assert found["dtype"] == "bfloat16"


def test_table_is_aligned():
    rows = {
        "dense": {"parameters": 1234567, "perplexity": 12.3456},
        "cut": {"parameters": 900, "tokens_per_second": 7.0},
    }
    assert format_text_table(rows).splitlines() == [
        "       parameters  perplexity  tokens per second",
        "------------------------------------------------",
        "dense   1,234,567       12.35                  -",
        "cut           900           -               7.00",
    ]
