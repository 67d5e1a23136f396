"""Deep JSON is refused before a parser recurses into it; brackets in strings are no levels."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from prunelit.data import text
from prunelit.data.rows.json_depth import MOST_LEVELS, DepthScan
from prunelit.runtime.errors import SourceNotFound
from tests.data.test_loading import one_line


def nest(draw: random.Random, levels: int) -> Any:
    """A value nested at most this deep, whose strings are full of brackets, quotes and backslashes."""
    if levels == 0 or draw.random() < 0.2:
        return "".join(draw.choices('[]{}"\\,: \nä', k=draw.randint(0, 6)))
    values = [nest(draw, levels - 1) for _ in range(draw.randint(0, 3))]
    return values if draw.random() < 0.5 else {f"{n}{draw.choice('[]{}')}": each for n, each in enumerate(values)}


def count_levels(value: Any) -> int:
    if isinstance(value, dict | list):
        return 1 + max(map(count_levels, value.values() if isinstance(value, dict) else value), default=0)
    return 0


@pytest.mark.parametrize("part_length", [1, 2, 3, 1_000])
def test_levels_are_those_of_the_parsed_value_however_the_text_is_cut(part_length: int) -> None:
    draw = random.Random(part_length)
    for _ in range(60):
        values = [nest(draw, 6) for _ in range(3)]
        content = "\n".join(map(json.dumps, values)).encode()
        scan = DepthScan()
        for start in range(0, len(content), part_length):
            scan.read(content[start : start + part_length])
        assert scan.deepest == max(map(count_levels, values))


def test_broken_lines_hide_nothing() -> None:
    for line in (b"]" * 500, b'{"text": "open', b'"\\'):
        scan = DepthScan()
        scan.read(line + b"\n" + b"[" * 300)
        assert scan.deepest >= 300


@pytest.mark.parametrize("levels", [2_000, 20_000])
def test_a_deep_row_is_one_line(tmp_path: Path, levels: int) -> None:
    (tmp_path / "deep.jsonl").write_text('{"text": "a"}\n{"text": ' + "[" * levels + "]" * levels + "}\n")
    with pytest.raises(SourceNotFound, match=f"cannot be read: expected JSON of at most {MOST_LEVELS} levels") as error:
        text.read_source_text(str(tmp_path / "deep.jsonl"))
    assert one_line(error)


def test_a_deep_string_of_json_is_one_line(tmp_path: Path) -> None:
    packed = "[" * 5_000 + "]" * 5_000
    (tmp_path / "deep.jsonl").write_text(json.dumps({"messages": packed}) + "\n")
    with pytest.raises(
        SourceNotFound, match="row 0: expected JSON of at most 128 levels in the column 'messages', got 5,000"
    ) as error:
        text.read_source_text(str(tmp_path / "deep.jsonl"))
    assert one_line(error)
