"""`prune` and `plan_model` from Python: what is no model, no text or no list is one clear line, and nothing is cut."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import DataLoader

from prunelit.callbacks import LLMBIP, Magnitude
from prunelit.runtime.errors import BadOption, DeclarationMismatch, NoCalibration, PrunelitError
from tests.tiny import tiny, tokens

BATCHES = [{"input_ids": tokens(2, 8)}]


@pytest.mark.parametrize("act", ["prune", "plan_model"])
@pytest.mark.parametrize(
    ("batches", "got"),
    [
        ("builtin:python-docs", "got 'builtin:python-docs'; make them with method.make_batches"),
        ([tokens(2, 8)], "got a Tensor in the list; "),
        (tokens(2, 8), "got a Tensor; "),
        ([{"ids": tokens(2, 8)}], "got a dict in the list; "),
        ([{"input_ids": [1, 2]}], "got a dict with other input_ids in the list; "),
        ([{"input_ids": tokens(2, 8)[0]}], "got a dict with other input_ids in the list; "),
        (DataLoader(torch.arange(4)), "got a DataLoader; "),  # type: ignore[arg-type]
        (iter(BATCHES), "got a list_iterator; "),
        (None, "got a NoneType; "),
    ],
)
def test_what_is_no_list_of_batches(act: str, batches: Any, got: str) -> None:
    for method in (LLMBIP(0.2, align=8), Magnitude(0.2, align=8)):
        with pytest.raises(BadOption, match=r"^batches: expected a list of .*input_ids.*, ") as error:
            getattr(method, act)(tiny("llama"), batches)
        assert got in str(error.value)


@pytest.mark.parametrize(
    ("model", "error", "said"),
    [
        (lambda: nn.Linear(2, 2), BadOption, "model: expected a transformers causal LM, got a Linear; pass what"),
        (lambda: "path/to/model", BadOption, "model: expected a transformers causal LM, got a str; pass what"),
        (
            lambda: get_peft_model(tiny("llama"), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")),
            DeclarationMismatch,
            "got a PeftModelForCausalLM; prune before adapters are added",
        ),
    ],
)
def test_what_is_no_model_to_cut(model: Callable[[], Any], error: type[PrunelitError], said: str) -> None:
    with pytest.raises(error, match=said):
        Magnitude(0.2, align=8).prune(model(), BATCHES)


def test_no_batches_say_how_they_are_made() -> None:
    wanted = r"got none; make them with method.make_batches\(text, tokenizer\)"
    for method in (LLMBIP(0.2, align=8), Magnitude(0.2, align=8, repair="bias")):
        with pytest.raises(NoCalibration, match=wanted):
            method.prune(tiny("llama"))


@pytest.mark.parametrize("given", [3, "0", None])
def test_protect_is_a_list(given: Any) -> None:
    with pytest.raises(BadOption, match=r"^protect: expected a list of layer numbers, as \[0, -1\], got "):
        Magnitude(0.2, protect=given)


@pytest.mark.parametrize("family", ["llama", "lfm2", "qwen3_5_text"])
def test_a_share_of_macs_is_that_of_the_layers_with_their_mixers(family: str) -> None:
    plan = Magnitude(ratio=0.2, align=1, budget="macs").plan_model(tiny(family))
    model = plan.model
    widths = [(shape.query_heads, shape.kv_groups, shape.ffn_channels) for shape in model.layers]
    dense = sum(s.macs_at(model.hidden_size, *each) for s, each in zip(model.layers, widths, strict=True))
    removed = 1 - (plan.predicted["macs_per_token"] - model.head_macs) / dense
    assert 0.2 - 1e-9 <= removed < 0.21
