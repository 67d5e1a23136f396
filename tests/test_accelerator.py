"""What a GPU would refuse: methods, repairs and recovery on tensors that are marked as those of an accelerator."""

import copy

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy

from prunelit.callbacks import LLMBIP
from prunelit.export.write import save
from prunelit.pruning.registry import method_class, methods
from prunelit.recovery.datamodule import TextDataModule
from prunelit.recovery.module import RecoveryModule
from tests.callbacks.test_contract import pruned
from tests.fake_accelerator import DEVICE, FakeAccelerator
from tests.tiny import EXPERT_METHODS, tiny

METHODS = tuple(methods())
# Each method with the repair that does most, and every repair with some method.
CASES = [(name, method_class(name).repair_choices[-1]) for name in METHODS]
CASES += [("flap", "bias"), ("random", "bias"), ("reap", "least_squares")]


def test_operations_on_two_devices_are_refused():
    with FakeAccelerator() as accelerator:
        there, here = torch.ones(3, device=DEVICE), torch.ones(3)
        assert (there * 2)[1:].device == DEVICE and there.cpu().device.type == here.device.type == "cpu"
        with pytest.raises(RuntimeError, match="expected all tensors on one device"):
            there + here
        with pytest.raises(TypeError, match="can't convert cuda:0 tensor to numpy"):
            there.numpy()
        assert there.sum().item() == 3 and accelerator.synchronizations["item"] == 1


def test_gradients_are_where_their_weights_are():
    model = tiny("llama")
    ids = torch.ones(1, 5, dtype=torch.long)
    with FakeAccelerator():
        model.to(DEVICE)
        with pytest.raises(RuntimeError, match="expected all tensors on one device"):
            model(input_ids=ids)
        ids = ids.to(DEVICE)
        model(input_ids=ids, labels=ids).loss.backward()
        assert {parameter.grad.device for parameter in model.parameters()} == {DEVICE}


@pytest.mark.filterwarnings("ignore:calibration")
@pytest.mark.parametrize(("name", "repair"), CASES)
def test_methods_and_repairs_run_where_the_model_is(name, repair):
    model = tiny("mixtral" if name in EXPERT_METHODS else "llama")
    if name in EXPERT_METHODS:  # its other kernels ask for operations that the CPU has not
        model.set_experts_implementation("eager")
    twin = copy.deepcopy(model)
    plan = pruned(name, twin, repair=repair)
    torch.manual_seed(0)
    with FakeAccelerator():
        model.to(DEVICE)
        plan_there = pruned(name, model, repair=repair)
        assert {parameter.device for parameter in model.parameters()} == {DEVICE}
    assert plan_there.digest == plan.digest
    for (path, weight), expected in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(weight, expected, msg=lambda text, path=path: f"{path}: {text}")


class _AnyDevice(CPUAccelerator):
    """Accelerator that takes the fake device for its own."""

    def setup_device(self, device):
        pass


class _Places(Callback):
    """Keeps the devices of the trained module's parameters; Lightning moves it to the CPU when the run has ended."""

    def on_train_end(self, trainer, pl_module):
        self.devices = {parameter.device for parameter in pl_module.parameters()}


RECOVERIES = {
    "distill": {"loss": "distill", "hidden_weight": 0.5, "label_share": 0.5},
    "int4-by-cut": {"base": "int4", "group_size": 16, "rank_rule": "by_cut"},
}


@pytest.mark.slow
@pytest.mark.parametrize("options", RECOVERIES.values(), ids=RECOVERIES)
def test_recovery_runs_where_the_trainer_puts_it(source, tmp_path, options):
    module = RecoveryModule(source, **{"lora_rank": 2, **options})
    data = TextDataModule(source, seqlen=16, batch_size=2, calibration_windows=8, validation_windows=4, train_windows=9)
    places = _Places()
    with FakeAccelerator():
        trainer = Trainer(
            default_root_dir=tmp_path,
            strategy=SingleDeviceStrategy(device=DEVICE, accelerator=_AnyDevice()),
            max_steps=2,
            limit_val_batches=1,
            val_check_interval=1,
            callbacks=[LLMBIP(0.3, align=16), places],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, datamodule=data)
        assert places.devices == {DEVICE}
        assert trainer.callback_metrics["val_perplexity"].isfinite()
        merged = module.to(DEVICE).merge_model()
        assert {parameter.device for parameter in merged.parameters()} == {DEVICE}
        save(merged, tmp_path / "model")
