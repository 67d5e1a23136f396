"""RecoveryModule: trains adapters on the cut model; a resumed run ends in the weights of an uninterrupted one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoModelForCausalLM

from prunelit.calibration import metrics
from prunelit.callbacks import LLMBIP, ShortGPT
from prunelit.core.plan import PruningPlan, get_applied_plans
from prunelit.core.saved_plans import CUT_MARK, list_saved_plans
from prunelit.data import loading
from prunelit.monitoring.run_report import RunReport
from prunelit.quantization import quantize
from prunelit.recovery.datamodule import TextDataModule
from prunelit.recovery.losses import compute_kl_divergence
from prunelit.recovery.module import RecoveryModule
from prunelit.runtime.errors import BadOption, BadPlan, DoesNotFit, SourceNotFound
from tests.tiny import tiny, tiny_tokenizer


def run(
    source: str, folder: Path, steps: int, resume: str | None = None, every: int = 3, align: int = 8, **options: Any
) -> Any:
    seed_everything(7)
    module = RecoveryModule(source, **({"lora_rank": 4, "lora_dropout": 0.2, "learning_rate": 1e-2} | options))
    data = TextDataModule(
        source, seqlen=16, batch_size=2, calibration_windows=8, validation_windows=4, train_windows=9, seed=1
    )
    pruner = LLMBIP(0.3, align=align)
    keep = ModelCheckpoint(folder / "ckpt", filename="{step}", every_n_train_steps=every, save_top_k=-1)
    # The schedule must not depend on where the run stops, so every run has the same max_steps and may stop early.
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_steps=8,
        limit_val_batches=1,
        val_check_interval=2,
        callbacks=[pruner, keep, *([_StopAfter(steps)] if steps < 8 else [])],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, datamodule=data, ckpt_path=resume)
    return module, trainer, pruner


class _StopAfter(ModelCheckpoint):
    """Stops the run as a kill would, after a number of steps (a checkpoint callback only to come last)."""

    def __init__(self, steps: int):
        super().__init__(save_top_k=0)
        self.steps = steps

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.steps


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"lora_rank": 0}], ids=["lora", "full"])
def test_resumed_from_the_middle_ends_in_the_same_weights(source: str, tmp_path: Path, options: Any) -> None:
    straight, *_ = run(source, tmp_path / "straight", 8, **options)
    run(source, tmp_path / "cut", 3, **options)
    resumed, trainer, _ = run(source, tmp_path / "cut", 8, str(tmp_path / "cut/ckpt/step=3.ckpt"), **options)
    assert trainer.global_step == 8
    expected, found = straight.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.slow
def test_the_first_checkpoint_differs_from_the_end(source: str, tmp_path: Path) -> None:
    """Guards the test above: steps after the checkpoint do change the weights."""
    early, *_ = run(source, tmp_path / "a", 3)
    late, *_ = run(source, tmp_path / "b", 8)
    assert any(not torch.equal(late.model.state_dict()[k], v) for k, v in early.model.state_dict().items())


def test_a_checkpoint_holds_plan_and_adapters_only(source: str, tmp_path: Path) -> None:
    module, _, pruner = run(source, tmp_path, 3)
    saved = torch.load(tmp_path / "ckpt/step=3.ckpt", weights_only=True)
    assert list_saved_plans({"state_dict": {CUT_MARK: saved["state_dict"].pop(CUT_MARK)}}) == [pruner.applied_plan]
    assert all(".lora_" in name for name in saved["state_dict"])
    state = next(value for name, value in saved["callbacks"].items() if "LLMBIP" in name)
    assert PruningPlan.from_json(state["plan"]) == pruner.applied_plan
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert set(saved["state_dict"]) == trained


@pytest.mark.slow
def test_a_checkpoint_of_another_rank_is_refused(source: str, tmp_path: Path) -> None:
    run(source, tmp_path, 3)
    with pytest.raises(BadPlan, match="another model, plan or lora_rank"):
        run(source, tmp_path, 8, str(tmp_path / "ckpt/step=3.ckpt"), lora_rank=2)


def test_training_lowers_the_loss_and_the_merged_model_keeps_it(source: str, tmp_path: Path) -> None:
    module, trainer, _ = run(source, tmp_path, 8, lora_dropout=0.0)
    windows = trainer.datamodule.train
    with module.model.disable_adapter():
        cut = metrics.perplexity(module.model, windows)["perplexity"]
    trained = metrics.perplexity(module.model, windows)["perplexity"]
    merged = metrics.perplexity(module.merge_model(), windows)["perplexity"]
    assert trained < cut
    assert merged == pytest.approx(trained, rel=1e-4)
    assert not any("lora" in name for name, _ in module.model.named_modules())


def test_validation_perplexity_is_that_of_measure(source: str, tmp_path: Path) -> None:
    module, trainer, _ = run(source, tmp_path, 8)
    data = trainer.datamodule
    evaluator = Trainer(default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_progress_bar=False)
    found = evaluator.validate(module, datamodule=data, verbose=False)[0]["val_perplexity"]
    assert found == pytest.approx(metrics.perplexity(module.model, data.validation)["perplexity"], rel=1e-3)


@pytest.mark.slow
def test_gradient_checkpointing_changes_no_weight(source: str, tmp_path: Path) -> None:
    plain, *_ = run(source, tmp_path / "plain", 4, lora_dropout=0.0)
    frugal, *_ = run(source, tmp_path / "frugal", 4, lora_dropout=0.0, gradient_checkpointing=True)
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(frugal.model.state_dict()[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"lora_rank": -1}, BadOption),
        ({"lora_dropout": 1.0}, BadOption),
        ({"warmup": 1.5}, BadOption),
        ({"learning_rate": -1.0}, BadOption),
        ({"loss": "mse"}, BadOption),
        ({"temperature": 0.0}, BadOption),
        ({"label_share": 1.0}, BadOption),
        ({"hidden_weight": -1.0}, BadOption),
        ({"base": "int8"}, BadOption),
        ({"base": "int4", "group_size": 20}, BadOption),
        ({"base": "nf4", "lora_rank": 0}, BadOption),
        ({"rank_rule": "odd"}, BadOption),
        ({"rank_rule": "by_cut", "ffn_lora_rank": 4}, BadOption),
        ({"ffn_lora_rank": 0}, BadOption),
        ({"ffn_learning_rate": -1.0}, BadOption),
        ({"optimizer": "sgd"}, BadOption),
        ({"model": "./nowhere"}, SourceNotFound),
    ],
)
def test_bad_options_before_the_model_is_loaded(
    source: str, options: dict[str, Any], error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "load", lambda *a: pytest.fail("the model was loaded"))
    with pytest.raises(error):
        RecoveryModule(**({"model": source} | options))


def test_the_report_of_a_whole_run(source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seed_everything(7)
    module = RecoveryModule(source, lora_rank=4, learning_rate=1e-2)
    data = TextDataModule(source, seqlen=16, batch_size=2, calibration_windows=8, validation_windows=4, train_windows=9)
    trainer = Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        max_steps=4,
        callbacks=[RunReport(), LLMBIP(0.3, align=8)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, datamodule=data)
    report = json.loads((tmp_path / "report.json").read_text())
    names = {"perplexity", "parameters", "block_parameters", "macs_per_token", "kv_bytes_per_token"}
    assert all(names <= set(report[row]) for row in ("dense", "pruned", "recovered"))
    assert {"protocol", "seconds", "peak_memory_mib", "versions", "seed"} <= set(report)
    assert report["recovered"]["perplexity"] < report["pruned"]["perplexity"]
    assert report["pruned"]["parameters"] == report["recovered"]["parameters"] < report["dense"]["parameters"]
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    again = metrics.perplexity(saved, data.validation)["perplexity"]
    assert again == pytest.approx(report["recovered"]["perplexity"], rel=1e-4)
    assert PruningPlan.load(tmp_path / "plan.json") == PruningPlan.load(tmp_path / "model" / "plan.json")
    assert "recovered" in capsys.readouterr().out


# Towards the dense model ---------------------------------------------------------------------------------------------


def test_distillation_comes_closer_to_the_dense_model(source: str, tmp_path: Path) -> None:
    module, trainer, _ = run(source, tmp_path, 8, lora_dropout=0.0, loss="distill", learning_rate=2e-3)
    windows, dense = trainer.datamodule.train, loading.load(source)

    def distance(model: Any) -> float:
        with torch.no_grad():
            return compute_kl_divergence(model(windows).logits, dense(windows).logits, windows).item()

    with module.model.disable_adapter():
        before = distance(module.model)
    assert distance(module.model) < 0.9 * before
    assert not any("_teacher" in name for name in module.state_dict())


@pytest.mark.slow
def test_the_dense_model_shares_what_is_frozen_and_is_not_changed(source: str, tmp_path: Path) -> None:
    module, *_ = run(source, tmp_path / "lora", 3, loss="distill", hidden_weight=1.0, label_share=0.5)
    teacher, mine = module._teacher[0], module.model.get_base_model()
    assert teacher.model.embed_tokens.weight is mine.model.embed_tokens.weight
    assert teacher.lm_head.weight is mine.lm_head.weight
    full, *_ = run(source, tmp_path / "full", 3, loss="distill", lora_rank=0)
    for found in (teacher, full._teacher[0]):
        for name, value in loading.load(source).state_dict().items():
            assert torch.equal(found.state_dict()[name], value), name
        assert not found.training


def test_hidden_states_are_paired_by_the_layers_that_stayed(source: str, tmp_path: Path) -> None:
    module = RecoveryModule(source, loss="distill")
    module.load_model()
    plan = ShortGPT(count=1).prune(module.model, [{"input_ids": torch.arange(32).view(2, 16)}])
    get_applied_plans(module.model)["first"] = plan
    (gone,) = [index for index, layer in enumerate(plan.layers) if layer.removed]
    module.trainer = Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path)  # type: ignore[assignment]
    module._load_teacher()
    layers = [index for index in range(len(plan.layers)) if index != gone]
    assert module._hidden_state_pairs == [*((j + 1, layer + 1) for j, layer in enumerate(layers[:-1])), (-1, -1)]
    whole = RecoveryModule(source, loss="distill", hidden_weight=1.0)
    whole.load_model()
    whole.trainer = module.trainer
    whole._load_teacher()
    batch = {"input_ids": torch.arange(16)[None]}
    assert whole._compute_distillation_loss(batch).item() == pytest.approx(0, abs=1e-5)


# On 4-bit bases ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Widths that nf4 takes on a CPU."""
    folder = tmp_path_factory.mktemp("wide")
    tokenizer = tiny_tokenizer()
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    tiny("llama", vocab_size=len(tokenizer), head_dim=32, **shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize("base", ["int4", "nf4"])
def test_a_quantised_run_resumes_and_ends_in_the_same_weights(wide: str, tmp_path: Path, base: str) -> None:
    options = {"base": base, "group_size": 16, "align": 64}
    straight, *_ = run(wide, tmp_path / "straight", 8, **options)
    run(wide, tmp_path / "cut", 3, **options)
    resumed, trainer, _ = run(wide, tmp_path / "cut", 8, str(tmp_path / "cut/ckpt/step=3.ckpt"), **options)
    assert trainer.global_step == 8 and quantize.get_quantization(resumed.model) == base
    mine, theirs = ({n: p for n, p in m.model.named_parameters() if "lora_" in n} for m in (straight, resumed))
    assert mine and all(torch.equal(theirs[name], value) for name, value in mine.items())


def test_int4_merges_without_loss_and_stays_int4(wide: str, tmp_path: Path) -> None:
    module, trainer, _ = run(wide, tmp_path, 8, base="int4", group_size=16, lora_dropout=0.0, align=64)
    windows = trainer.datamodule.validation
    with torch.no_grad():
        before = module.model.eval()(windows).logits
        merged = module.merge_model()
        after = merged(windows).logits
    assert quantize.get_quantization(merged) == "int4"
    assert (after - before).norm() <= 1e-4 * before.norm()


def ended(source: str, folder: Path, report: Any = None, **options: Any) -> dict[str, Any]:
    """The report of a run to its end."""
    seed_everything(7)
    module = RecoveryModule(source, **({"lora_rank": 4, "learning_rate": 1e-2, "lora_dropout": 0.0} | options))
    data = TextDataModule(source, seqlen=16, batch_size=2, calibration_windows=8, validation_windows=4, train_windows=9)
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_steps=4,
        callbacks=[report or RunReport(), LLMBIP(0.3, align=options.get("group_size", 64))],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, datamodule=data)
    return dict(json.loads((folder / "report.json").read_text()))


def by_transformers(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")


@pytest.mark.slow
@pytest.mark.parametrize("base", ["none", "int4", "nf4"])
def test_what_merging_changed_is_said_and_adapters_are_kept(
    wide: str, tmp_path: Path, base: str, caplog: pytest.LogCaptureFixture
) -> None:
    from peft import PeftModel

    with caplog.at_level("INFO", "prunelit"):
        report = ended(wide, tmp_path, base=base, group_size=64 if base == "nf4" else 16)
    merge = report["merge"]
    assert merge["base"] == base and (merge["relative"] <= 1e-5) == (base != "nf4")
    assert abs(merge["loss_before"] - merge["loss_after"]) <= (0.5 if base == "nf4" else 1e-4)
    assert f"loss {merge['loss_before']:.4f} before, {merge['loss_after']:.4f} after" in caplog.text
    assert report["format"] == ("int4" if base == "int4" else "uniform")
    model = by_transformers(tmp_path / "model")
    adapter = PeftModel.from_pretrained(by_transformers(tmp_path / "base"), tmp_path / "adapter").eval()
    ids = torch.arange(16)[None]
    with torch.no_grad():
        wanted, found = (m(input_ids=ids, use_cache=False).logits for m in (model, adapter))
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()
    assert PruningPlan.load(tmp_path / "adapter" / "plan.json") == PruningPlan.load(tmp_path / "plan.json")
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert ("got format int4" in card) if base == "int4" else ("--enable-lora --max-lora-rank" in card)


@pytest.mark.slow
def test_the_saved_int4_model_is_the_measured_one(wide: str, tmp_path: Path) -> None:
    report = ended(wide, tmp_path, RunReport(save_base=False), base="int4", group_size=16)
    assert not (tmp_path / "base").exists() and (tmp_path / "adapter").is_dir()
    data = TextDataModule(wide, seqlen=16, batch_size=2, calibration_windows=8, validation_windows=4, train_windows=9)
    data.setup("fit")
    for model in (by_transformers(tmp_path / "model"), loading.load(tmp_path / "model", four_bit=True)):
        again = metrics.perplexity(model, data.validation)["perplexity"]
        assert again == pytest.approx(report["recovered"]["perplexity"], rel=1e-5)
        assert metrics.measure_model_size(model) == {
            name: report["recovered"][name] for name in metrics.measure_model_size(model)
        }


def test_another_format_holds_rounded_weights(wide: str, tmp_path: Path) -> None:
    report = ended(wide, tmp_path, RunReport(format="uniform", save_base=False), base="int4", group_size=16)
    assert report["format"] == "uniform" and "rounded" in report["base"]
    assert "quantization_config" not in json.loads((tmp_path / "model" / "config.json").read_text())


def test_int4_is_asked_for_with_its_base(wide: str, tmp_path: Path) -> None:
    with pytest.raises(BadOption, match=r"report\.format: expected int4 with base int4, got base none"):
        ended(wide, tmp_path, RunReport(format="int4"))


def test_nf4_is_merged_into_the_cut_weights(wide: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    module, trainer, _ = run(wide, tmp_path, 8, base="nf4", lora_dropout=0.0, align=64)
    base, windows = module._full_precision_model[0], trainer.datamodule.validation
    plain = {name: value.clone() for name, value in base.state_dict().items()}
    merged = module.merge_model()
    assert quantize.get_quantization(merged) is None and not any("lora" in name for name in merged.state_dict())
    assert any(not torch.equal(merged.state_dict()[name], value) for name, value in plain.items())
    assert metrics.perplexity(merged, windows)["perplexity"] < 200


def test_options_of_adapters_reach_them(wide: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    module, trainer, _ = run(
        wide, tmp_path / "a", 2, ffn_lora_rank=2, ffn_learning_rate=1e-3, optimizer="adamw8bit", base="int4", align=64
    )
    ranks = {name.split(".")[-3]: len(p) for name, p in module.model.named_parameters() if "lora_A" in name}
    assert set(ranks.values()) == {2, 4}
    assert [group["name"] for group in trainer.optimizers[0].param_groups] == ["other", "ffn"]
    assert type(trainer.optimizers[0]).__name__ == "AdamW8bit"
    by_cut, *_ = run(wide, tmp_path / "b", 2, rank_rule="by_cut", lora_rank=16, align=16)
    found = {len(p) for name, p in by_cut.model.named_parameters() if "lora_A" in name}
    assert len(found) > 1, "one kind lost more than the other"


@pytest.mark.parametrize(
    ("format", "family", "base", "cut", "why"),
    [
        ("uniform", "llama", "int4", {"scope": "global"}, "format 'uniform': expected layers of one shape"),
        ("padded", "mistral", "none", {"scope": "global", "repair": "bias"}, "format 'padded': .*this model's biases"),
        ("deci", "qwen3", "none", {}, "format 'deci': expected a model of .*, got 'qwen3'"),
        ("gguf", "llama", "none", {}, "format 'gguf': expected a BPE tokenizer"),
        ("int4", "gpt2", "int4", {}, "format 'int4': .*Conv1D"),
    ],
)
def test_a_format_that_can_not_hold_the_cut_model_is_refused_before_training(
    tmp_path: Path, format: str, family: str, base: str, cut: dict[str, Any], why: str
) -> None:
    if format == "gguf":
        pytest.importorskip("xllamacpp")
    tokenizer = tiny_tokenizer()
    tiny(family, vocab_size=len(tokenizer)).save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    source = str(tmp_path / "source")
    data = TextDataModule(source, seqlen=16, batch_size=2, calibration_windows=8, validation_windows=4)
    trainer = Trainer(
        default_root_dir=tmp_path / "run",
        accelerator="cpu",
        max_steps=2,
        callbacks=[RunReport(format=format), LLMBIP(0.3, align=8, **cut)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    with pytest.raises(DoesNotFit, match=why):
        trainer.fit(RecoveryModule(source, lora_rank=2, base=base, group_size=16), datamodule=data)
    assert trainer.global_step == 0
    assert not (tmp_path / "run" / "model").exists() and (tmp_path / "run" / "plan.json").is_file()
