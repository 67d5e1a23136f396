"""`plan` says what `prune` and `fit` would cut, touches nothing, and its files are edited, compared and replayed."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from prunelit.cli import fit
from prunelit.cli import plan as command
from prunelit.cli.parsing.fit_options import is_fit_config
from prunelit.core.plan import PruningPlan
from prunelit.core.plan_diff import find_plan_differences
from prunelit.data import loading, text
from prunelit.planning import latency
from prunelit.planning.serving import list_serving_options
from prunelit.pruning.registry import methods
from prunelit.runtime.errors import BadPlan
from tests.cli.test_fit import ROOT, call, refused, small
from tests.cli.test_fit import words as words  # a fixture
from tests.core.test_plan import DENSE, plan_of
from tests.tiny import EXPERT_METHODS, keep, tiny, tiny_tokenizer

SHAPE = DENSE.layers[0]


def planned(source: str, words: str, out: Path, *more: str) -> list[str]:
    return ["plan", *small(source, words, out, *more)[1:]]


@pytest.mark.filterwarnings("ignore:calibration")  # few tokens for so many experts
@pytest.mark.parametrize("method", sorted(methods()))
def test_it_is_the_plan_that_prune_cuts_by(
    capsys: pytest.CaptureFixture[str], source: str, mixture_source: str, words: str, tmp_path: Path, method: str
) -> None:
    model = mixture_source if method in EXPERT_METHODS else source
    code, said, err = call(capsys, *planned(model, words, tmp_path / "plan.json", "--method", method))
    assert code == 0, err
    assert call(capsys, *small(model, words, tmp_path / "out", "--method", method))[0] == 0
    assert (tmp_path / "plan.json").read_text() == (tmp_path / "out" / "plan.json").read_text()
    plan = PruningPlan.load(tmp_path / "plan.json")
    assert plan.digest in said and f"{int(plan.predicted['parameters']):,}" in said
    assert all(row.target in said and row.why in said for row in list_serving_options(plan))


def test_what_reads_no_text_loads_none(
    capsys: pytest.CaptureFixture[str], source: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "draw_windows", lambda *a: pytest.fail("text was read"))
    monkeypatch.setattr(loading, "load_tokenizer", lambda *a: pytest.fail("a tokenizer was loaded"))
    more = ["--method", "magnitude", "--repair", "bias"]
    code, said, err = call(capsys, *planned(source, words, tmp_path / "plan.json", *more))
    assert code == 0, err
    assert "bias added" in said


def test_a_given_plan_needs_neither_weights_nor_text(
    capsys: pytest.CaptureFixture[str], source: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call(capsys, *planned(source, words, tmp_path / "plan.json"))[0] == 0
    monkeypatch.setattr(loading, "load", lambda *a: pytest.fail("the model was loaded"))
    monkeypatch.setattr(text, "draw_windows", lambda *a: pytest.fail("text was read"))
    given = ["--plan", str(tmp_path / "plan.json")]
    said = [call(capsys, "plan", *arguments) for arguments in (given, ["--model", source, *given], ["show", given[1]])]
    assert {code for code, _, _ in said} == {0}, said
    assert len({out for _, out, _ in said}) == 1


def test_a_config_of_a_search_serves_a_replay_too(
    capsys: pytest.CaptureFixture[str], source: str, words: str, tmp_path: Path
) -> None:
    assert call(capsys, *planned(source, words, tmp_path / "plan.json"))[0] == 0
    given = ["--model", source, "--plan", str(tmp_path / "plan.json")]
    code, said, err = call(capsys, "plan", "--config", str(ROOT / "configs" / "plan.yaml"), *given)
    assert code == 0 and "llm_bip" in said, err
    asked = ["prune", *given, "--repair", "bias", "--text", words, "--windows", "8", "--seqlen", "16"]
    (tmp_path / "c.yaml").write_text(call(capsys, *asked, "--out", str(tmp_path / "out"), "--print_config")[1])
    code, _, err = call(capsys, "prune", "--config", str(tmp_path / "c.yaml"))
    assert code == 0, err


def test_a_plan_for_another_model_is_refused_before_it_is_loaded(
    capsys: pytest.CaptureFixture[str], source: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call(capsys, *planned(source, words, tmp_path / "plan.json"))[0] == 0
    tiny("llama", vocab_size=len(tiny_tokenizer()), num_hidden_layers=2).save_pretrained(tmp_path / "other")
    monkeypatch.setattr(loading, "load", lambda *a: pytest.fail("the model was loaded"))
    given = ["--model", str(tmp_path / "other"), "--plan", str(tmp_path / "plan.json")]
    refused(call(capsys, "plan", *given), "another model", "num_hidden_layers 3", "got 2")


def test_streamed_plans_are_the_same(
    capsys: pytest.CaptureFixture[str], source: str, words: str, tmp_path: Path
) -> None:
    for name, more in (("a", []), ("b", ["--stream", "true", "--memory_gib", "1"])):
        code, _, err = call(capsys, *planned(source, words, tmp_path / name, *more))
        assert code == 0, err
    assert (tmp_path / "a").read_text() == (tmp_path / "b").read_text()


def test_latency_is_summed_from_the_measured_table(
    capsys: pytest.CaptureFixture[str], source: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def table(decoder: Any, *_: Any) -> latency.LatencyTable:
        shape = decoder.layers[0].shape
        curves = {shape: ([[0, 0.0], [shape.query_heads, 1.0]], [[0, 0.0], [shape.ffn_channels, 2.0]])}
        return latency.LatencyTable(curves, {"mode": "prefill", "tokens": 9, "device": "cpu", "dtype": "float32"})

    monkeypatch.setattr(latency, "measure_latency_table", table)
    code, said, err = call(capsys, *planned(source, words, tmp_path / "plan.json", "--latency", "true"))
    assert code == 0, err
    plan = PruningPlan.load(tmp_path / "plan.json")
    left = sum(len(k.query_heads) / 9 + 2 * len(k.ffn_channels) / 96 for k in plan.layers)
    assert f"9000.0 ms dense, {left * 1e3:.1f} ms planned: {9 / left:.2f} times the speed" in said
    refused(call(capsys, *planned(source, words, tmp_path / "b", "--latency", "true", "--stream", "true")), "latency")


# Files of `fit` ------------------------------------------------------------------------------------------------------


def fit_config(source: str, words: str, run: Path, *callbacks: dict[str, Any]) -> dict[str, Any]:
    trainer = {"default_root_dir": str(run), "accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    sizes = {"train": words, "seqlen": 16, "calibration_windows": 6, "validation_windows": 4}
    return {
        "model": {"model": source},
        "data": sizes,
        "trainer": trainer | {"max_steps": 1, "callbacks": list(callbacks)},
    }


def callback(name: str, **options: Any) -> dict[str, Any]:
    return {"class_path": f"prunelit.callbacks.{name}", "init_args": {"ratio": 0.3, "align": 8, "windows": 4} | options}


@pytest.mark.parametrize(
    "chosen", [callback("LLMBIP", scope="global"), callback("Magnitude"), callback("FLAP")], ids=str
)
def test_a_file_of_fit_is_planned_as_fit_cuts(
    capsys: pytest.CaptureFixture[str], source: str, words: str, tmp_path: Path, chosen: dict[str, Any]
) -> None:
    path, run = tmp_path / "fit.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump(fit_config(source, words, run, chosen)))
    code, _, err = call(capsys, "plan", "--config", str(path), "--out", str(tmp_path / "plan.json"))
    assert code == 0, err
    assert {each.name for each in run.iterdir()} <= {"kept"} if run.exists() else True
    code, _, err = call(capsys, "fit", "--config", str(path))
    assert code == 0, err
    assert (run / "plan.json").read_text() == (tmp_path / "plan.json").read_text()


def test_fit_finds_what_plan_has_scored(
    capsys: pytest.CaptureFixture[str], source: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prunelit.callbacks.llm_bip import LLMBIP

    path = tmp_path / "fit.yaml"
    path.write_text(yaml.safe_dump(fit_config(source, words, tmp_path / "run", callback("LLMBIP"))))
    assert call(capsys, "plan", "--config", str(path), "--out", str(tmp_path / "plan.json"))[0] == 0
    monkeypatch.setattr(LLMBIP, "score", lambda *a: pytest.fail("scored again"))
    code, _, err = call(capsys, "fit", "--config", str(path))
    assert code == 0, err


def test_a_file_of_fit_with_a_plan_loads_nothing(
    capsys: pytest.CaptureFixture[str], source: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call(capsys, *planned(source, words, tmp_path / "plan.json"))[0] == 0
    path = tmp_path / "fit.yaml"
    path.write_text(yaml.safe_dump(fit_config(source, words, tmp_path / "run", callback("LLMBIP"))))
    monkeypatch.setattr(loading, "load", lambda *a: pytest.fail("the model was loaded"))
    code, said, err = call(capsys, "plan", "--config", str(path), "--plan", str(tmp_path / "plan.json"))
    assert code == 0, err
    assert PruningPlan.load(tmp_path / "plan.json").digest in said


def test_a_file_of_fit_needs_one_pruning_callback(
    capsys: pytest.CaptureFixture[str], source: str, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "fit.yaml"
    path.write_text(yaml.safe_dump(fit_config(source, words, tmp_path / "run")))
    refused(call(capsys, "plan", "--config", str(path)), "expected one pruning callback", "got 0")
    path.write_text(yaml.safe_dump(fit_config(source, words, tmp_path / "run", callback("LLMBIP", ratio=2))))
    refused(call(capsys, "plan", "--config", str(path)), "ratio", "2")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_which_files_are_those_of_fit(path: Path) -> None:
    assert is_fit_config(["--config", str(path)]) == (path.stem.split("-")[0] in ("quickstart", "recover"))


# Edited and replayed -------------------------------------------------------------------------------------------------


def test_an_edited_plan_is_cut_without_method_or_text(
    capsys: pytest.CaptureFixture[str], source: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "plan.json"
    assert call(capsys, *planned(source, words, path, "--method", "magnitude"))[0] == 0
    data = json.loads(path.read_text())
    data["layers"][1]["mlp"] = {"channels": "0-9, 20, 40-59"}
    path.write_text(json.dumps(data))
    monkeypatch.setattr(text, "draw_windows", lambda *a: pytest.fail("text was read"))
    code, _, err = call(capsys, "prune", "--model", source, "--plan", str(path), "--out", str(tmp_path / "out"))
    assert code == 0, err
    plan = PruningPlan.load(tmp_path / "out" / "plan.json")
    assert plan == PruningPlan.load(path)
    assert len(plan.layers[1].ffn_channels) == 31
    assert json.loads((tmp_path / "out" / "report.json").read_text())["method"] == "magnitude"


def test_a_repair_that_a_plan_can_not_hold_is_said(
    capsys: pytest.CaptureFixture[str], source: str, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    assert call(capsys, *planned(source, words, path, "--method", "flap"))[0] == 0
    replay = ["prune", "--model", source, "--plan", str(path)]
    code, _, err = call(capsys, *replay, "--out", str(tmp_path / "a"))
    assert code == 0 and "plan: flap also repairs (repair: bias)" in err
    more = ["--method", "flap", "--text", words, "--seqlen", "16", "--windows", "4"]
    assert call(capsys, *replay, *more, "--out", str(tmp_path / "b"))[0] == 0
    cut = [PruningPlan.load(tmp_path / name / "plan.json") for name in ("a", "b")]
    assert any(kept.mlp_bias for kept in cut[1].layers) and not any(kept.mlp_bias for kept in cut[0].layers)


def test_a_plan_is_not_overwritten_unasked(
    capsys: pytest.CaptureFixture[str], source: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "plan.json"
    path.write_text("mine")
    arguments = planned(source, words, path, "--method", "magnitude")
    assert call(capsys, *arguments, "--overwrite", "true")[0] == 0
    path.write_text("mine")
    monkeypatch.setattr(loading, "load", lambda *a: pytest.fail("the model was loaded"))
    refused(call(capsys, *arguments), "--overwrite")
    assert path.read_text() == "mine"
    refused(call(capsys, *planned(source, words, tmp_path)), "plan.json")  # in the folder that was named


def test_nonsense_is_one_line(capsys: pytest.CaptureFixture[str], source: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(plan_of().to_json().replace('"channels": "0-95"', '"channels": "0-96"', 1))
    for arguments in (
        ["plan", "show", str(path)],
        ["plan", "--plan", str(path)],
        ["plan", "diff", str(path), str(path)],
    ):
        refused(call(capsys, *arguments), "plan.json", "layer 0", "channels", "0-96")
    refused(call(capsys, "plan", "show"), "expected one plan file")
    refused(call(capsys, "plan", "diff", str(path)), "expected two plan files")
    refused(call(capsys, "plan", "--ratio", "0.2"), "model")
    refused(call(capsys, "plan", "--plan", str(path), "--ratoi", "1"), "ratoi", "did you mean 'ratio'")


@pytest.mark.parametrize("name", ["plan", "prune"])
def test_help_has_one_spelling_of_a_plan(capsys: pytest.CaptureFixture[str], name: str) -> None:
    code, said, _ = call(capsys, name, "--help")
    assert code == 0 and "--plan PLAN" in said and "plan_file" not in said


# diff ----------------------------------------------------------------------------------------------------------------


def test_diff_says_what_differs_in_which_layer(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    first = plan_of(keep(SHAPE, channels=tuple(range(64))), keep(SHAPE, groups=(0, 1)))
    second = plan_of(keep(SHAPE, channels=(*range(62), 70)), keep(SHAPE, groups=()))
    found = find_plan_differences(first, second)
    assert [(each.layer, each.kind, each.widths) for each in found] == [
        (0, "ffn_channels", (64, 63)),
        (1, "kv_groups", (2, 0)),
        (1, "query_heads", (4, 0)),
    ]
    assert (found[0].only_first, found[0].only_second) == ((62, 63), (70,))
    for name, plan in (("a", first), ("b", second), ("same", replace(first, method="other", options={"x": 1}))):
        plan.save(tmp_path / name)
    code, said, _ = call(capsys, "plan", "diff", str(tmp_path / "a"), str(tmp_path / "b"))
    assert code == 1
    assert "62-63" in said and "2 of 3 layers differ" in said
    for plan in (first, second):
        assert f"{plan.predicted['parameters']:,}" in said
    code, said, _ = call(capsys, "plan", "diff", str(tmp_path / "a"), str(tmp_path / "same"))
    assert (code, first.digest in said) == (0, True)


def test_added_biases_are_a_difference() -> None:
    bare = keep(SHAPE, channels=tuple(range(8)))
    (found,) = find_plan_differences(plan_of(bare), plan_of(replace(bare, mlp_bias=True)))
    assert (found.layer, found.kind, found.widths) == (0, "mlp_bias", (False, True))


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (replace(DENSE, model_type="mistral"), "model_type 'llama' and 'mistral'"),
        (replace(DENSE, layers=DENSE.layers[:2]), "layers 3 and 2"),
        (replace(DENSE, layers=(*DENSE.layers[:2], replace(SHAPE, head_dim=4))), "layer 2"),
        (replace(DENSE, weights="fedcba9876543210"), "weights"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_plans_of_different_models_are_not_compared(model: Any, named: str) -> None:
    with pytest.raises(BadPlan, match=f"different dense models.*{named}"):
        find_plan_differences(plan_of(), plan_of(model=model))


def test_show_and_diff_import_nothing_heavy(tmp_path: Path) -> None:
    plan_of().save(tmp_path / "plan.json")
    path = str(tmp_path / "plan.json")
    code = (
        "import sys; from prunelit.cli.main import main;"
        f"codes = main(['plan', 'show', {path!r}]), main(['plan', 'diff', {path!r}, {path!r}]);"
        "heavy = {'torch', 'lightning', 'transformers', 'jsonargparse'} & set(sys.modules);"
        "sys.exit(bool(heavy) or any(codes))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert fit.plan is command
