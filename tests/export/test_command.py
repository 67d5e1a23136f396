"""`python -m prunelit export`: from any source to any format, with a proof; one line where it cannot."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from prunelit.cli import export
from prunelit.core.plan import PruningPlan
from prunelit.data import loading
from prunelit.export import save
from prunelit.model import surgery
from tests.cli.test_fit import call, refused
from tests.export.alike import assert_equal, logits
from tests.tiny import cut, tiny, tiny_tokenizer


@pytest.fixture
def hetero(tmp_path: Path) -> Path:
    """A cut model in a folder, with its plan, as `prune` leaves it."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    model = tiny("llama", vocab_size=len(tokenizer))
    model.generation_config = GenerationConfig(pad_token_id=0, max_new_tokens=5)
    plan = cut(model, "mixed")
    surgery.apply(model, plan)
    save(model, tmp_path / "hetero", tokenizer, plan)
    return tmp_path / "hetero"


def test_a_dense_model(capsys: pytest.CaptureFixture[str], source: str, tmp_path: Path) -> None:
    code, said, err = call(capsys, "export", "--model", source, "--out", str(tmp_path / "m"))
    assert code == 0, err
    assert "largest difference of logits 0" in said and f"{tmp_path / 'm'}/: uniform model" in said
    assert json.loads((tmp_path / "m" / "proof.json").read_text())["passed"]
    assert_equal(AutoModelForCausalLM.from_pretrained(tmp_path / "m"), loading.load(source))


@pytest.mark.parametrize("format", ["auto", "hetero", "padded"])
def test_a_cut_model(capsys: pytest.CaptureFixture[str], hetero: Path, format: str, tmp_path: Path) -> None:
    out = tmp_path / "m"
    code, said, err = call(capsys, "export", "--model", str(hetero), "--format", format, "--out", str(out))
    assert code == 0, err
    assert said.splitlines()[2].startswith("dense") and "0 |" not in said
    assert PruningPlan.load(out / "plan.json") == PruningPlan.load(hetero / "plan.json")
    assert GenerationConfig.from_pretrained(out).max_new_tokens == 5
    tokenizer = AutoTokenizer.from_pretrained(out, trust_remote_code=format != "padded")
    assert tokenizer.chat_template == "{{ messages[0]['content'] }}"
    found, expected = logits(loading.load(out)), logits(loading.load(hetero))
    assert (found - expected).abs().max() <= (2e-6 if format == "padded" else 0)
    if format == "padded":
        assert "of the saving is given up" in err


def test_dtype_and_shards(capsys: pytest.CaptureFixture[str], hetero: Path, tmp_path: Path) -> None:
    options = ["--dtype", "bfloat16", "--max_shard_size", "50KB", "--out", str(tmp_path / "m")]
    code, said, err = call(capsys, "export", "--model", str(hetero), *options)
    assert code == 0, err
    files = sorted((tmp_path / "m").glob("*.safetensors"))
    assert len(files) > 1 and all(path.stat().st_size < 60_000 for path in files)
    assert len({path.stat().st_mode for path in (tmp_path / "m").iterdir()}) == 1  # whoever serves it may read it
    for path in files:
        with safe_open(path, framework="pt") as file:
            assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
    dense, here = (line.split()[-1] for line in said.splitlines()[2:4])
    assert int(dense) == 2 * 3 * 3 * 8 * 2 and int(here) < int(dense)  # the KV cache of both in bfloat16


@pytest.mark.parametrize(
    ("more", "wanted"),
    [
        (["--format", "hetreo"], ["format 'hetreo'", "auto, uniform, hetero, padded"]),
        (["--model", "./nowhere"], ["model './nowhere'", "no such"]),
        (["--max_shard_size", "lots"], ["max_shard_size", "lots"]),
        (["--type", "q8"], ["type 'q8'", "expected none"]),
        (["--dtype", "float4"], ["dtype", "float4"]),
        (["--fromat", "hetero"], ["--fromat", "did you mean 'format'"]),
    ],
)
def test_one_line_and_code_2_before_loading(
    capsys: pytest.CaptureFixture[str],
    source: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    more: list[str],
    wanted: list[str],
) -> None:
    monkeypatch.setattr(loading, "load", lambda *a: pytest.fail("the model was loaded"))
    refused(call(capsys, "export", "--model", source, "--out", str(tmp_path / "m"), *more), *wanted)
    assert not (tmp_path / "m").exists()


def test_a_folder_that_is_not_empty(
    capsys: pytest.CaptureFixture[str], source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "thesis.txt").write_text("x")
    with monkeypatch.context() as patch:
        patch.setattr(loading, "load", lambda *a: pytest.fail("the model was loaded"))
        refused(call(capsys, "export", "--model", source, "--out", str(tmp_path / "m")), "--overwrite")
        again = call(capsys, "export", "--model", source, "--out", str(tmp_path / "m"), "--overwrite", "true")
        refused(again, "expected an empty folder or one that prunelit wrote", "choose another path")
    assert (tmp_path / "m" / "thesis.txt").read_text() == "x"


def test_uniform_says_why_not(capsys: pytest.CaptureFixture[str], hetero: Path, tmp_path: Path) -> None:
    options = ["--format", "uniform", "--out", str(tmp_path / "m")]
    refused(call(capsys, "export", "--model", str(hetero), *options), "layer 0", "layer 1", "'hetero'", "'padded'")
    assert not (tmp_path / "m").exists()


def test_a_plan_that_is_none(capsys: pytest.CaptureFixture[str], hetero: Path, tmp_path: Path) -> None:
    (hetero / "plan.json").write_text("{}")
    refused(call(capsys, "export", "--model", str(hetero), "--out", str(tmp_path / "m")), "plan.json", "format")


def test_the_report_of_the_run_is_found(hetero: Path, tmp_path: Path) -> None:
    """`prune` leaves it in the folder, `fit` above it; one of another run above it is none of ours."""
    report: dict[str, Any] = {"dense": {"perplexity": 12.0}}
    plan = PruningPlan.load(hetero / "plan.json")
    assert export._load_run_files(hetero) == (plan, {})
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert export._load_run_files(hetero) == (plan, {})
    (tmp_path / "plan.json").write_text(plan.to_json())
    assert export._load_run_files(hetero) == (plan, report)
    for none in ("cut sho", "[1]"):
        (hetero / "report.json").write_text(none)
        assert export._load_run_files(hetero) == (plan, {})
    (hetero / "report.json").write_text(json.dumps({"dense": {}}))
    assert export._load_run_files(hetero) == (plan, {"dense": {}})
