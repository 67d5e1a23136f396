"""Whole evaluations: what they leave, that a killed one goes on, and that bad input is said before loading."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from prunelit.data import loading
from prunelit.evaluation import memory, perplexities, run, samples, speed, zero_shot
from prunelit.evaluation.run import evaluate_model
from prunelit.evaluation.speed import Speed
from prunelit.runtime.errors import BadAdapter, BadOption, NonFinite, PrunelitError
from tests.evaluation.rows import rows, write
from tests.tiny import tiny, tiny_tokenizer


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    for name in ("a", "b"):
        (tmp_path / "data" / f"{name}.txt").write_text(" ".join(f"{name}{n * 7 % 101}" for n in range(300)))
    for task in ("piqa", "boolq"):
        write(tmp_path / "data" / "tasks", task, rows(task))
    return tmp_path / "data"


@pytest.fixture
def no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory measured in no process of its own, which takes seconds."""
    found = {"peak_bytes": 2**20, "of": "process", "loading_counts": False}
    monkeypatch.setattr(memory, "measure_peak_memory", lambda subject, wanted: found)


def everything(data: Path, **more: Any) -> dict[str, Any]:
    texts = {
        "a": {"text": "owner/a", "file": "a.txt", "seqlen": 32, "windows": 4},
        "b": {"text": "b.txt", "seqlen": 32},
        "b, strided": {"text": "b.txt", "seqlen": 32, "stride": 8, "windows": 6},
    }
    return {
        "texts": texts,
        "data": str(data),
        "tasks": ["piqa", "boolq"],
        "tasks_folder": str(data / "tasks"),
        "limit": 5,
        "speed": Speed(prompt=8, new_tokens=2, repeats=2),
        "prompts": ["once upon"],
        "sample_tokens": 4,
    } | more


@pytest.mark.usefixtures("no_process")
def test_everything_against_the_dense_model(dense: str, smaller: str, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = evaluate_model(smaller, dense, out=str(out), **everything(data))
    assert json.loads((out / "evaluate.json").read_text()) == json.loads(json.dumps(report))
    assert report["model"]["parameters"] < report["against"]["parameters"]
    texts = report["perplexity"]
    assert texts["a"]["protocol"]["text"] == ["a.txt"]
    assert texts["a"]["model"]["tokens"] == 4 * 31
    assert texts["b, strided"]["against"]["tokens"] == 31 + 5 * 8
    assert texts["a"]["log_ratio"] == texts["a"]["model"]["nll"] - texts["a"]["against"]["nll"]
    found = report["zero_shot"]
    assert {name: task["model"]["items"] for name, task in found["tasks"].items()} == {"piqa": 5, "boolq": 5}
    assert found["averages"]["acc"]["difference"]["difference"] == pytest.approx(
        found["averages"]["acc"]["model"] - found["averages"]["acc"]["against"]
    )
    assert found["protocol"]["limit"] == 5
    assert report["speed"]["ratios"]["decode"]["promised"] > 1
    assert len(report["samples"]["model"]) == len(report["samples"]["against"]) == 1
    said = (out / "evaluate.md").read_text()
    assert said.count("Windows of 32 tokens, without overlap") == 1
    assert said.count("a new one every 8, only new tokens count") == 1
    for part in ("| piqa | 5 | acc_norm |", "## Speed", "promised", "once upon", "95% interval", "peak memory"):
        assert part in said, part


def test_a_model_alone(dense: str, data: Path) -> None:
    report = evaluate_model(dense, **everything(data, speed=False))
    assert "against" not in report["perplexity"]["a"]
    assert "difference" not in report["zero_shot"]["averages"]["acc"]
    said = run.render_evaluation_markdown(report)
    assert "against" not in said
    assert "| average |  | acc |" in said


def test_an_evaluation_that_was_killed_goes_on(
    dense: str, smaller: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def counted(module: Any, name: str, stop_at: int | None = None) -> None:
        real = getattr(module, name)

        def call(*given: Any) -> Any:
            if stop_at is not None and len(calls) == stop_at:
                raise KeyboardInterrupt
            calls.append(name)
            return real(*given)

        monkeypatch.setattr(module, name, call)

    options = everything(data, out=str(tmp_path / "out"))
    peak = {"peak_bytes": 1, "of": "process", "loading_counts": False}
    with monkeypatch.context() as patch:
        patch.setattr(memory, "measure_peak_memory", lambda subject, wanted: peak)
        straight = evaluate_model(smaller, dense, **everything(data))
        monkeypatch.setattr(memory, "measure_peak_memory", lambda subject, wanted: peak)
        parts = (
            (perplexities, "measure_text_perplexity"),
            (zero_shot.ZeroShotEvaluator, "run_task"),
            (samples, "generate_completions"),
            (speed, "measure_speed"),
        )
        for stop in (1, 4, 7, 12):  # after so many parts in all
            for module, name in parts:
                counted(module, name, stop)
            with pytest.raises(KeyboardInterrupt):
                evaluate_model(smaller, dense, **options)
            assert len(calls) == stop
            patch.undo()
            monkeypatch.undo()
            monkeypatch.setattr(memory, "measure_peak_memory", lambda subject, wanted: peak)
        for module, name in parts:
            counted(module, name)
        resumed = evaluate_model(smaller, dense, **options)
        assert calls == calls[:12] + ["measure_speed"]  # 3 texts, 2 tasks, samples, for two models, then speed
        evaluate_model(smaller, dense, **options)
        assert len(calls) == 13
    for part in ("model", "against", "perplexity", "zero_shot", "samples"):
        assert resumed[part] == straight[part]


def test_another_protocol_or_file_is_measured_anew(dense: str, data: Path, tmp_path: Path) -> None:
    def kept() -> set[str]:
        return {path.name for path in (tmp_path / "out" / "kept").iterdir()}

    common = {"data": str(data), "tasks": "piqa", "tasks_folder": str(data / "tasks"), "out": str(tmp_path / "out")}
    evaluate_model(dense, texts={"a": {"text": "a.txt", "seqlen": 32, "windows": 2}}, **common)
    before = kept()
    assert len(before) == 2
    evaluate_model(dense, texts={"a": {"text": "a.txt", "seqlen": 16, "windows": 4}}, **common)
    assert len(kept()) == 3
    content = rows("piqa")
    content[0]["goal"] = "to be seen"
    write(data / "tasks", "piqa", content)
    evaluate_model(dense, texts={"a": {"text": "a.txt", "seqlen": 16, "windows": 4}}, **common)
    assert len(kept()) == 4


def test_an_adapter_is_merged(dense: str, data: Path, tmp_path: Path) -> None:
    from prunelit.recovery import lora

    adapted = lora.add_lora(loading.load(dense), 2, 4, 0.0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    tiny_tokenizer().save_pretrained(tmp_path / "merged")
    options = {"texts": {"a": {"text": "a.txt", "seqlen": 32}}, "data": str(data)}
    found, merged, plain = (
        evaluate_model(source, adapter=adapter, **options)["perplexity"]["a"]["model"]["nll"]
        for source, adapter in ((dense, str(tmp_path / "adapter")), (str(tmp_path / "merged"), None), (dense, None))
    )
    assert found == pytest.approx(merged, abs=1e-6)
    assert abs(found - plain) > 1e-3


def test_an_adapter_of_another_model_is_refused(dense: str, smaller: str, data: Path, tmp_path: Path) -> None:
    from prunelit.recovery import lora

    lora.add_lora(loading.load(dense), 2, 4, 0.0).save_pretrained(tmp_path / "adapter")
    options = {"texts": {"a": {"text": "a.txt", "seqlen": 32}}, "data": str(data)}
    with pytest.raises(BadAdapter, match="it was made for another cut") as error:
        evaluate_model(smaller, adapter=str(tmp_path / "adapter"), **options)
    assert "\n" not in str(error.value)
    with pytest.raises(BadAdapter, match=r"adapter_config\.json"):
        evaluate_model(dense, adapter=str(tmp_path), **options)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"tasks": ["piqqa"]}, "did you mean 'piqa'"),
        ({"tasks": ["hellaswag"]}, "expected hellaswag.jsonl"),
        ({"limit": 0}, "limit: expected at least 1, got 0; null takes all"),
        ({"batch_size": 0}, "batch_size: expected at least 1"),
        ({"tasks_folder": "nowhere"}, "tasks_folder 'nowhere'"),
        ({"texts": {"a": {"text": "gone.txt"}}}, "texts.a: text .*gone.txt': no such file"),
        ({"texts": {"a": {"text": "a.txt", "strid": 4}}}, "did you mean 'stride'"),
        ({"texts": {"a": {"text": "a.txt", "seqlen": 8, "stride": 9}}}, "stride: expected 1 to 8"),
        ({"prompts": [" "]}, "prompts"),
        ({"chat": True}, "chat template"),
        ({"device": "cuda:7"}, "device"),
        ({"against": "nowhere/at/all"}, "no such folder"),
        ({"tasks": None, "texts": None, "speed": False, "prompts": None}, "expected something to measure"),
    ],
)
def test_bad_input_is_said_before_a_model_is_loaded(
    wrong: dict[str, Any], said: str, dense: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "load", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(PrunelitError, match=said) as error:
        evaluate_model(dense, out=str(tmp_path / "out"), **everything(data, **wrong))
    assert "\n" not in str(error.value)


def test_more_tokens_than_positions_is_said_before_anything_is_measured(
    dense: str, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(perplexities, "measure_text_perplexity", lambda *_: pytest.fail("something was measured"))
    with pytest.raises(BadOption, match="at most 512 tokens, the model's positions, got 514"):
        evaluate_model(dense, **everything(data, speed=Speed(prompt=512, new_tokens=2)))


def test_weights_that_are_no_numbers(data: Path, tmp_path: Path) -> None:
    model = tiny("llama", vocab_size=len(tiny_tokenizer()))
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    tiny_tokenizer().save_pretrained(tmp_path / "nan")
    with pytest.raises(NonFinite, match=r"layers\.1\.mlp\.up_proj\.weight"):
        evaluate_model(str(tmp_path / "nan"), **everything(data))


def test_models_in_two_dtypes_do_not_compare(
    dense: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for dtype, folder in (("bfloat16", "half"), ("float16", "narrow")):
        loading.load(dense, dtype).save_pretrained(tmp_path / folder)
        tiny_tokenizer().save_pretrained(tmp_path / folder)
    texts = {"texts": {"a": {"text": "a.txt", "seqlen": 32}}, "data": str(data)}
    assert evaluate_model(str(tmp_path / "narrow"), dense, device="cpu", **texts)["perplexity"]["a"]["against"]
    monkeypatch.setattr(loading, "load", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(BadOption, match="one dtype, got bfloat16 and float32; pass --dtype"):
        evaluate_model(str(tmp_path / "half"), dense, **everything(data, speed=False))
