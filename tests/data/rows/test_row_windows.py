"""Windows of a large source are drawn by rows: only drawn rows are tokenised, evenly, once, and the same everywhere."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from prunelit.data import text
from prunelit.data.rows import row_windows
from prunelit.data.rows.text_rows import TextRows
from tests.tiny import tiny_tokenizer


class Counted:
    """A tokenizer that knows what it was given."""

    def __init__(self) -> None:
        self.is_fast = False
        self.texts: list[str] = []
        self.tokenizer = tiny_tokenizer()

    def __call__(self, text: str, **options: Any) -> Any:
        self.texts.append(text)
        return self.tokenizer(text, **options)


def shard(path: Path, rows: int, words: int) -> str:
    """A file of rows of about `words` words, each with its number in front."""
    draw = random.Random(0)
    with open(path, "w") as file:
        for row in range(rows):
            content = " ".join(draw.choice(("red", "blue", "fish", "sea")) for _ in range(draw.randint(1, 2 * words)))
            file.write(json.dumps({"text": f"<{row}> {content}", "url": "x" * 50}) + "\n")
    return str(path)


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_windows, "WHOLE_BYTES", 20_000)


@pytest.mark.usefixtures("small_limit")
def test_only_drawn_rows_are_tokenised(tmp_path: Path) -> None:
    source, tokenizer = shard(tmp_path / "a.jsonl", 3_000, 20), Counted()
    windows = text.draw_windows(source, tokenizer, 64, 4, seed=0)
    assert windows.shape == (4, 64) and len(tokenizer.texts) < 40
    assert sum(map(len, tokenizer.texts)) < 4_000 < 20_000 < Path(source).stat().st_size
    rows = [row.split(">")[0] for row in tokenizer.texts]
    assert len(set(rows)) == len(rows) and len({int(row[1:]) // 1_000 for row in rows}) == 3
    pieces = "".join(tokenizer.texts).lower()
    for window in windows:
        assert tokenizer.tokenizer.decode(window.tolist()) in pieces


@pytest.mark.usefixtures("small_limit")
def test_a_seed_draws_the_same_everywhere_and_another_one_others(tmp_path: Path) -> None:
    source = shard(tmp_path / "a.jsonl", 2_000, 20)
    drawn = [text.draw_windows(source, tiny_tokenizer(), 64, 4, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0].equal(drawn[1]) and not drawn[0].equal(drawn[2])


@pytest.mark.usefixtures("small_limit")
def test_few_long_rows_are_drawn_from_all_over() -> None:
    rows = TextRows("books", ["".join(f"{book}{place:05d} " for place in range(4_000)) for book in "abc"])
    windows = row_windows.draw_row_windows(rows, tiny_tokenizer(), 32, 30, seed=0)
    texts = [tiny_tokenizer().decode(row) for row in windows.tolist()]
    assert len(set(texts)) == 30 and {"a", "b", "c"} <= set("".join(texts))
    places = sorted(int(word[1:]) for each in texts for word in each.split()[1:2])
    assert places[0] < 800 and places[-1] > 3_200


def test_small_sources_and_single_documents_are_taken_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_windows, "WHOLE_BYTES", 1_000)
    assert not row_windows.is_drawn_by_rows(TextRows("a", ["a" * 500, "b" * 499]), 8, 2)
    (tmp_path / "a.txt").write_text("a" * 5_000)
    assert not row_windows.is_drawn_by_rows(text.open_text_rows(str(tmp_path / "a.txt")), 8, 2)
    assert not row_windows.is_drawn_by_rows(TextRows("a", ["a" * 5_000] * 2), 8, 40)  # almost all of it is wanted
    assert row_windows.is_drawn_by_rows(TextRows("a", ["a" * 5_000] * 2), 8, 2)


def test_the_first_windows_are_those_of_the_whole_and_need_its_beginning_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prunelit.data.rows.token_pieces.PIECE_LENGTH", 5_000)
    source, tokenizer = shard(tmp_path / "a.jsonl", 200, 20), Counted()
    tokenizer.is_fast = True
    whole = text.draw_windows(source, tiny_tokenizer(), 64)
    assert text.draw_windows(source, tokenizer, 64, 3).equal(whole[:3]) and len(whole) > 150
    assert max(map(len, tokenizer.texts)) == 5_000 and sum(map(len, tokenizer.texts)) < 15_000


def test_rows_that_do_not_suffice_give_fewer_windows() -> None:
    rows = TextRows("poems", ["one fish", "two fish", "red fish"])
    assert len(row_windows.draw_row_windows(rows, tiny_tokenizer(), 16, 9, seed=0)) == 1
    assert row_windows.draw_row_windows(rows, tiny_tokenizer(), 64, 2, seed=0).shape == torch.Size([0, 64])
