"""Every stage, and code without a Trainer, gets the shapes of a checkpoint; where nothing of ours is, it says so."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.utils.data import DataLoader

import prunelit
from prunelit.callbacks import Magnitude
from prunelit.core.saved_plans import CUT_MARK, list_saved_plans
from prunelit.recovery.datamodule import TextDataModule
from prunelit.recovery.module import RecoveryModule
from prunelit.runtime.errors import BadPlan, PrunelitError, SourceNotFound
from tests.foreign_job import ForeignData, ForeignModule, sequences
from tests.pruning.test_attach import bip, trainer, whole_layer_plan, widths
from tests.tiny import tiny


class Stages(ForeignModule):
    """A foreign job with all stages."""

    def test_step(self, batch: dict[str, torch.Tensor], index: int) -> None:
        self.validation_step(batch, index)

    def predict_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        logits: torch.Tensor = self.network(**batch).logits
        return logits


def loader() -> Any:
    return DataLoader(sequences(8), batch_size=4)  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=["widths", "a layer", "biases", "two cuts"])
def trained(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A trained module, its checkpoint, one of its weights only, and a maker of its callback."""
    folder = tmp_path_factory.mktemp("trained")
    plan = whole_layer_plan(folder / "plan.json")
    options: dict[str, Any] = {"a layer": {"plan_file": plan}, "biases": {"repair": "bias"}}.get(request.param, {})
    module = Stages()
    if request.param == "two cuts":
        trainer(folder, bip()).fit(module, datamodule=ForeignData())
    keep = ModelCheckpoint(dirpath=folder / "ckpt", save_last=True)
    light = ModelCheckpoint(dirpath=folder / "ckpt", filename="light", save_weights_only=True, every_n_train_steps=4)
    trainer(folder, bip(**options), keep, light, enable_checkpointing=True).fit(module, datamodule=ForeignData())
    return module.eval(), folder / "ckpt" / "last.ckpt", folder / "ckpt" / "light.ckpt", lambda: bip(**options)


def check_equal(module: Any, trained: Any) -> None:
    found, expected = module.state_dict(), trained[0].state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_every_stage_rebuilds_the_shapes(trained: Any, tmp_path: Path, stage: str) -> None:
    module = Stages()
    run = trainer(tmp_path, trained[3]())
    getattr(run, stage)(module, loader(), ckpt_path=str(trained[1]))
    check_equal(module, trained)


def test_any_callback_of_ours_rebuilds_the_shapes_for_a_test(trained: Any, tmp_path: Path) -> None:
    module = Stages()
    trainer(tmp_path, Magnitude(0.5)).test(module, loader(), ckpt_path=str(trained[1]), verbose=False)
    check_equal(module, trained)


def test_the_live_model_is_tested_by_its_own_checkpoint(tmp_path: Path) -> None:
    module, keep = Stages(), ModelCheckpoint(dirpath=tmp_path / "ckpt", save_last=True)
    run = trainer(tmp_path, bip(), keep, enable_checkpointing=True)
    run.fit(module, datamodule=ForeignData())
    small = widths(module)
    run.test(module, loader(), ckpt_path="best", verbose=False)
    run.validate(module, loader(), verbose=False)  # the path of the run before is not this one's
    run.fit(module, datamodule=ForeignData())
    assert widths(module) == small
    trainer(tmp_path, bip()).fit(module, datamodule=ForeignData())
    with pytest.raises(BadPlan, match=r"its model was cut by .*, this one by .*, then .*; build the module anew"):
        trainer(tmp_path, bip()).test(module, loader(), ckpt_path=str(tmp_path / "ckpt/last.ckpt"))


@pytest.mark.parametrize("which", [1, 2])
def test_restore_without_a_trainer(trained: Any, tmp_path: Path, which: int) -> None:
    module = prunelit.restore(Stages(), trained[which])
    check_equal(module, trained)
    network = prunelit.restore(ForeignModule.build(), str(trained[which])).eval()
    ids = torch.arange(8)[None]
    assert torch.equal(network(ids).logits, trained[0].network(ids).logits)
    torch.save(torch.load(trained[which], weights_only=True)["state_dict"], tmp_path / "state.pt")
    check_equal(prunelit.restore(Stages(), tmp_path / "state.pt"), trained)
    state = torch.load(trained[which], weights_only=True)["state_dict"]
    torch.save({name: value.bfloat16() for name, value in state.items()}, tmp_path / "half.pt")
    halved = prunelit.restore(Stages(), tmp_path / "half.pt")
    assert widths(halved) == widths(trained[0])


def test_a_restored_module_trains_on_by_the_checkpoint(trained: Any, tmp_path: Path) -> None:
    module = prunelit.restore(Stages(), trained[1])
    run = trainer(tmp_path, trained[3](), steps=6)
    run.fit(module, datamodule=ForeignData(), ckpt_path=str(trained[1]))
    assert widths(module) == widths(trained[0])
    assert run.global_step == 6


@pytest.mark.parametrize("way", ["test", "fit", "load_from_checkpoint", "torch"])
def test_where_nothing_of_ours_is_the_error_says_what_was_done(trained: Any, tmp_path: Path, way: str) -> None:
    with pytest.raises(RuntimeError, match=r"this checkpoint was cut by prunelit: .*prunelit\.restore\(module"):
        if way == "test":
            trainer(tmp_path).test(Stages(), loader(), ckpt_path=str(trained[1]))
        elif way == "fit":
            trainer(tmp_path, steps=6).fit(Stages(), datamodule=ForeignData(), ckpt_path=str(trained[1]))
        elif way == "load_from_checkpoint":
            Stages.load_from_checkpoint(trained[2])
        else:
            Stages().load_state_dict(torch.load(trained[2], weights_only=True)["state_dict"])


@pytest.mark.parametrize("way", ["as it is", "pickled", "copied", "restored"])
def test_only_checkpoints_hold_the_plan(trained: Any, tmp_path: Path, way: str) -> None:
    module = {
        "as it is": lambda: trained[0],
        "pickled": lambda: pickle.loads(pickle.dumps(trained[0])),
        "copied": lambda: copy.deepcopy(trained[0]),
        "restored": lambda: prunelit.restore(Stages(), trained[1]),
    }[way]()
    average = {name: value.clone() for name, value in module.state_dict().items()}
    for name, value in module.state_dict().items():  # as jobs do
        average[name].mul_(0.5).add_(value, alpha=0.5)
    assert all(value.is_floating_point() for value in average.values())
    run = trainer(tmp_path)  # without a callback of ours
    run.strategy.connect(module)
    for weights_only in (True, False):
        run.save_checkpoint(tmp_path / "saved.ckpt", weights_only=weights_only)
        check_equal(prunelit.restore(Stages(), tmp_path / "saved.ckpt"), trained)


class StoresPlan(Callback):
    """What it calls a plan is none of ours."""

    def state_dict(self) -> dict[str, Any]:
        return {"plan": "weekly"}


def test_what_others_call_a_plan_is_passed_over(tmp_path: Path) -> None:
    keep = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    trainer(tmp_path, StoresPlan(), bip(), keep, enable_checkpointing=True).fit(Stages(), datamodule=ForeignData())
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    marked = dict(content["state_dict"])
    content["state_dict"].pop(CUT_MARK)
    assert list_saved_plans(content) == list_saved_plans({"state_dict": marked})
    trainer(tmp_path, StoresPlan(), bip(), steps=6).fit(
        Stages(), datamodule=ForeignData(), ckpt_path=str(tmp_path / "last.ckpt")
    )


def write_bytes(content: bytes) -> torch.Tensor:
    return torch.tensor(list(content), dtype=torch.uint8)


@pytest.mark.parametrize(
    "mark",
    ["x", None, torch.tensor(3), *map(write_bytes, (b"\xff\xfe", b"5", b"[5]", b"[]", b'["{}"]', b"[" * 100_000))],
)
def test_a_mark_of_somebody_else_is_one_line(tmp_path: Path, mark: Any) -> None:
    torch.save({"state_dict": {CUT_MARK: mark}}, tmp_path / "odd.ckpt")
    with pytest.raises(BadPlan) as refused:
        prunelit.restore(Stages(), tmp_path / "odd.ckpt")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("part", "value"), [("state_dict", [1]), ("state_dict", {5: torch.ones(1)}), ("callbacks", "s"), (5, 5)]
)
def test_a_checkpoint_of_other_types_is_one_line(tmp_path: Path, part: Any, value: Any) -> None:
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2"} | {part: value}, tmp_path / "odd.ckpt")
    for read in (
        lambda path: prunelit.restore(Stages(), path),
        lambda path: trainer(tmp_path, bip()).test(Stages(), loader(), ckpt_path=str(path)),
    ):
        with pytest.raises(SourceNotFound, match=r"odd\.ckpt'.* with names for ") as refused:
            read(tmp_path / "odd.ckpt")
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("state", ["s", {"plan": 5}, {"plan": "{}", "repaired": None, "cut_weights": None}])
def test_a_callback_state_of_other_types_is_one_line(tmp_path: Path, state: Any) -> None:
    content = {"state_dict": {}, "pytorch-lightning_version": "2", "callbacks": {bip().state_key: state}}
    torch.save(content, tmp_path / "odd.ckpt")
    with pytest.raises(BadPlan) as refused:
        trainer(tmp_path, bip()).fit(Stages(), datamodule=ForeignData(), ckpt_path=str(tmp_path / "odd.ckpt"))
    assert "\n" not in str(refused.value)


def test_what_cannot_be_restored_is_said_in_one_line(trained: Any, tmp_path: Path) -> None:
    with pytest.raises(BadPlan, match="without a plan"):
        torch.save({"state_dict": {}}, tmp_path / "plain.ckpt")
        prunelit.restore(Stages(), tmp_path / "plain.ckpt")
    with pytest.raises(BadPlan, match="made for another model"):
        prunelit.restore(tiny("llama"), trained[1])
    with pytest.raises(PrunelitError, match="expected a LightningModule or a transformers model, got dict"):
        prunelit.restore({}, trained[1])  # type: ignore[type-var]
    content = torch.load(trained[1], weights_only=True)
    state = content["state_dict"]
    torch.save(content | {"state_dict": {CUT_MARK: state[CUT_MARK]}}, tmp_path / "empty.ckpt")
    for fresh in (Stages(), ForeignModule.build()):
        with pytest.raises(BadPlan, match=r"does not fit Stages|expected all weights of Llama|sit on repaired weights"):
            prunelit.restore(fresh, tmp_path / "empty.ckpt")


def test_a_job_without_a_cut_has_no_mark(tmp_path: Path) -> None:
    module, run = Stages(), trainer(tmp_path)
    run.fit(module, datamodule=ForeignData())
    run.save_checkpoint(tmp_path / "dense.ckpt")
    assert list_saved_plans(torch.load(tmp_path / "dense.ckpt", weights_only=True)) == []


# RecoveryModule --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(f"w{n * 7 % 101}" for n in range(250)))
    return str(path)


def text(source: str, words: str) -> TextDataModule:
    return TextDataModule(
        source, words, seqlen=16, batch_size=2, calibration_windows=8, validation_windows=4, train_windows=9, seed=1
    )


@pytest.fixture(scope="module", params=["adapters", "all weights", "repaired"])
def recovered(request: Any, source: str, words: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("recovered")
    repair = {"repaired": "least_squares"}.get(request.param, "none")
    options = {"lora_rank": 0 if request.param == "all weights" else 4}
    module, keep = RecoveryModule(source, **options), ModelCheckpoint(dirpath=folder / "ckpt", save_last=True)
    run = trainer(folder, bip(repair=repair), keep, enable_checkpointing=True)
    run.fit(module, datamodule=text(source, words))
    perplexity = run.validate(module, text(source, words), verbose=False)[0]["val_perplexity"]
    return folder, folder / "ckpt" / "last.ckpt", perplexity, repair, module, options


@pytest.mark.parametrize("kept", [True, False])
def test_recovery_is_validated_from_its_checkpoint(
    source: str, words: str, recovered: Any, tmp_path: Path, kept: bool
) -> None:
    folder, path, perplexity, repair, _, options = recovered
    module = RecoveryModule(source, **options)
    run = trainer(folder if kept else tmp_path, bip(repair=repair))
    found = run.validate(module, text(source, words), ckpt_path=str(path), verbose=False)[0]["val_perplexity"]
    assert found == pytest.approx(perplexity, rel=1e-6)


def test_recovery_loads_from_its_checkpoint_where_it_holds_all(source: str, recovered: Any) -> None:
    _, path, _, repair, trained_module, options = recovered
    ids = torch.arange(8)[None]
    if repair != "none":
        for load in (RecoveryModule.load_from_checkpoint, lambda path: prunelit.restore(RecoveryModule(source), path)):
            with pytest.raises(BadPlan, match="sit on repaired weights, which it does not hold"):
                load(path)
        return
    with torch.no_grad():
        expected = trained_module.model.eval()(ids).logits
        for module in (
            RecoveryModule.load_from_checkpoint(path),
            prunelit.restore(RecoveryModule(source, **options), path),
        ):
            torch.testing.assert_close(module.model.eval()(ids).logits, expected)


def test_recovery_without_its_callback_says_what_to_add(
    source: str, words: str, recovered: Any, tmp_path: Path
) -> None:
    with pytest.raises(BadPlan, match="this checkpoint was cut by prunelit: add the callback of llm_bip"):
        trainer(tmp_path).validate(
            RecoveryModule(source, **recovered[5]), text(source, words), ckpt_path=str(recovered[1])
        )
