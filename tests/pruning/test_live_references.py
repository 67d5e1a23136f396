"""After a cut, whatever in a job still holds the old weights is named; what holds the new ones, or its own, is not."""

import copy
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    Callback,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch.optim.swa_utils import AveragedModel

import prunelit
from prunelit.callbacks import Magnitude
from prunelit.core.saved_plans import CUT_MARK
from prunelit.model.copies import copy_sharing_tensors
from prunelit.pruning import live_references
from prunelit.runtime.errors import StaleReference
from tests.foreign_job import ForeignData, ForeignModule
from tests.pruning.test_attach import trainer, whole_layer_plan, widths

ROOT = Path(__file__).parents[2]


def cut(**options: Any) -> Magnitude:
    return Magnitude(0.3, align=8, **options)


def fit(folder: Path, module: ForeignModule, *callbacks: Any, data: Any = None, **options: Any) -> Trainer:
    run = trainer(folder, *callbacks, **options)
    run.fit(module, datamodule=data or ForeignData())
    return run


class EarlyOptimizer(ForeignModule):
    def __init__(self) -> None:
        super().__init__()
        self.adam = torch.optim.AdamW(self.parameters(), lr=1e-3)

    def configure_optimizers(self) -> Any:
        return self.adam


class EarlyOptimizers(EarlyOptimizer):
    """Two optimisers, one of them right."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, index: int) -> Any:
        return None

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.network.lm_head.parameters(), lr=1e-3), self.adam]


class HoldsParameters(ForeignModule):
    def __init__(self) -> None:
        super().__init__()
        self.clipped = {"ffn": [p for n, p in self.network.named_parameters() if "mlp" in n]}


class HoldsParameter(ForeignModule):
    def __init__(self) -> None:
        super().__init__()
        self.gate = self.network.model.layers[0].mlp.gate_proj.weight  # registered under a second name


class HoldsSchedule(ForeignModule):
    """An optimiser of its own, behind an object of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.helper = Helper(torch.optim.SGD(self.parameters(), lr=1e-3))


class Helper:
    def __init__(self, optimizer: Any):
        self.optimizer = optimizer


class HoldsMethod(ForeignModule):
    def __init__(self) -> None:
        super().__init__()
        self.last_layer = self.network.model.layers[-1].forward


class HoldsLayers(ForeignModule):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = list(self.network.model.layers)


class Remote(Mapping[int, Any]):
    """Reads each item from somewhere else."""

    def __len__(self) -> int:
        return 5

    def __iter__(self) -> Iterator[int]:
        return iter(range(5))

    def __getitem__(self, key: int) -> Any:
        raise OSError("gone")


def test_the_data_of_a_job_is_not_read_item_by_item(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Rows(ForeignData):
        def __init__(self) -> None:
            super().__init__()
            self.samples = [{"input_ids": [1] * 512, "names": ["a"] * 512, "labels": list(range(512))}] * 2
            self.samples += [dict(self.samples[0], input_ids=[1] * 512) for _ in range(500)]
            self.shards = Remote()

    visits, find = [], live_references._find_replaced
    monkeypatch.setattr(live_references, "_find_replaced", lambda *given: (visits.append(1), find(*given))[1])
    module = ForeignModule()
    module.shares_weights = [copy_sharing_tensors(module.network)]  # type: ignore[assignment]
    fit(tmp_path, module, cut(), data=Rows())
    assert 500 < len(visits) < 10_000
    monkeypatch.setattr(live_references, "_MOST_VISITED", 100)
    visits.clear()
    fit(tmp_path, module, cut(), data=Rows())
    assert 100 < len(visits) < 1500


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (EarlyOptimizer, r"optimizer AdamW: .* got 9 that the cut has replaced, such as .*configure_optimizers"),
        (EarlyOptimizers, "optimizer AdamW"),
        (HoldsParameters, r"HoldsParameters\.clipped: .*mlp.* of before the cut"),
        (HoldsParameter, r"HoldsParameter\.gate: .*gate_proj"),
        (HoldsSchedule, r"HoldsSchedule\.helper"),
    ],
)
def test_who_holds_weights_of_before_the_cut_is_named(tmp_path: Path, kind: Any, said: str) -> None:
    with pytest.raises(StaleReference, match=said):
        fit(tmp_path, kind(), cut(), max_epochs=1)


@pytest.mark.parametrize("stage", ["validate", "test", "restore"])
def test_without_training_it_is_named_too(tmp_path: Path, stage: str) -> None:
    class Watches(HoldsLayers):
        def test_step(self, batch: Any, index: int) -> None:
            pass

    class SetsInSetup(ForeignModule):
        def setup(self, stage: str) -> None:
            self.blocks = list(self.network.model.layers)

        test_step = Watches.test_step

    plan = whole_layer_plan(tmp_path / "plan.json")
    keep = ModelCheckpoint(dirpath=tmp_path / "ckpt", save_last=True)
    fit(tmp_path, ForeignModule(), cut(plan_file=plan), keep, enable_checkpointing=True)
    last = str(tmp_path / "ckpt" / "last.ckpt")

    def read(module: ForeignModule) -> None:
        if stage == "restore":
            prunelit.restore(module, last)
        else:
            rows = ForeignData().val_dataloader()
            getattr(trainer(tmp_path, cut(plan_file=plan)), stage)(module, rows, ckpt_path=last, verbose=False)

    with pytest.raises(StaleReference, match=r"Watches\.blocks: .*model\.layers\.2.* in the module's setup"):
        read(Watches())
    read(SetsInSetup())


def test_hooks_on_parameters_that_are_cut_are_named_in_one_line(tmp_path: Path) -> None:
    module = ForeignModule()
    layers = module.network.model.layers
    layers[0].mlp.up_proj.weight.register_post_accumulate_grad_hook(lambda parameter: None)
    layers[1].mlp.down_proj.weight.register_hook(lambda gradient: gradient * 2)
    layers[0].input_layernorm.weight.register_hook(lambda gradient: gradient * 2)  # which stays
    with pytest.warns(
        UserWarning, match=r"replaced 2 parameters that had hooks, such as model\.layers\.0\.mlp\.up_proj"
    ):
        fit(tmp_path, module, cut())


@pytest.mark.parametrize("kind", [HoldsLayers, HoldsMethod])
def test_a_layer_that_was_removed_is_named(tmp_path: Path, kind: Any) -> None:
    with pytest.raises(StaleReference, match=rf"{kind.__name__}\..*set it in the module's setup"):
        fit(tmp_path, kind(), cut(plan_file=whole_layer_plan(tmp_path / "plan.json")))


def test_a_second_name_of_the_layers_stays_right(tmp_path: Path) -> None:
    class HoldsLayerList(ForeignModule):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = self.network.model.layers

    keep = ModelCheckpoint(dirpath=tmp_path / "ckpt", save_last=True)
    cuts = [cut(plan_file=whole_layer_plan(tmp_path / "plan.json")) for _ in range(2)]
    last = tmp_path / "ckpt" / "last.ckpt"
    first, again = HoldsLayerList(), HoldsLayerList()
    fit(tmp_path, first, cuts[0], keep, enable_checkpointing=True)
    trainer(tmp_path, cuts[1], steps=6).fit(again, datamodule=ForeignData(), ckpt_path=str(last))
    for module in (first, again, prunelit.restore(HoldsLayerList(), last)):
        assert module.blocks is module.network.model.layers
        assert len(module.blocks) == 2


def test_layers_that_stay_may_be_held(tmp_path: Path) -> None:
    module = HoldsLayers()
    fit(tmp_path, module, cut())
    assert module.blocks == list(module.network.model.layers)


class OwnAverage(Callback):
    """An average of somebody's own, made when the job is set up."""

    def __init__(self, form: str):
        self.form = form

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if self.form == "module":
            self.averaged = copy.deepcopy(pl_module)
        elif self.form == "model":
            self.ema_model = copy.deepcopy(pl_module.network)
        else:
            self.shadow = {name: p.detach().clone() for name, p in pl_module.named_parameters()}


@pytest.mark.parametrize("form", ["module", "model", "state"])
def test_an_average_of_ones_own_is_named_before_the_cut_and_works_after_it(tmp_path: Path, form: str) -> None:
    with pytest.raises(StaleReference, match=r"put OwnAverage after the pruning callback in trainer.callbacks"):
        fit(tmp_path, ForeignModule(), OwnAverage(form), cut())
    fit(tmp_path, ForeignModule(), cut(), OwnAverage(form))


def test_a_teacher_may_hold_the_dense_weights(tmp_path: Path) -> None:
    class EmaLoss(Callback):  # whose name tells nothing of what it holds
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            self.teacher, self.teaching_module = copy.deepcopy(pl_module.network), copy.deepcopy(pl_module)

    class Teaches(ForeignModule):
        def __init__(self, with_reference: bool = True) -> None:
            super().__init__()
            self.shares_weights = [copy_sharing_tensors(self.network)]
            if with_reference:
                self.reference = Teaches(with_reference=False).requires_grad_(False)

    module = Teaches()
    fit(tmp_path, module, EmaLoss(), cut(target="network"))
    assert module.reference.network.model.layers[0].mlp.gate_proj.out_features == 64
    assert module.shares_weights[0].model.layers[0].mlp.gate_proj.out_features == 64


AVERAGES = {
    "WeightAveraging": lambda: WeightAveraging(),
    "EMAWeightAveraging": lambda: EMAWeightAveraging(decay=0.5),
    "StochasticWeightAveraging": lambda: StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=1),
}


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides")
@pytest.mark.parametrize("name", AVERAGES)
def test_lightnings_averages_stand_after_the_cut_wherever_they_are_listed(tmp_path: Path, name: str) -> None:
    module, average = ForeignModule(), AVERAGES[name]()
    run = fit(tmp_path, module, average, cut(), steps=-1, max_epochs=2)
    assert [type(c).__name__ for c in run.callbacks[:2]] == ["Magnitude", name]  # type: ignore[attr-defined]
    copied = average._average_model
    copied = copied.module if isinstance(copied, AveragedModel) else copied
    assert widths(copied) == widths(module) != [(2, 64)] * 3


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides")
def test_a_job_with_an_average_resumes_and_is_tested(tmp_path: Path) -> None:
    keep = ModelCheckpoint(dirpath=tmp_path / "ckpt", save_last=True)
    module = ForeignModule()
    fit(tmp_path, module, WeightAveraging(), cut(), keep, enable_checkpointing=True)
    last = str(tmp_path / "ckpt" / "last.ckpt")
    assert CUT_MARK in torch.load(last, weights_only=True)["state_dict"]
    again = ForeignModule()
    run = trainer(tmp_path, WeightAveraging(), cut(), steps=6)
    run.fit(again, datamodule=ForeignData(), ckpt_path=last)
    assert run.global_step == 6
    assert widths(again) == widths(module)


def test_a_second_fit_finds_nothing_of_the_first(tmp_path: Path) -> None:
    module = ForeignModule()
    callback = cut()
    fit(tmp_path, module, callback)
    fit(tmp_path, module, callback)
    fit(tmp_path, module, cut())


TWO_RANKS = """
from tests.pruning.test_live_references import EarlyOptimizer, ForeignData, ForeignModule, Trainer, cut

for module in (ForeignModule(), EarlyOptimizer()):
    run = Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_steps=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, callbacks=[cut()],
    )
    run.fit(module, datamodule=ForeignData())
    open(f"trained {run.global_rank}", "w").close()
"""


@pytest.mark.slow
def test_two_ranks_stop_together(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(TWO_RANKS)
    done = subprocess.run(
        [sys.executable, "job.py"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 1
    assert sorted(path.name for path in tmp_path.glob("trained *")) == ["trained 0", "trained 1"]
    assert done.stderr.count("StaleReference: optimizer AdamW: expected the parameters of the cut model") == 2
