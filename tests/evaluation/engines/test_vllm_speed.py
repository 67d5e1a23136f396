"""Speed in vLLM: what its engine is asked, what is reported, and one line where it does not run; once for real."""

import json
import os
import sys
from pathlib import Path

import pytest

from prunelit import export
from prunelit.data import loading
from prunelit.evaluation import memory
from prunelit.evaluation.engines import vllm_speed
from prunelit.evaluation.markdown import render_evaluation_markdown
from prunelit.evaluation.run import evaluate_model
from prunelit.evaluation.speed import Speed
from prunelit.quantization import quantize
from prunelit.runtime.errors import BadOption, DoesNotFit
from tests.tiny import tiny, tiny_tokenizer

REAL_PYTHON = os.environ.get("PRUNELIT_VLLM_PYTHON", "")
FAKE = """
import json, os, sys, time
print("what an engine prints")
__version__ = "0.0-fake"
clock = [0.0]
time.perf_counter = lambda: clock[0]
class SamplingParams:
    def __init__(self, **options): self.options = options
class LLM:
    def __init__(self, folder, **options):
        with open(os.environ["FAKE_LOG"], "a") as log:
            log.write(json.dumps({"folder": folder, **options}) + "\\n")
        if os.environ.get("FAKE_ERROR"):
            try:
                raise ValueError(os.environ["FAKE_ERROR"])
            except ValueError as error:
                raise RuntimeError("engine core failed") from error
        layers = json.load(open(os.path.join(folder, "config.json"))).get("per_layer_config")
        self.seconds = 1 if layers else 2
    def generate(self, prompts, sampling, use_tqdm):
        assert sampling.options["ignore_eos"] and sampling.options["temperature"] == 0
        tokens = sum(len(prompt["prompt_token_ids"]) for prompt in prompts)
        clock[0] += self.seconds * (tokens + 8 * sampling.options["max_tokens"])
"""


@pytest.fixture
def python_with_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A Python whose vLLM is a stand-in: half as slow on layers that differ."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "vllm.py").write_text(FAKE)
    program = tmp_path / "python"
    program.write_text(f'#!/bin/sh\nPYTHONPATH="{tmp_path / "site"}" exec "{sys.executable}" "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "log"))
    peak = {"peak_bytes": 2**20, "of": "process", "loading_counts": False}
    monkeypatch.setattr(memory, "measure_peak_memory", lambda subject, wanted: peak)
    return str(program)


def test_both_models_are_timed_in_turn_beside_what_counts_promise(
    dense: str, smaller: str, python_with_vllm: str, tmp_path: Path
) -> None:
    speed = Speed(prompt=16, new_tokens=4, context=8, repeats=2, batch=2)
    report = evaluate_model(smaller, dense, speed=speed, vllm_python=python_with_vllm, out=str(tmp_path / "out"))
    served = report["speed"]["vllm"]
    assert served["versions"]["vllm"] == "0.0-fake"
    for role, seconds in (("model", 1), ("against", 2)):
        assert served[role]["prefill_seconds"] == [seconds * (2 * 16 + 8)] * 2
        assert served[role]["decode_seconds"] == [seconds * 8 * 4] * 2
    for kind in ("prefill", "decode"):
        assert served["ratios"][kind]["promised"] == report["speed"]["ratios"][kind]["promised"]
        assert served["ratios"][kind]["median"] == 2
    asked = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [item["folder"] for item in asked] == [smaller, dense]
    assert [item["trust_remote_code"] for item in asked] == [True, False]
    assert all(item["max_model_len"] == 16 and item["gpu_memory_utilization"] == 0.45 for item in asked)
    page = render_evaluation_markdown(report)
    assert "In vLLM 0.0-fake" in page and "- vLLM, decode: " in page and page.count("| prefill, tokens/s |") == 2
    assert "Decode in vLLM, times as fast" in (tmp_path / "out" / "report.html").read_text()
    assert str(tmp_path) not in json.dumps(report["speed"])


def test_a_model_that_is_no_folder_is_saved_for_it(
    dense: str, python_with_vllm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_speed, "_is_model_folder", lambda source: False)  # as of a hub id
    speed = Speed(prompt=4, new_tokens=2, repeats=1)
    report = evaluate_model(dense, speed=speed, vllm_python=python_with_vllm)
    assert "ratios" not in report["speed"]["vllm"] and report["speed"]["vllm"]["model"]["decode_seconds"]
    asked = json.loads((tmp_path / "log").read_text())
    assert asked["folder"] != dense and not Path(asked["folder"]).exists()


def test_what_it_does_not_run_is_one_line(dense: str, python_with_vllm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_ERROR", "head_dim 7 is not supported")
    with pytest.raises(
        DoesNotFit, match=r"vLLM does not run the model: ValueError: head_dim 7 is not supported; leave"
    ):
        evaluate_model(dense, speed=Speed(prompt=4, new_tokens=2, repeats=1), vllm_python=python_with_vllm)


def test_what_cannot_be_timed_is_said_before_a_model_is_loaded(
    dense: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounded = tiny("llama")
    quantize.quantize_model(rounded, "int4", 16)
    export.save(rounded, tmp_path / "int4", format="int4")
    monkeypatch.setattr(loading, "load", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(BadOption, match="expected --speed beside it, got none"):
        evaluate_model(dense, samples=True, vllm_python=sys.executable)
    with pytest.raises(BadOption, match=r"vllm_python: expected plain weights, got .*int4"):
        evaluate_model(str(tmp_path / "int4"), speed=True, vllm_python=sys.executable)
    with pytest.raises(BadOption, match="expected the Python of an environment with vLLM, got one without"):
        evaluate_model(dense, speed=True, vllm_python=sys.executable)


@pytest.mark.slow
@pytest.mark.skipif(not REAL_PYTHON, reason="PRUNELIT_VLLM_PYTHON names no Python with vLLM")
def test_the_real_engine(tmp_path: Path) -> None:
    model = tiny("llama", hidden_size=288, head_dim=32)  # heads of 32, the fewest that vLLM's kernels take
    model.save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    report = evaluate_model(
        str(tmp_path / "dense"), speed=Speed(prompt=16, new_tokens=4, repeats=2), vllm_python=REAL_PYTHON
    )
    assert report["speed"]["vllm"]["model"]["decode_tokens_per_second"] > 0
