"""Command lines are parsed before anything slow is imported; the parsers know what the functions behind them take."""

import dataclasses
import inspect
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from jsonargparse import ArgumentParser

from prunelit.calibration.metrics import perplexity
from prunelit.cli import dashboard, export, fit, plan, prune
from prunelit.cli.main import COMMANDS, main
from prunelit.cli.parsing import aliases, declarations, fit_options, parsers
from prunelit.cli.parsing.options import declare_method, import_method, parse_command_line
from prunelit.compare.config import Calibration, Latency
from prunelit.compare.run import compare_methods
from prunelit.evaluation.perplexities import Text
from prunelit.evaluation.run import evaluate_model
from prunelit.evaluation.speed import Speed
from prunelit.monitoring.run_report import RunReport
from prunelit.pruning.callback import PruningCallback
from prunelit.pruning.registry import methods
from prunelit.recovery.datamodule import TextDataModule
from prunelit.recovery.module import RecoveryModule
from tests.cli.test_fit import ROOT, call

SLOW = {"torch", "transformers", "lightning"}
ANSWERED_AT_ONCE = [
    *([command, "--help"] for command in COMMANDS),
    *(["prune", "--method", name, "--help"] for name in methods()),
    ["fit", "--help", "all"],
    ["fit", "--trainer.max_step", "3"],
    ["fit", "--data.seqlen", "many"],
    ["plan", "--config", "configs/recover-lora.yaml", "--modl", "x"],
    ["plan", "show", "--help"],
    ["prune", "--raito", "0.2"],
    ["prune", "--model", "m"],
    ["prune", "--model", "m", "--out", "o", "--ratio", "some"],
    ["evaluate", "--model", "m", "--dtype", "int8"],
    ["compare", "--config", "configs/compare-quick.yaml", "--print_config"],
    ["prunne"],
]
ASK = """
import sys, json
from prunelit.cli.main import main
for arguments in json.loads(sys.argv[1]):
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    assert code in (0, 2), arguments
    slow = {"torch", "transformers", "lightning"} & set(sys.modules)
    assert not slow, (arguments, slow)
"""


def test_help_and_mistakes_import_nothing_slow() -> None:
    command = [sys.executable, "-c", ASK, json.dumps(ANSWERED_AT_ONCE)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("prunelit: error: ") == 8


def describe(function: Callable[..., Any]) -> dict[str, tuple[Any, str]]:
    """The default and the type of every option, as jsonargparse sees them."""
    parser = ArgumentParser()
    add = parser.add_class_arguments if isinstance(function, type) else parser.add_function_arguments
    add(function, "x", sub_configs=False, fail_untyped=False)
    return {
        action.dest: (
            action.default,
            re.sub(r"prunelit(\.\w+)*\.", "", str(getattr(action, "_typehint", action.type))),
        )
        for action in parser._actions
        if action.dest.startswith("x.") and not action.dest.endswith(".help")
    }


@pytest.mark.parametrize("name", sorted(methods()))
def test_a_method_is_declared_as_its_class_is(name: str) -> None:
    declared, kind = declare_method(name), import_method(name)
    assert not isinstance(declared.function, type)
    assert describe(declared.function) == describe(kind)
    for field in ("job_options", "ignored_options", "cut_options", "repair_choices"):
        assert getattr(declared, field) == getattr(kind, field), field


def test_a_replay_is_declared_as_its_class_is() -> None:
    assert describe(declare_method(None).function) == describe(PruningCallback)


@pytest.mark.parametrize(
    "function",
    [export.export_model, evaluate_model, compare_methods, dashboard.create_dashboard, RecoveryModule, TextDataModule]
    + [RunReport],
    ids=lambda function: function.__name__,
)
def test_a_function_is_declared_as_it_is(function: Callable[..., Any]) -> None:
    declared = declarations.declare_function(function.__module__, function.__name__)
    assert not isinstance(declared, type) and "declared_" in declared.__name__
    assert describe(declared) == describe(function)


@pytest.mark.parametrize(
    ("function", "skip"),
    [
        (prune.prune_model, {"method", "sources"}),
        (plan.make_model_plan, {"model", "method", "sources", "measured"}),
    ],
)
def test_what_a_command_adds_itself_is_left_out(function: Callable[..., Any], skip: set[str]) -> None:
    declared = inspect.signature(declarations.declare_function(function.__module__, function.__name__, skip))
    real = inspect.signature(function).parameters
    assert {name: x.default for name, x in declared.parameters.items()} == {
        name: x.default for name, x in real.items() if name not in skip
    }


@pytest.mark.parametrize("kind", [Calibration, Latency, Speed, Text])
def test_dataclasses_are_declared_as_they_are(kind: type) -> None:
    real = {field.name: field.default for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    assert declarations.list_fields(kind.__module__, kind.__name__) == list(real)
    declared = declarations.declare_dataclass(kind.__module__, kind.__name__)
    assert {field.name: field.default for field in dataclasses.fields(declared)} == real  # type: ignore[arg-type]


def test_dataclasses_are_built_from_options() -> None:
    request = ["--config", str(ROOT / "configs" / "compare-quick.yaml"), "--calibration.windows", "3"]
    options = parsers.build_options("compare", request)
    assert type(options["calibration"]) is Calibration and options["calibration"].windows == 3
    speed = parsers.build_options("evaluate", ["--model", "m", "--speed.prompt", "12"])["speed"]
    assert type(speed) is Speed and speed.prompt == 12
    assert parsers.build_options("evaluate", ["--model", "m", "--speed"])["speed"] is True


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_the_options_of_fit_are_those_of_lightning(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    known: set[str] = set()

    def keep(cli: fit.PrunelitCLI, parser: Any, args: Any) -> None:
        actions = cli._parser(command)._actions
        known.update(action.dest for action in actions if not action.dest.endswith(".help"))
        raise SystemExit(0)

    monkeypatch.setattr(fit.PrunelitCLI, "parse_arguments", keep)
    with pytest.raises(SystemExit):
        fit.run(command, [])
    others = {"help", "config", "print_config", "trainer", "model", "data", "report"} | {"data.tokenizer"}
    assert set(fit_options.list_fit_options(command)) == known - others


def test_the_page_of_fit_is_in_groups(capsys: pytest.CaptureFixture[str]) -> None:
    code, page, _ = call(capsys, "fit", "--help")
    assert code == 0 and len(page.splitlines()) < 150 and max(map(len, page.splitlines())) <= 120
    for group in ("\nmodel: ", "\ndata: ", "\nreport: ", "\ntrainer: ", "\ncallbacks\n"):
        assert group in page
    assert "--trainer.max_steps" in page and "--trainer.detect_anomaly" not in page
    _, trainer, _ = call(capsys, "fit", "--help", "trainer")
    assert "--trainer.detect_anomaly" in trainer and "--model.lora_rank" not in trainer
    _, everything, _ = call(capsys, "validate", "-h", "all")
    assert "--trainer.detect_anomaly" in everything and "--model.lora_rank" in everything and "--verbose" in everything
    code, _, error = call(capsys, "fit", "--help", "trainr")
    assert code == 2 and "did you mean 'trainer'?" in error and error.count("\n") == 1


@pytest.mark.parametrize("command", sorted(parsers.PARSERS))
def test_no_alias_is_an_option_itself(command: str) -> None:
    options = {action.dest for action in parsers.build_command_parser(command, [])._actions}
    others = {alias for names in aliases.ALIASES.values() for alias in names}
    assert not options & others and not options & aliases.REFUSED.keys()
    for name, alternatives in aliases.ALIASES.items():
        own = aliases.OWN_NAMES.get(command, {}).get(name, name)
        if own.partition(".")[0] in options:
            for alternative in alternatives:
                assert aliases.translate_options(command, [f"--{alternative}"]) == [f"--{own}"]


def test_every_name_of_a_command_is_an_option_of_it() -> None:
    for command, names in aliases.OWN_NAMES.items():
        known = (
            set(fit_options.list_fit_options(command))
            if command == "fit"
            else {action.dest for action in parsers.build_command_parser(command, [])._actions}
        )
        for name in names.values():
            assert name in known or name.partition(".")[0] in known, (command, name)


def test_others_spellings_reach_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(prune, "parse_command", lambda *words: seen.append(parsers.parse_command(*words)) or exit_now())
    given = ["--pretrained", "m", "--sparsity", "0.2", "--output-dir", "o", "--dataset", "a", "b", "--nsamples=8"]
    with pytest.raises(SystemExit):
        main(["prune", *given, "--max-length", "16", "--overwrite", "--stream", "false", "--protect", "0", "-1"])
    options = seen[0]
    assert (options.model, options.ratio, options.out, options.text) == ("m", 0.2, "o", ["a", "b"])
    assert (options.windows, options.seqlen, options.overwrite, options.stream) == (8, 16, True, False)
    assert options.protect == [0, -1]


def exit_now() -> Any:
    raise SystemExit(0)


def pipe_text(path: Path, text: str) -> threading.Thread:
    """Make a pipe that can be read once, as a shell does for `<(...)`."""
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_text, args=(text,), daemon=True)
    writer.start()
    return writer


@pytest.mark.timeout(60)  # a second reader of a pipe would wait without end
def test_a_config_may_come_through_a_pipe(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    writer = pipe_text(tmp_path / "prune", "{method: flap, model: m, out: o, ratio: 0.3}")
    code, printed, _ = call(capsys, "prune", "--config", str(tmp_path / "prune"), "--print_config")
    options = yaml.safe_load(printed)
    assert code == 0 and (options["method"], options["model"], options["ratio"]) == ("flap", "m", 0.3)
    writer.join()
    pipe_text(tmp_path / "wrong", "model: m\nraito: 0.3\n").join(0)
    code, _, error = call(capsys, "prune", "--config", str(tmp_path / "wrong"), "--out", "o")
    assert code == 2 and "did you mean 'ratio'?" in error
    pipe_text(tmp_path / "fit", "trainer:\n  max_step: 3\n").join(0)
    code, _, error = call(capsys, "plan", f"--config={tmp_path / 'fit'}")
    assert code == 2 and "config given as text: trainer.max_step" in error and "'max_steps'" in error


def test_plan_of_a_file_of_fit_takes_the_spellings_of_fit(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["plan", "--config", str(ROOT / "configs" / "recover-lora.yaml")]
    code, _, error = call(capsys, *words, "--max-seq-length", "x", "--output_dir", str(tmp_path))
    assert code == 2 and "data.seqlen: expected a whole number, got 'x'" in error
    code, _, error = call(capsys, *words, "--sparsity", "0.2")
    assert code == 2 and "plan: --sparsity: expected the method as a callback" in error


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["prune", "--raito", "0.2"], ["--raito", "did you mean 'ratio'?"]),
        (["prune", "--ratio", "0.2"], ["model, out: expected a value, got none; pass --model and --out"]),
        (["prune", "--trust-remote-code"], ["--trust-remote-code: expected a model of a family", "never run"]),
        (["evaluate", "--revision=main"], ["--revision: expected a folder", "hf download"]),
        (["prune", "--text", "a", "-x"], ["unrecognized arguments: -x"]),
        (["prune", "--overwrite", "yess"], ["overwrite: expected true or false, got 'yess'"]),
        (["methods", "-q", "-v"], ["quiet: expected it without --verbose"]),
        (["methods", "--log", "jsn"], ["log: expected json or text, got 'jsn'; did you mean 'json'?"]),
        (["fit", "--sparsity", "0.2"], ["--sparsity: expected the method as a callback: --trainer.callbacks+"]),
        (["fit", "--model.lora-rnk=3"], ["--model.lora_rnk", "did you mean 'model.lora_rank'?"]),
        (["fit", "--text", "a", "--seqlen", "x"], ["data.seqlen: expected a whole number, got 'x'"]),
    ],
    ids=lambda value: value[1] if value[0] in COMMANDS else "",
)
def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], parts: list[str]) -> None:
    required = ["--model", "m", "--ratio", "0.2", "--out", "o"] if arguments[1] in ("--text", "--overwrite") else []
    required = required if arguments[0] == "prune" else []
    code, printed, error = call(capsys, *arguments, *required)
    assert (code, printed, error.count("\n")) == (2, "", 1)
    assert all(part in error for part in parts), error


def test_a_config_file_with_anothers_name_is_told_ours(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("sparsity: 0.2\nmodel: m\nout: o\n")
    code, _, error = call(capsys, "prune", "--config", str(tmp_path / "c.yaml"))
    assert code == 2 and "'sparsity'" in error and "its name here is 'ratio'" in error


def test_lists_are_written_as_people_write_them() -> None:
    parser = ArgumentParser(exit_on_error=False)
    for name in ("methods", "prompts", "text"):
        parser.add_argument(f"--{name}", type=list[str])
    words = ["--methods", "[llm_bip,flap]", "--prompts", "[w1 w2]", "--text", "a", "[b]"]
    options = parse_command_line(parser, words)
    assert (options.methods, options.prompts, options.text) == (["llm_bip", "flap"], ["[w1 w2]"], ["a", "[b]"])


def test_the_reference_shows_the_aliases() -> None:
    page = (ROOT / "docs" / "reference" / "commands.md").read_text(encoding="utf-8")
    assert aliases.render_alias_table() in page


def test_what_cannot_be_read_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise declarations.UnreadableExpression("odd")

    monkeypatch.setattr(declarations, "evaluate_expression", refuse)
    assert declarations.declare_function("prunelit.calibration.metrics", "perplexity") is cast(Any, perplexity)
    declared = declare_method("flap")
    assert isinstance(declared.function, type) and declared.cut_options == ()
