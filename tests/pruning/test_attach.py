"""A pruning callback on a foreign Lightning job: the model is cut once, before anything is built on its shapes."""

import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader
from transformers import BertConfig, BertModel

from prunelit.callbacks import LLMBIP, Magnitude
from prunelit.core.plan import LayerPlan, PruningPlan
from prunelit.model.decoder import Decoder
from prunelit.runtime.errors import BadOption, BadPlan, NoCalibration, NoModel, SourceNotFound
from tests.foreign_job import ForeignData, ForeignModule, sequences

ROOT = Path(__file__).parents[2]


def trainer(folder: Path, *callbacks: Any, steps: int = 4, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "default_root_dir": folder,
        "accelerator": "cpu",
        "max_steps": steps,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
    }
    return Trainer(**(defaults | options), callbacks=list(callbacks))


def bip(**options: Any) -> LLMBIP:
    return LLMBIP(**({"ratio": 0.3, "align": 8, "windows": 8} | options))


def widths(module: ForeignModule) -> list[tuple[int, int]]:
    return [(layer.shape.kv_groups, layer.shape.ffn_channels) for layer in Decoder(module.network)]


def whole_layer_plan(path: Path) -> str:
    """A plan without the last layer."""
    shape = Decoder(ForeignModule().network).shape
    layers = [LayerPlan.dense(layer) for layer in shape.layers]
    gone = LayerPlan((), (), ())
    PruningPlan("by hand", shape, (*layers[:-1], gone)).save(path)
    return str(path)


def test_two_callbacks_that_cut_are_refused(tmp_path: Path) -> None:
    module = ForeignModule()
    dense = widths(module)
    with pytest.raises(BadOption, match=r"trainer.callbacks: .* got LLMBIP and Magnitude; keep one of them"):
        trainer(tmp_path, bip(), Magnitude(0.3, align=8)).fit(module, datamodule=ForeignData())
    assert widths(module) == dense


def test_the_job_trains_a_smaller_model(tmp_path: Path) -> None:
    module, callback = ForeignModule(), bip()
    dense = sum(p.numel() for p in module.network.parameters())
    run = trainer(tmp_path, callback)
    run.fit(module, datamodule=ForeignData())
    assert callback.applied_plan is not None
    assert sum(p.numel() for p in module.network.parameters()) == callback.applied_plan.predicted["parameters"] < dense
    in_optimizer = {id(p) for group in run.optimizers[0].param_groups for p in group["params"]}
    assert in_optimizer == {id(p) for p in module.network.parameters()}
    record = callback.applied_plan.calibration
    assert record["source"] == ["train dataloader"]
    assert record["windows"] == 8
    assert record["tokens"] < 8 * 16, "padding was counted"


def test_a_loader_passed_to_fit_is_enough(tmp_path: Path) -> None:
    module, callback = ForeignModule(), bip()
    trainer(tmp_path, callback).fit(module, train_dataloaders=DataLoader(sequences(), batch_size=4))
    assert callback.applied_plan is not None


def test_setup_leaves_the_random_state_alone(tmp_path: Path) -> None:
    class Spy(ForeignModule):
        def setup(self, stage: str) -> None:
            self.state = torch.get_rng_state()

    torch.manual_seed(3)
    before = torch.get_rng_state()
    module = Spy()
    torch.set_rng_state(before)
    trainer(tmp_path, bip()).fit(module, datamodule=ForeignData())
    assert torch.equal(module.state, before)


def test_a_callback_cuts_a_model_once(tmp_path: Path) -> None:
    module, callback = ForeignModule(), bip()
    trainer(tmp_path, callback).fit(module, datamodule=ForeignData())
    once = widths(module)
    trainer(tmp_path, callback).fit(module, datamodule=ForeignData())
    trainer(tmp_path, bip()).validate(module, datamodule=ForeignData(), verbose=False)
    assert widths(module) == once


def test_a_new_callback_cuts_further_and_says_what_its_ratio_counts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module, cuts = ForeignModule(), [Magnitude(0.2, align=4, kinds=["channels"]) for _ in range(3)]
    dense = sum(p.numel() for p in module.network.parameters())
    caplog.set_level("INFO")
    parameters = []
    for cut in cuts:
        trainer(tmp_path, cut).fit(module, datamodule=ForeignData())
        parameters.append(sum(p.numel() for p in module.network.parameters()))
        assert cut.applied_plan is not None
        assert cut.applied_plan.predicted["parameters"] == parameters[-1]
        assert cut.applied_plan.predicted["ratio_of_block_parameters"] == pytest.approx(0.24, abs=0.04)
    assert dense > parameters[0] > parameters[1] > parameters[2]
    assert f"magnitude: cut 3 of this model; the ratio counted what earlier cuts had left. {parameters[2]:,} of" in (
        caplog.text
    )


def test_a_run_of_two_cuts_resumes_into_the_shapes_of_both(tmp_path: Path) -> None:
    def cut(**options: Any) -> Magnitude:
        return Magnitude(0.3, align=8, **options)

    module = ForeignModule()
    trainer(tmp_path, cut()).fit(module, datamodule=ForeignData())
    checkpoint = ModelCheckpoint(dirpath=tmp_path / "ckpt", save_last=True)
    trainer(tmp_path, cut(), checkpoint, enable_checkpointing=True).fit(module, datamodule=ForeignData())
    again = ForeignModule()
    run = trainer(tmp_path, cut(), steps=6)
    run.fit(again, datamodule=ForeignData(), ckpt_path=str(tmp_path / "ckpt" / "last.ckpt"))
    assert widths(again) == widths(module) != [(2, 64)] * 3
    assert run.global_step == 6


@pytest.mark.parametrize("shown", [False, True])
def test_a_job_says_once_how_much_was_cut(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, shown: bool
) -> None:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    own, lightnings = logging.getLogger("prunelit"), logging.getLogger("lightning.pytorch")
    monkeypatch.setattr(lightnings, "handlers", [handler])
    monkeypatch.setattr(lightnings, "level", logging.INFO)  # our command line may have run in this process
    monkeypatch.setattr(own, "handlers", [handler] if shown else [])
    monkeypatch.setattr(own, "propagate", False)
    monkeypatch.setattr(own, "level", logging.INFO if shown else logging.NOTSET)
    own.manager._clear_cache()  # type: ignore[attr-defined]
    trainer(tmp_path, Magnitude(0.3, align=8), steps=1).fit(ForeignModule(), datamodule=ForeignData())
    own.manager._clear_cache()  # type: ignore[attr-defined]
    assert len([line for line in lines if "of block parameters removed" in line]) == 1


class TwoModels(ForeignModule):
    def __init__(self) -> None:
        super().__init__()
        self.teacher = self.build().requires_grad_(False)  # named first by who reads the module from above
        self.student = self.network
        del self.network
        self.network = [self.student]  # type: ignore[assignment]

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        loss: torch.Tensor = self.student(**batch, labels=batch["input_ids"]).loss
        return loss

    def validation_step(self, batch: dict[str, torch.Tensor], index: int) -> None:
        pass


def test_of_several_models_the_target_is_cut(tmp_path: Path) -> None:
    module = TwoModels()
    with pytest.raises(BadOption, match=r"expected one transformers model, got 2; .*target: 'teacher' or 'student'"):
        trainer(tmp_path, bip()).fit(module, datamodule=ForeignData())
    with pytest.raises(NoModel, match=r"target 'pupil'.*'teacher' .*'student'"):
        trainer(tmp_path, bip(target="pupil")).fit(module, datamodule=ForeignData())
    callback = bip(target="student")
    trainer(tmp_path, callback).fit(module, datamodule=ForeignData())
    shapes = [[layer.shape.ffn_channels for layer in Decoder(model)] for model in (module.teacher, module.student)]
    assert shapes[0] == [64] * 3
    assert max(shapes[1]) < 64
    assert callback.applied_plan is not None
    assert "target" not in callback.applied_plan.options


def test_a_part_of_a_model_is_no_second_model_and_no_target(tmp_path: Path) -> None:
    class PartFirst(ForeignModule):
        def __init__(self) -> None:
            super().__init__()
            whole = self.network
            del self.network
            self.backbone = whole.model
            self.network = whole

    module = PartFirst()
    for target in ("backbone", "network.model"):
        with pytest.raises(BadOption, match=rf"target '{target}': .* got a part of 'network'.*give target: 'network'"):
            trainer(tmp_path, bip(target=target)).fit(module, datamodule=ForeignData())
    trainer(tmp_path, bip()).fit(module, datamodule=ForeignData())
    assert widths(module) != [(2, 64)] * 3
    assert module.backbone is module.network.model


def test_a_checkpoint_of_the_dense_model_is_refused_before_anything_is_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = ModelCheckpoint(dirpath=tmp_path / "ckpt", save_last=True)
    trainer(tmp_path, keep, enable_checkpointing=True).fit(ForeignModule(), datamodule=ForeignData())
    monkeypatch.setattr(LLMBIP, "score", fail)
    with pytest.raises(BadPlan, match=r"last\.ckpt: .*without a plan.*fit without ckpt_path$"):
        trainer(tmp_path, bip(), steps=6).fit(
            ForeignModule(), datamodule=ForeignData(), ckpt_path=str(tmp_path / "ckpt" / "last.ckpt")
        )


def test_a_callback_is_pickled_after_a_fit_and_plans_for_its_target(tmp_path: Path) -> None:
    callback, module = bip(target="student"), TwoModels()
    run = trainer(tmp_path, callback)
    run.fit(module, datamodule=ForeignData())
    assert pickle.loads(pickle.dumps(callback)).applied_plan == callback.applied_plan
    other = TwoModels()
    plan = Magnitude(0.3, align=8, target="student").plan_job(run, other)
    assert plan.model == Decoder(other.student).shape


def test_a_model_that_cannot_be_pruned_beside_it_needs_no_target(tmp_path: Path) -> None:
    module = ForeignModule()
    module.reward = BertModel(  # type: ignore[assignment]
        BertConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
    ).requires_grad_(False)
    trainer(tmp_path, bip()).fit(module, datamodule=ForeignData())
    assert widths(module) != [(2, 64)] * 3


def test_a_callback_used_again_cuts_the_next_model(tmp_path: Path) -> None:
    callback, first, second = bip(), ForeignModule(), ForeignModule()
    run = trainer(tmp_path, callback)
    run.fit(first, datamodule=ForeignData())
    trainer(tmp_path, callback).fit(second, datamodule=ForeignData())
    assert widths(second) == widths(first) != [(2, 64)] * 3


def test_validation_alone_cuts_nothing(tmp_path: Path) -> None:
    module = ForeignModule()
    trainer(tmp_path, bip()).validate(module, datamodule=ForeignData(), verbose=False)
    assert widths(module) == [(2, 64)] * 3


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_fresh_dense_model_resumes_into_the_cut_shapes(tmp_path: Path, scope: str) -> None:
    checkpoint = ModelCheckpoint(dirpath=tmp_path / "ckpt", save_last=True)
    first = bip(scope=scope)
    trainer(tmp_path, first, checkpoint, enable_checkpointing=True).fit(ForeignModule(), datamodule=ForeignData())
    assert (tmp_path / "ckpt" / "plan.llm_bip.json").is_file()

    again, module = bip(scope=scope), ForeignModule()
    again.score = None  # type: ignore[method-assign,assignment]  # scoring again would fail
    run = trainer(tmp_path, again, steps=6)
    run.fit(module, datamodule=ForeignData(), ckpt_path=str(tmp_path / "ckpt" / "last.ckpt"))
    assert again.applied_plan == first.applied_plan
    assert run.global_step == 6


def test_a_run_by_a_plan_file_goes_on_by_it_and_by_no_other(tmp_path: Path) -> None:
    for name, scope in (("mine", "layer"), ("other", "global")):
        made = bip(scope=scope)
        trainer(tmp_path / name, made, steps=0).fit(ForeignModule(), datamodule=ForeignData())
        assert made.applied_plan is not None
        made.applied_plan.save(tmp_path / f"{name}.json")
    checkpoint = ModelCheckpoint(dirpath=tmp_path / "ckpt", save_last=True)
    for name, resume in (("mine", None), ("mine", "last.ckpt"), ("other", "last.ckpt")):
        callback = bip(plan_file=str(tmp_path / f"{name}.json"), repair="bias")  # biases that no file declares
        run = trainer(tmp_path, callback, *([] if resume else [checkpoint]), enable_checkpointing=not resume)
        path = str(tmp_path / "ckpt" / resume) if resume else None
        if name == "mine":
            run.fit(ForeignModule(), datamodule=ForeignData(), ckpt_path=path)
        else:
            with pytest.raises(BadPlan, match="plan_file"):
                run.fit(ForeignModule(), datamodule=ForeignData(), ckpt_path=path)


def fail(*args: Any) -> None:
    pytest.fail("computed again")


def test_a_job_with_a_folder_of_its_own_keeps_what_is_expensive(tmp_path: Path, monkeypatch: Any) -> None:
    modules = [ForeignModule(), ForeignModule()]
    for module in modules:  # the first was killed before it had a checkpoint
        callback = bip(repair="least_squares")
        torch.manual_seed(5)
        trainer(tmp_path / "run", callback, steps=0).fit(module, datamodule=ForeignData())
        for name in ("score", "cut"):
            monkeypatch.setattr(LLMBIP, name, fail)
    first, again = (module.network.state_dict() for module in modules)
    assert all(torch.equal(again[name], value) for name, value in first.items())
    assert {path.name.split("-")[1] for path in (tmp_path / "run/kept").iterdir()} == {"scores", "plan", "repaired"}


def test_a_job_without_one_keeps_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)  # Lightning's default_root_dir where none is given
    trainer(tmp_path, bip(repair="least_squares"), steps=0).fit(ForeignModule(), datamodule=ForeignData())
    assert not list(tmp_path.iterdir())


def test_a_resumed_run_puts_repaired_weights_back_or_says_that_they_differ(tmp_path: Path, monkeypatch: Any) -> None:
    checkpoint = ModelCheckpoint(dirpath=tmp_path / "ckpt", save_last=True)
    first = bip(repair="least_squares")
    trainer(tmp_path, first, checkpoint, enable_checkpointing=True).fit(ForeignModule(), datamodule=ForeignData())
    last = str(tmp_path / "ckpt" / "last.ckpt")

    with monkeypatch.context() as patch:  # neither text nor repair
        patch.setattr(LLMBIP, "cut", fail)
        patch.setattr(LLMBIP, "_find_calibration", fail)
        again = bip(repair="least_squares")
        trainer(tmp_path, again, steps=6).fit(ForeignModule(), datamodule=ForeignData(), ckpt_path=last)
        assert again.state_dict() == first.state_dict()

    for path in (tmp_path / "kept").iterdir():
        path.unlink()
    module = ForeignModule()
    torch.manual_seed(9)  # other batches come first
    with pytest.warns(UserWarning, match="other repaired weights"):
        trainer(tmp_path, bip(repair="least_squares"), steps=6).fit(module, datamodule=ForeignData(), ckpt_path=last)


def test_a_checkpoint_that_is_not_there_is_said_before_anything_is_scored(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(LLMBIP, "score", fail)
    with pytest.raises(SourceNotFound, match=r"nowhere\.ckpt.*missing"):
        trainer(tmp_path, bip()).fit(
            ForeignModule(), datamodule=ForeignData(), ckpt_path=str(tmp_path / "nowhere.ckpt")
        )


def test_a_fine_tuned_copy_of_the_model_is_another_model(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(dirpath=tmp_path / "ckpt", save_last=True)
    trainer(tmp_path, bip(), checkpoint, enable_checkpointing=True).fit(ForeignModule(), datamodule=ForeignData())
    module = ForeignModule()
    with torch.no_grad():
        module.network.lm_head.weight.mul_(1.001)
    with pytest.raises(BadPlan, match="another model"):
        trainer(tmp_path, bip()).fit(module, datamodule=ForeignData(), ckpt_path=str(tmp_path / "ckpt" / "last.ckpt"))


def test_a_plan_is_replayed_without_scoring(tmp_path: Path) -> None:
    first = bip()
    trainer(tmp_path, first).fit(ForeignModule(), datamodule=ForeignData())
    assert first.applied_plan is not None
    first.applied_plan.save(tmp_path / "plan.json")
    again = bip(plan_file=str(tmp_path / "plan.json"))
    again.score = None  # type: ignore[method-assign,assignment]
    trainer(tmp_path, again).fit(ForeignModule(), datamodule=ForeignData())
    assert again.applied_plan is not None
    assert again.applied_plan.layers == first.applied_plan.layers


def test_resuming_with_another_plan_is_refused(tmp_path: Path) -> None:
    callback = Magnitude(ratio=0.3, align=8)
    trainer(tmp_path, callback).fit(ForeignModule(), datamodule=ForeignData())
    other = bip(scope="global")
    trainer(tmp_path, other).fit(ForeignModule(), datamodule=ForeignData())
    with pytest.raises(BadPlan, match="resume with the configuration of that run"):
        callback.load_state_dict(other.state_dict())


def test_a_model_that_does_not_exist_yet_is_an_error_not_a_skip(tmp_path: Path) -> None:
    with pytest.raises(NoModel, match="build it in __init__"):
        trainer(tmp_path, bip()).fit(ForeignModule(late=True), datamodule=ForeignData())


def test_no_calibration_text_names_the_three_ways(tmp_path: Path) -> None:
    class Tuples(ForeignModule):
        def train_dataloader(self) -> Any:
            return [(torch.zeros(2, 4), torch.zeros(2))]

    with pytest.raises(NoCalibration, match=r"calibration=.*calibration_dataloader\(\).*input_ids"):
        trainer(tmp_path, bip()).fit(Tuples())


def test_a_datamodules_calibration_loader_comes_first(tmp_path: Path) -> None:
    class WithCalibration(ForeignData):
        def calibration_dataloader(self) -> Any:
            return DataLoader(sequences(6), batch_size=3)  # type: ignore[arg-type]

    callback = bip()
    trainer(tmp_path, callback).fit(ForeignModule(), datamodule=WithCalibration())
    assert callback.applied_plan is not None
    assert callback.applied_plan.calibration["source"] == ["calibration_dataloader()"]
    assert callback.applied_plan.calibration["windows"] == 6


def test_spawned_processes_are_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path, strategy="ddp_spawn", devices=2)
    with pytest.raises(BadOption, match="use strategy='ddp'"):
        bip().setup(run, ForeignModule(), "fit")


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.foreign_job", *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def cli_job(folder: Path, devices: int) -> PruningPlan:
    """The foreign job on the command line with the method's YAML as a second --config; the plan it left."""
    folder.mkdir()
    (folder / "job.yaml").write_text(
        f"seed_everything: 0\n"
        f"trainer: {{max_steps: 2, accelerator: cpu, devices: {devices}, strategy: {'ddp' if devices > 1 else 'auto'}, "
        f"default_root_dir: {folder}, enable_progress_bar: false, logger: false}}\n"
    )
    small = (ROOT / "callbacks" / "llm_bip.yaml").read_text().replace("align: 64", "align: 8")
    (folder / "llm_bip.yaml").write_text(small)
    done = command("fit", "--config", f"{folder}/job.yaml", "--config", f"{folder}/llm_bip.yaml")
    assert done.returncode == 0, done.stderr
    plans = list(folder.rglob("plan.llm_bip.json"))
    assert len(plans) == 1
    return PruningPlan.load(plans[0])


@pytest.mark.slow
def test_a_cli_job_takes_the_yaml_and_two_ranks_make_the_plan_of_one(tmp_path: Path) -> None:
    alone, together = cli_job(tmp_path / "one", 1), cli_job(tmp_path / "two", 2)
    assert alone.predicted["ratio_of_block_parameters"] >= 0.2
    # The job shuffles, so the order of its sequences may differ; all 32 of them are scored either way.
    assert together.calibration["tokens"] == alone.calibration["tokens"]
    assert together.layers == alone.layers
