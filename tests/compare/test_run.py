"""`compare`: numbers against sums by hand, what is not run again, what fails and what goes on, what is refused."""

import copy
import gc
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
import types
import weakref
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml

from prunelit.callbacks.magnitude import Magnitude
from prunelit.callbacks.random import Random
from prunelit.cli.main import main
from prunelit.compare import cell, figures, tables
from prunelit.compare.cell import measure_prefill_seconds
from prunelit.compare.config import parse_method_rows
from prunelit.core.scores import LayerScores
from prunelit.data import loading
from prunelit.data.eval_texts import resolve_text_sources
from prunelit.pruning.callback import PruningCallback
from prunelit.pruning.context import PruningContext
from prunelit.pruning.registry import methods
from prunelit.report.format_numbers import exponentiate_nll, format_perplexity
from prunelit.runtime.errors import SourceNotFound
from prunelit.runtime.fingerprints import fingerprint_model as fingerprint
from tests.cli.test_fit import call, refused
from tests.tiny import tiny, tiny_tokenizer

ROOT = Path(__file__).parents[2]
NAME = __name__  # methods of this file are named by import path


class Spy(Magnitude):
    """Magnitude that says on which text it was asked to score."""

    reads_text = True
    seen: ClassVar[list[tuple[str, int, str]]] = []

    def score(self, context: PruningContext) -> list[LayerScores]:
        ids = torch.cat([batch["input_ids"] for batch in context.batches])
        self.seen.append((type(self).__name__, self.seed, str(ids.tolist())))
        return super().score(context)


class Other(Spy):
    """The same under another name."""


class Slow(Random):
    """Slow enough to be killed in the middle."""

    def score(self, context: PruningContext) -> list[LayerScores]:
        time.sleep(1.5)
        return super().score(context)


class Forgetful(PruningCallback):
    """Draws from the generators of the process, not from its seed."""

    reads_text = False

    def score(self, context: PruningContext) -> list[LayerScores]:
        return [
            LayerScores(
                torch.rand(layer.shape.query_heads),
                torch.tensor([random.random() for _ in range(layer.shape.ffn_channels)]),
            )
            for layer in context.decoder
        ]


class Broken(Random):
    """A method with a bug."""

    def score(self, context: PruningContext) -> list[LayerScores]:
        raise TypeError("a bug\nover two lines")


class Stopped(Random):
    """Ctrl-C while it scores at the second ratio."""

    armed: ClassVar[bool] = True

    def score(self, context: PruningContext) -> list[LayerScores]:
        if self.ratio == 0.3 and self.armed:
            raise KeyboardInterrupt
        return super().score(context)


class Diary(Random):
    """A search with a journal, stopped in the middle when there is none yet."""

    read: ClassVar[list[str]] = []

    def __init__(self, ratio: float, journal: str | None = None, **kwargs: Any):
        super().__init__(ratio, **kwargs)
        self.journal = journal

    def score(self, context: PruningContext) -> list[LayerScores]:
        path = Path(str(self.journal))
        if not path.exists():
            path.write_text("half of the search")
            raise KeyboardInterrupt
        self.read.append(path.read_text())
        return super().score(context)


class Closed(PruningCallback):
    """Takes no option but the ratio."""

    def __init__(self, ratio: float):
        super().__init__(ratio)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("texts")
    (folder / "sub").mkdir()
    (folder / "words.txt").write_text(" ".join(f"w{n * 7 % 101}" for n in range(600)))
    (folder / "sub" / "other.txt").write_text(" ".join(f"x{n * 11 % 37} y" for n in range(600)))
    return str(folder)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Pictures, and the collector, take most of a small comparison's time."""
    if "memory" not in request.node.name:
        monkeypatch.setattr(gc, "collect", lambda: 0)
    if "pictures" not in request.node.name and "matplotlib" not in request.node.name:
        monkeypatch.setattr(figures, "write_comparison_figures", lambda *a: [])


def config(source: str, data: str, tmp_path: Path, **changes: Any) -> list[str]:
    """Arguments of a small comparison: two methods, two ratios, two texts."""
    content: dict[str, Any] = {
        "model": source,
        "data": data,
        "out": str(tmp_path / "out"),
        "ratios": [0.1, 0.3],
        "calibration": {"text": "words.txt", "windows": 4, "seqlen": 16},
        "texts": {
            "words": {"text": "words.txt", "seqlen": 16, "windows": 4},
            "other": {"text": ["sub/other.txt"], "seqlen": 32, "windows": 2},
        },
        "methods": ["random", "magnitude"],
        "options": {"align": 1},
    }
    path = tmp_path / f"{len(list(tmp_path.glob('*.yaml')))}.yaml"
    path.write_text(yaml.safe_dump(content | changes, sort_keys=False))
    return ["compare", "--config", str(path)]


def report(tmp_path: Path) -> dict[str, Any]:
    return dict(json.loads((tmp_path / "out" / "compare.json").read_text()))


def stamps(tmp_path: Path) -> dict[str, int]:
    """Modification time of every cell's file, by name."""
    return {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / "cells").iterdir()}


# The numbers -----------------------------------------------------------------------------------------------------


def by_hand(model: Any, path: str, seqlen: int, count: int) -> float:
    """Mean negative log-likelihood of the first windows, token by token."""
    ids = tiny_tokenizer()(Path(path).read_text())["input_ids"]
    losses = []
    for place in range(count):
        window = ids[place * seqlen : (place + 1) * seqlen]
        with torch.no_grad():
            logits = model(torch.tensor([window])).logits[0].double()
        for position in range(seqlen - 1):
            chances = torch.softmax(logits[position], dim=0)
            losses.append(-math.log(float(chances[window[position + 1]])))
    return sum(losses) / len(losses)


def test_numbers_are_those_of_sums_by_hand(
    capsys: pytest.CaptureFixture[str], source: str, data: str, tmp_path: Path
) -> None:
    code, out, err = call(capsys, *config(source, data, tmp_path))
    assert code == 0, err
    found = report(tmp_path)
    places = {"words": (f"{data}/words.txt", 16, 4), "other": (f"{data}/sub/other.txt", 32, 2)}
    dense = {name: by_hand(loading.load(source), *place) for name, place in places.items()}
    for name, value in dense.items():
        assert found["dense"]["texts"][name]["nll"] == pytest.approx(value, rel=1e-5)
    measures = {}
    for label, kind in (("random", Random), ("magnitude", Magnitude)):
        for ratio in (0.1, 0.3):
            model = loading.load(source)
            plan = kind(ratio, align=1).prune(model)
            cell = next(c for c in found["cells"] if (c["label"], c["ratio"]) == (label, ratio))
            nll = {name: by_hand(model, *place) for name, place in places.items()}
            for name, value in nll.items():
                assert cell["texts"][name]["nll"] == pytest.approx(value, rel=1e-5)
                assert cell["texts"][name]["perplexity"] == pytest.approx(math.exp(value), rel=1e-4)
            measures[label, ratio] = sum(nll[name] - dense[name] for name in places) / 2
            assert cell["mean_log_ratio"] == pytest.approx(measures[label, ratio], abs=1e-5)
            assert cell["size"]["parameters"] == sum(p.numel() for p in model.parameters())
            assert cell["ratio_of_block_parameters"] == plan.predicted["ratio_of_block_parameters"]
            assert cell["plan"] == plan.digest
            shown = " / ".join(f"{math.exp(value):.1f}" for value in nll.values())
            assert shown in out, (shown, out)
    for ratio in (0.1, 0.3):
        best = min(("random", "magnitude"), key=lambda label: measures[label, ratio])
        assert f"**{measures[best, ratio]:.3f}**" in out
    assert found["texts"]["words"]["sequence_length"] == 16
    assert found["texts"]["other"]["text"] == ["sub/other.txt"]  # as written, whatever --data is on this machine


def handmade(**changes: Any) -> dict[str, Any]:
    def cell(label: str, ratio: float, seed: int, a: float, b: float) -> dict[str, Any]:
        texts = {"a": {"nll": math.log(a)}, "b": {"nll": math.log(b)}}
        rest = {"ratio_of_block_parameters": ratio, "seconds": {"prune": 1.0}, "size": {"parameters": 1000 * a}}
        return {"label": label, "ratio": ratio, "seed": seed, "status": "finished", "texts": texts, **rest}

    base = {
        "model": "toy",
        "command": "python -m prunelit compare",
        "rows": [
            {"label": "x|y", "method": "flap", "options": {"align": 1}},
            {"label": "z", "method": "z", "options": {}},
        ],
        "options": {"align": 1},
        "ratios": [0.1, 0.125],
        "seeds": [0, 1],
        "calibration": {"text": ["c"], "windows": 2, "seqlen": 8, "fingerprints": {"0": "f"}},
        "texts": {n: {"text": [n], "windows": 1, "sequence_length": 8, "dtype": "float32"} for n in ("a", "b")},
        "latency": None,
        "dense": {"texts": {"a": {"nll": math.log(10)}, "b": {"nll": math.log(20)}}, "size": {"parameters": 9000}},
        "cells": [
            cell("x|y", 0.1, 0, 20, 40),
            cell("x|y", 0.1, 1, 40, 160),
            cell("z", 0.1, 0, 15, 30),
            cell("z", 0.1, 1, 15, 30),
            cell("x|y", 0.125, 0, 100, 2000),
            {"label": "x|y", "ratio": 0.125, "seed": 1, "status": "failed", "failed": "too much"},
            cell("z", 0.125, 0, 1000, 20000),
            {"label": "z", "ratio": 0.125, "seed": 1, "status": "missing"},
        ],
        "hardware": {"device": "abacus", "threads": 1},
        "versions": {"torch": "2"},
    }
    return base | changes


def test_tables_by_hand() -> None:
    said = tables.render_comparison_markdown(handmade())
    assert "the dense model has 10.0 / 20.0" in said
    # seeds 20 and 40: mean 30, half the range 10; 40 and 160: 100 and 60
    assert "| x\\|y | 30.0 ± 10.0 / 100 ± 60 | 100 / 2000 (1 of 2 seeds) |" in said
    assert "| z | 15.0 ± 0.0 / 30.0 ± 0.0 | 1000 / 20000 (1 of 2 seeds) |" in said
    # (ln 2 + ln 2) / 2 and (ln 4 + ln 8) / 2: mean 1.213, half the range 0.520; z: ln 1.5 = 0.405
    assert "| x\\|y | 1.213 ± 0.520 | 3.454 (1 of 2 seeds) |" in said
    assert "| z | **0.405 ± 0.000** | 5.756 (1 of 2 seeds) |" in said  # a place with a failed seed does not win
    assert "| method | 10% | 12.5% |" in said
    assert "- x|y at 12.5% (seed 1): failed: too much" in said
    assert "- 1 of 8 cells have not been run" in said
    assert "- x|y: `flap`\n" in said
    assert "- Scored on 2 x 8 tokens of c" in said
    unread = handmade()["calibration"] | {"fingerprints": {}}
    assert "Scored on" not in tables.render_comparison_markdown(handmade(calibration=unread))
    assert "- z:" not in said


def two_rows(nlls: list[list[float]], shares: tuple[float, float], **options: Any) -> dict[str, Any]:
    """A report of two rows at one ratio, with the losses of each seed; the dense model has 2."""
    cells = [
        {
            **{"label": label, "ratio": 0.2, "seed": seed, "status": "finished", "texts": {"a": {"nll": nll}}},
            **{"ratio_of_block_parameters": share, "seconds": {"prune": 1.0}, "size": {"parameters": 9}},
        }
        for label, share, row in zip("xz", shares, nlls, strict=True)
        for seed, nll in enumerate(row)
    ]
    rows = [{"label": label, "method": label, "options": options} for label in "xz"]
    dense = {"texts": {"a": {"nll": 2.0}}, "size": {"parameters": 10}}
    texts = {"a": handmade()["texts"]["a"]}
    seeds = list(range(len(nlls[0])))
    return handmade(rows=rows, ratios=[0.2], seeds=seeds, cells=cells, dense=dense, texts=texts, options=options)


@pytest.mark.parametrize(
    ("nlls", "shares", "options", "head", "winner"),
    [
        ([[2.5], [2.7]], (0.2, 0.2), {}, "20%", "x"),
        ([[2.5], [2.501]], (0.2, 0.2), {}, "20%", None),  # within what another seed changes
        ([[2.5, 2.6], [2.58, 2.66]], (0.2, 0.2), {}, "20%", None),  # the seeds overlap
        ([[2.5, 2.6], [2.78, 2.86]], (0.2, 0.2), {}, "20%", "x"),
        ([[2.5], [2.7]], (0.211, 0.249), {}, "21.1% to 24.9% (asked: 20%)", None),  # it removed less
        ([[2.5], [2.7]], (0.249, 0.211), {}, "21.1% to 24.9% (asked: 20%)", "x"),
        ([[2.5], [2.7]], (0.249, 0.249), {}, "24.9% (asked: 20%)", "x"),
        ([[2.5], [2.7]], (0.1, 0.249), {"budget": "macs"}, "20%", "x"),  # no share of parameters was asked for
        ([[2.5], [math.nan]], (0.2, 0.2), {}, "20%", "x"),
        ([[math.nan], [math.nan]], (0.2, 0.2), {}, "20%", None),
    ],
)
def test_a_winner_leads_by_more_than_noise_and_removed_no_less(
    nlls: list[list[float]], shares: tuple[float, float], options: dict[str, Any], head: str, winner: str | None
) -> None:
    comparison: Any = two_rows(nlls, shares, **options)
    said = tables.render_comparison_markdown(comparison)
    assert f"| method | {head} |" in said
    assert [label for label, _ in tables.find_best_rows(comparison).values()] == ([winner] if winner else [])
    assert said.count("| **") == (winner is not None)
    assert ("(-24.9%)" in said) == ("to" in head)


@pytest.mark.parametrize(
    ("value", "shown"),
    [(1.0, "1.00"), (9.994, "9.99"), (9.996, "10.0"), (99.94, "99.9"), (99.96, "100"), (9385.8, "9386")],
)
def test_a_perplexity_has_three_digits(value: float, shown: str) -> None:
    assert format_perplexity(value) == shown


def test_a_perplexity_beyond_floats() -> None:
    assert format_perplexity(exponentiate_nll({"nll": 800.0})) == "inf"
    assert tables.format_spread([math.inf, 3.0], format_perplexity) == "inf"


def test_two_seeds_share_windows_between_methods_and_not_between_seeds(
    capsys: pytest.CaptureFixture[str], source: str, data: str, tmp_path: Path
) -> None:
    Spy.seen.clear()
    arguments = config(source, data, tmp_path, seeds=[0, 1], methods=[f"{NAME}.Spy", f"{NAME}.Other", "random"])
    code, out, err = call(capsys, *arguments)
    assert code == 0, err
    assert len(Spy.seen) == 2 * 2 * 2
    of_seed = {seed: {ids for _, s, ids in Spy.seen if s == seed} for seed in (0, 1)}
    assert len(of_seed[0]) == len(of_seed[1]) == 1
    assert of_seed[0] != of_seed[1]
    found = report(tmp_path)
    pair = [
        exponentiate_nll(c["texts"]["words"]) for c in found["cells"] if (c["label"], c["ratio"]) == ("random", 0.3)
    ]
    assert len(set(pair)) == 2
    assert f"{sum(pair) / 2:.1f} ± {abs(pair[0] - pair[1]) / 2:.1f} / " in out


# What is run, and what is not run again --------------------------------------------------------------------------


def test_a_finished_cell_is_not_run_again(
    capsys: pytest.CaptureFixture[str], source: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call(capsys, *config(source, data, tmp_path))[0] == 0
    before, first = stamps(tmp_path), report(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(PruningCallback, "prune", lambda *a, **k: pytest.fail("a cell was run again"))
        code, _, err = call(capsys, *config(source, data, tmp_path))
    assert code == 0, err
    assert "4 finished earlier, 0 to run" in err
    assert stamps(tmp_path) == before
    assert report(tmp_path)["cells"] == first["cells"]
    # Another comparison takes over what is identical, and nothing else.
    code, _, err = call(capsys, *config(source, data, tmp_path, ratios=[0.3, 0.4], methods=["magnitude", "random"]))
    assert code == 0, err
    assert "2 finished earlier, 2 to run" in err
    assert len(stamps(tmp_path)) == len(before) + 2
    assert (
        "1 finished"
        in call(
            capsys,
            *config(
                source,
                data,
                tmp_path,
                ratios=[0.3],
                options={"align": 8},
                methods=["random", {"method": "magnitude", "options": {"align": 1}}],
            ),
        )[2]
    )
    for change in (
        {"texts": {"words": {"text": "words.txt", "seqlen": 32, "windows": 2}}},
        {"seeds": [1]},
        {"dtype": "bfloat16"},
        {"latency": {"tokens": 4, "repeats": 1}},
    ):
        code, _, err = call(capsys, *config(source, data, tmp_path, ratios=[0.3], methods=["random"], **change))
        assert (code, "0 finished earlier, 1 to run" in err) == (0, True), (change, err)
    code, _, err = call(capsys, *config(source, data, tmp_path), "--again", "true", "--only", "random")
    assert "2 cells: 0 finished earlier, 2 to run" in err
    after = stamps(tmp_path)
    changed = {name.split("-")[0] for name in before if after[name] != before[name]}
    assert changed == {"random"}


def test_calibration_matters_to_methods_that_read_text_only(
    capsys: pytest.CaptureFixture[str], source: str, data: str, tmp_path: Path
) -> None:
    some = {"ratios": [0.3], "methods": ["magnitude", "llm_bip"]}
    assert call(capsys, *config(source, data, tmp_path, **some))[0] == 0
    changed = {"calibration": {"text": "words.txt", "windows": 6, "seqlen": 16}}
    assert "1 finished earlier, 1 to run" in call(capsys, *config(source, data, tmp_path, **some, **changed))[2]


def test_another_model_in_the_same_folder(
    capsys: pytest.CaptureFixture[str], source: str, data: str, tmp_path: Path
) -> None:
    model = loading.load(source)
    assert fingerprint(copy.deepcopy(model)) == fingerprint(model)
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.mul_(1.0001)  # every sign stays
    assert fingerprint(tuned) != fingerprint(model)
    longer = copy.deepcopy(model)
    longer.config.rms_norm_eps = 0.1
    assert fingerprint(longer) != fingerprint(model)
    tuned.save_pretrained(tmp_path / "tuned")
    tiny_tokenizer().save_pretrained(tmp_path / "tuned")
    assert call(capsys, *config(source, data, tmp_path, ratios=[0.3]))[0] == 0
    code, _, err = call(capsys, *config(str(tmp_path / "tuned"), data, tmp_path, ratios=[0.3]))
    assert (code, "0 finished earlier, 2 to run" in err) == (0, True), err


def test_damaged_cells_are_run_again(
    capsys: pytest.CaptureFixture[str], source: str, data: str, tmp_path: Path
) -> None:
    assert call(capsys, *config(source, data, tmp_path))[0] == 0
    cells = sorted((tmp_path / "out" / "cells").glob("[!d]*.json"))
    whole = cells[0].read_text()
    cells[0].write_text(whole[: len(whole) // 2])
    cells[1].write_text(json.dumps({**json.loads(cells[1].read_text()), "key": {}}))
    assert "2 finished earlier, 2 to run" in call(capsys, *config(source, data, tmp_path))[2]
    assert json.loads(cells[0].read_text())["texts"] == json.loads(whole)["texts"]


def test_cells_do_not_depend_on_their_order(
    capsys: pytest.CaptureFixture[str], source: str, data: str, tmp_path: Path
) -> None:
    """The dense model stays dense, and no method sees what another left in the random generators."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    forgetful = f"{NAME}.Forgetful"
    state = torch.get_rng_state()
    assert call(capsys, *config(source, data, tmp_path / "a", methods=[forgetful, "random"]))[0] == 0
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    random.seed(5)
    assert call(capsys, *config(source, data, tmp_path / "b", methods=["random", forgetful], ratios=[0.3, 0.1]))[0] == 0
    one, two = (
        {(c["label"], c["ratio"]): (c["texts"], c["plan"]) for c in report(tmp_path / folder)["cells"]}
        for folder in "ab"
    )
    assert one == two
    assert report(tmp_path / "a")["dense"] == report(tmp_path / "b")["dense"]


@pytest.mark.filterwarnings("ignore:seqlen. 1024 tokens are more")  # than the tiny model's positions
def test_texts_by_source_alone_and_a_single_label(
    capsys: pytest.CaptureFixture[str], source: str, data: str, tmp_path: Path
) -> None:
    """A text's name may be a number, as YAML reads it; its windows are then all of 1,024 tokens."""
    code, out, err = call(capsys, *config(source, data, tmp_path, texts={1: "words.txt"}, only="random", ratios=[0.3]))
    assert code == 0, err
    assert "1: 2 windows of 1024 tokens of words.txt" in out
    assert "1 of 2 cells have not been run" in out


def test_rows_by_label(capsys: pytest.CaptureFixture[str], source: str, data: str, tmp_path: Path) -> None:
    code, out, err = call(capsys, *config(source, data, tmp_path), "--only", "magnitude")
    assert code == 0, err
    assert "| random | \N{EN DASH} | \N{EN DASH} |" in out
    assert "2 of 4 cells have not been run" in out
    code, out, err = call(capsys, *config(source, data, tmp_path), "--only", "random")
    assert "2 cells: 0 finished earlier, 2 to run" in err
    assert "\N{EN DASH}" not in out


@pytest.mark.parametrize(("given", "ratios"), [("0.3 0.2", [0.3, 0.2]), ("[0.3,0.2]", [0.3, 0.2]), ("0.3", [0.3])])
def test_lists_on_the_command_line(
    capsys: pytest.CaptureFixture[str], source: str, data: str, tmp_path: Path, given: str, ratios: list[float]
) -> None:
    lists = f"--ratios {given} --seeds 1 0 --methods random"
    code, _, err = call(capsys, *config(source, data, tmp_path), *lists.split())
    assert code == 0, err
    found = report(tmp_path)
    assert (found["ratios"], found["seeds"], [row["label"] for row in found["rows"]]) == (ratios, [1, 0], ["random"])


def test_interrupted_and_started_again(
    capsys: pytest.CaptureFixture[str], source: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = config(source, data, tmp_path, methods=[f"{NAME}.Stopped", "magnitude"])
    code, _, err = call(capsys, *arguments)
    assert (code, "interrupted" in err, "goes on from here" in err) == (130, True, True), err
    before = stamps(tmp_path)
    assert len(before) == 1 + 2  # one cell, and the dense model on two texts
    monkeypatch.setattr(Stopped, "armed", False)
    code, _, err = call(capsys, *arguments)
    assert (code, "1 finished earlier, 3 to run" in err) == (0, True), err
    assert {name: stamps(tmp_path)[name] for name in before} == before


def test_a_search_goes_on_from_its_journal(
    capsys: pytest.CaptureFixture[str], source: str, data: str, tmp_path: Path
) -> None:
    Diary.read.clear()
    arguments = config(source, data, tmp_path, methods=[f"{NAME}.Diary"], ratios=[0.3], plans=True)
    assert call(capsys, *arguments)[0] == 130
    assert Diary.read == []
    code, _, err = call(capsys, *arguments)
    assert (code, Diary.read) == (0, ["half of the search"]), err
    assert [path.suffix for path in (tmp_path / "out" / "kept").iterdir()] == [".jsonl"]
    assert ".jsonl" not in next((tmp_path / "out" / "plans").iterdir()).read_text()
    assert "1 finished earlier" in call(capsys, *arguments)[2]


@pytest.mark.slow
def test_killed_in_the_middle_and_started_again(source: str, data: str, tmp_path: Path) -> None:
    arguments = config(source, data, tmp_path, methods=[f"{NAME}.Slow"], ratios=[0.1, 0.2, 0.3, 0.4])
    command = [sys.executable, "-m", "prunelit", *arguments]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    cells = tmp_path / "out" / "cells"
    running = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 400
        while not list(cells.glob("*Slow*.json")):
            assert running.poll() is None, "it ended before a cell was finished"
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        running.send_signal(signal.SIGKILL)
        running.wait()
    before = {name: stamp for name, stamp in stamps(tmp_path).items() if not name.startswith(".")}
    finished = sum("Slow" in name for name in before)
    assert 1 <= finished < 4
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    assert f"{finished} finished earlier, {4 - finished} to run" in done.stderr
    after = stamps(tmp_path)
    assert {name: after[name] for name in before} == before
    assert all(cell["status"] == "finished" for cell in report(tmp_path)["cells"])


# What fails ------------------------------------------------------------------------------------------------------


def test_a_failing_cell_does_not_stop_the_others(
    capsys: pytest.CaptureFixture[str], source: str, data: str, tmp_path: Path
) -> None:
    arguments = config(source, data, tmp_path, ratios=[0.99, 0.3], methods=[f"{NAME}.Broken", "random"])
    code, out, err = call(capsys, *arguments)
    assert code == 1
    assert "| Broken | \N{EN DASH} | \N{EN DASH} |" in out
    assert "Broken at 99%, 30%: failed: TypeError: a bug over two lines" in out
    assert "random at 99%: failed: ratio 0.99" in out
    assert "3 cells failed" in out
    status = {(c["label"], c["ratio"]): c["status"] for c in report(tmp_path)["cells"]}
    assert status == {
        ("Broken", 0.99): "failed",
        ("Broken", 0.3): "failed",
        ("random", 0.99): "failed",
        ("random", 0.3): "finished",
    }
    broken = next((tmp_path / "out" / "cells").glob("*Broken*.json"))
    assert "in score" in json.loads(broken.read_text())["traceback"]
    assert "Traceback" not in err
    code, _, err = call(capsys, *arguments)  # what made it fail may be gone: failed cells are tried again
    assert (code, "1 finished earlier, 3 to run" in err) == (1, True), err


def test_a_model_that_loses_its_mind_is_a_failed_cell(
    capsys: pytest.CaptureFixture[str], source: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = PruningCallback.cut

    def poison(self: Any, context: Any, plan: Any) -> None:
        cut(self, context, plan)
        context.decoder.model.get_input_embeddings().weight.data[5:].fill_(float("nan"))

    monkeypatch.setattr(PruningCallback, "cut", poison)
    code, out, _ = call(capsys, *config(source, data, tmp_path, ratios=[0.3], methods=["random"]))
    assert code == 1
    assert "expected a finite loss, got nan" in out


@pytest.mark.slow
def test_memory_holds_no_copy_after_a_cell(
    capsys: pytest.CaptureFixture[str], source: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even after one that failed, whose traceback would have kept it."""
    copies: list[Any] = []
    alive: list[int] = []

    class Recorder:
        @staticmethod
        def deepcopy(model: Any) -> Any:
            alive.append(sum(known() is not None for known in copies))
            made = copy.deepcopy(model)
            copies.append(weakref.ref(made))
            return made

    monkeypatch.setattr(cell, "copy", Recorder)
    arguments = config(source, data, tmp_path, methods=[f"{NAME}.Broken", "random", "magnitude"])
    assert call(capsys, *arguments)[0] == 1
    assert alive == [0] * 6


@pytest.mark.slow
def test_out_of_memory_names_the_knob(
    capsys: pytest.CaptureFixture[str], source: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **named: Any) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    monkeypatch.setattr(Random, "score", full)
    code, out, _ = call(capsys, *config(source, data, tmp_path, ratios=[0.3]))
    assert (code, "seqlen" in out, "| random | \N{EN DASH} |" in out) == (1, True, True)
    assert "Tried to allocate" not in out


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"methods": ["llm_bop"]}, ["llm_bop", "did you mean 'llm_bip'"]),
        ({"methods": []}, ["methods", "at least one"]),
        ({"methods": [3]}, ["methods", "3"]),
        ({"methods": ["random", "random"]}, ["'random' twice", "label"]),
        ({"methods": [{"method": "random", "lable": "x"}]}, ["lable", "did you mean 'label'"]),
        ({"methods": [{"method": "random", "options": {"scoop": "layer"}}]}, ["scoop", "did you mean 'scope'"]),
        ({"methods": [{"method": "random", "options": {"scope": "galaxy"}}]}, ["random", "scope", "galaxy"]),
        ({"methods": [{"method": "shortgpt", "options": {"scope": "global"}}]}, ["shortgpt", "got 'scope'"]),
        ({"methods": ["shortgpt"], "options": {"unit": "query_head"}}, ["no method of this table takes 'unit'"]),
        ({"methods": [{"method": "random", "options": {"align": "wide"}}]}, ["random", "align", "wide"]),
        ({"methods": [{"method": "random", "options": {"align": 0}}]}, ["random", "align", "0"]),
        ({"methods": [{"method": "random", "options": {"seed": 1}}]}, ["seed", "seeds"]),
        ({"methods": [{"method": "random", "options": ["align"]}]}, ["options", "align"]),
        ({"methods": [f"{NAME}.Closed"], "options": {}}, ["Closed", "seed", "kwargs"]),
        ({"methods": [f"{NAME}.Missing"]}, ["Missing", "cannot be imported"]),
        ({"options": {"aling": 1}}, ["aling", "did you mean 'align'"]),
        ({"options": {"seqlen": 1}}, ["seqlen", "calibration.seqlen"]),
        ({"ratios": [0.1, 1.5]}, ["ratio", "1.5"]),
        ({"methods": ["prunelit.core.plan.PruningPlan"]}, ["PruningPlan", "subclass of PruningCallback"]),
        ({"methods": "random"}, ["methods", "list", "random"]),
        ({"options": {1: 2}}, ["options", "1"]),
        ({"options": [1]}, ["options", "a mapping"]),
        ({"ratios": []}, ["ratios"]),
        ({"ratios": [0.1, 0.1]}, ["ratios"]),
        ({"ratios": ["lots"]}, ["ratios", "lots"]),
        ({"seeds": []}, ["seeds"]),
        ({"texts": {}}, ["texts"]),
        ({"texts": {"words": {"text": "nowhere.txt"}}}, ["texts.words", "nowhere.txt", "no such file"]),
        ({"texts": {"words": {"txt": "words.txt"}}}, ["txt", "did you mean 'text'"]),
        ({"texts": {"words": {"text": "words.txt", "seqlen": "long"}}}, ["seqlen", "long"]),
        ({"texts": {"words": {"text": "words.txt", "seqlen": 100000}}}, ["at least one window of 100000 tokens"]),
        ({"texts": {"words": {"text": "words.txt", "seqlen": 1}}}, ["texts.words", "seqlen"]),
        ({"texts": {"words": 3}}, ["texts.words", "{text, seqlen, windows}", "3"]),
        ({"texts": {"words": {"text": []}}}, ["texts.words", "{text, seqlen, windows}"]),
        ({"calibration": {"text": "words.txt", "widnows": 3}}, ["widnows", "did you mean 'windows'"]),
        ({"calibration": {"text": "nowhere.txt"}, "methods": ["llm_bip"]}, ["calibration", "nowhere.txt"]),
        ({"calibration": {"text": "words.txt", "windows": 0}}, ["windows", "0"]),
        ({"calibration": "words.txt"}, ["calibration", "Calibration", "words.txt"]),
        ({"latency": True}, ["latency", "Latency", "True"]),
        ({"latency": {"tokens": 0}}, ["latency.tokens", "0"]),
        ({"latency": {"tokns": 3}}, ["tokns", "did you mean 'tokens'"]),
        ({"ratois": [0.1]}, ["ratois", "did you mean 'ratios'"]),
        ({"model": "./nowhere"}, ["./nowhere"]),
        ({"device": "toaster"}, ["toaster"]),
        ({"dtype": "float4"}, ["float4"]),
        ({"only": ["randon"]}, ["randon", "did you mean 'random'"]),
    ],
)
def test_refused_in_one_line_before_the_model_is_loaded(
    capsys: pytest.CaptureFixture[str],
    source: str,
    data: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    wanted: list[str],
) -> None:
    monkeypatch.setattr(loading, "load", lambda *a: pytest.fail("the model was loaded"))
    refused(call(capsys, *config(source, data, tmp_path, **changes)), *wanted)
    assert not (tmp_path / "out").exists()


def test_outputs_that_can_not_be_written(
    capsys: pytest.CaptureFixture[str], source: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "load", lambda *a: pytest.fail("the model was loaded"))
    (tmp_path / "file").write_text("x")
    refused(call(capsys, *config(source, data, tmp_path, out=str(tmp_path / "file"))), "expected a folder, got a file")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "cells").write_text("x")
    refused(call(capsys, *config(source, data, tmp_path)), "cells", "cannot be made")


def test_data_folder(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = f"{data}/words.txt"
    assert resolve_text_sources("x", ["words.txt", "sub/other.txt"], data) == [whole, f"{data}/sub/other.txt"]
    assert resolve_text_sources("x", whole, str(tmp_path)) == [whole]
    assert resolve_text_sources("x", ["builtin:python-docs", "owner/name:config:test"], data) == [
        "builtin:python-docs",
        "owner/name:config:test",
    ]
    with pytest.raises(SourceNotFound, match=f"{data}/absent.jsonl.gz"):
        resolve_text_sources("x", "absent.jsonl.gz", data)
    with pytest.raises(SourceNotFound, match="--data FOLDER"):
        resolve_text_sources("x", "sub/other.parquet", None)
    monkeypatch.chdir(data)
    assert resolve_text_sources("x", "words.txt", None) == ["words.txt"]


def test_options_reach_the_methods_that_take_them() -> None:
    both = parse_method_rows(
        ["magnitude", {"method": "llm_bip", "label": "exact", "options": {"form": "exact"}}], {"propagate_ffn": False}
    )
    assert [dict(row.options) for row in both] == [{}, {"propagate_ffn": False, "form": "exact"}]
    own = parse_method_rows([{"method": "llm_bip", "options": {"propagate_ffn": True}}], {"propagate_ffn": False})
    assert dict(own[0].options) == {"propagate_ffn": True}


def test_a_common_repair_passes_by_the_methods_that_have_it_not() -> None:
    found = parse_method_rows(
        ["llm_bip", "shortgpt", "best", {"method": "flap", "options": {"repair": "none"}}], {"repair": "bias"}
    )
    assert [dict(row.options) for row in found] == [{"repair": "bias"}, {}, {}, {"repair": "none"}]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("compare*.yaml")), ids=lambda path: path.stem)
def test_rows_of_the_configs_can_be_built(path: Path) -> None:
    content = yaml.safe_load(path.read_text())
    assert len(parse_method_rows(content["methods"], content.get("options", {}))) == len(content["methods"])


def test_the_table_of_the_readme_has_every_method() -> None:
    """Those that come with prunelit; a new one may stay out of the table."""
    content = yaml.safe_load((ROOT / "configs" / "compare.yaml").read_text())
    named = {entry if isinstance(entry, str) else entry["method"] for entry in content["methods"]}
    ours = "llm_bip block_pruner saap greedy_output best magnitude random taylor wanda_sp flap shortgpt"
    assert named == set(ours.split()) == named & set(methods())


def test_half_precision_is_measured_in_single_on_a_cpu(
    capsys: pytest.CaptureFixture[str], source: str, data: str, tmp_path: Path
) -> None:
    loading.load(source).half().save_pretrained(tmp_path / "half")
    tiny_tokenizer().save_pretrained(tmp_path / "half")
    half = str(tmp_path / "half")
    assert call(capsys, *config(half, data, tmp_path, ratios=[0.3], methods=["random"], device="cpu"))[0] == 0
    assert report(tmp_path)["texts"]["words"]["dtype"] == "float32"


# Latency, plans, pictures, boards --------------------------------------------------------------------------------


def test_latency_is_the_median_of_passes_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[str] = []
    took = {"dense": iter([9.0, 2.0, 50.0, 4.0]), "cut": iter([9.0, 1.0, 0.5, 2.0])}  # the first is not counted
    clock = [0.0]
    pair = {name: tiny("llama") for name in took}
    for name, model in pair.items():

        def ran(module: Any, args: Any, out: Any, name: str = name) -> None:
            passes.append(name)
            clock[0] += next(took[name])

        model.base_model.register_forward_hook(ran)
    monkeypatch.setattr(cell.time, "perf_counter", lambda: clock[0])
    assert measure_prefill_seconds(list(pair.values()), tokens=8, repeats=3) == [4.0, 1.0]
    assert passes == ["dense", "cut"] * 2 + ["cut", "dense"] + ["dense", "cut"]


def test_latency_and_plans(capsys: pytest.CaptureFixture[str], source: str, data: str, tmp_path: Path) -> None:
    from prunelit import PruningPlan

    some: dict[str, Any] = {"ratios": [0.3], "methods": ["llm_bip"]}
    assert call(capsys, *config(source, data, tmp_path, **some))[0] == 0
    assert not (tmp_path / "out" / "plans").exists()
    code, out, err = call(capsys, *config(source, data, tmp_path, **some, plans=True))
    assert (code, "0 finished earlier, 1 to run" in err) == (0, True), err  # finished, but its plan was not kept
    plan = PruningPlan.load(next((tmp_path / "out" / "plans").iterdir()))
    cell = report(tmp_path)["cells"][0]
    assert plan.digest == cell["plan"]
    assert plan.calibration["source"] == ["words.txt"]
    assert plan.calibration["tokens"] == 4 * 16
    assert plan.calibration["fingerprint"] == report(tmp_path)["calibration"]["fingerprints"]["0"]
    code, out, err = call(capsys, *config(source, data, tmp_path, **some, latency={"tokens": 8, "repeats": 2}))
    assert code == 0, err
    found = report(tmp_path)["cells"][0]["latency"]
    assert found["speedup"] == pytest.approx(found["dense_seconds"] / found["seconds"])
    assert f"| llm_bip | {found['speedup']:.2f} |" in out
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Perplexity on words against latency" in page and "1 of 1 cells finished" in page


@pytest.mark.slow
def test_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    cells = handmade()["cells"]
    for entry in cells:
        entry["latency"] = {"speedup": 1.5}
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        written = figures.write_comparison_figures(
            handmade(cells=cells, latency={"tokens": 8, "repeats": 1}), tmp_path / folder
        )
        names = {f"perplexity_vs_{axis}.{ending}" for axis in ("parameters", "latency") for ending in ("png", "svg")}
        assert {path.name for path in written} == names == {path.name for path in (tmp_path / folder).iterdir()}
    for path in sorted((tmp_path / "a").iterdir()):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    assert (tmp_path / "a" / "perplexity_vs_parameters.png").read_bytes().startswith(b"\x89PNG")
    drawn = (tmp_path / "a" / "perplexity_vs_parameters.svg").read_text()
    assert all(re.search(rf">{re.escape(label)} [\d.,e]+( \u2191)?<", drawn) for label in ("x|y", "z", "dense"))
    assert ">a<" in drawn and ">b<" in drawn
    nothing = [dict(cell, status="missing") for cell in cells]
    assert figures.write_comparison_figures(handmade(cells=nothing), tmp_path) == []


def test_pictures_leave_out_what_no_axis_holds(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    cells = handmade()["cells"]
    cells[0]["texts"]["a"]["nll"] = 900.0
    rows_ = [{"label": "x|y", "method": "flap", "options": {}}, {"label": "z", "method": "z$", "options": {}}]
    assert len(figures.write_comparison_figures(handmade(cells=cells, rows=rows_), tmp_path)) == 2


def fake_wandb(said: list[Any]) -> Any:
    """A module with the part of wandb's interface that is used; it records what it is told."""

    class Table:
        def __init__(self, columns: list[str]):
            self.columns, self.data = columns, []

        def add_data(self, *row: Any) -> None:
            assert len(row) == len(self.columns)
            self.data.append(row)

    class Config(dict):  # type: ignore[type-arg]
        pass

    class Run:
        summary: ClassVar[dict[str, Any]] = {}
        config = Config()

        def log(self, content: Any) -> None:
            said.append(content)

        def finish(self, exit_code: int = 0) -> None:
            said.append(exit_code)

    def init(**options: Any) -> Run:
        said.append(options)
        return Run()

    return types.SimpleNamespace(Table=Table, Image=lambda path: path, init=init, Error=RuntimeError, Settings=dict)


def test_wandb_gets_the_table_where_a_project_is_named(
    capsys: pytest.CaptureFixture[str], source: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[Any] = []
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(said))
    assert call(capsys, *config(source, data, tmp_path))[0] == 0
    assert said == []
    code, _, err = call(capsys, *config(source, data, tmp_path), "--wandb_project", "prunes")
    assert code == 0, err
    options, logged, exit_code = said
    assert (options["project"], exit_code) == ("prunes", 0)
    table = logged["comparison"]
    assert [row[:2] for row in table.data] == [
        ("dense", 0.0),
        ("random", 0.1),
        ("random", 0.3),
        ("magnitude", 0.1),
        ("magnitude", 0.3),
    ]
    cell = next(c for c in report(tmp_path)["cells"] if (c["label"], c["ratio"]) == ("magnitude", 0.3))
    row = dict(zip(table.columns, table.data[-1], strict=True))
    assert row["mean log ratio"] == pytest.approx(cell["mean_log_ratio"])
    assert row["perplexity other"] == pytest.approx(cell["texts"]["other"]["perplexity"])
    monkeypatch.setitem(sys.modules, "wandb", None)
    refused(call(capsys, *config(source, data, tmp_path), "--wandb_project", "prunes"), "pip install 'prunelit[wandb]'")


def test_a_wandb_run_ends_as_failed_where_the_comparison_does(
    capsys: pytest.CaptureFixture[str], source: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[Any] = []
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(said))
    arguments = config(source, data, tmp_path, methods=[f"{NAME}.Stopped"])
    assert call(capsys, *arguments, "--wandb_project", "prunes")[0] == 130
    assert said[1:] == [1]


@pytest.mark.slow
def test_wandb_offline_run_holds_the_table_and_no_path_of_this_machine(source: str, data: str, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    arguments = config(source, data, tmp_path, ratios=[0.3], methods=["random"], wandb_project="prunes")
    command = [sys.executable, "-m", "prunelit", *arguments]
    env = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    run = next((tmp_path / "out" / "wandb").glob("offline-run-*"))
    stored = next(run.glob("*.wandb")).read_bytes()
    assert b"mean_log_ratio/random/30%/seed 0" in stored
    assert str(tmp_path).encode() not in stored
    assert data.encode() not in stored
    assert b"words.txt" not in stored
    content = json.loads(next(run.rglob("*.table.json")).read_text())
    assert content["columns"][:3] == ["method", "ratio", "seed"]
    assert [row[0] for row in content["data"]] == ["dense", "random"]


def test_the_command_works_through_main_without_lightning_reading_argv(
    capsys: pytest.CaptureFixture[str], source: str, data: str, tmp_path: Path
) -> None:
    """As from Python: `sys.argv` is another program's."""
    assert main(config(source, data, tmp_path, ratios=[0.3], methods=["random"])) == 0
    assert report(tmp_path)["command"] == "python -m prunelit compare"
