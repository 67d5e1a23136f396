"""Settings of a model and of its tokenizer come out of a job as they went in, but for what the cut itself changes."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.test_fit import call
from tests.cli.test_fit import words as words  # a fixture
from tests.tiny import tiny, tiny_tokenizer

SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1, "eos_token_id": [1, 2]}
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
OF_THE_CUT = {"architectures", "auto_map", "model_type", "per_layer_config", "num_attention_heads"}
OF_THE_CUT |= {"num_key_value_heads", "intermediate_size", "n_inner", "n_head", "head_dim"}  # the last one for vLLM
OF_THE_RESULT = {"README.md", "modeling_pruned.py", "plan.json", "proof.json"}
OF_THE_JOB = {"record.json", "report.html", "report.json"}


def save_chat_model(family: str, folder: Path) -> Path:
    """Save a chat model with sampling settings that are not the defaults, and with a setting of its own."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tiny(family, vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(SAMPLING))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"its_own": {"a": 1}}))
    return folder


def read_settings(folder: Path) -> dict[str, Any]:
    """Read all files of a folder but its weights; of configs, all but what the cut and the version explain."""
    files: dict[str, Any] = {}
    for path in folder.iterdir():
        if path.name.startswith("model") or path.name in OF_THE_RESULT | OF_THE_JOB:
            continue
        files[path.name] = path.read_text()
        if path.suffix == ".json":
            explained = OF_THE_CUT | {"transformers_version"} if "config" in path.name else set()
            files[path.name] = {name: x for name, x in json.loads(files[path.name]).items() if name not in explained}
    return files


def test_prune_keeps_the_settings(capsys: pytest.CaptureFixture[str], words: str, tmp_path: Path) -> None:
    source = save_chat_model("gpt2", tmp_path / "source")
    out, text = tmp_path / "out", ["--text", words, "--windows", "8", "--seqlen", "16"]
    cut = ["prune", "--model", str(source), "--ratio", "0.3", "--align", "8", "--out", str(out)]
    code, _, err = call(capsys, *cut, *text)
    assert code == 0, err
    assert read_settings(out) == read_settings(source)


@pytest.mark.parametrize("rank", [0, 4])
def test_fit_keeps_the_settings(capsys: pytest.CaptureFixture[str], words: str, tmp_path: Path, rank: int) -> None:
    source = save_chat_model("llama", tmp_path / "source")
    sizes = {"seqlen": 16, "calibration_windows": 4, "batch_size": 2, "validation_windows": 4}
    trainer = {"accelerator": "cpu", "logger": "false", "max_steps": 1, "enable_checkpointing": "false"}
    cut = ["--trainer.callbacks", "prunelit.callbacks.LLMBIP", "--trainer.callbacks.ratio", "0.3"]
    code, _, err = call(
        *(capsys, "fit", "--model", str(source), "--data.train", words),
        *(f"--data.{name}={value}" for name, value in sizes.items()),
        *(f"--trainer.{name}={value}" for name, value in trainer.items()),
        *(*cut, "--trainer.callbacks.align", "8", f"--model.lora_rank={rank}"),
        *("--model.gradient_checkpointing=true", "--report.prompts=[w1 w2]"),
        f"--trainer.default_root_dir={tmp_path}",
    )
    assert code == 0, err
    for name in ("model", "base") if rank else ("model",):
        assert read_settings(tmp_path / name) == read_settings(source)
