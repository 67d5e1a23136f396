"""What vLLM says of a folder: compared, written into proof.json, or refused in one line; once with the real engine."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from prunelit.calibration import metrics
from prunelit.cli import export
from prunelit.export import write_model
from prunelit.export.proof import served, vllm_script
from prunelit.model import surgery
from prunelit.recovery.adapter_files import write_adapter
from prunelit.recovery.lora import add_lora
from prunelit.runtime.errors import BadOption, DoesNotFit, NotProved
from tests.cli.test_fit import call
from tests.export.alike import uniform
from tests.tiny import cut, tiny, tiny_tokenizer

REAL_PYTHON = os.environ.get("PRUNELIT_VLLM_PYTHON", "")


class Step(SimpleNamespace):
    """Anything that vLLM answers with."""


class FakeLLM:
    """Stands for vLLM's engine: answers with what transformers computes, moved by `shift`, or refuses."""

    shift = 0.0
    refuses: tuple[str, ...] = ()

    def __init__(self, folder: str, model_impl: str, trust_remote_code: bool, **options: Any):
        if model_impl in self.refuses:
            try:
                raise ValueError(f"no {model_impl}")
            except ValueError as error:
                raise RuntimeError("engine core failed") from error
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=trust_remote_code
        )

    @torch.no_grad()
    def generate(self, prompts: list[dict[str, list[int]]], sampling: Step, use_tqdm: bool) -> list[Step]:
        assert not use_tqdm  # vLLM fails with TQDM_DISABLE, which -q sets
        answers = []
        for prompt in prompts:
            tokens, steps = list(prompt["prompt_token_ids"]), []
            for _ in range(sampling.max_tokens):
                logprobs = self.model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
                tokens.append(int(logprobs.argmax()))
                steps.append({tokens[-1]: Step(logprob=float(logprobs[tokens[-1]]) + self.shift)})
            answers.append(Step(outputs=[Step(token_ids=tokens[-len(steps) :], logprobs=steps)]))
        return answers


@pytest.fixture
def fake_vllm(monkeypatch: pytest.MonkeyPatch) -> type[FakeLLM]:
    """The script runs in this process, where vLLM is a stand-in; the check that there is one is passed by."""

    def run_here(script: str, question: dict[str, Any], *more: str, python: str) -> bytes:
        return json.dumps(vllm_script.answer_question(json.loads(json.dumps(question)))).encode()

    fake = type("LLM", (FakeLLM,), {})
    module = Step(__version__="0.0-fake", LLM=fake, SamplingParams=Step)
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setitem(sys.modules, "vllm.distributed", Step(cleanup_dist_env_and_memory=lambda: None))
    monkeypatch.setattr(served, "new_process", Step(run_proof_script=run_here))
    monkeypatch.setattr(served, "check_vllm_python", lambda python: None)
    return fake


def test_the_verdict_is_in_the_proof(
    fake_vllm: type[FakeLLM], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny("llama")
    surgery.apply(model, uniform(model, groups=2))
    write_model(model, tmp_path / "cut", tiny_tokenizer())
    fake_vllm.refuses = ("auto",)
    options = ["--model", str(tmp_path / "cut"), "--out", str(tmp_path / "m"), "--prove", "vllm"]
    code, said, err = call(capsys, "export", *options)
    assert code == 0, err
    assert "vLLM 0.0-fake" in said and "runs it with --model-impl transformers" in said
    verdict = json.loads((tmp_path / "m" / "proof.json").read_text())["vllm"]
    assert verdict["passed"] and verdict["tokens"] == 16 and verdict["largest_logprob_difference"] < 1e-5
    assert verdict["refused"] == {"auto": "ValueError: no auto"}  # the error that began it
    card = (tmp_path / "m" / "README.md").read_text()
    assert "vllm serve PATH --model-impl transformers" in card and "- vLLM 0.0-fake" in card


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"shift": 0.01}, r"the same text, log-probabilities differ by 1\.00e-02, expected at most 1e-03"),
        ({"refuses": ("auto",)}, r"vLLM 0\.0-fake does not run it \(auto: ValueError: no auto\)"),
    ],
)
def test_a_folder_that_vllm_does_not_run_is_not_kept(
    fake_vllm: type[FakeLLM], settings: dict[str, Any], why: str, tmp_path: Path
) -> None:
    for name, value in settings.items():
        setattr(fake_vllm, name, value)
    model = tiny("llama")
    surgery.apply(model, cut(model, "mixed"))
    with pytest.raises(NotProved, match=why):
        write_model(model, tmp_path / "m", format="hetero", vllm_python="")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("format", "python", "error", "why"),
    [
        ("auto", sys.executable, BadOption, "expected the Python of an environment with vLLM, got one without"),
        ("auto", "/nowhere/python", BadOption, "got no such program"),
        ("gguf", sys.executable, DoesNotFit, "prove 'vllm': expected format uniform, hetero, padded or deci"),
    ],
)
def test_one_line_before_a_model_is_loaded(
    source: str, format: str, python: str, error: type[Exception], why: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=why):
        export.export_model(source, str(tmp_path / "m"), format, prove="vllm", vllm_python=python)
    with pytest.raises(BadOption, match="expected --prove vllm beside it"):
        export.export_model(source, str(tmp_path / "m"), vllm_python=python)


def test_a_tie_ends_the_comparison_of_a_text() -> None:
    expected = {"tokens": [[4, 5, 6]], "logprobs": [[-0.1, -0.7, -0.2]], "leads": [[0.5, 0.0005, 0.4]]}
    answer = {"tokens": [[4, 9, 9]], "logprobs": [[-0.1, -0.7003, -3.0]]}
    verdict = served.compare_served_answers(expected, answer)
    assert verdict["passed"] and (verdict["ties"], verdict["tokens"]) == (1, 1)
    apart = served.compare_served_answers(expected | {"leads": [[0.5, 0.01, 0.4]]}, answer)
    assert not apart["passed"] and not apart["same_text"]
    lost = served.compare_served_answers(expected, {"tokens": [[4, 5, 6]], "logprobs": [[-0.1, float("nan"), -0.2]]})
    assert not lost["passed"]


def answer_with_adapters(model: Any, prompts: torch.Tensor, folder: Path) -> dict[str, Any]:
    """Put random adapters of two ranks onto a model, save them, and answer with them."""
    adapted = add_lora(model, 4, 8, 0.0, {"ffn": 6}).eval()
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    folder.mkdir()
    write_adapter(adapted, folder, "")
    return served.compute_greedy_answers(adapted, prompts, 8)


@pytest.mark.slow
@pytest.mark.skipif(not REAL_PYTHON, reason="PRUNELIT_VLLM_PYTHON names no Python with vLLM")
def test_the_real_engine(tmp_path: Path) -> None:
    """One process of vLLM runs them all: it takes half a minute to start."""
    cases = [
        ("uniform", None, "qwen3"),
        ("uniform", "uniform", "qwen2"),
        ("uniform", "groups", "llama"),
        ("hetero", "channel", "qwen3"),
        ("hetero", "mixed", "llama"),
        ("deci", "mixed", "qwen2"),
        ("uniform", "adapters", "llama"),
        ("hetero", "adapters", "qwen3"),
    ]
    written, folders, sizes, adapters = [], [], [], {}
    for index, (format, kind, family) in enumerate(cases):
        model = tiny(
            family, hidden_size=288, head_dim=32
        )  # heads of 32 dimensions, the fewest that vLLM's kernels take
        plans = {"uniform": lambda m: uniform(m, heads_in_group=1), "groups": lambda m: uniform(m, groups=1)}
        plans["adapters"] = (lambda m: uniform(m, groups=1)) if format == "uniform" else (lambda m: cut(m, "mixed"))
        if kind:
            surgery.apply(model, plans[kind](model) if kind in plans else cut(model, kind))
        prompts = metrics.make_fixed_tokens(model)
        sizes.append(metrics.measure_model_size(model))
        if kind == "adapters":
            write_model(model, tmp_path / str(index), format=format)
            folders.append((tmp_path / str(index), format))
            adapters[index] = tmp_path / f"{index}-adapter"
            written.append(answer_with_adapters(model, prompts, adapters[index]))
            continue
        written.append(served.compute_greedy_answers(model, prompts, 8))
        if index == 0:  # a token that ends a text is one that may be written
            model.generation_config.eos_token_id = written[0]["tokens"][0][0]
        write_model(model, tmp_path / str(index), format=format)
        folders.append((tmp_path / str(index), format))
    items = served.list_serve_folders(folders)
    for index, folder in adapters.items():
        items[index]["adapter"] = {"folder": str(folder), "rank": served.round_up_lora_rank(6)}
    question = {"folders": items, "prompts": prompts.tolist(), "new_tokens": 8}
    reply = served.ask_vllm(REAL_PYTHON, question, tmp_path)
    for case, expected, answer in zip(cases, written, reply["answers"], strict=True):
        assert "error" not in answer, (case, answer)
        verdict = served.compare_served_answers(expected, answer)
        assert verdict["passed"], (case, verdict)
    # Where an attention is gone, vLLM reserves no KV cache.
    assert reply["answers"][4]["kv_bytes_per_token"] == sizes[4]["kv_bytes_per_token"]
