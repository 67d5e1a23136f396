"""MLflow and Trackio get the pictures, tables and files that W&B gets; read back from their stores on this disk."""

import io
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import Logger, MLFlowLogger
from PIL import Image

from prunelit.monitoring import loggers
from prunelit.monitoring.trackio_logger import TrackioLogger
from prunelit.runtime.errors import BadOption


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), "red").save(buffer, "png")
    return buffer.getvalue()


def log_everything(logger: Logger, folder: Path) -> None:
    weights = folder / "weights.bin"
    weights.write_bytes(b"123")
    loggers.guard_hyperparameters([logger])
    logger.log_hyperparams({"ratio": 0.2, "data": "/home/me/secret.txt", "api_key": "abc"})
    loggers.define_axes([logger], {"search/perplexity": "search/evaluation"})
    loggers.log_numbers([logger], {"quality/dense_perplexity": 16.5}, 3)
    loggers.log_points([logger], {"search/perplexity": 12.5}, "search/evaluation", 2)
    loggers.log_summary([logger], {"stage/cut_seconds": 1.25})
    loggers.log_picture([logger], "prune/kept", png(), "a caption", 3)
    loggers.log_table([logger], "prune/layers", ["layer", "kept"], [[0, "a|b"], [1, "c"]], 3)
    loggers.log_used_artifact([logger], "base", "base-model", {"parameters": 10})
    content = {"plan.json": "{}", "model/weights.bin": weights}
    loggers.log_artifact([logger], "plan", "plan", {"method": "flap"}, content)
    logger.finalize("success")


@pytest.mark.filterwarnings("ignore")  # what MLflow calls of pandas and others
def test_mlflow_in_local_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="pip install -e '.[mlflow]'")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = MLFlowLogger("tiny", tracking_uri=f"file:{tmp_path / 'store'}")
    log_everything(logger, tmp_path)
    (artifacts,) = (tmp_path / "store").glob("*/*/artifacts")
    found = {str(path.relative_to(artifacts)) for path in artifacts.rglob("*") if path.is_file()}
    assert found == {
        *("pictures/prune_kept.png", "tables/prune_layers.json"),
        *("plan/plan.json", "plan/model/weights.bin", "plan/metadata.json"),
    }
    assert Image.open(artifacts / "pictures" / "prune_kept.png").size == (4, 3)
    assert '"a|b"' in (artifacts / "tables" / "prune_layers.json").read_text()
    run = logger.experiment.get_run(logger.run_id)
    assert run.data.metrics["search/perplexity"] == 12.5 and run.data.metrics["stage/cut_seconds"] == 1.25
    assert run.data.params == {"ratio": "0.2"}
    assert loggers.list_logger_runs([logger]) == [f"MLFlowLogger {logger.name} {logger.run_id}"]


@pytest.mark.filterwarnings("ignore")  # what Trackio's own libraries warn of
def test_trackio_in_local_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "store"))  # read when it is imported
    pytest.importorskip("trackio", reason="pip install -e '.[trackio]'")
    from trackio.sqlite_storage import SQLiteStorage

    logger = TrackioLogger("tiny", name="first")
    log_everything(logger, tmp_path)
    rows = SQLiteStorage.get_logs("tiny", "first")
    values = {name: value for row in rows for name, value in row.items()}
    assert values["quality/dense_perplexity"] == 16.5 and values["search/perplexity"] == 12.5
    assert values["prune/kept"]["caption"] == "a caption" and values["prune/kept"]["_type"] == "trackio.image"
    assert [row["kept"] for row in values["prune/layers"]["_value"]] == ["a|b", "c"]
    assert list((tmp_path / "store").rglob("*.png"))
    config = SQLiteStorage.get_run_config("tiny", "first")
    assert config["ratio"] == 0.2 and "secret" not in str(config) and "api_key" not in config
    assert loggers.list_logger_runs([logger]) == ["TrackioLogger tiny first"]


class RecordedTracker:
    """What is called of a tracker whose package is not installed: names, and arguments without pictures."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **options: self.calls.append((name, args))


def test_mlflow_is_called_as_documented(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its `MlflowClient` takes the id of the run first: `log_image`, `log_table`, `log_text`, `log_artifact`."""
    client = RecordedTracker()
    monkeypatch.setattr(MLFlowLogger, "experiment", client)
    monkeypatch.setattr(MLFlowLogger, "run_id", "run")
    monkeypatch.setattr(MLFlowLogger, "__init__", lambda self: None)
    logger = MLFlowLogger()
    loggers.log_picture([logger], "prune/kept", png(), "a caption", 3)
    loggers.log_table([logger], "prune/layers", ["layer", "kept"], [[0, "a"], [1, "b"]], 3)
    loggers.log_artifact([logger], "plan", "plan", {}, {"plan.json": "{}", "sub/file": tmp_path})
    picture, table, *files = client.calls
    assert picture[0] == "log_image" and picture[1][0] == "run" and picture[1][2] == "pictures/prune_kept.png"
    assert table == ("log_table", ("run", {"layer": [0, 1], "kept": ["a", "b"]}, "tables/prune_layers.json"))
    assert files == [
        ("log_text", ("run", "{}", "plan/plan.json")),
        ("log_artifact", ("run", str(tmp_path), "plan/sub")),
        ("log_dict", ("run", {"type": "plan"}, "plan/metadata.json")),
    ]


def test_a_project_without_a_name_is_refused() -> None:
    with pytest.raises(BadOption, match="project: expected a name"):
        TrackioLogger(" ")
