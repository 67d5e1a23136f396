"""Configs by their names, wherever one stands, and copies of them: files of the user's are never replaced unasked."""

import sys
from pathlib import Path

import pytest
import yaml

from prunelit.cli.config_files import read_config, resolve_configs
from prunelit.cli.init import files
from prunelit.cli.main import main
from prunelit.runtime.errors import SourceNotFound

ROOT = Path(__file__).parents[2]
SHIPPED = sorted(path for folder in ("configs", "callbacks") for path in (ROOT / folder).rglob("*.yaml"))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_every_file_has_a_name_with_and_without_its_ending(place: Path) -> None:
    assert len(SHIPPED) > 40
    for path in SHIPPED:
        name = str(path.relative_to(ROOT))
        if path.parent.name == "attach":  # options of another program
            assert files.resolve_config_path(name) == name
            continue
        for value in {name, name.removesuffix(".yaml"), name.removeprefix("configs/").removesuffix(".yaml")}:
            assert Path(files.resolve_config_path(value)).samefile(path), value


def test_an_installed_package_has_them_inside(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = place / "prunelit" / "shipped" / "configs" / "recipes"
    inside.mkdir(parents=True)
    (inside / "new.yaml").write_text("seed: 1")
    monkeypatch.setattr(files, "__file__", str(place / "prunelit" / "cli" / "init" / "files.py"))
    assert files.list_shipped_names() == ["recipes/new"]
    assert files.resolve_config_path("recipes/new") == str(inside / "new.yaml")


def test_a_file_wins_over_a_name_and_a_folder_does_not(place: Path) -> None:
    (place / "plan").mkdir()
    (place / "quickstart").write_text("seed_everything: 7\n")
    assert resolve_configs(["--config", "quickstart"]) == ["--config", "quickstart"]
    assert Path(resolve_configs(["--config=plan"])[0].partition("=")[2]).samefile(ROOT / "configs" / "plan.yaml")


@pytest.mark.parametrize(
    "value", ["../configs/quickstart", "/quickstart", "./quickstart", "", "x" * 5000, "a\0b", "{seed: 1}", "a: 1\nb: 2"]
)
def test_what_is_no_name_stays_as_it_is(place: Path, value: str) -> None:
    assert files.resolve_config_path(value) == value


@pytest.mark.parametrize(
    ("value", "near"),
    [
        ("quikstart", "'quickstart'"),
        ("configs/recover-lorra.yaml", "'recover-lora'"),
        ("flap", "'methods/flap' or 'callbacks/flap'"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(place: Path, value: str, near: str) -> None:
    with pytest.raises(SourceNotFound) as error:
        read_config(value)
    assert f"did you mean {near}?" in str(error.value) and "\n" not in str(error.value)


def test_a_command_takes_names(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With sys.argv, which Lightning reads and with which it starts further ranks."""
    words = ["fit", "--config", "quickstart", "--config=callbacks/flap", "--print_config"]
    monkeypatch.setattr(sys, "argv", ["prunelit", *words])
    with pytest.raises(SystemExit, match="0"):
        main(words)
    options = yaml.safe_load(capsys.readouterr().out)
    assert options["model"]["model"] == "builtin:smollm2-135m"
    assert options["trainer"]["callbacks"][-1]["class_path"] == "prunelit.callbacks.FLAP"
    paths = [Path(word.partition("=")[2] or word) for word in sys.argv[3:5]]
    assert [path.name for path in paths] == ["quickstart.yaml", "flap.yaml"] and all(map(Path.is_file, paths))


def test_init_copies_everything_once(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "init", "mine")
    assert code == 0 and "files copied into configs/ and callbacks/" in out
    for path in (*SHIPPED, ROOT / "configs" / "attach" / "job.py", ROOT / "configs" / "README.md"):
        assert (place / "mine" / path.relative_to(ROOT)).read_bytes() == path.read_bytes()
    assert run(capsys, "init", "mine")[1].startswith("mine: 0 of ")


def test_init_replaces_nothing_unasked(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed = place / "configs" / "quickstart.yaml"
    changed.parent.mkdir()
    changed.write_text("mine: 1\n")
    code, _, error = run(capsys, "init", ".")
    assert code == 2 and "got configs/quickstart.yaml; --overwrite replaces them" in error
    assert [path.name for path in place.rglob("*") if path.is_file()] == ["quickstart.yaml"]
    assert run(capsys, "init", ".", "--overwrite")[0] == 0
    assert changed.read_bytes() == (ROOT / "configs" / "quickstart.yaml").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "expected one folder"),
        (["a", "b"], "got a b"),
        (["a", "--overwrit"], "did you mean '--overwrite'?"),
        (["a", "--list"], "expected one folder"),
        (["file"], "output 'file"),
    ],
)
def test_init_refuses_in_one_line(
    place: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], part: str
) -> None:
    (place / "file").touch()
    code, out, error = run(capsys, "init", *arguments)
    assert (code, out, len(error.splitlines())) == (2, "", 1) and part in error
    assert [path.name for path in place.iterdir()] == ["file"]


def test_init_lists_names_with_what_they_are_for(capsys: pytest.CaptureFixture[str]) -> None:
    rows = run(capsys, "init", "--list")[1].splitlines()[1:]
    assert [row.split()[0] for row in rows] == files.list_shipped_names()
    assert all(len(row.split()) > 3 and len(row) <= 120 for row in rows)
