"""One `prune` looks at a model once before the cut and once after it, and at its config.json once."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from prunelit.model.decoder import Decoder
from prunelit.model.stored import folder
from prunelit.report import run_page
from prunelit.report.record import Record
from tests.cli.test_fit import call, small
from tests.cli.test_fit import words as words  # a fixture


@pytest.mark.parametrize("repair", ["none", "bias", "least_squares"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_prune_builds_two_decoders_and_reads_the_config_once(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    words: str,
    tmp_path: Path,
    repair: str,
    scope: str,
) -> None:
    decoders, reads = [], []
    build, read = Decoder.__init__, Path.read_text

    def count_decoder(self: Decoder, model: Any) -> None:
        decoders.append(sum(parameter.numel() for parameter in model.parameters()))
        build(self, model)

    def count_read(self: Path, *args: Any, **options: Any) -> str:
        if self == Path(source) / "config.json":
            reads.append(self)
        return read(self, *args, **options)

    folder._read_text_once.cache_clear()
    monkeypatch.setattr(Decoder, "__init__", count_decoder)
    monkeypatch.setattr(Path, "read_text", count_read)
    more = ["--repair", repair, "--scope", scope]
    code, _, err = call(capsys, *small(source, words, tmp_path / "out", "--method", "llm_bip", *more))
    assert code == 0, err
    assert len(reads) == 1
    assert len(decoders) == 2 and decoders[0] > decoders[1], decoders


def test_a_config_that_changes_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for layers in (2, 30):
        path.write_text(json.dumps({"num_hidden_layers": layers}))
        assert folder.read_model_config(tmp_path) == {"num_hidden_layers": layers}
    folder.read_model_config(tmp_path).clear()  # a caller's change stays with the caller
    assert folder.read_model_config(tmp_path) == {"num_hidden_layers": 30}


@pytest.mark.parametrize(
    ("name", "status", "said"),
    [("SIGINT", 130, "interrupted"), ("SIGTERM", 143, "ended by SIGTERM"), ("SIGHUP", 129, "ended by SIGHUP")],
)
def test_a_prune_that_is_stopped_while_it_writes_its_report_leaves_nothing_in_the_way(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    words: str,
    tmp_path: Path,
    name: str,
    status: int,
    said: str,
) -> None:
    number = getattr(signal, name)
    handler = signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL
    previous = signal.signal(number, handler)  # a runner of tests may ignore it
    write = run_page.write_run_page

    def stop(record: Record, target: Path) -> None:
        assert (target / "report.json").is_file() and (target / "model.safetensors").is_file()
        write(record, target)
        os.kill(os.getpid(), number)

    command = small(source, words, tmp_path / "out", "--method", "magnitude")
    with monkeypatch.context() as patch:
        patch.setattr(run_page, "write_run_page", stop)
        code, _, err = call(capsys, *command)
        assert (code, err.splitlines()[-1]) == (status, f"prunelit: {said}")
    assert signal.signal(number, previous) is handler
    assert sorted(path.name for path in tmp_path.iterdir()) == ["words.txt"]
    code, _, err = call(capsys, *command)
    assert code == 0, err
    assert {"report.json", "report.html", "record.json", "proof.json"} <= {x.name for x in (tmp_path / "out").iterdir()}
    stages = {stage["name"] for stage in json.loads((tmp_path / "out" / "record.json").read_text())["stages"]}
    assert "save" in stages and "save" in json.loads((tmp_path / "out" / "report.json").read_text())["seconds"]
    assert str(tmp_path / "out") in (tmp_path / "out" / "report.html").read_text()
