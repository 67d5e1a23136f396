"""`prunelit.prune` and `prunelit.plan`: one call, by name, on what a caller has at hand."""

from pathlib import Path
from typing import Any

import pytest
import torch

import prunelit
from prunelit.core.plan import get_applied_plans
from prunelit.runtime.errors import BadOption, InfeasibleBudget, NoCalibration, PrunelitError, SourceNotFound
from tests.tiny import tiny, tiny_tokenizer, tokens

CUT: dict[str, Any] = {"ratio": 0.3, "align": 8, "windows": 4, "seqlen": 16}
TEXTS = [" ".join(f"w{n * k % 89}" for n in range(60)) for k in range(8)]


def test_it_cuts_as_the_method_itself_does(source: str, tmp_path: Path) -> None:
    tokenizer = prunelit.load_tokenizer(source)
    (tmp_path / "words.txt").write_text("\n\n".join(TEXTS))
    method, expected = prunelit.LLMBIP(**CUT), prunelit.load(source)
    plan = method.prune(expected, method.make_batches(str(tmp_path / "words.txt"), tokenizer))
    texts: list[Any] = [str(tmp_path / "words.txt"), tmp_path / "words.txt", TEXTS]
    texts += [[{"text": text} for text in TEXTS], method.make_batches(TEXTS, tokenizer)]
    for given in texts:
        model = prunelit.load(source)
        made = prunelit.prune(model, "llm_bip", text=given, **CUT)
        assert made.digest == plan.digest, given
        assert made.calibration["fingerprint"] == plan.calibration["fingerprint"], given
        assert torch.equal(model(tokens() % len(tokenizer)).logits, expected(tokens() % len(tokenizer)).logits)
        assert list(get_applied_plans(model).values()) == [made]


def test_a_name_is_loaded_cut_and_saved(source: str, tmp_path: Path) -> None:
    out = tmp_path / "smaller"
    with pytest.raises(BadOption, match="out: expected a folder for the cut model"):
        prunelit.prune(source, "magnitude", ratio=0.3)
    plan = prunelit.prune(source, "magnitude", ratio=0.3, align=8, out=out)
    assert prunelit.load(out).num_parameters() == plan.predicted["parameters"]
    assert prunelit.PruningPlan.load(out / "plan.json").digest == plan.digest
    prunelit.load_tokenizer(out)
    with pytest.raises(PrunelitError, match="overwrite"):
        prunelit.prune(source, "magnitude", ratio=0.3, out=out)


def test_a_stream_of_texts_is_read_as_far_as_needed(source: str) -> None:
    drawn = []

    def draw() -> Any:
        while True:
            drawn.append(1)
            yield TEXTS[0]

    plan = prunelit.prune(prunelit.load(source), "llm_bip", text=draw(), **CUT)
    assert len(drawn) < 10 and plan.calibration["windows"] == 4


def test_a_loader_is_read_as_far_as_needed() -> None:
    drawn = []

    def draw() -> Any:
        while True:
            drawn.append(1)
            yield {"input_ids": tokens(3, 16)}

    plan = prunelit.prune(tiny("llama"), "llm_bip", text=draw(), **CUT)
    assert len(drawn) == 2 and plan.calibration["windows"] == 4


def test_cutting_twice_counts_what_is_left() -> None:
    model = tiny("llama")
    first = prunelit.prune(model, "magnitude", ratio=0.3, align=8)
    second = prunelit.prune(model, "magnitude", ratio=0.3, align=8)
    assert second.model.parameters == first.predicted["parameters"]
    assert second.predicted["parameters"] == model.num_parameters()


def test_an_optimiser_of_before_is_told_of() -> None:
    model = tiny("llama")
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.warns(UserWarning, match="optimizer AdamW: it holds .* of before the cut"):
        prunelit.prune(model, "magnitude", ratio=0.3, align=8)
    assert optimizer.param_groups


def test_mistakes_get_one_line() -> None:
    model = tiny("llama")
    size = model.num_parameters()
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"ratoi": 0.3}, "got 'ratoi'; did you mean 'ratio'"),
        ({"ratio": 0.3, "textt": "a"}, "got 'textt'; did you mean 'text'"),
        ({"ratio": 0.3, "target": "student"}, "got 'target'"),
        ({}, "^ratio: expected it, or parameters"),
        ({"ratio": "much"}, "ratio"),
        ({"ratio": 0.3, "scope": "lyer"}, "did you mean 'layer'"),
        ({"ratio": 0.3, "text": 7}, "got a int"),
        ({"ratio": 0.3, "text": tokens(), "device": "gpuu"}, "device 'gpuu': expected 'auto', 'cpu'"),
        ({"ratio": 0.3, "text": "a text without a tokenizer"}, "tokenizer"),
        ({"ratio": 0.3, "method": "flpa"}, "did you mean 'flap'"),
        ({"ratio": 0.3, "method": torch.nn.Linear}, "a subclass of PruningCallback"),
        ({"ratio": 0.3, "method": prunelit.LLMBIP(0.3)}, "no options beside an instance"),
    )
    for options, message in cases:
        with pytest.raises(BadOption, match=message) as caught:
            prunelit.prune(model, **options)
        assert "\n" not in str(caught.value)
    for name in ("no such file.txt", "no/such/file.jsonl", "builtin:nothing"):
        with pytest.raises(SourceNotFound):
            prunelit.prune(model, text=name, tokenizer=tiny_tokenizer(), **CUT)
    with pytest.raises(NoCalibration, match="nothing in it"):
        prunelit.prune(model, text=[], **CUT)
    with pytest.raises(InfeasibleBudget, match="parameters: the smallest"):  # before any text is read
        prunelit.prune(model, parameters=10, text="no such file.txt", tokenizer=tiny_tokenizer())
    wrapped = torch.nn.Sequential(model)
    with pytest.raises(BadOption, match="got a Sequential around one"):
        prunelit.prune(wrapped, text=tokens(), **CUT)
    assert model.num_parameters() == size
