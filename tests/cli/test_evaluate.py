"""The command: one perplexity as JSON, and with more asked for a whole evaluation as Markdown."""

import json
from pathlib import Path

import pytest

from prunelit.cli.main import main
from tests.evaluation.rows import rows, write


@pytest.fixture
def words(tmp_path: Path) -> str:
    path = tmp_path / "words.txt"
    path.write_text(" ".join(f"w{n * 7 % 101}" for n in range(600)))
    return str(path)


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["evaluate", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_one_perplexity_is_json(capsys: pytest.CaptureFixture[str], source: str, words: str, tmp_path: Path) -> None:
    target = tmp_path / "e.json"
    options = ["--model", source, "--text", words, "--seqlen", "16", "--windows", "4"]
    code, out, err = call(capsys, *options, "--stride", "4", "--json", str(target))
    assert code == 0, err
    assert json.loads(out) == json.loads(target.read_text())
    assert json.loads(out)["tokens"] == 15 + 3 * 4
    assert json.loads(out)["protocol"]["stride"] == 4


def test_more_is_markdown(capsys: pytest.CaptureFixture[str], source: str, words: str, tmp_path: Path) -> None:
    write(tmp_path / "tasks", "piqa", rows("piqa"))
    out = tmp_path / "out"
    options = ["--model", source, "--against", source, "--text", words, "--seqlen", "16", "--windows", "4"]
    options += ["--tasks", "piqa", "--tasks_folder", str(tmp_path / "tasks"), "--limit", "2"]
    code, said, err = call(capsys, *options, "--out", str(out), "--json", str(tmp_path / "e.json"))
    assert code == 0, err
    assert said.startswith((out / "evaluate.md").read_text())
    assert json.loads((tmp_path / "e.json").read_text()) == json.loads((out / "evaluate.json").read_text())
    report = json.loads((out / "evaluate.json").read_text())
    assert report["perplexity"]["text"]["log_ratio"] == 0
    assert report["zero_shot"]["tasks"]["piqa"]["difference"]["acc"]["difference"] == 0
    assert "piqa, model: acc" in err


@pytest.mark.slow
def test_speed_from_the_shell(capsys: pytest.CaptureFixture[str], source: str) -> None:
    """Memory is measured in a process of its own."""
    options = ["--model", source, "--speed.prompt", "8", "--speed.new_tokens", "2", "--speed.repeats", "2"]
    code, said, err = call(capsys, *options, "--prompts", "ab", "cd", "--sample_tokens", "3")
    assert code == 0, err
    assert "prefill of 8 tokens; 2 new tokens after 8 in the cache" in said
    assert "peak memory, MiB" in said
    assert said.count("Prompt:") == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tasks", "piqqa"], "did you mean 'piqa'"),
        (["--tasks", "piqa", "--tasks_folder", "nowhere"], "nowhere"),
        (["--tasks", "piqa", "--limit", "0"], "limit"),
        (["--speed.promt", "3"], "promt"),
        (["--speed.prompt", "0"], "speed.prompt: expected at least 1"),
        (["--adapter", "nowhere"], "adapter_config.json"),
        (["--stride", "0"], "stride"),
        (["--texts", "{text: {text: a.txt}}", "--text", "b.txt"], "other than 'text'"),
        (["--tsks", "piqa"], "did you mean 'tasks'"),
    ],
)
def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str], source: str, options: list[str], said: str) -> None:
    code, out, err = call(capsys, "--model", source, *options)
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1
