"""The proof: what is equal passes, what is not leaves nothing, in this process and in a new one."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from prunelit.calibration import metrics
from prunelit.export import formats, hetero, model_files, padded, save, uniform, write_model
from prunelit.export.proof import compare, reload
from prunelit.model import surgery
from prunelit.runtime.errors import NotProved
from tests.export.alike import uniform as cut_alike
from tests.tiny import FAMILIES, SLIDING, cut, tiny, tokens

CUTS = {"uniform": cut_alike, "hetero": lambda m: cut(m, "mixed"), "padded": lambda m: cut(m, "mixed")}


def cut_for(format: str) -> Any:
    model = tiny("llama")
    surgery.apply(model, CUTS[format](model))
    return model


def damaged(monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None]) -> None:
    """What is written comes out otherwise."""

    def write(shell: Any, job: formats.ExportJob, weights: Any = None) -> None:
        model_files.write_model_as(shell, job, weights)
        damage(job.path)

    for module in (uniform, hetero, padded):
        monkeypatch.setattr(module, "write_model_as", write)


def another_head(place: Path) -> None:
    weights = load_file(place / "model.safetensors")
    weights["lm_head.weight"][:, 0] += 1.0
    save_file(weights, place / "model.safetensors", {"format": "pt"})


def one_fewer(place: Path) -> None:
    weights = load_file(place / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, place / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("fresh", [False, pytest.param(True, marks=[pytest.mark.new_process, pytest.mark.slow])])
@pytest.mark.parametrize("format", CUTS)
def test_the_verdict_stands_beside_the_weights(format: str, fresh: bool, tmp_path: Path) -> None:
    written = write_model(cut_for(format), tmp_path / "m", format=format, fresh_process=fresh)
    verdict = json.loads((tmp_path / "m" / "proof.json").read_text())
    assert verdict == written.proof
    assert (verdict["format"], verdict["passed"], verdict["tokens"]) == (format, True, 64)
    assert verdict["largest_difference"] <= (2e-6 if format == "padded" else 0) < verdict["limit"]
    assert verdict["versions"].keys() >= {"python", "torch", "transformers", "prunelit"}
    if fresh:
        assert f"trust_remote_code={format == 'hetero'}) in a new process" in verdict["loader"]
        assert verdict["same_text_without_cache"] and verdict["cache_difference"] <= 1e-5
        assert [len(text) for text in verdict["generated"]] == [8, 8]


@pytest.mark.parametrize("family", [f if f in SLIDING else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES])
def test_every_family_is_proved(family: str, tmp_path: Path) -> None:
    """As commands do, generation included; its padded models are in test_padded.py."""
    model = tiny(family)
    plan = cut(model, "mixed")
    surgery.apply(model, plan)
    proof = write_model(model, tmp_path / "m", fresh_process=True).proof
    # Layers of one block each are gone with their block, and what remains is a stock class.
    assert plan.is_uniform == (family == "nemotron_h")
    assert proof["format"] == ("uniform" if plan.is_uniform else "hetero") and proof["largest_difference"] == 0
    assert proof["same_text_without_cache"] and proof["cache_difference"] <= 1e-5


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("format", CUTS)
def test_other_weights_leave_nothing(format: str, fresh: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged(monkeypatch, another_head)
    with pytest.raises(NotProved, match=r"largest logit difference .*; nothing was kept"):
        save(cut_for(format), tmp_path / "m", format=format, fresh_process=fresh)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.new_process
@pytest.mark.parametrize("format", ["uniform", "hetero"])
def test_missing_weights_are_not_made_up(format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged(monkeypatch, one_fewer)
    with pytest.raises(NotProved, match=r"cannot be loaded again: .*1 parameters \(model.norm.weight"):
        save(cut_for(format), tmp_path / "m", format=format, fresh_process=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.new_process
def test_a_process_without_memory_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "killed.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    monkeypatch.setattr(reload, "__file__", str(tmp_path / "killed.py"))
    with pytest.raises(NotProved, match=r"ended by signal 9 \(out of memory\?\); nothing was kept"):
        save(tiny("llama"), tmp_path / "m", fresh_process=True)


@pytest.mark.slow
@pytest.mark.new_process
def test_a_folder_that_needs_prunelit_does_not_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is installed here, and loads; where the folder is going to, it may not be."""
    add = hetero.add_modelling_file

    def needy(model: Any, place: Path) -> None:
        add(model, place)
        with (place / "modeling_pruned.py").open("a") as file:
            file.write("\nimport prunelit\n")

    monkeypatch.setattr(hetero, "add_modelling_file", needy)
    with pytest.raises(NotProved, match=r"cannot be loaded again: .*prunelit"):
        save(cut_for("hetero"), tmp_path / "m", fresh_process=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("fresh", [False, True])
def test_a_model_that_was_cast_is_equal(dtype: torch.dtype, fresh: bool, tmp_path: Path) -> None:
    """`.to` also casts the rotary frequencies, which no file holds: they are compared in the precision of a file's."""
    model = tiny("llama").to(dtype)
    buffers = dict(model.named_buffers())
    written = write_model(model, tmp_path / "m", fresh_process=fresh)
    assert written.proof["largest_difference"] == 0
    assert written.proof["dtype"] == str(dtype).removeprefix("torch.")
    assert all(found is buffers[name] for name, found in model.named_buffers())


@pytest.mark.parametrize("fresh", [False, True])
def test_other_rotary_frequencies_are_no_rounding(fresh: bool, tmp_path: Path) -> None:
    model = tiny("llama").to(torch.bfloat16)
    model.model.rotary_emb.inv_freq *= 2.0
    with pytest.raises(NotProved, match="largest logit difference"):
        save(model, tmp_path / "m", fresh_process=fresh)


def test_a_wrong_cache_does_not_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(question: dict[str, Any]) -> dict[str, Any]:
        model = tiny("llama")
        model.model.layers[1].self_attn.layer_idx = 0  # two layers write to one place of the cache
        return reload.run_reloaded_model(model, torch.tensor(question["tokens"]), question["new_tokens"])

    monkeypatch.setattr(compare, "run_reload_script", answer)
    with pytest.raises(NotProved, match="generation with the KV cache differs"):
        save(tiny("llama"), tmp_path / "m", fresh_process=True)
    assert not list(tmp_path.iterdir())


def test_texts_are_compared_up_to_where_they_part() -> None:
    """After another token, logits are of another text: a tie that rounding breaks is no fault of the cache."""
    model = tiny("llama")
    generate = model.generate

    def tie(ids: Any, **options: Any) -> Any:
        made = generate(ids, **options)
        if not options["use_cache"]:
            made.sequences[:, -2] += 1  # the second-to-last token, and what follows from it
            made.logits[-1][:] += 5.0
        return made

    model.generate = tie
    found = reload.run_reloaded_model(model, tokens(), 4)
    assert found["cached"] != found["uncached"] and found["cache_difference"] < 1e-5


def test_short_models_are_asked_about_short_texts() -> None:
    model = tiny("gpt2", n_positions=16)
    assert metrics.make_fixed_tokens(model).shape == (2, 8)
    assert metrics.make_fixed_tokens(tiny("llama")).shape == (2, 32)


@pytest.mark.slow
@pytest.mark.parametrize("format", CUTS)
def test_long_generation_in_a_new_process(format: str, tmp_path: Path) -> None:
    """As a user without prunelit: plain transformers, and a text that outgrows the sliding window."""
    model = tiny("gemma2")
    surgery.apply(model, CUTS[format](model))
    save(model, tmp_path / "m", format=format)
    code = """
import sys
sys.modules["prunelit"] = None
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=sys.argv[2] == "hetero")
ids = torch.tensor(eval(sys.argv[3]))
texts = [model.generate(ids, max_new_tokens=30, do_sample=False, use_cache=use).tolist() for use in (True, False)]
assert texts[0] == texts[1]
sys.stdout.write(repr(texts[0]))
"""
    command = [sys.executable, "-P", "-c", code, str(tmp_path / "m"), format, repr(tokens().tolist())]
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == repr(model.generate(tokens(), max_new_tokens=30, do_sample=False).tolist())
