"""More tokens than a model has positions: a line, where a forward pass would end in a traceback."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from prunelit.calibration import metrics
from prunelit.callbacks import LLMBIP
from prunelit.core.architectures import get_architecture
from prunelit.data import loading
from prunelit.model import context_length
from prunelit.runtime.errors import BadOption
from tests.cli.test_fit import ROOT, call, refused, small
from tests.cli.test_fit import words as words  # a fixture
from tests.tiny import FAMILIES, tiny, tiny_tokenizer, tokens


@pytest.mark.parametrize("family", list(FAMILIES))
def test_what_is_declared_to_have_a_table_of_positions_has_one(family: str) -> None:
    model = tiny(family)
    limit = context_length.get_context_limit(model.config)
    assert limit is not None
    if limit > 64:
        return  # computed from the start, so there is no table to leave
    model(input_ids=tokens(1, limit))
    fails = False
    try:
        model(input_ids=tokens(1, limit + 1))
    except (IndexError, RuntimeError):  # a gather, in GPT-J
        fails = True
    assert fails == get_architecture(model.config).position_table


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_a_loaded_model_is_asked_before_a_forward_pass(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(family)
    monkeypatch.setattr(type(model), "forward", lambda *a, **k: pytest.fail("the model was run"))
    said = r"seqlen: expected at most 64 tokens \(the model's positions\), got 65"
    with pytest.raises(BadOption, match=said):
        metrics.perplexity(model, tokens(2, 65))
    for method in (LLMBIP(0.2, align=8), LLMBIP(0.2, align=8, repair="bias")):
        with pytest.raises(BadOption, match=said):
            method.prune(model, [{"input_ids": tokens(2, 65)}])


def test_computed_positions_go_on_with_one_warning() -> None:
    model = tiny("llama")
    metrics.perplexity(model, tokens(2, 64))
    with pytest.warns(UserWarning, match="seqlen: 65 tokens are more than the model's 64 positions") as caught:
        metrics.perplexity(model, tokens(2, 65))
    assert len(caught) == 1


def test_a_config_without_a_number_or_of_an_unknown_family_is_no_reason_to_refuse() -> None:
    context_length.check_context_length(None, 10**6)
    context_length.check_context_length(SimpleNamespace(model_type="gpt2"), 10**6)
    context_length.check_position_table(SimpleNamespace(model_type="made_up", max_position_embeddings=8), 9)


@pytest.fixture
def gpt2(tmp_path: Path) -> str:
    tokenizer = tiny_tokenizer()
    tiny("gpt2", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    return str(tmp_path / "gpt2")


@pytest.mark.parametrize(
    ("command", "options", "named"),
    [
        ("plan", [], "seqlen"),
        ("prune", [], "seqlen"),
        ("prune", ["--method", "magnitude", "--repair", "bias"], "seqlen"),
        ("evaluate", [], "seqlen"),
        ("evaluate", ["--samples", "true"], "texts.text.seqlen"),
        ("compare", ["--texts", "{a: {text: WORDS, seqlen: 65}}"], "texts.a.seqlen"),
        ("compare", ["--texts", "{a: {text: WORDS, seqlen: 16}}", "--calibration.seqlen", "65"], "calibration.seqlen"),
        (
            "compare",
            ["--texts", "{a: {text: WORDS, seqlen: 16}}", "--calibration.seqlen", "16", "--latency.tokens", "65"],
            "latency.tokens",
        ),
    ],
)
def test_commands_refuse_before_weights_are_loaded(
    capsys: pytest.CaptureFixture[str],
    gpt2: str,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    options: list[str],
    named: str,
) -> None:
    monkeypatch.setattr(loading, "load", lambda *a, **k: pytest.fail("the model was loaded"))
    given = {
        "plan": [*small(gpt2, words, tmp_path / "p.json")[1:], "--seqlen", "65"],
        "prune": [*small(gpt2, words, tmp_path / "out")[1:], "--seqlen", "65"],
        "evaluate": ["--model", gpt2, "--text", words, "--seqlen", "65"],
        "compare": ["--model", gpt2, "--out", str(tmp_path / "c"), "--methods+", "llm_bip", "--ratios+", "0.2"],
    }[command]
    options = [option.replace("WORDS", words) for option in options]
    refused(call(capsys, command, *given, *options), f"{named}: expected at most 64 tokens", "got 65")


def test_fit_refuses_before_weights_are_loaded(
    capsys: pytest.CaptureFixture[str], gpt2: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "load", lambda *a, **k: pytest.fail("the model was loaded"))
    given = ["--config", str(ROOT / "configs" / "quickstart.yaml"), "--model", gpt2, "--data.train", words]
    refused(call(capsys, "fit", *given, "--data.seqlen", "65"), "data.seqlen: expected at most 64 tokens", "got 65")


def test_what_reads_no_text_has_no_length(capsys: pytest.CaptureFixture[str], gpt2: str, tmp_path: Path) -> None:
    given = ["--method", "magnitude", "--ratio", "0.2", "--align", "8", "--seqlen", "65", "--out", str(tmp_path / "p")]
    code, _, err = call(capsys, "plan", "--model", gpt2, *given)
    assert code == 0, err


def test_a_cut_gpt2_still_has_its_table(tmp_path: Path) -> None:
    model: Any = tiny("gpt2")
    LLMBIP(0.2, align=8).prune(model, [{"input_ids": tokens(2, 16)}])
    model.config.model_type = "pruned_gpt2"
    with torch.no_grad(), pytest.raises(BadOption, match="seqlen"):
        metrics.perplexity(model, tokens(2, 65))
