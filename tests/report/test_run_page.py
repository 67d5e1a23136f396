"""Every command leaves a page; that of `fit` is there while it runs, and goes on when the run does."""

import json
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from prunelit.callbacks import LLMBIP
from prunelit.cli.main import main
from prunelit.monitoring.run_report import RunReport
from prunelit.recovery.datamodule import TextDataModule
from prunelit.recovery.module import RecoveryModule
from prunelit.report.record import Record
from prunelit.runtime.errors import BadOption, DoesNotFit
from tests.report.test_page import Read, foreign


def page(folder: Path) -> str:
    found = (folder / "report.html").read_text(encoding="utf-8")
    assert foreign(found) == []
    return Read(found).text


def fit(source: str, folder: Path, steps: int, resume: Path | None = None, **options: Any) -> Record:
    seed_everything(7)
    data = TextDataModule(source, seqlen=16, batch_size=2, calibration_windows=8, validation_windows=4, train_windows=9)
    report = RunReport(**options)
    Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_steps=steps,
        log_every_n_steps=1,
        callbacks=[report, LLMBIP(0.3, align=8), ModelCheckpoint(folder / "checkpoints", every_n_train_steps=2)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    ).fit(RecoveryModule(source, lora_rank=4), datamodule=data, ckpt_path=resume)
    return report.record


def test_fit(source: str, tmp_path: Path) -> None:
    record = fit(source, tmp_path, 3)
    assert Record.from_json((tmp_path / "record.json").read_text()) == Record.from_json(record.to_json())
    assert [entry["step"] for entry in record.training] == [1, 2, 3]
    assert list(record.measured) == ["dense", "pruned", "recovered"] and record.scores["channels"]
    assert all({"prompt", "dense", "pruned", "recovered"} == set(row) for row in record.completions)
    text = page(tmp_path)
    assert "recovered in 3 steps" in text and "The capital of France is" in text
    assert "Size on the disk" in text and "Times as fast" in text and "What next" not in text
    report = json.loads((tmp_path / "report.json").read_text())
    weights = sum(path.stat().st_size for path in (tmp_path / "model").glob("*.safetensors"))
    assert report["disk_bytes"]["recovered"] == weights < report["disk_bytes"]["dense"]
    assert f"{report['dense']['parameters'] - report['dense']['block_parameters']:,}" in text
    assert "parameters outside of them" in text and "tower" not in text and report["tower_parameters"] == 0
    assert f"{report['dense']['parameters']:,}" in text and str(tmp_path / "model") in text

    # The same again from step 2: one curve, nothing twice; up to there that of the checkpoint, whatever the file says.
    edited = json.loads((tmp_path / "record.json").read_text())
    edited["training"][0]["train_loss"] = 123.0
    edited["training"][2]["train_loss"] = 456.0
    (tmp_path / "record.json").write_text(json.dumps(edited))
    again = fit(source, tmp_path, 4, next((tmp_path / "checkpoints").glob("*step=2.ckpt")))
    assert [entry["step"] for entry in again.training] == [1, 2, 3, 4]
    assert again.training[:2] == record.training[:2] and again.training[2]["train_loss"] != 456.0
    assert again.scores == record.scores and len(again.completions) == len(record.completions)
    assert again.measured["dense"] == record.measured["dense"]


def test_a_killed_run_has_a_page(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any) -> None:
        raise SystemExit(9)

    monkeypatch.setattr(RecoveryModule, "training_step", killed)
    (tmp_path / "config.yaml").write_text("seed_everything: 7\n")  # which the command line writes
    with pytest.raises(SystemExit):
        fit(source, tmp_path, 3, prompts=[])
    text = page(tmp_path)
    assert "it was stopped" in text and f"fit --config {tmp_path}/config.yaml --ckpt_path last" in text
    assert "not finished" in text and "pruned" in text and "What it writes" not in text


def test_a_refused_run_says_what_to_do(source: str, tmp_path: Path) -> None:
    with pytest.raises(DoesNotFit) as refusal:
        fit(source, tmp_path, 3, prompts=[], format="gguf")
    assert str(refusal.value) in page(tmp_path)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(BadOption, match="prompts"):
        RunReport(prompts=[" "])


def test_prune(source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "cut"
    given = ["--ratio", "0.3", "--align", "8", "--windows", "4", "--seqlen", "16"]
    assert main(["prune", "--model", source, "--method", "flap", "--out", str(out), *given]) == 0, capsys.readouterr()
    text = page(out)
    record = Record.from_json((out / "record.json").read_text())
    assert [stage["name"] for stage in record.stages] == ["text", "load_model", "score_and_plan", "cut", "save"]
    assert record.plan is not None and record.plan.digest in text
    assert "method: flap" in record.facts["config"] and 'from_pretrained("' in text


def test_evaluate(source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = "<b>one</b> & two"
    given = ["--prompts", prompt, "--sample_tokens", "4", "--against", source]
    assert main(["evaluate", "--model", source, "--out", str(tmp_path / "e"), *given]) == 0, capsys.readouterr()
    text = page(tmp_path / "e")
    assert prompt in text and "against" in text
