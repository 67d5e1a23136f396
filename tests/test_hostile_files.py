"""Hostile files of strangers: a sample of benchmarks/hostile_files.py, two of every kind, always the same ones."""

import importlib.util
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "hostile_files.py"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Any:
    spec = importlib.util.spec_from_file_location("hostile_files", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    environment = dict(os.environ)
    spec.loader.exec_module(module)
    originals = module.write_originals(tmp_path_factory.mktemp("hostile") / "originals")
    yield module, originals
    os.environ.clear()
    os.environ.update(environment)


def test_a_hostile_file_is_read_or_refused_in_one_line_and_runs_no_code(
    hostile: tuple[ModuleType, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, originals = hostile
    monkeypatch.setenv("PRUNELIT_CACHE", str(tmp_path / "cache"))
    tries = [(kind, seed) for kind in module.KINDS for seed in (1000, 1001)]
    tries += [
        ("adapter config", 8),
        ("adapter config", 5015),
        ("adapter config", 9028),
        ("tokenizer config", 15),
        ("config", 5005),
        ("index", 5015),
    ]
    found = {(kind, seed): module.attempt(kind, seed, originals, tmp_path, in_memory=True) for kind, seed in tries}
    assert len(found) >= 40
    assert {pair: row for pair, row in found.items() if row[0] not in ("read", "refused")} == {}
    assert sum(verdict == "refused" for verdict, _ in found.values()) > len(found) // 3, "they are not hostile"


def test_what_runs_code_is_seen(hostile: tuple[ModuleType, Path], tmp_path: Path, monkeypatch: Any) -> None:
    module, originals = hostile
    changed, read, how, _ = module.KINDS["plan"]
    monkeypatch.setitem(module.KINDS, "plan", (changed, read, how, lambda path: (path.parent / module.CANARY).touch()))
    assert module.attempt("plan", 0, originals, tmp_path, in_memory=True)[0] == "ran code"
    monkeypatch.setitem(module.KINDS, "plan", (changed, read, how, lambda path: 1 / 0))
    assert module.attempt("plan", 0, originals, tmp_path, in_memory=True)[0] == "traceback"
