"""A run that was ended in any way goes on from its newest whole checkpoint and ends in the weights of one that ran on.

Run as a program, this file is a nursery of runs that are to be killed: it imports the stack once and forks each run.
"""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import load_file

from prunelit.callbacks import LLMBIP, Magnitude
from prunelit.cli.main import main
from prunelit.monitoring import checkpoints
from prunelit.monitoring.checkpoints import AtomicCheckpointIO, SaveOnSigterm
from prunelit.recovery.datamodule import TextDataModule
from prunelit.recovery.module import RecoveryModule
from prunelit.runtime import atomic_files, torch_files
from prunelit.runtime.errors import BadPlan, OutputNotWritable, SourceNotFound
from tests.tiny import tiny, tiny_tokenizer

ROOT = Path(__file__).parents[2]
STEPS = 8


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(f"w{n * 7 % 101}" for n in range(250)))
    return str(path)


def fit(source: str, words: str, folder: Path, *callbacks: Any, resume: Any = None, **options: Any) -> Any:
    """A short run without the command line; every random number in it is seeded."""
    seed_everything(7, verbose=False)
    shape = {"lora_rank": 4, "lora_dropout": 0.2, "learning_rate": 1e-2}
    module = RecoveryModule(source, **{**shape, **options.pop("model", {})})
    data = TextDataModule(
        source, words, seqlen=16, batch_size=2, calibration_windows=8, validation_windows=4, train_windows=9, seed=1
    )
    pruner = options.pop("pruner", None) or LLMBIP(0.3, align=8)
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_steps=STEPS // options.get("accumulate_grad_batches", 1),
        limit_val_batches=2,
        val_check_interval=options.pop("val_check_interval", 2),
        callbacks=[pruner, options.pop("saver", None) or SaveOnSigterm(), *callbacks],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )
    checkpoints.configure_checkpoints(trainer)
    trainer.fit(
        module, datamodule=data, ckpt_path=checkpoints.find_newest_checkpoint(trainer) if resume == "last" else resume
    )
    return module.model.state_dict()


class Terminate(Callback):
    """Sends SIGTERM to this process after a batch of training, or within the validation that follows it."""

    def __init__(self, batch: int, validating: bool):
        self.batch, self.validating = batch, validating

    def on_train_batch_end(self, trainer: Trainer, *rest: Any) -> None:
        if not self.validating and trainer.fit_loop.total_batch_idx + 1 == self.batch:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_validation_batch_end(self, trainer: Trainer, *rest: Any) -> None:
        if self.validating and trainer.fit_loop.total_batch_idx + 1 == self.batch:
            self.validating = False
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="module")
def straight(source: str, words: str, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, torch.Tensor]]:
    """Weights of runs that nothing stopped, by the batches that make a step."""
    return {
        n: fit(
            source, words, tmp_path_factory.mktemp("straight"), enable_checkpointing=False, accumulate_grad_batches=n
        )
        for n in (1, 2, 3)
    }


EVERY_BATCH = [(batch, False, n) for n in (1, 2, 3) for batch in range(1, STEPS) if n == 1 or batch < 5]
IN_VALIDATION = [(2, True, 1), (4, True, 1), (2, True, 3)]
QUICK = [(3, False, 1), (4, False, 1), (2, True, 1), (3, False, 2), (4, False, 3)]


@pytest.mark.parametrize(
    ("batch", "validating", "accumulate"),
    [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in EVERY_BATCH + IN_VALIDATION],
)
def test_sigterm_saves_the_step_where_it_came_and_the_run_goes_on(
    source: str, words: str, straight: Any, tmp_path: Path, batch: int, validating: bool, accumulate: int
) -> None:
    with pytest.raises(SystemExit) as stopped:
        fit(source, words, tmp_path, Terminate(batch, validating), accumulate_grad_batches=accumulate)
    assert stopped.value.code == 143
    saved = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    last_batch = 4  # of an epoch, after which there is always a step
    assert saved["global_step"] == batch // accumulate + (batch == last_batch and batch % accumulate > 0)
    resumed = fit(source, words, tmp_path, resume="last", accumulate_grad_batches=accumulate)
    assert all(torch.equal(resumed[name], value) for name, value in straight[accumulate].items())


class Validations(Callback):
    """Keeps the perplexity of every validation, by the training batches before it."""

    def __init__(self) -> None:
        self.perplexities: dict[int, float] = {}

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        batches = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        assert batches not in self.perplexities
        self.perplexities[batches] = float(trainer.callback_metrics["val_perplexity"])


@pytest.mark.parametrize("step", [2, 3, 4, 6])
def test_a_checkpoint_before_a_validation_is_followed_by_it(source: str, words: str, tmp_path: Path, step: int) -> None:
    keep = ModelCheckpoint(filename="{step}", every_n_train_steps=step, save_top_k=-1)
    whole, resumed = Validations(), Validations()
    weights = fit(source, words, tmp_path, keep, whole)
    again = fit(source, words, tmp_path, resumed, resume=str(tmp_path / f"checkpoints/step={step}.ckpt"))
    assert list(whole.perplexities) == [2, 4, 6, 8]
    assert resumed.perplexities == {batches: x for batches, x in whole.perplexities.items() if batches >= step}
    assert all(torch.equal(again[name], value) for name, value in weights.items())


def test_a_validation_of_every_batch_is_made_up_for_once(source: str, words: str, tmp_path: Path) -> None:
    keep = ModelCheckpoint(filename="{step}", every_n_train_steps=3, save_top_k=-1)
    fit(source, words, tmp_path, keep, val_check_interval=1)
    resumed, saver = Validations(), SaveOnSigterm()
    options = {"val_check_interval": 1, "resume": str(tmp_path / "checkpoints/step=3.ckpt"), "saver": saver}
    fit(source, words, tmp_path, resumed, **options)
    assert list(resumed.perplexities) == [3, 4, 5, 6, 7, 8]
    other = Validations()  # the same callback in a run that starts anew
    fit(source, words, tmp_path, other, val_check_interval=1, saver=saver)
    assert list(other.perplexities) == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_checkpoint_after_a_validation_is_not_followed_by_it_again(source: str, words: str, tmp_path: Path) -> None:
    keep = ModelCheckpoint(filename="{step}", save_on_train_epoch_end=False, save_top_k=-1)
    whole, resumed = Validations(), Validations()
    fit(source, words, tmp_path, keep, whole)
    fit(source, words, tmp_path, resumed, resume=str(tmp_path / "checkpoints/step=4.ckpt"))
    assert resumed.perplexities == {batches: x for batches, x in whole.perplexities.items() if batches > 4}


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_validation_that_sigterm_broke_off_is_done_again(
    source: str, words: str, straight: Any, tmp_path: Path, accumulate: int
) -> None:
    whole, resumed = Validations(), Validations()
    fit(source, words, tmp_path / "whole", whole, enable_checkpointing=False, accumulate_grad_batches=accumulate)
    with pytest.raises(SystemExit):
        fit(source, words, tmp_path, Terminate(2, validating=True), accumulate_grad_batches=accumulate)
    fit(source, words, tmp_path, resumed, resume="last", accumulate_grad_batches=accumulate)
    assert resumed.perplexities == whole.perplexities


def test_sigterm_saves_where_nothing_else_writes_checkpoints(source: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        fit(source, words, tmp_path, Terminate(3, validating=False), enable_checkpointing=False)
    assert torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 3


@pytest.mark.parametrize(("given", "expected"), [(None, "checkpoints"), ("mine", "mine")])
def test_checkpoints_go_where_the_next_run_looks(tmp_path: Path, given: str | None, expected: str) -> None:
    keep = ModelCheckpoint(given and tmp_path / given)
    trainer = Trainer(default_root_dir=tmp_path, accelerator="cpu", logger=CSVLogger(tmp_path), callbacks=[keep])
    checkpoints.configure_checkpoints(trainer)
    assert keep.dirpath == str(tmp_path / expected)


def test_a_checkpoint_holds_all_that_a_run_needs(source: str, words: str, tmp_path: Path) -> None:
    fit(source, words, tmp_path, ModelCheckpoint(every_n_train_steps=3, save_last=True))
    saved = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert {"state_dict", "optimizer_states", "lr_schedulers", "loops", "random_states"} <= set(saved)
    assert saved["loops"]["fit_loop"]["state_dict"]["combined_loader"] == [{"epoch": 1, "batch": 2}]
    state = saved["callbacks"]["LLMBIP"]
    assert all(state[name] for name in ("plan", "model", "tokenizer"))


# Damage ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(source: str, words: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run with a checkpoint of every third step."""
    folder = tmp_path_factory.mktemp("finished")
    keep = ModelCheckpoint(filename="{step}", every_n_train_steps=3, save_last=True, save_top_k=-1)
    fit(source, words, folder, keep)
    return folder


def copy(finished: Path, folder: Path) -> list[Path]:
    """Its checkpoints in a folder of their own, oldest first."""
    (folder / "checkpoints").mkdir(parents=True)
    copies = []
    for name in ("step=3.ckpt", "step=6.ckpt", "last.ckpt"):
        copies.append(folder / "checkpoints" / name)
        copies[-1].write_bytes((finished / "checkpoints" / name).read_bytes())
        os.utime(copies[-1], ns=(len(copies) * 10**9, len(copies) * 10**9))
    return copies


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(
    ("harm", "wrong"),
    [(cut_short, "cut short"), (flip_a_bit, "damaged"), (empty, "cut short"), (Path.unlink, "missing")],
)
def test_a_damaged_checkpoint_is_never_loaded(finished: Path, tmp_path: Path, harm: Any, wrong: str) -> None:
    *_, good, last = copy(finished, tmp_path)
    AtomicCheckpointIO().load_checkpoint(last)
    harm(last)
    with pytest.raises(SourceNotFound, match=rf"last\.ckpt.*{wrong}.*resume from '.*step=6\.ckpt'"):
        AtomicCheckpointIO().load_checkpoint(last)
    assert torch_files.find_file_damage(good) is None


def test_last_is_the_newest_whole_one_and_says_so(
    finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, last = (path.relative_to(tmp_path) for path in copy(finished, tmp_path))
    monkeypatch.chdir(tmp_path)
    # Lightning makes the folder of the callback absolute, while that of the Trainer stays as it was given.
    callbacks = [ModelCheckpoint("checkpoints")]
    trainer = Trainer(default_root_dir=".", accelerator="cpu", logger=False, callbacks=callbacks)
    checkpoints.configure_checkpoints(trainer)
    caplog.set_level("INFO", "prunelit")
    assert checkpoints.find_newest_checkpoint(trainer) == last
    cut_short(last)
    torch_files.write_torch_file(tmp_path / "checkpoints" / "weights.ckpt", {"state_dict": {}})
    assert checkpoints.find_newest_checkpoint(trainer) == second
    assert caplog.text.count("last.ckpt is cut short: taking the one before") == 1
    assert "weights.ckpt is without an optimiser's state" in caplog.text
    for path in (first, second):
        flip_a_bit(path)
    assert checkpoints.find_newest_checkpoint(trainer) is None
    assert "starting from the beginning" in caplog.text


def test_a_damaged_one_is_refused_before_anything_is_scored(
    source: str, words: str, finished: Path, tmp_path: Path
) -> None:
    *_, last = copy(finished, tmp_path)
    cut_short(last)
    pruner = LLMBIP(0.3, align=8)
    pruner.score = None  # type: ignore[method-assign,assignment]
    with pytest.raises(SourceNotFound, match="cut short"):
        fit(source, words, tmp_path / "other", pruner=pruner, resume=last)


def test_a_full_disk_leaves_the_earlier_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OutputNotWritable, match=r"last\.ckpt.*cannot be written.*make room"):
            AtomicCheckpointIO().save_checkpoint({"step": 2, "w": torch.zeros(10**6)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert torch.load(path) == {"step": 1}
    assert os.listdir(tmp_path) == ["last.ckpt"]


def test_what_a_killed_process_left_at_the_side_goes_and_what_a_live_one_writes_stays(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    dead = subprocess.Popen(["true"])
    dead.wait()
    for process in (dead.pid, os.getppid()):
        (tmp_path / f".last.ckpt.{atomic_files.platform.node()}.{process}").write_text("half")
    torch_files.write_torch_file(path, {})
    assert sorted(os.listdir(tmp_path)) == sorted(
        [f".last.ckpt.{atomic_files.platform.node()}.{os.getppid()}", "last.ckpt"]
    )


def test_what_can_not_be_pickled_is_not_blamed_on_the_disk(tmp_path: Path) -> None:
    with pytest.raises(AttributeError, match="lambda"):
        torch_files.write_torch_file(tmp_path / "x.ckpt", lambda: None)
    assert not os.listdir(tmp_path)


# Another run -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"pruner": lambda: LLMBIP(0.4, align=8)}, "ratio 0.3, this run asks for 0.4"),
        ({"pruner": lambda: LLMBIP(0.3, align=8, form="exact")}, "form"),
        ({"pruner": lambda: Magnitude(0.3, align=8)}, "cut by LLMBIP, this run cuts by Magnitude"),
        ({"model": "weights"}, "another model"),
        ({"model": "tokenizer"}, "another tokenizer"),
    ],
)
def test_going_on_with_something_else_is_refused(
    source: str, words: str, finished: Path, tmp_path: Path, other: dict[str, Any], said: str
) -> None:
    *_, last = copy(finished, tmp_path)
    if kind := other.get("model"):
        tokenizer, model = tiny_tokenizer(), tiny("llama", vocab_size=len(tiny_tokenizer()))
        if kind == "weights":
            with torch.no_grad():
                model.model.layers[1].mlp.down_proj.weight.mul_(1.001)
        else:
            tokenizer.add_special_tokens({"eos_token": "<pad>"})
        source = str(tmp_path / "model")
        model.save_pretrained(source)
        tokenizer.save_pretrained(source)
    with pytest.raises(BadPlan, match=said):
        fit(source, words, tmp_path, pruner=other["pruner"]() if "pruner" in other else None, resume=last)


def test_another_learning_rate_is_not_another_run(source: str, words: str, finished: Path, tmp_path: Path) -> None:
    first, *_ = copy(finished, tmp_path)
    fit(source, words, tmp_path, resume=first, model={"learning_rate": 1e-3})


# The command, killed ---------------------------------------------------------------------------------------------


class Nursery:
    """A process that has imported everything, and forks one run after another."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.monitoring.test_checkpoints"],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, folder: Path, *more: str, at: str = "", limit: float | None = None) -> tuple[int, str, float]:
        """Exit status (negative: the signal), what it said, seconds; `at` is where it kills itself, see `_arm`."""
        arguments = ["fit", "--config", str(folder / "run.yaml"), *more]
        job = {"arguments": arguments, "at": at, "folder": str(folder)}
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        start = time.perf_counter()
        run = int(self.process.stdout.readline())
        if limit is not None:
            time.sleep(limit)
            os.kill(run, signal.SIGKILL)  # a zombie until the nursery hears our next line, so never somebody else
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        status = os.waitstatus_to_exitcode(int(self.process.stdout.readline()))
        return status, (folder / "said.txt").read_text(), time.perf_counter() - start

    def close(self) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.process.stdout.close()


def _arm(at: str, folder: Path) -> None:
    """Count what is expensive in counts.txt, and kill this process where `at` says."""
    from prunelit.export.proof import compare, reload
    from prunelit.repair import reconstruct

    place, _, number = at.partition(":")
    passed = 0

    def counted(owner: Any, name: str, what: str) -> None:
        real = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            with (folder / "counts.txt").open("a") as file:
                file.write(f"{what}\n")
            if place == f"in {what}":
                os.kill(os.getpid(), signal.SIGKILL)
            found = real(*args, **kwargs)
            if place == f"after {what}":
                os.kill(os.getpid(), signal.SIGKILL)
            return found

        setattr(owner, name, call)

    compare.run_reload_script = reload.reload_and_run  # as in tests/conftest.py
    counted(LLMBIP, "score", "score")
    counted(reconstruct, "apply_least_squares", "repair")
    if place == "full disk":
        limited = torch_files.write_torch_file

        def write(path: Path, content: Any) -> None:
            if path.suffix == ".ckpt" and content["global_step"] >= int(number):
                resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
            limited(path, content)

        checkpoints.write_torch_file = write  # type: ignore[assignment]
    replace, step = os.replace, RecoveryModule.training_step

    def replaced(before: Any, after: Any) -> None:
        nonlocal passed
        if place == "writing" and str(after).endswith(".ckpt"):
            passed += 1
            if passed == int(number):
                os.kill(os.getpid(), signal.SIGKILL)
        replace(before, after)

    def stepped(self: Any, *args: Any) -> Any:
        if place == "step" and self.global_step == int(number):
            os.kill(os.getpid(), signal.SIGKILL)
        if place == "SIGTERM" and self.global_step == int(number):
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args)

    atomic_files.os.replace = replaced  # type: ignore[assignment]
    RecoveryModule.training_step = stepped  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def nursery() -> Any:
    found = Nursery()
    yield found
    found.close()


def prepare(folder: Path, source: str, words: str) -> Path:
    """run.yaml with a checkpoint after each validation, every second step."""
    folder.mkdir(exist_ok=True)
    pruner = {"ratio": 0.3, "align": 8, "repair": "least_squares"}
    run = {
        "seed_everything": 3,
        "model": {"model": source, "lora_rank": 4, "lora_dropout": 0.2, "learning_rate": 1e-2},
        "data": {
            "train": words,
            "seqlen": 16,
            "batch_size": 2,
            "calibration_windows": 8,
            "validation_windows": 4,
            "train_windows": 9,
        },
        "trainer": {
            "default_root_dir": str(folder),
            "accelerator": "cpu",
            "max_steps": STEPS,
            "val_check_interval": 2,
            "logger": False,
            "enable_progress_bar": False,
            "callbacks": [
                {"class_path": "prunelit.callbacks.LLMBIP", "init_args": pruner},
                {"class_path": "ModelCheckpoint", "init_args": {"save_last": True, "save_on_train_epoch_end": False}},
            ],
        },
        "ckpt_path": "last",
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return folder


@pytest.fixture(scope="module")
def wanted(nursery: Nursery, source: str, words: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a run leaves that nothing stopped: its weights, its report, its seconds."""
    folder = prepare(tmp_path_factory.mktemp("wanted"), source, words)
    status, said, seconds = nursery.run(folder)
    assert status == 0, said
    assert "no checkpoint in" in said  # `last` is no error where there is none
    assert counts(folder) == ["repair", "score"]
    report = json.loads((folder / "report.json").read_text()) | {"curve": read_curve(folder)}
    return load_file(folder / "model/model.safetensors"), report, seconds


def read_curve(folder: Path) -> list[tuple[float, float]]:
    """Steps and perplexities of all validations. The loss of a step before the resume is not logged again."""
    points = json.loads((folder / "record.json").read_text())["training"]
    return [(point["step"], point["val_perplexity"]) for point in points]


def counts(folder: Path) -> list[str]:
    return sorted((folder / "counts.txt").read_text().split()) if (folder / "counts.txt").exists() else []


def check_equal(folder: Path, wanted: Any) -> None:
    weights, report, _ = wanted
    found = load_file(folder / "model/model.safetensors")
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], value) for name, value in weights.items())
    again = json.loads((folder / "report.json").read_text())
    assert all(again[row] == report[row] for row in ("dense", "pruned", "recovered"))
    assert read_curve(folder) == report["curve"] and len(report["curve"]) == STEPS // 2
    assert not [path.name for path in folder.rglob(".*") if path.suffix == ".ckpt"]


@pytest.mark.slow
def test_killed_at_every_kind_of_moment_and_nothing_is_computed_twice(
    nursery: Nursery, wanted: Any, source: str, words: str, tmp_path: Path
) -> None:
    folder = prepare(tmp_path / "run", source, words)
    for at in ("in score", "after score", "in repair", "after repair", "step:1", "writing:1", "writing:2", "step:3"):
        status, said, _ = nursery.run(folder, at=at)
        assert status == -signal.SIGKILL, (at, said)
    status, said, _ = nursery.run(folder, at="SIGTERM:5")
    assert status == 143, said
    assert "saved step 6" in said
    assert nursery.run(folder)[0] == 0
    check_equal(folder, wanted)
    # Each twice more than needed: killed in it, and killed after it before its end was on the disk.
    assert counts(folder) == ["repair"] * 3 + ["score"] * 3


@pytest.mark.slow
def test_killed_at_random_moments(nursery: Nursery, wanted: Any, source: str, words: str, tmp_path: Path) -> None:
    chance = random.Random(0)
    for number in range(2):
        folder = prepare(tmp_path / str(number), source, words)
        for _ in range(3):
            status, said, _ = nursery.run(folder, limit=chance.uniform(0.05, 1.0) * wanted[2])
            assert status in (0, -signal.SIGKILL), said
        status, said, _ = nursery.run(folder)
        assert status == 0, said
        check_equal(folder, wanted)


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_room_lets_the_run_go_on(
    nursery: Nursery, wanted: Any, source: str, words: str, tmp_path: Path
) -> None:
    folder = prepare(tmp_path / "run", source, words)
    status, said, _ = nursery.run(folder, at="full disk:4")
    assert status == 2, said
    assert said.count("prunelit: error: ") == 1
    assert "cannot be written" in said.splitlines()[-1]
    assert torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 2
    assert nursery.run(folder)[0] == 0
    check_equal(folder, wanted)


def _nursery() -> None:
    """For every line of stdin fork a run, say its number, and after the next line how it ended."""
    for line in sys.stdin:
        job = json.loads(line)
        run = os.fork()
        if run == 0:
            said = os.open(f"{job['folder']}/said.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(said, 1)
            os.dup2(said, 2)
            sys.argv = ["prunelit", *job["arguments"]]
            _arm(job["at"], Path(job["folder"]))
            try:
                code = main(job["arguments"])
            except SystemExit as stop:
                code = int(stop.code or 0)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        _answer(run)
        sys.stdin.readline()
        _answer(os.waitpid(run, 0)[1])


def _answer(number: int) -> None:
    sys.stdout.write(f"{number}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    _nursery()
