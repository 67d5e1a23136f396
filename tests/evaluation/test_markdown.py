"""Tables are Markdown, one for each protocol; the code refuses two protocols in one."""

from typing import Any

import pytest

from prunelit.evaluation import perplexities
from prunelit.evaluation.markdown import build_perplexity_table, render_evaluation_markdown
from prunelit.report.page.parts import Notes, Table
from prunelit.runtime.errors import BadOption
from tests.tiny import tokens


def text(length: int, *nll: float) -> dict[str, Any]:
    found = {who: {"nll": value, "tokens": 30} for who, value in zip(("model", "against"), nll, strict=False)}
    ratio = {"log_ratio": nll[0] - nll[1]} if len(nll) > 1 else {}
    return (
        {"protocol": perplexities.describe_text_protocol(["a.txt"], tokens(3, length), "float32", None)} | found | ratio
    )


def test_perplexities_of_one_protocol() -> None:
    said, grid, notes = build_perplexity_table({"a": text(12, 3.0, 2.9), "b": text(12, 2.5, 2.0)})
    assert said == "Windows of 12 tokens, without overlap; mean over predicted tokens, float32."
    assert grid == Table(
        ["", "a", "b", "mean"],
        [
            ["model", "20.1", "12.2", ""],
            ["against", "18.2", "7.39", ""],
            ["ln(model / against)", "0.100", "0.500", "0.300"],
        ],
    )
    assert notes == Notes([f"{name}: a.txt; 3 windows, 30 tokens" for name in "ab"])
    assert build_perplexity_table({"a": text(12, 3.0)})[1] == Table(["", "a"], [["model", "20.1"]])


def test_two_protocols_in_one_table_are_refused() -> None:
    with pytest.raises(BadOption, match="make a table for each"):
        build_perplexity_table({"a": text(12, 3.0), "b": text(16, 3.0)})


def handmade_evaluation() -> dict[str, Any]:
    """Everything that an evaluation against another model can hold."""
    size = {
        "parameters": 111_290_688,
        "block_parameters": 82_978_560,
        "macs_per_token": 9,
        "kv_bytes_per_token": 46_080,
    }
    metrics = {"acc": 0.5, "acc_stderr": 0.01, "acc_norm": 0.4, "acc_norm_stderr": None}
    interval = {"difference": -0.01, "low": -0.02, "high": 0.001}
    task = {"items": 1000, "metrics": metrics}
    timings = {f"{kind}_tokens_per_second": 12_345.6 for kind in ("prefill", "decode")}
    timings |= {"time_to_first_token_seconds": 0.5, "of": "process", "loading_counts": True}
    timings |= {f"{kind}_bytes": 3e8 for kind in ("weight", "peak", "kv")} | {"kv_bytes_predicted": 3e8}
    ratio = {"median": 1.2, "low": 1.1, "high": 1.3, "promised": 1.27, "promised_by": "MACs", "said": "as promised"}
    prompts = ["The capital of France is", "w" * 300]
    return {
        "command": "python -m prunelit evaluate --model runs/quickstart/model --against HuggingFaceTB/SmolLM2-135M",
        "model": {"source": "runs/quickstart/model", "adapter": None} | size,
        "against": {"source": "HuggingFaceTB/SmolLM2-135M", "adapter": None} | size,
        "perplexity": {name: text(1024, 3.0, 2.5) for name in ("wikitext2", "ptb", "c4")},
        "zero_shot": {
            "protocol": {"harness": "lm-evaluation-harness 0.4", "shots": 0, "limit": None, "batch_size": 8}
            | {"dtype": "float32", "interval": "paired", "rows": "hub"},
            "tasks": {
                name: {"model": task, "against": task, "difference": {"acc": interval, "acc_norm": interval}}
                for name in ("piqa", "arc_challenge")
            },
            "averages": {"acc": {"model": 0.5, "against": 0.51, "difference": interval}},
        },
        "speed": {
            "protocol": {"batch": 1, "prompt": 512, "new_tokens": 32, "context": 512, "repeats": 9, "dtype": "float32"},
            **dict.fromkeys(("model", "against"), timings),
            "ratios": dict.fromkeys(("prefill", "decode"), ratio),
        },
        "samples": {"prompts": prompts, "chat": True, "new_tokens": 48, "model": prompts[::-1], "against": prompts},
        "hardware": {"device": "CPU", "threads": 1},
        "versions": {"torch": "2"},
    }


def test_the_whole_report_has_a_table_for_each_protocol() -> None:
    size = {"parameters": 10, "block_parameters": 5, "macs_per_token": 9, "kv_bytes_per_token": 0}
    report = {
        "command": "python -m prunelit evaluate",
        "model": {"source": "m", "adapter": "lora"} | size,
        "perplexity": {"a": text(12, 3.0), "b": text(16, 3.0), "c": text(12, 2.0)},
        "hardware": {"device": "CPU", "threads": 1},
        "versions": {"torch": "2"},
    }
    said = render_evaluation_markdown(report)
    assert "# Evaluation of `m` with adapter `lora`" in said
    assert said.index("|  | a | c |") < said.index("Windows of 16 tokens") < said.index("|  | b |")
