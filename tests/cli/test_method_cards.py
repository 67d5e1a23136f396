"""`methods`: what the syntax trees say is what the classes are and do."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from prunelit.cli import method_cards
from prunelit.cli.main import main
from prunelit.cli.method_cards import answer_methods_command, list_method_options
from prunelit.pruning.registry import method_class, methods
from prunelit.runtime.errors import BadOption
from tests.test_configs import ROOT, arguments, call
from tests.tiny import EXPERT_METHODS, family_for, tiny, tokens

METHODS = tuple(methods())
WIDTHS = {"scope", "unit", "kinds", "align", "min_kept", "uniform_heads", "rounding", "speedup"}


@pytest.mark.parametrize("name", METHODS)
def test_options_are_those_of_the_constructor(name: str) -> None:
    found = {option.name: option for option in list_method_options(name)}
    known = arguments(method_class(name))
    assert found.keys() <= known.keys()
    assert known.keys() - found.keys() <= WIDTHS
    for option, default in known.items():
        if option in found:
            given = found[option].default
            assert (None if given is None else yaml.safe_load(given)) == (
                None if default in (None,) or isinstance(default, type) else list(default) if default == () else default
            )
            assert (given is None) == isinstance(default, type)  # inspect's mark of an argument without a default
            assert len(found[option].what) > 5, option


@pytest.mark.parametrize("name", METHODS)
def test_what_a_method_needs_is_what_it_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    done = {"backward": 0, "steps": 0}

    def counted(kind: str, call: Any) -> Any:
        def run(*args: Any, **options: Any) -> Any:
            done[kind] += 1
            return call(*args, **options)

        return run

    monkeypatch.setattr(torch.autograd, "backward", counted("backward", torch.autograd.backward))
    monkeypatch.setattr(torch.autograd, "grad", counted("backward", torch.autograd.grad))
    monkeypatch.setattr(torch.optim.AdamW, "step", counted("steps", torch.optim.AdamW.step))
    whole = name in ("block_pruner", "shortgpt", *EXPERT_METHODS)
    method = method_class(name)(ratio=0.3, **({} if whole else {"align": 8}))
    needs = method_cards.determine_needs(methods()[name])
    plan = method.prune(tiny(family_for(name)), [{"input_ids": tokens(6, 20)}] if method.needs_text() else [])
    assert (needs == "no text") == (not method.reads_text)
    assert (needs in ("backward", "trains")) == (done["backward"] > 0)
    assert (needs == "trains") == (done["steps"] > 0)
    assert (needs == "search") == ("search" in plan.calibration)


def test_the_table_has_a_line_for_every_method() -> None:
    lines = {
        line.split()[0]: line for line in answer_methods_command([]).splitlines() if line and line.split()[0] in METHODS
    }
    assert tuple(lines) == METHODS
    assert max(map(len, answer_methods_command([]).splitlines())) <= 120
    papers = (
        "2406.10594 2504.05586 2402.14800 2312.11983 2407.19126 2412.06419 2510.13999 2412.15127 2403.03853 2305.11627 "
        "2312.11983"
    )
    assert [word for line in lines.values() for word in line.split() if word[:4].isdigit()] == papers.split()


@pytest.mark.parametrize("name", METHODS)
def test_a_card_names_options_commands_and_files_that_are_there(name: str) -> None:
    card = answer_methods_command([name])
    assert methods()[name].card in card
    assert "say nothing" not in card and "`PruningCallback`" not in card  # where that is, a reader of a card cannot see
    assert all(f"    {option.name} " in card for option in list_method_options(name))
    assert max(map(len, card.splitlines())) <= 140
    assert f"--config configs/methods/{name}.yaml" in card
    assert all((ROOT / path).is_file() for path in (f"callbacks/{name}.yaml", f"configs/methods/{name}.yaml"))
    assert f"\n## {name}\n" in (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "wanted", "end"),
    [
        ("best", "{none}", "Here: none."),
        ("shortgpt", "{none,least_squares}", "Here: none, least_squares."),
        ("greedy_output", "{none,bias,least_squares,two_step}", '"two_step", the paper\'s remedy.'),
    ],
)
def test_help_and_card_offer_the_repairs_that_a_method_has(
    capsys: pytest.CaptureFixture[str], name: str, wanted: str, end: str
) -> None:
    with pytest.raises(SystemExit):
        main(["prune", "--method", name, "--help"])
    assert f"--repair {wanted}" in capsys.readouterr().out
    said = next(option.what for option in list_method_options(name) if option.name == "repair")
    assert said.endswith(end)


def test_the_commands_of_a_card_are_parsed(capsys: pytest.CaptureFixture[str]) -> None:
    words = (
        answer_methods_command(["flap"])
        .replace("\\\n", " ")
        .split("python -m prunelit fit ")[1]
        .splitlines()[0]
        .split()
    )
    shown = yaml.safe_load(call(capsys, "fit", *words, "--print_config"))
    checkpoints, entry = shown["trainer"]["callbacks"]
    assert (entry["class_path"], entry["init_args"]["ratio"]) == ("prunelit.callbacks.FLAP", 0.2)
    assert entry["init_args"]["scope"] == "global"  # the method's own, not that of the file
    there = yaml.safe_load((ROOT / "configs" / "recover-lora.yaml").read_text(encoding="utf-8"))["trainer"]
    (asked,) = (c["init_args"] for c in there["callbacks"] if c["class_path"] == "ModelCheckpoint")
    assert checkpoints["class_path"].endswith(".ModelCheckpoint")
    assert checkpoints["init_args"].items() >= (asked | {"dirpath": None}).items()  # which is default_root_dir's
    sample = yaml.safe_load(answer_methods_command(["flap"]).partition("In YAML\n")[2].partition("\n\n")[0])
    assert sample["trainer"]["callbacks+"][0]["class_path"] == "prunelit.callbacks.FLAP"


def test_every_method_has_a_page_of_the_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs")
    importlib.import_module("method_pages").write_method_pages(tmp_path)
    contents = (tmp_path / "method-pages.md").read_text(encoding="utf-8")
    for name in METHODS:
        page = (tmp_path / "methods" / f"{name}.md").read_text(encoding="utf-8")
        assert all(f"| `{option.name}` |" in page for option in list_method_options(name))
        assert f"prune --model PATH_OR_ID --method {name} " in page and f"methods.md#{name})" in page
        assert f"[{name}](methods/{name}.md)" in contents


def test_as_data() -> None:
    found = json.loads(answer_methods_command(["--json"]))
    assert [entry["name"] for entry in found] == list(METHODS)
    assert json.loads(answer_methods_command(["flap", "--json"])) == next(
        entry for entry in found if entry["name"] == "flap"
    )


def test_help_says_how(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--help"]) == 0
    assert "[--json]" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["flap", "taylor"], ["--jsn"], ["torch.nn.Linear"], ["flop"]])
def test_anything_else_is_refused(words: list[str]) -> None:
    with pytest.raises(BadOption, match="did you mean 'flap'" if words == ["flop"] else "expected"):
        answer_methods_command(words)
