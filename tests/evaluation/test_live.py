"""`prunelit.evaluate`: live models and names, given texts and token ids, and how the result shows itself."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

import prunelit
from prunelit.calibration.metrics import perplexity
from prunelit.runtime.errors import BadOption
from tests.tiny import tiny, tiny_tokenizer, tokens

ROWS = tokens(4, 16)
TEXTS = [" ".join(f"w{n * k % 89}" for n in range(60)) for k in range(8)]


def test_token_ids_need_no_tokenizer() -> None:
    model = tiny("llama").train()
    result = prunelit.evaluate(model, {"first": ROWS[:2], "all": ROWS}, against=tiny("llama"))
    assert result.perplexity["all"] == pytest.approx(perplexity(model, ROWS, 4)["perplexity"])
    assert result.size["parameters"] == model.num_parameters() and model.training
    assert result.report["perplexity"]["first"]["log_ratio"] == 0


def test_a_live_model_measures_as_its_folder_does(source: str) -> None:
    live = prunelit.evaluate(prunelit.load(source), TEXTS, seqlen=16, windows=3)
    by_name = prunelit.evaluate(source, TEXTS, seqlen=16, windows=3)
    assert live.perplexity == by_name.perplexity
    entry = live.report["perplexity"]["text"]
    assert entry["protocol"]["text"] == ["text given in Python"] and entry["protocol"]["windows"] == 3


def test_the_result_shows_itself(tmp_path: Path) -> None:
    result = prunelit.evaluate(tiny("llama"), {"<b>": ROWS}, against=tiny("llama"))
    assert repr(result).startswith("<EvaluationResult of ") and "perplexity on <b>" in repr(result)
    assert "| ln(model / against) | 0.000 |" in str(result)
    html = result._repr_html_()
    HTMLParser().feed(html)
    assert "&lt;b&gt;" in html and "<b><b>" not in html
    assert result.plot()._repr_png_()[:4] == b"\x89PNG"  # type: ignore[attr-defined]
    result.save(tmp_path / "result.json")
    assert json.loads((tmp_path / "result.json").read_text()) == result.report


def test_what_cannot_be_measured_is_refused_in_one_line(source: str) -> None:
    model = tiny("llama")
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"text": {"a": {"text": ROWS, "seqln": 8}}}, "text.a: expected .* got 'seqln'; did you mean 'seqlen'"),
        ({"text": {"a": {"seqlen": 8}}}, "text.a: expected a text"),
        ({"text": ROWS, "windows": -1}, "text.text: windows: expected a whole number of at least 1, got -1"),
        ({"text": {"a": {"text": TEXTS, "seqlen": "8"}}}, "text.a: seqlen: expected a whole number of at least 2"),
        ({"text": {"a": {"text": ROWS, "stride": 4}}}, "text.a: stride: expected none beside token ids"),
        ({"text": TEXTS}, "tokenizer: expected that of the model, got none"),
        ({"text": [ROWS[:, :4], ROWS]}, "of one length"),
        ({"text": ["One text.", "builtin:python-docs"]}, "expected sources or texts, got both"),
        ({"text": ROWS, "tasks": "pika", "tokenizer": tiny_tokenizer()}, "did you mean 'piqa'"),
    )
    for options, message in cases:
        with pytest.raises(BadOption, match=message) as caught:
            prunelit.evaluate(model, **options)
        assert "\n" not in str(caught.value)
    with pytest.raises(BadOption, match="got a Linear"):
        prunelit.evaluate(torch.nn.Linear(2, 2), ROWS)
