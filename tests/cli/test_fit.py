"""The command line: the short forms, and one clear line with exit code 2 for bad input."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from prunelit.callbacks import PruningCallback
from prunelit.cli import fit
from prunelit.cli.main import COMMANDS, main
from prunelit.data import loading
from prunelit.pruning.registry import methods
from prunelit.runtime.parser_messages import condense_message
from tests.tiny import EXPERT_METHODS

ROOT = Path(__file__).parents[2]


@pytest.fixture
def words(tmp_path: Path) -> str:
    path = tmp_path / "words.txt"
    path.write_text(" ".join(f"w{n * 7 % 101}" for n in range(3000)))
    return str(path)


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command run in this process."""
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["prunelit", *arguments])  # Lightning reads it, as from a shell
        return _run(capsys, arguments)


def _run(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]) -> tuple[int, str, str]:
    try:
        code = main(list(arguments))
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def small(source: str, words: str, out: Path, *more: str) -> list[str]:
    sizes = ["--text", words, "--windows", "8", "--seqlen", "16"]
    sizes += [] if set(EXPERT_METHODS) & set(more) else ["--align", "8"]
    return ["prune", "--model", source, "--ratio", "0.3", *sizes, "--out", str(out), *more]


@pytest.mark.filterwarnings("ignore:calibration")  # few tokens for so many experts
@pytest.mark.parametrize("method", sorted(methods()))
def test_prune_then_evaluate(
    capsys: pytest.CaptureFixture[str], source: str, mixture_source: str, words: str, tmp_path: Path, method: str
) -> None:
    out, model = tmp_path / "out", mixture_source if method in EXPERT_METHODS else source
    code, text, err = call(capsys, *small(model, words, out, "--method", method))
    assert code == 0, err
    assert "removed" in text
    report = json.loads((out / "report.json").read_text())
    assert report["pruned"]["ratio_of_block_parameters"] >= 0.3
    assert report["pruned"]["parameters"] < report["dense"]["parameters"]
    assert (out / "plan.json").is_file()
    target = tmp_path / "e.json"
    code, text, err = call(
        capsys,
        "evaluate",
        "--model",
        str(out),
        "--text",
        words,
        "--seqlen",
        "16",
        "--windows",
        "4",
        "--json",
        str(target),
    )
    assert code == 0, err
    assert json.loads(text) == json.loads(target.read_text())
    assert {"perplexity", "tokens", "protocol"} <= set(json.loads(text))
    assert json.loads(text)["tokens"] == 4 * 15


def test_the_same_seed_gives_the_same_model(
    capsys: pytest.CaptureFixture[str], source: str, words: str, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        assert call(capsys, *small(source, words, tmp_path / name, "--seed", "3"))[0] == 0
    assert (tmp_path / "a/plan.json").read_text() == (tmp_path / "b/plan.json").read_text()


def test_global_scope_prunes_to_a_folder_that_loads(
    capsys: pytest.CaptureFixture[str], source: str, words: str, tmp_path: Path
) -> None:
    import prunelit

    assert call(capsys, *small(source, words, tmp_path / "out", "--scope", "global", "--unit", "query_head"))[0] == 0
    model = prunelit.load(tmp_path / "out")
    assert torch.isfinite(model(torch.tensor([[3, 4, 5]])).logits).all()


def test_a_plan_is_replayed(capsys: pytest.CaptureFixture[str], source: str, words: str, tmp_path: Path) -> None:
    assert call(capsys, *small(source, words, tmp_path / "a"))[0] == 0
    plan = str(tmp_path / "a" / "plan.json")
    assert call(capsys, *small(source, words, tmp_path / "b", "--plan_file", plan))[0] == 0
    assert (tmp_path / "b/plan.json").read_text() == (tmp_path / "a/plan.json").read_text()


def test_options_from_a_config_file_and_overrides(
    capsys: pytest.CaptureFixture[str], source: str, words: str, tmp_path: Path
) -> None:
    code, text, _ = call(capsys, *small(source, words, tmp_path / "out", "--method", "magnitude"), "--print_config")
    assert code == 0
    config = yaml.safe_load(text)
    assert config["method"] == "magnitude"
    assert config["ratio"] == 0.3
    (tmp_path / "c.yaml").write_text(text)
    code, text, err = call(capsys, "prune", "--config", str(tmp_path / "c.yaml"), "--ratio", "0.2")
    assert code == 0, err
    plan = json.loads((tmp_path / "out/plan.json").read_text())
    assert (plan["method"], plan["options"]["ratio"]) == ("magnitude", 0.2)


def test_texts_one_or_several_in_a_file_or_on_the_command_line(
    capsys: pytest.CaptureFixture[str], source: str, words: str, tmp_path: Path
) -> None:
    other = tmp_path / "more words.txt"
    other.write_text("more of them " * 200)
    lines = {"one.yaml": f"text: {words}", "two.yaml": f"text: [{words}, {other}]"}
    for name, line in lines.items():
        (tmp_path / name).write_text(f"{line}\nseqlen: 16\nwindows: 4\n")
    both = [words, str(other)]
    for arguments, wanted in (
        (["--config", str(tmp_path / "one.yaml")], [words]),
        (["--config", str(tmp_path / "two.yaml")], both),
        (["--config", str(tmp_path / "one.yaml"), "--text", *both], both),
        (["--text", words, str(other), "--seqlen", "16", "--windows", "4"], both),
        ([f"--text={words}", "--seqlen", "16", "--windows", "4"], [words]),
    ):
        code, text, err = call(capsys, "evaluate", "--model", source, *arguments)
        assert code == 0, err
        assert json.loads(text)["protocol"]["text"] == wanted


# Bad input -------------------------------------------------------------------------------------------------------


def refused(result: tuple[int, str, str], *wanted: str) -> None:
    code, _, err = result
    lines = [line for line in err.splitlines() if line.strip()]
    assert code == 2, err
    assert len(lines) == 1, err
    assert lines[0].startswith("prunelit: error: ")
    assert all(word in lines[0] for word in wanted), lines[0]


@pytest.mark.parametrize(
    ("more", "out", "wanted"),
    [
        (["--format", "gguf"], "model.gguf", ["out: expected a folder", "plan.json"]),
        (["--format", "padded", "--stream", "true"], "m", ["format 'padded'", "in memory"]),
        (["--format", "deci", "--stream", "true"], "m", ["format 'deci'", "in memory"]),
        (["--format", "gguf", "--stream", "true"], "m", ["format 'gguf'", "in memory"]),
    ],
)
def test_prune_knows_before_it_loads_what_can_not_be_written(
    capsys: pytest.CaptureFixture[str],
    source: str,
    words: str,
    tmp_path: Path,
    more: list[str],
    out: str,
    wanted: list[str],
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "load_tokenizer", pytest.fail)
        refused(call(capsys, *small(source, words, tmp_path / out, *more)), *wanted)


@pytest.mark.parametrize(("format", "why"), [("uniform", "'padded'"), ("gguf", "BPE tokenizer")])
def test_prune_knows_before_it_cuts_what_a_format_can_not_hold(
    capsys: pytest.CaptureFixture[str], source: str, words: str, tmp_path: Path, format: str, why: str
) -> None:
    differing = ["--method", "random", "--scope", "global", "--unit", "query_head", "--format", format]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PruningCallback, "cut", pytest.fail)
        refused(call(capsys, *small(source, words, tmp_path / "m", *differing)), f"format '{format}'", why)
    assert not (tmp_path / "m").exists()


def test_an_output_that_can_not_be_written(
    capsys: pytest.CaptureFixture[str], source: str, words: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("x")
    refused(call(capsys, *small(source, words, tmp_path / "file")), "expected a folder, got a file")
    refused(call(capsys, *small(source, words, tmp_path / "file" / "below")), "cannot be written")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("x")
    refused(call(capsys, *small(source, words, tmp_path / "full")), "--overwrite")
    assert (tmp_path / "full" / "thesis.txt").read_text() == "x"


def test_unwritable_outputs_are_found_before_the_model_is_loaded(
    capsys: pytest.CaptureFixture[str], source: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prunelit.data import loading

    monkeypatch.setattr(loading, "load", lambda *a: pytest.fail("the model was loaded"))
    (tmp_path / "file").write_text("x")
    refused(call(capsys, *small(source, words, tmp_path / "file")), "file")
    result = call(capsys, "evaluate", "--model", source, "--text", words, "--json", str(tmp_path))
    refused(result, "expected a file, got a folder")


def test_validate_runs_the_validation_loop_and_cuts_nothing(
    capsys: pytest.CaptureFixture[str], source: str, words: str, tmp_path: Path
) -> None:
    base = {
        "model": {"model": source},
        "data": {"train": words, "seqlen": 16, "calibration_windows": 4, "validation_windows": 4},
        "trainer": {
            "default_root_dir": str(tmp_path / "run"),
            "accelerator": "cpu",
            "logger": False,
            "callbacks": [{"class_path": "prunelit.callbacks.LLMBIP", "init_args": {"ratio": 0.3, "align": 8}}],
        },
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(base))
    code, text, err = call(capsys, "validate", "--config", str(tmp_path / "run.yaml"))
    assert code == 0, err
    assert "val_perplexity" in text
    assert not (tmp_path / "run" / "plan.json").exists()


# The light front ---------------------------------------------------------------------------------------------------


def test_the_front_imports_nothing_heavy() -> None:
    code = (
        "import sys; from prunelit.cli.main import main;"
        "main(['--help']); main(['methods']); main(['methods', 'llm_bip']);"
        "heavy = {'torch', 'lightning', 'transformers', 'jsonargparse'} & set(sys.modules); sys.exit(bool(heavy))"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 3  # of the CPU; well under one second
    assert all(command in done.stdout for command in COMMANDS)
    assert all(method in done.stdout for method in methods())


def test_chatter_goes_to_the_stderr_of_now(
    capsys: pytest.CaptureFixture[str], source: str, words: str, tmp_path: Path
) -> None:
    """The second command of a process speaks as the first one did."""
    for name in ("a", "b"):
        _, _, err = call(capsys, *small(source, words, tmp_path / name))
        assert err.count("of block parameters removed") == 1
        assert "Logging error" not in err


def test_a_name_inside_a_list_of_an_option_is_said_in_full() -> None:
    nested = (
        'Parser key "texts":\n  Problem with given class_path \'a.B\':\n    Parser key "n":\n      Expected a number'
    )
    assert condense_message(nested).endswith("n: Expected a number")


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_fit_from_the_shell(source: str, words: str, tmp_path: Path, devices: int) -> None:
    """A whole run in its own process, on one rank and on two, with one plan and equal measurements."""
    from transformers import AutoModelForCausalLM

    arguments: dict[str, Any] = {
        "model.model": source,
        "data.train": words,
        "data.seqlen": 16,
        "data.calibration_windows": 8,
        "data.validation_windows": 8,
        "trainer.default_root_dir": tmp_path / "run",
        "trainer.devices": devices,
        "trainer.accelerator": "cpu",
        "trainer.strategy": "ddp" if devices > 1 else "auto",
        "trainer.max_steps": 4,
        "trainer.val_check_interval": 2,
        "trainer.logger": "false",
        "trainer.enable_progress_bar": "false",
    }
    small_cut = (ROOT / "callbacks" / "llm_bip.yaml").read_text().replace("align: 64", "align: 8")
    (tmp_path / "cut.yaml").write_text(small_cut)
    done = subprocess.run(
        [sys.executable, "-m", "prunelit", "fit", "--config", str(tmp_path / "cut.yaml")]
        + [f"--{name}={value}" for name, value in arguments.items()],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "recovered" in done.stdout
    run = tmp_path / "run"
    assert {"model", "plan.json", "report.json", "config.yaml"} <= {path.name for path in run.iterdir()}
    report = json.loads((run / "report.json").read_text())
    assert report["protocol"]["tokens"] == 8 * 15
    assert f"| recovered | {report['recovered']['perplexity']:.2f} |" in (run / "model" / "README.md").read_text()
    assert "in a new process" in json.loads((run / "model" / "proof.json").read_text())["loader"]
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    assert sum(p.numel() for p in model.parameters()) == report["recovered"]["parameters"]
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["model"] == source


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (["--model", "a/b"], ["--model.model", "a/b"]),
        (["--config", "x.yaml", "--model=a/b"], ["--config", "x.yaml", "--model.model=a/b"]),
        (["--model", "part.yaml"], ["--model", "part.yaml"]),
        (["--model.lora_rank", "4"], ["--model.lora_rank", "4"]),
    ],
)
def test_fit_takes_a_model_as_the_other_commands_do(given: list[str], wanted: list[str]) -> None:
    assert fit.expand_fit_options(given) == wanted


def test_a_plan_needs_one_callback_that_cuts(capsys: pytest.CaptureFixture[str], source: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{}")
    options = ["--model", source, "--trainer.default_root_dir", str(tmp_path / "run"), "--plan"]
    refused(
        call(capsys, "fit", *options, str(tmp_path / "plan.json")), "plan", "expected one pruning callback", "got 0"
    )
    more = [*options, "nowhere.json", "--config", str(ROOT / "configs" / "recover-lora.yaml")]
    refused(call(capsys, "fit", *more), "nowhere.json")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["fit", "plan"])
@pytest.mark.parametrize("more", [[], ["--plan", "plan.json"]])
def test_two_callbacks_that_cut_are_refused(
    capsys: pytest.CaptureFixture[str],
    source: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    more: list[str],
) -> None:
    monkeypatch.setattr(loading, "load", lambda *_: pytest.fail("the model was loaded"))
    files = [ROOT / "configs" / "quickstart.yaml", ROOT / "callbacks" / "flap.yaml"]
    given = [*("--model", source, "--trainer.default_root_dir", str(tmp_path / "run")), *more]
    for path in files:
        given += ["--config", str(path)]
    refused(call(capsys, command, *given), "trainer.callbacks: expected one", "got LLMBIP and FLAP", "keep one of them")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ([], "CommandProgressBar"),
        (["--trainer.enable_progress_bar", "false"], "NoneType"),
        (["--trainer.callbacks+=RichProgressBar"], "RichProgressBar"),
    ],
)
def test_one_style_of_bars_unless_another_is_asked_for(source: str, options: list[str], wanted: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["prunelit"])
        trainer = fit.build_fit_job(
            ["--model", source, "--trainer.accelerator", "cpu", "--trainer.logger", "false", *options]
        )[0]
    assert type(trainer.progress_bar_callback).__name__ == wanted
    assert wanted != "CommandProgressBar" or trainer.progress_bar_callback.is_disabled  # nobody looks
