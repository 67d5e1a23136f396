"""What the dashboard logs, read back: an offline W&B run, TensorBoard's events, the CSV logger's files."""

import csv
import json
import os
import re
import subprocess
import sys
import time
import types
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from prunelit.cli.main import main
from prunelit.monitoring.dashboard import IMAGES, METRICS, Dashboard, list_shareable_files
from prunelit.monitoring.loggers import guard_hyperparameters
from prunelit.pruning.registry import method_class, methods
from prunelit.runtime.errors import BadOption
from tests.foreign_job import ForeignData, ForeignModule
from tests.tiny import tiny, tiny_tokenizer

LATE = ("quality_training", "quality_speed", "quality_stages")
ROOT = Path(__file__).parents[2]
MARKER, KEY, WORD, PROMPT = (
    "secretfolder",
    "0123456789abcdef0123456789abcdef01234567",
    "xylophone",
    "Tell me the secret",
)


def trainer(folder: Path, loggers: Any, *callbacks: Any, **more: Any) -> Trainer:
    options = {"max_steps": 4, "log_every_n_steps": 2, "val_check_interval": 2, "num_sanity_val_steps": 0} | more
    options = {"enable_checkpointing": False} | options
    return Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=loggers,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **options,
    )


def records(folder: Path) -> list[dict[str, Any]]:
    """The records of the one offline run in a folder, once W&B's own process has written the last one."""
    (path,) = folder.rglob("run-*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
    for _ in range(60):
        done = subprocess.run(command, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL)
        found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        if any(each["type"] == "exit" for each in found):
            return found
        time.sleep(0.5)
    raise AssertionError(f"{path} has no end")


def history(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    lines = [each["history"]["item"] for each in found if each["type"] == "history"]
    # Of media one key each: the others say their caption, size, ...
    return [line | {key.removesuffix("._type"): line[key] for key in line if key.endswith("._type")} for line in lines]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = tiny_tokenizer()
    folder = tmp_path_factory.mktemp(MARKER) / "model"
    tiny("llama", vocab_size=len(tokenizer), max_position_embeddings=512).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    text = folder.parent / "text.txt"
    text.write_text(f"{WORD} the quick brown fox jumps over the lazy dog. " * 400)
    return folder


@pytest.fixture(scope="module")
def fitted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`fit` with W&B offline, the dashboard and no prompts."""
    out = tmp_path_factory.mktemp("fitted")
    patch = pytest.MonkeyPatch()
    patch.setenv("WANDB_API_KEY", KEY)
    patch.setenv("WANDB_MODE", "offline")
    try:
        words = [
            *("fit", "--model", str(source), "--data.train", str(source.parent / "text.txt")),
            *("--data.seqlen", "32", "--data.validation_windows", "4", "--data.calibration_windows", "4"),
            *("--trainer.max_steps", "4", "--trainer.log_every_n_steps", "2", "--trainer.val_check_interval", "2"),
            *("--trainer.default_root_dir", str(out), "--trainer.accelerator", "cpu", "--report.prompts", "[]"),
            *("--trainer.logger", "WandbLogger", "--trainer.logger.save_dir", str(out), "--trainer.devices", "1"),
            *("--config", str(block_pruner(out)), "--config", str(dashboard(out))),
        ]
        patch.setattr(sys, "argv", ["prunelit", *words])  # Lightning reads it, as from a shell
        code = main(words)
        import wandb

        wandb.finish()
    finally:
        patch.undo()
    assert code == 0
    return out


def block_pruner(folder: Path) -> Path:
    path = folder / "block_pruner.yaml"
    path.write_text(
        "trainer:\n  callbacks+:\n    - class_path: prunelit.callbacks.BlockPruner\n      init_args: {count: 2}\n"
    )
    return path


def dashboard(folder: Path) -> Path:
    path = folder / "dashboard.yaml"
    path.write_text(
        (ROOT / "callbacks" / "dashboard.yaml").read_text().replace("artifacts: plan ", "artifacts: model ")
    )
    return path


def test_an_offline_run_holds_it_once(fitted: Path) -> None:
    lines = history(records(fitted))
    counts = Counter(name for line in lines for name in line if not name.startswith("_"))
    report = json.loads((fitted / "report.json").read_text())
    for state in ("dense", "pruned", "recovered"):
        assert [line[f"quality/{state}_perplexity"] for line in lines if f"quality/{state}_perplexity" in line] == [
            pytest.approx(report[state]["perplexity"])
        ]
    for name in ("prune/kept", "prune/search", "quality/quality", "quality/training", "quality/stages", "prune/layers"):
        assert counts[name] == 1, name
    assert counts["train/tokens_per_second"] == counts["quality/val_over_dense"] == 2
    assert counts["train_loss"] == 2 and counts["val_perplexity"] == 2  # Lightning's, and nobody else's
    tried = [line["search/evaluation"] for line in lines if "search/evaluation" in line]
    assert tried == list(range(1, len(tried) + 1)) and len(tried) >= 2
    assert [line["search/blocks"] for line in lines if "search/blocks" in line] == [0, 1, 2]
    axes = [line["stage/number"] for line in lines if "stage/number" in line]
    assert axes == list(range(1, len(axes) + 1)) and len(axes) >= 6


def test_every_metric_of_the_layout_is_logged(fitted: Path) -> None:
    names = {name for line in history(records(fitted)) for name in line}
    assert {name for section in METRICS.values() for name in section} <= names
    assert set(IMAGES.values()) - {"prune/scores"} <= names  # a block search has no scores of units


def test_summary_and_artifacts(fitted: Path) -> None:
    found = records(fitted)
    summary: dict[str, Any] = {}
    for each in found:
        if each["type"] == "summary":
            summary |= each["summary"]["update"]
    report = json.loads((fitted / "report.json").read_text())
    for state in ("dense", "pruned", "recovered"):
        assert summary[f"quality/{state}_perplexity"] == pytest.approx(report[state]["perplexity"])
    made = {each["artifact"]["name"]: each["artifact"] for each in found if each["type"] == "artifact"}
    assert made["plan"]["type"] == "plan" and made["model"]["type"] == "model"
    plan = json.loads((fitted / "plan.json").read_text())
    said = {name: json.dumps(each.get("metadata", "")) for name, each in made.items()}
    assert "of" in said["plan"] and said["plan"].count("base-") == 1
    files = {entry["path"] for entry in made["model"]["manifest"]["contents"]}
    assert {"model.safetensors", "config.json", "plan.json"} <= files
    assert not files & {"README.md", "report.json", "proof.json"}  # they name sources, or hold tokens of a text
    assert plan["method"] == "block_pruner"


def test_nothing_private_leaves(fitted: Path, source: Path) -> None:
    (run,) = (path.parent for path in fitted.rglob("run-*.wandb"))
    sent = [path for path in run.rglob("*") if path.is_file() and "logs" not in path.relative_to(run).parts]
    content = b"".join(path.read_bytes() for path in sent)
    assert b"quality/dense_perplexity" in content
    # Where W&B lays files out for the upload: in the local file only, not in what an artifact lists.
    content = re.sub(rb"[\w/.-]*/artifacts/staging/\w+", b"", content)
    private = [MARKER, KEY, WORD, PROMPT, "--data.train", str(Path.home()), str(fitted)]
    for word in private:
        if word and word != "/":
            assert word.encode() not in content, word
    assert {each["run"]["host"] for each in records(fitted) if each["type"] == "run"} == {"-"}


@pytest.mark.parametrize("first", [True, False])
def test_csv_and_tensorboard_get_numbers_pictures_and_tables(tmp_path: Path, first: bool) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    loggers = [CSVLogger(tmp_path, "csv"), TensorBoardLogger(tmp_path, "tb")]
    dashboard, pruner = Dashboard(), method_class("flap")(ratio=0.3, align=8, windows=4)
    callbacks = (dashboard, pruner) if first else (pruner, dashboard)
    trainer(tmp_path, loggers, *callbacks).fit(ForeignModule(), datamodule=ForeignData())
    logged = Path(loggers[0].log_dir)
    with (logged / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["prune/removed_share"] for row in rows if row.get("prune/removed_share")] == [
        str(pruner.applied_plan.predicted["ratio_of_block_parameters"])
    ]
    assert len([row for row in rows if row.get("train/tokens_per_second")]) == 2
    drawn = {path.name for path in (logged / "pictures").iterdir()}
    assert {"prune_kept.png", "prune_scores.png", "quality_training.png", "quality_stages.png"} == drawn - {
        "quality_speed.png"
    }
    with (logged / "tables" / "prune_layers.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(pruner.applied_plan.layers)
    events = EventAccumulator(loggers[1].log_dir, size_guidance={"images": 0}).Reload()
    tags = events.Tags()
    assert {"prune/removed_share", "train/tokens_per_second", "stage/seconds"} <= set(tags["scalars"])
    assert {"prune/kept", "prune/scores"} <= set(tags["images"])
    assert len(events.Images("prune/kept")) == 1
    assert "prune/layers/text_summary" in tags["tensors"]


def test_without_logger_or_method_it_does_nothing(tmp_path: Path) -> None:
    trainer(tmp_path, False, Dashboard(prompts=["a"])).fit(ForeignModule(), datamodule=ForeignData())
    assert not list(tmp_path.rglob("*.png"))
    logger = CSVLogger(tmp_path, "csv")
    trainer(tmp_path, logger, Dashboard()).fit(ForeignModule(), datamodule=ForeignData())
    drawn = {path.name for path in (Path(logger.log_dir) / "pictures").iterdir()}
    assert drawn == {"quality_training.png", "quality_speed.png"}


def test_completions_of_the_prompts_asked_for(tmp_path: Path, source: Path) -> None:
    from prunelit import RecoveryModule, TextDataModule

    module = RecoveryModule(str(source), lora_rank=2)
    data = TextDataModule(str(source), str(source.parent / "text.txt"), seqlen=32, validation_windows=2)
    logger = CSVLogger(tmp_path, "csv")
    callbacks = Dashboard(prompts=[PROMPT, "Why"], prompt_tokens=4), method_class("magnitude")(ratio=0.3, align=8)
    trainer(tmp_path, logger, *callbacks, max_steps=1, val_check_interval=1).fit(module, datamodule=data)
    with (Path(logger.log_dir) / "tables" / "samples.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["prompt"] for row in rows] == [PROMPT, "Why"]
    assert all(list(row) == ["prompt", "dense", "pruned", "recovered"] for row in rows)
    assert str(source.parent) not in (Path(logger.log_dir) / "hparams.yaml").read_text()


def test_a_job_of_two_models_without_a_cut_has_no_completions(tmp_path: Path) -> None:
    module, logger = ForeignModule(), CSVLogger(tmp_path, "csv")
    module.teacher = ForeignModule.build()  # type: ignore[assignment]
    module.tokenizer = tiny_tokenizer()  # type: ignore[assignment]
    trainer(tmp_path, logger, Dashboard(prompts=["a"]), max_steps=1).fit(module, datamodule=ForeignData())
    assert not (Path(logger.log_dir) / "tables" / "samples.csv").exists()


class Spy(Logger):
    """A logger of nobody's: it takes numbers."""

    def __init__(self, version: str) -> None:
        super().__init__()
        self._version, self.rows = version, list[dict[str, float]]()

    @property
    def name(self) -> str:
        return "spy"

    @property
    def version(self) -> str:
        return self._version

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.rows.append(dict(metrics))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def points(self, name: str) -> list[float]:
        return [row[name] for row in self.rows if name in row]


def test_a_resumed_run_goes_on_and_repeats_nothing(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def job(steps: int, version: str, resume: Path | None = None) -> Spy:
        spy, kept = Spy(version), ModelCheckpoint(dirpath=tmp_path / "checkpoints", save_last=True)
        loggers = [spy, TensorBoardLogger(tmp_path, "tb", version=version)]
        callbacks = Dashboard(), method_class("block_pruner")(count=1, windows=4), kept
        options = {"max_steps": steps, "val_check_interval": 4, "enable_checkpointing": True}
        path = None if resume is None else str(resume)
        trainer(tmp_path, loggers, *callbacks, **options).fit(ForeignModule(), datamodule=ForeignData(), ckpt_path=path)
        return spy

    first, last = job(4, "a"), tmp_path / "checkpoints" / "last.ckpt"
    again = job(8, "a", last)
    assert len(first.points("search/perplexity")) > 1 and len(first.points("prune/removed_share")) == 1
    assert again.points("search/perplexity") == again.points("prune/removed_share") == []
    assert len(again.points("train/tokens_per_second")) == 2
    events = EventAccumulator(str(tmp_path / "tb" / "a"), size_guidance={"images": 0}).Reload()
    assert [len(events.Images(name)) for name in ("prune/kept", "prune/search", "quality/training")] == [1, 1, 2]
    numbers = [event.step for event in events.Scalars("stage/seconds")]
    assert numbers == list(range(1, len(numbers) + 1))
    assert job(8, "b", last).points("prune/removed_share"), "another run of the logger has nothing yet"


def test_used_again_it_shows_the_next_job(tmp_path: Path) -> None:
    dashboard = Dashboard()
    for name in ("one", "two"):
        logger = CSVLogger(tmp_path, name)
        callbacks = dashboard, method_class("magnitude")(ratio=0.3, align=8)
        trainer(tmp_path / name, logger, *callbacks).fit(ForeignModule(), datamodule=ForeignData())
        drawn = {path.name for path in (Path(logger.log_dir) / "pictures").iterdir()}
        assert {"prune_kept.png", "prune_scores.png", "quality_training.png"} <= drawn


def test_a_search_is_on_disk_while_it_goes_on(tmp_path: Path) -> None:
    logger, seen = CSVLogger(tmp_path, "csv"), list[str]()

    class Watch(Callback):
        def on_event(self, event: str, facts: Any) -> None:
            if event == "removed":
                seen.append((Path(logger.log_dir) / "metrics.csv").read_text())

    callbacks = Dashboard(), Watch(), method_class("block_pruner")(count=2, windows=4)
    trainer(tmp_path, logger, *callbacks, max_steps=1).fit(ForeignModule(), datamodule=ForeignData())
    assert len(seen) == 3 and all("search/perplexity" in text for text in seen)
    assert len(seen[0]) < len(seen[1]) < len(seen[2])


def test_hyperparameters_of_any_job_reach_wandb_without_paths_and_text() -> None:
    from lightning.pytorch.loggers import WandbLogger

    run = types.SimpleNamespace(config={})
    logger = WandbLogger(project="prunes", offline=True, experiment=run)  # type: ignore[arg-type]
    run.config = types.SimpleNamespace(update=lambda given, **_: run.__dict__.update(got=given))
    for _ in range(2):
        guard_hyperparameters([logger])
    logger.log_hyperparams({"lora_rank": 8, "data": f"/home/{MARKER}/text.txt", "api_key": "abc", "said": "two words"})
    assert run.got == {"lora_rank": 8}


def test_a_model_leaves_without_sources_and_tokens(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "plan.json", "report.json", "proof.json", "README.md"):
        (folder / name).write_text(MARKER)
    found = list_shareable_files(folder, "{}")
    assert found == {"config.json": folder / "config.json", "plan.json": "{}"}


def test_it_is_no_method_and_refuses_other_artifacts() -> None:
    assert "dashboard" not in methods()
    with pytest.raises(BadOption, match="artifacts: expected one of none, plan, model, got 'all'"):
        Dashboard(artifacts="all")  # type: ignore[arg-type]


@pytest.mark.slow
def test_two_ranks_are_one_run(tmp_path: Path) -> None:
    """A foreign job by its command line, on two gloo processes."""
    (tmp_path / "job.yaml").write_text(
        f"seed_everything: 0\n"
        f"trainer: {{max_steps: 4, log_every_n_steps: 2, accelerator: cpu, devices: 2, strategy: ddp, "
        f"default_root_dir: {tmp_path}, enable_progress_bar: false, limit_val_batches: 0, "
        f"logger: {{class_path: WandbLogger, init_args: {{offline: true, save_dir: {tmp_path}}}}}}}\n"
    )
    (tmp_path / "flap.yaml").write_text(
        "trainer:\n  callbacks+:\n    - class_path: prunelit.callbacks.FLAP\n"
        "      init_args: {ratio: 0.3, align: 8, windows: 8}\n"
    )
    # W&B's process of the tests above would take the run over, and end it only when it ends itself.
    alone = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    configs = [tmp_path / "job.yaml", tmp_path / "flap.yaml", ROOT / "callbacks" / "dashboard.yaml"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.foreign_job", "fit", *(f"--config={path}" for path in configs)],
        cwd=ROOT,
        env=alone | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    counts = Counter(name for line in history(records(tmp_path)) for name in line)
    assert counts["prune/kept"] == counts["prune/scores"] == counts["prune/removed_share"] == 1
    assert counts["train/tokens_per_second"] == 2
