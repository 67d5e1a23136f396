"""Plans, models, adapters and checkpoints that an earlier version wrote still load; see make_written_before.py."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import prunelit
from prunelit.callbacks import FLAP, LLMBIP
from prunelit.cli.main import main
from tests.compatibility import make_written_before as made

BEFORE = made.FOLDER
EXPECTED: dict[str, Any] = json.loads((BEFORE / "expected.json").read_text(encoding="utf-8"))
# Loads folders where prunelit can not be imported, and prints their logits.
PLAIN = """
import json, sys
sys.modules["prunelit"] = None
import torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
folder, names, identifiers = json.loads(sys.argv[1])
found = {}
for name in names:
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/{name}", device_map="cpu", trust_remote_code=True).eval()
    with torch.no_grad():
        found[name] = model(input_ids=torch.tensor(identifiers), use_cache=False).logits[0, -1, ::8].tolist()
print(json.dumps(found))
"""


def check(model: Any, name: str, tolerance: float = 1e-5) -> None:
    """The logits are those that were recorded under this name."""
    assert made.some_logits(model) == pytest.approx(EXPECTED["logits"][name], rel=tolerance, abs=tolerance)


@pytest.fixture
def before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folder, which is the working directory as well."""
    shutil.copytree(BEFORE, tmp_path / "before")
    monkeypatch.chdir(tmp_path / "before")
    return tmp_path / "before"


@pytest.mark.parametrize("name", ["dense", *made.FOLDERS])
def test_a_folder_loads_with_prunelit(name: str) -> None:
    check(prunelit.load(BEFORE / name), name)


@pytest.mark.parametrize("name", ["dense", "uniform", "hetero", "int4", "run/model"])
def test_a_tokenizer_loads(name: str) -> None:
    tokenizer = prunelit.load_tokenizer(BEFORE / name)
    assert tokenizer.decode(tokenizer("some words")["input_ids"]) == "some words"


@pytest.mark.slow
def test_the_folders_load_with_transformers_alone() -> None:
    question = [str(BEFORE), ["dense", *made.FOLDERS], made.identifiers().tolist()]
    said = subprocess.run(
        [sys.executable, "-P", "-c", PLAIN, json.dumps(question)], capture_output=True, text=True, check=False
    )
    assert said.returncode == 0, said.stderr
    found = json.loads(said.stdout.splitlines()[-1])
    for name in question[1]:
        assert found[name] == pytest.approx(EXPECTED["logits"][name], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("name", made.PLANS)
def test_a_plan_loads_and_is_written_as_it_was(name: str) -> None:
    plan = prunelit.PruningPlan.load(BEFORE / name)
    assert plan.digest == EXPECTED["plans"][name]
    assert plan.to_json() == (BEFORE / name).read_text(encoding="utf-8")


def test_a_plan_cuts() -> None:
    model = prunelit.load(BEFORE / "dense")
    prunelit.apply(model, prunelit.PruningPlan.load(BEFORE / "plan.json"))
    check(model, "hetero")


def test_methods_replay_their_plans() -> None:
    for kind, name in ((LLMBIP, "plan.json"), (FLAP, "plan_bias.json")):
        method = kind(0.4, plan_file=str(BEFORE / name))
        plan = method.prune(prunelit.load(BEFORE / "dense"), made.batches())
        assert plan.digest == EXPECTED["plans"][name]


def test_a_plan_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "show", str(BEFORE / "plan.json")]) == 0
    assert "llm_bip" in capsys.readouterr().out


def test_adapters_merge_into_their_base(before: Path) -> None:
    assert main(["export", "--model", "run/base", "--adapter", "run/adapter", "--out", "merged"]) == 0
    check(prunelit.load("merged"), "run/model")


def test_adapters_load_with_peft() -> None:
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(prunelit.load(BEFORE / "run/base"), BEFORE / "run/adapter")
    check(adapted.eval(), "run/model")


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_run_goes_on_from_its_checkpoint(
    before: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["prunelit", *made.RESUME])
    shutil.rmtree("run/model")
    kept = sorted(path.name for path in Path("run/kept").iterdir())
    assert main(list(made.RESUME)) == 0
    report = json.loads(Path("run/report.json").read_text())
    assert report["trained_steps"] == made.STEPS
    assert "scoring again" not in caplog.text
    assert sorted(path.name for path in Path("run/kept").iterdir()) == kept  # no weights were repaired again
    check(prunelit.load("run/model"), "run/model", tolerance=1e-4)


def test_the_checkpoint_is_one_of_before_the_end() -> None:
    saved = torch.load(BEFORE / made.CHECKPOINT, weights_only=True)
    assert saved["global_step"] == made.STEPS - 1


def test_no_file_was_changed() -> None:
    """A search and replace over the whole repository must leave these files alone."""
    assert made.digests(BEFORE) == EXPECTED["files"]


def test_no_file_names_the_machine_that_wrote_it() -> None:
    for path in (path for path in BEFORE.rglob("*") if path.is_file()):
        content = path.read_bytes()
        assert not any(root in content for root in (b"/tmp", b"/home", b"/root", b"/var/", b"/Users")), path
