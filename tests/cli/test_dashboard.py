"""The layout of a W&B project shows what the dashboard logs, and nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest

from prunelit.cli.main import main
from prunelit.monitoring import workspace
from prunelit.monitoring.dashboard import AXES, IMAGES, METRICS

OTHERS = {"train_loss", "val_perplexity", "prune/layers", "samples"}  # of the job itself, and the tables


def names(found: Any) -> set[str]:
    """All texts in a layout that look like a logged name."""
    if isinstance(found, dict):
        return set().union(*map(names, found.values()))
    if isinstance(found, list):
        return set().union(*map(names, found))
    return {found.removeprefix("summary_metrics.")} if isinstance(found, str) else set()


def test_the_layout_shows_everything_and_only_what_is_logged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "layout.json"
    assert main(["dashboard", "--project", "p", "--entity", "e", "--out", str(path)]) == 0
    assert capsys.readouterr().out.strip() == str(path)
    found = json.loads(path.read_text())
    sections = found["spec"]["section"]["panelBankConfig"]["sections"]
    assert [each["name"] for each in sections][: len(METRICS)] == list(workspace._TITLES.values())
    known = {name for section in METRICS.values() for name in section} | set(IMAGES.values()) | set(AXES.values())
    said = {name for name in names(sections) if name.split("/")[0] in ("quality", "prune", "search", "train", "stage")}
    assert said <= known | OTHERS
    assert said >= known


def test_errors_are_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert main(["dashboard", "--project", " "]) == 2
    assert "project: expected a name, got ' '" in capsys.readouterr().err
    assert main(["dashboard", "--projct", "p"]) == 2
    assert "did you mean" in capsys.readouterr().err

    def refuses(*_: Any) -> Any:
        raise RuntimeError("not logged in\nmore")

    monkeypatch.setattr(workspace, "build_workspace", refuses)
    assert main(["dashboard", "--project", "p"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("prunelit: error: project 'p': W&B refuses: not logged in; run `wandb login`")
    assert len(error.splitlines()) == 1
