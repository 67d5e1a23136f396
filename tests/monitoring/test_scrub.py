"""What of hyperparameters may leave: numbers, switches, short words."""

from pathlib import Path
from typing import Any

import pytest

from prunelit.monitoring import scrub


@pytest.mark.parametrize(
    ("name", "value", "stays"),
    [
        ("ratio", 0.2, True),
        ("propagate", False, True),
        ("protect", [0, -1], True),
        ("scope", "global", True),
        ("nested", {"scope": "layer", "at": "/home/me"}, True),
        ("plan_file", "/home/me/plan.json", False),
        ("plan_file", "plans\\plan.json", False),
        ("model", "owner/name", False),
        ("api_key", "abcdef", False),
        ("hf_token", "abcdef", False),
        ("prompt", "hello", False),
        ("said", "two words", False),
        ("digest", "a" * 40, False),
        ("texts", ["one", "two"], False),
        ("paths", ["one", "/two"], False),
        ("nothing", None, False),
        ("object", object(), False),
    ],
)
def test_plain(name: str, value: Any, stays: bool) -> None:
    assert (name in scrub.keep_plain_values({name: value})) == stays


def test_the_name_of_a_file_that_is_there_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert scrub.keep_plain_values({"model": "mine"}) == {"model": "mine"}
    (tmp_path / "mine").mkdir()
    assert scrub.keep_plain_values({"model": "mine"}) == {}
    assert scrub.keep_plain_values({"nested": {"scope": "layer", "at": "/home/me"}}) == {"nested": {"scope": "layer"}}
