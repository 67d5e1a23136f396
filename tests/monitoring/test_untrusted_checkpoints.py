"""Checkpoints that somebody else wrote: nothing in them is run, and what is no checkpoint is named in one line."""

import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

import prunelit
from prunelit.callbacks import LLMBIP, Magnitude
from prunelit.cli.main import main
from prunelit.monitoring import checkpoints
from prunelit.monitoring.checkpoints import AtomicCheckpointIO
from prunelit.recovery.module import RecoveryModule
from prunelit.runtime.errors import SourceNotFound
from prunelit.runtime.torch_files import read_checkpoint_file
from tests.foreign_job import ForeignData, ForeignModule
from tests.pruning.test_attach import fail, trainer


class Canary:
    """An object whose loading creates a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a job whose model was cut."""
    folder = tmp_path_factory.mktemp("trained")
    keep = ModelCheckpoint(dirpath=folder, save_last=True)
    trainer(folder, Magnitude(0.3, align=8), keep, enable_checkpointing=True).fit(
        ForeignModule(), datamodule=ForeignData()
    )
    return folder / "last.ckpt"


@pytest.fixture
def canary(trained: Path, tmp_path: Path) -> Path:
    """The same with an object in it that writes `sung` when it is loaded; the plan beside it is not there."""
    path = tmp_path / "checkpoints" / "canary.ckpt"
    path.parent.mkdir()
    torch.save(torch.load(trained, weights_only=True) | {"hyper_parameters": {"x": Canary(tmp_path / "sung")}}, path)
    return path


def fit(folder: Path, path: Path, **options: Any) -> None:
    trainer(folder, Magnitude(0.3, align=8)).fit(
        ForeignModule(), datamodule=ForeignData(), ckpt_path=str(path), **options
    )


WAYS: dict[str, Callable[[Path, Path], Any]] = {
    "attached job": fit,
    "attached job, weights_only": lambda folder, path: fit(folder, path, weights_only=True),
    "validate": lambda folder, path: trainer(folder, Magnitude(0.3, align=8)).validate(
        ForeignModule(), datamodule=ForeignData(), ckpt_path=str(path)
    ),
    "restore a module": lambda folder, path: prunelit.restore(ForeignModule(), path),
    "restore a model": lambda folder, path: prunelit.restore(ForeignModule.build(), path),
    "our writer": lambda folder, path: AtomicCheckpointIO().load_checkpoint(path),
    "our writer, weights_only": lambda folder, path: AtomicCheckpointIO().load_checkpoint(path, weights_only=True),
}


@pytest.mark.parametrize("way", [way for way in WAYS if not way.startswith("restore")])
def test_nothing_in_a_checkpoint_is_run(canary: Path, tmp_path: Path, way: str) -> None:
    with pytest.raises(SourceNotFound, match=r"canary\.ckpt.*plain data, got one with objects .*: io\.open; if you"):
        WAYS[way](tmp_path / "run", canary)
    assert not (tmp_path / "sung").exists()


def test_the_plan_is_read_without_running_what_the_caller_allows(
    canary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Magnitude, "score", fail)
    seen: list[Any] = []

    class Stops(ForeignModule):
        def setup(self, stage: str) -> None:  # after the callback has read the file, before Lightning does
            seen.append((tmp_path / "sung").exists())
            raise KeyError("stop")

    callback = Magnitude(0.3, align=8)
    with pytest.raises(KeyError, match="stop"):
        trainer(tmp_path, callback).fit(Stops(), datamodule=ForeignData(), ckpt_path=str(canary), weights_only=False)
    assert seen == [False]
    assert callback.applied_plan is not None


@pytest.mark.parametrize("build", [ForeignModule, ForeignModule.build])
def test_restore_takes_weights_and_plan_alone(canary: Path, trained: Path, tmp_path: Path, build: Any) -> None:
    content = torch.load(trained, weights_only=True)
    parameters = {"x": Canary(tmp_path / "sung"), "folder": tmp_path}  # a Path is no plain data either
    torch.save(content | {"hyper_parameters": parameters}, canary)
    found, expected = prunelit.restore(build(), canary).state_dict(), prunelit.restore(build(), trained).state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert not (tmp_path / "sung").exists()


def test_load_from_checkpoint_runs_nothing(canary: Path, tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"[Uu]nsupported global|weights_only"):
        RecoveryModule.load_from_checkpoint(canary)
    assert not (tmp_path / "sung").exists()


def test_last_passes_over_it(canary: Path, trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = canary.with_name("good.ckpt")
    good.write_bytes(trained.read_bytes())
    os.utime(good, ns=(10**9, 10**9))
    run = Trainer(default_root_dir=tmp_path, accelerator="cpu", logger=False)
    checkpoints.configure_checkpoints(run)
    caplog.set_level("INFO", "prunelit")
    assert checkpoints.find_newest_checkpoint(run) == good
    assert "canary.ckpt is not to be read" in caplog.text
    assert not (tmp_path / "sung").exists()


def write_nonsense_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")


def write_nonsense_pickle(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", b"nonsense")
        archive.writestr("x/version", b"3")


HOSTILE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "cut short"),
    "text": (lambda path: path.write_text("a checkpoint\n" * 50), "not a file of torch.save"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-200]), "cut short"),
    "zip": (write_nonsense_zip, "not a file of torch.save"),
    "pickle": (write_nonsense_pickle, "torch cannot read"),
    "list": (lambda path: torch.save([1], path), "holds a list"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_is_no_checkpoint_is_one_line(
    trained: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, (write, said) = tmp_path / "a.ckpt", HOSTILE[kind]
    path.write_bytes(trained.read_bytes())
    write(path)
    monkeypatch.setattr(Magnitude, "score", fail)
    for way in ("attached job", "validate", "restore a module", "our writer"):
        with pytest.raises(SourceNotFound, match=rf"a\.ckpt'.*{said}") as refused:
            WAYS[way](tmp_path / "run", path)
        assert "\n" not in str(refused.value)
    assert main(["fit", "--model", "nowhere", "--ckpt_path", str(path)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_weights_alone_are_no_checkpoint_to_resume_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LLMBIP, "score", fail)
    torch.save({"state_dict": {}}, tmp_path / "weights.pt")
    with pytest.raises(SourceNotFound, match=r"weights\.pt.*without 'pytorch-lightning_version'"):
        fit(tmp_path / "run", tmp_path / "weights.pt")
    assert read_checkpoint_file(tmp_path / "weights.pt") == {"state_dict": {}}
