"""What --overwrite may replace: what prunelit wrote, and never the working directory or what is read."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from prunelit import LLMBIP
from prunelit.core.plan import PLAN_FORMATS
from prunelit.data import loading
from prunelit.export import check_output, formats, save
from prunelit.export.overwrite import is_prunelit_output
from prunelit.monitoring.run_report import RunReport
from prunelit.quantization import quantize
from prunelit.runtime.atomic_files import check_folder, replace_folder
from prunelit.runtime.errors import OutputNotWritable
from tests.cli.test_fit import call, refused, small
from tests.core.test_plan import plan_of
from tests.export.gguf.test_writer import tokenizer
from tests.export.test_int4 import WIDE
from tests.report.test_run_page import fit
from tests.runtime.test_atomic_files import old
from tests.tiny import tiny


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def words(tmp_path: Path) -> str:
    path = tmp_path / "words.txt"
    path.write_text(" ".join(f"w{n * 7 % 101}" for n in range(3000)))
    return str(path)


# Whose a folder is ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unproved", [False, True])
@pytest.mark.parametrize("format", formats.FORMATS)
def test_every_format_leaves_the_mark(format: str, unproved: bool, tmp_path: Path) -> None:
    if format == "gguf" and not unproved:
        pytest.importorskip("llama_cpp")
    if format == "w4a16" and not unproved:
        pytest.importorskip("compressed_tensors")
    model, spoken = tiny("llama", **WIDE), tokenizer()
    if format in formats.FOUR_BIT_FORMATS:
        quantize.quantize_model(model, "int4", 32, zeros="integer")
    if format == "gguf":
        model.resize_token_embeddings(len(spoken))
    save(model, tmp_path / "m", spoken if format == "gguf" else None, format=format, unproved=unproved)
    assert is_prunelit_output(tmp_path / "m")


PLAN = json.dumps({"format": PLAN_FORMATS[0]})


@pytest.mark.parametrize(
    ("content", "ours"),
    [
        ({"proof.json": '{"format": "gguf", "passed": null}'}, True),
        ({"config.json": "{}", "report.json": "{}", "plan.json": PLAN}, True),  # of prune before there were proofs
        ({"adapter_config.json": "{}", "plan.json": PLAN}, True),
        ({"config.json": "{}", "model.safetensors": ""}, False),  # a model
        ({"config.json": "{}", "plan.json": PLAN}, False),  # and one that somebody planned for
        ({"report.json": "{}", "plan.json": PLAN, "thesis.txt": ""}, False),
        ({"adapter_config.json": "{}"}, False),
        ({"config.json": "{}", "report.json": "{}", "plan.json": '{"format": "of a house"}'}, False),
        ({"proof.json": '{"theorem": 1}'}, False),
        ({"proof.json": "[1"}, False),
        ({"proof.json": '"format passed"'}, False),
        ({"model.proof.json": '{"format": "gguf", "passed": true}'}, False),  # of a file beside one's own
    ],
    ids=str,
)
def test_the_marks(content: dict[str, str], ours: bool, tmp_path: Path) -> None:
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    assert is_prunelit_output(tmp_path) == ours
    if ours:
        return check_output(tmp_path, overwrite=True)
    with pytest.raises(OutputNotWritable, match="one that prunelit wrote"):
        check_output(tmp_path, overwrite=True)
    with pytest.raises(OutputNotWritable, match="replaces only what prunelit wrote"):
        check_output(tmp_path)
    check_folder(tmp_path)  # files may be added


def test_a_link_is_followed(tmp_path: Path) -> None:
    old(tmp_path / "m")
    (tmp_path / "link").symlink_to(tmp_path / "m")
    check_output(tmp_path / "link", overwrite=True)
    with pytest.raises(OutputNotWritable, match="which is read"):
        check_output(tmp_path / "link", overwrite=True, reads=[str(tmp_path / "m")])


@pytest.mark.parametrize("place", ["m", "m/below/here"])
def test_the_working_directory_stays(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old(tmp_path / "m")
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(tmp_path / place)
    for overwrite in (False, True):
        with pytest.raises(OutputNotWritable, match="got that of the working directory; choose another path"):
            check_output(tmp_path / "m", overwrite)
    check_output(tmp_path / "n", overwrite=True)


def test_what_is_read_stays(tmp_path: Path) -> None:
    old(tmp_path / "m")
    (tmp_path / "m.gguf").write_text("weights")
    for target, read, file in (("m", "m", False), ("m", "m/old.txt", False), ("m.gguf", "m.gguf", True)):
        with pytest.raises(OutputNotWritable, match=f"{read}', which is read; choose another path"):
            check_output(tmp_path / target, True, file, ["org/name", str(tmp_path / read)])
    check_output(tmp_path / "m", True, reads=["org/name", "builtin:python-docs", str(tmp_path), str(tmp_path / "m2")])


# By the commands -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["prune", "export"])
@pytest.mark.parametrize("where", [".", "mine", "model"])
def test_nothing_of_the_user_is_replaced(
    capsys: pytest.CaptureFixture[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    where: str,
) -> None:
    save(tiny("llama"), tmp_path / "model")  # a source that prunelit wrote: the mark alone would let it go
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    before = files(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "load", lambda *_: pytest.fail("the model was loaded"))
    given = small("model", words, Path(where)) if command == "prune" else ["export", "--model", "model", "--out", where]
    said = {".": "the working directory", "mine": "one that prunelit wrote", "model": "'model', which is read"}[where]
    refused(call(capsys, *given, "--overwrite", "true"), f"output {where!r}", said, "choose another path")
    assert files(tmp_path) == before


def test_a_second_prune_replaces_the_first(
    capsys: pytest.CaptureFixture[str], source: str, words: str, tmp_path: Path
) -> None:
    for ratio in ("0.3", "0.2"):
        given = [*small(source, words, tmp_path / "m"), "--ratio", ratio, "--overwrite", "true"]
        assert call(capsys, *given)[0] == 0
    assert json.loads((tmp_path / "m" / "plan.json").read_text())["options"]["ratio"] == 0.2


@pytest.mark.parametrize("name", ["model", "adapter", "base"])
def test_fit_asks_before_it_measures(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.txt").write_text("x")
    monkeypatch.setattr(RunReport, "_measure_state", lambda *_: pytest.fail("it was measured"))
    with pytest.raises(OutputNotWritable, match=rf"{name}': expected .* prunelit wrote"):
        fit(source, tmp_path, 1)
    assert files(tmp_path) == {f"{name}/thesis.txt": b"x"}


def test_fit_spares_the_model_it_reads(tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with replace_folder(tmp_path / "model") as folder:
        for path in Path(source).iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        (folder / "proof.json").write_text('{"format": "uniform", "passed": true}')
    monkeypatch.setattr(RunReport, "_measure_state", lambda *_: pytest.fail("it was measured"))
    with pytest.raises(OutputNotWritable, match="which is read"):
        fit(str(tmp_path / "model"), tmp_path, 1)


@pytest.mark.parametrize("read", ["text", "plan"])
def test_fit_spares_the_files_it_reads(tmp_path: Path, read: str) -> None:
    old(tmp_path / "model")
    file = str(tmp_path / "model" / "old.txt")
    pruner, report = LLMBIP(0.3), RunReport()
    pruner.plan_file = file if read == "plan" else None
    data = SimpleNamespace(sources=["builtin:python-docs", *([file] if read == "text" else [])])
    job: Any = SimpleNamespace(callbacks=[pruner], datamodule=data)
    module: Any = SimpleNamespace(hparams={"model": "org/name"})
    report._folder = tmp_path
    with pytest.raises(OutputNotWritable, match=r"old.txt', which is read"):
        report._check_folders(job, module)


def test_prune_spares_the_plan_it_reads(capsys: pytest.CaptureFixture[str], source: str, tmp_path: Path) -> None:
    old(tmp_path / "m")
    plan_of().save(tmp_path / "m" / "edited.json")
    given = ["--model", source, "--plan", str(tmp_path / "m" / "edited.json"), "--out", str(tmp_path / "m")]
    refused(call(capsys, "prune", *given, "--overwrite", "true"), "edited.json', which is read")


def test_adapters_of_an_older_run_that_cut_nothing_are_ours_beside_its_model(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    assert not is_prunelit_output(tmp_path / "adapter")
    old(tmp_path / "model")
    assert is_prunelit_output(tmp_path / "adapter")


def test_fit_again_replaces_its_own(source: str, tmp_path: Path) -> None:
    made: Any = {}
    for steps in (1, 2):
        fit(source, tmp_path, steps, prompts=[])
        made[steps] = [files(tmp_path / name) for name in ("model", "adapter")]
        for name in ("model", "adapter", "base"):
            (tmp_path / name / "plan.json").unlink()  # which a run that cuts nothing does not leave
            assert is_prunelit_output(tmp_path / name)
    assert made[1] != made[2]
