"""What the README shows runs: its Python, its example method, and the commands it names."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer

from prunelit.__main__ import COMMANDS
from prunelit.calibrate import batched
from prunelit.text import windows
from tests.tiny import tiny, tiny_tokenizer

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def python(containing: str) -> str:
    return next(block for block in blocks("python") if containing in block)


def test_the_example_method_cuts(tmp_path: Path) -> None:
    names: dict[str, Any] = {"__name__": "mine"}
    exec(python("class Mine"), names)
    assert len(python("class Mine").splitlines()) < 40
    model = tiny("llama")
    ids = windows("builtin:python-docs", tiny_tokenizer(), 16, 8, seed=0) % model.config.vocab_size
    plan = names["Mine"](0.3, align=8).prune(model, batched(ids))
    assert plan.predicted["ratio_of_block_parameters"] >= 0.3


def test_the_library_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_tokenizer()
    source = tmp_path / "dense"
    tiny("llama", vocab_size=len(tokenizer), max_position_embeddings=512).save_pretrained(source)
    tokenizer.save_pretrained(source)
    monkeypatch.chdir(tmp_path)
    code = (
        python("prunelit.load").replace("path/or/id", str(source)).replace("ratio=0.2", "ratio=0.3, align=8, windows=4")
    )
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["model"].num_parameters() == names["plan"].predicted["parameters"]


def test_the_attach_example_builds_a_trainer() -> None:
    names: dict[str, Any] = {}
    exec(python("Trainer("), names)
    assert isinstance(names["trainer"], Trainer)


def test_every_command_is_one_of_ours() -> None:
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    named = [shlex.split(line, comments=True) for line in lines if line.startswith("python -m prunelit")]
    assert {"prune", "evaluate", "methods"} <= {words[3] for words in named} <= set(COMMANDS)
    made = [line.split()[1] for line in lines if line.startswith("make ")]
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {"quickstart", "test"} <= set(made) <= set(targets)


def test_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert link.startswith("http") or (ROOT / link).exists(), link
