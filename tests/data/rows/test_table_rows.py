"""Rows of tables that are no text are named, empty ones are left out, and long ones are measured."""

import datetime
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from prunelit.data import instructions, text
from prunelit.data.rows import row_windows, table_rows
from prunelit.data.rows.table_rows import TableRows
from prunelit.runtime.errors import BadOption, SourceNotFound
from tests.data.rows.test_row_shapes import CHAT, WRITTEN, rows_in, templated
from tests.data.test_loading import one_line
from tests.tiny import tiny_tokenizer


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets-cache"))
    monkeypatch.setattr(table_rows, "_described", set())
    monkeypatch.setattr(row_windows, "WHOLE_BYTES", 1_000)


def parquet(path: Path, **columns: Any) -> str:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return str(path)


# What is no text -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"question": "when", "answer": ["1983", "in 1983"]}, "answer"),
        ({"question": "when", "answer": {"value": "1983"}}, "answer"),
        ({"question": 3, "answer": "1983"}, "question"),
        ({"instruction": "add", "input": [1, 2], "output": "3"}, "input"),
        ({"prompt": "add", "completion": CHAT}, "prompt"),
    ],
)
def test_a_row_that_is_no_text_is_named_with_its_column(tmp_path: Path, row: dict[str, Any], column: str) -> None:
    source = rows_in(tmp_path / "a.jsonl", row)
    for read in (text.draw_windows, instructions.read_instructions):
        with pytest.raises(SourceNotFound, match=f"row 0: expected .* in the column '{column}'") as error:
            read(source, templated(), 64)
        assert one_line(error)


@pytest.mark.parametrize(
    ("full", "empty"),
    [
        ({"messages": CHAT}, {"messages": None}),
        ({"messages": CHAT}, {"messages": []}),
        ({"question": "a sea", "answer": "the red sea"}, {"question": None, "answer": "the red sea"}),
        ({"question": "a sea", "answer": "the red sea"}, {"question": "a sea", "answer": None}),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, {"prompt": CHAT[:1], "completion": None}),
    ],
)
def test_an_empty_row_is_left_out_in_calibration_and_training_alike(
    tmp_path: Path, full: dict[str, Any], empty: dict[str, Any]
) -> None:
    source, tokenizer = rows_in(tmp_path / "a.jsonl", full, empty, full), templated()
    assert text.read_source_text(source, tokenizer) == WRITTEN * 2
    assert len(instructions.read_instructions(source, tokenizer, 64)["labels"]) == 2


def test_times_in_tool_calls_are_written(tmp_path: Path) -> None:
    call = {"name": "look", "at": datetime.datetime(2020, 1, 2)}
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    source = parquet(tmp_path / "a.parquet", messages=[chat])
    assert '"at": "2020-01-02 00:00:00"' in text.read_source_text(source, tiny_tokenizer())


# Sizes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", [pyarrow.string(), pyarrow.string_view(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())]
)
def test_texts_of_every_kind_are_measured(tmp_path: Path, kind: Any) -> None:
    source = parquet(tmp_path / "a.parquet", text=pyarrow.array(["fish", None, "one fish" * 500], kind))
    assert TableRows(source).measure_rows().tolist() == [4, 0, 4_000]
    assert text.draw_windows(source, tiny_tokenizer(), 8, 2, seed=0).shape == (2, 8)


@pytest.mark.parametrize("value", [["a", "b"], 3])
def test_a_large_column_that_is_no_text_is_one_line(tmp_path: Path, value: Any) -> None:
    source = parquet(tmp_path / "a.parquet", text=[value] * 3_000)
    with pytest.raises(
        SourceNotFound, match=r"expected rows of text, got (list|int64).* in the column 'text'"
    ) as error:
        text.draw_windows(source, tiny_tokenizer(), 8, 2, seed=0)
    assert one_line(error)


def test_a_few_long_rows_of_ids_give_all_windows_from_all_over(tmp_path: Path) -> None:
    halves = [{"input_ids": list(range(32))}, {"input_ids": list(range(32, 64))}]
    rows = TableRows(rows_in(tmp_path / "a.jsonl", *halves))
    assert rows.measure_rows().tolist() == [32, 32]
    windows = row_windows.draw_row_windows(rows, tiny_tokenizer(), 8, 8, seed=0)
    assert sorted(windows.tolist()) == [list(range(start, start + 8)) for start in range(0, 64, 8)]
    source = rows_in(tmp_path / "b.jsonl", *({"input_ids": [5, 6, 7, 8] * 300} for _ in range(3)))
    assert row_windows.is_drawn_by_rows(TableRows(source), 8, 128)
    assert len(text.draw_windows(source, tiny_tokenizer(), 8, 128, seed=0)) == 128


def test_a_few_long_chats_give_all_windows(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "red sea " * 200}, *CHAT[1:]]
    source = rows_in(tmp_path / "a.jsonl", *[{"messages": chat}] * 9)
    assert not row_windows.is_drawn_by_rows(TableRows(source), 8, 40)
    assert row_windows.is_drawn_by_rows(TableRows(source), 8, 4)
    for count in (4, 40):
        assert len(text.draw_windows(source, templated(), 8, count, seed=0)) == count


def test_rows_whose_windows_do_not_suffice_are_taken_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = rows_in(tmp_path / "a.jsonl", *[{"messages": CHAT}] * 60)
    monkeypatch.setattr("prunelit.data.text.is_drawn_by_rows", lambda *_: True)
    tokens = text.draw_windows(source, templated(), 2).numel()
    # A window takes a whole chat and drops its rest, so half of the windows are all that drawn rows can give.
    seqlen = tokens // 60 // 2
    assert len(text.draw_windows(source, templated(), seqlen, 100, seed=0)) == 100


# Options -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (("constraints.jsonl", "manual.jsonl"), {"constraints.jsonl", "manual.jsonl"}),
        (("latest.jsonl", "older.jsonl"), {"latest.jsonl", "older.jsonl"}),
        (("train-00000-of-00001.jsonl", "test.jsonl"), {"train-00000-of-00001.jsonl"}),
        (("en_train2.jsonl", "en_validation.jsonl"), {"en_train2.jsonl"}),
        (("training.jsonl", "test.jsonl"), {"training.jsonl"}),
    ],
)
def test_splits_of_a_folder_are_whole_words(tmp_path: Path, names: tuple[str, ...], wanted: set[str]) -> None:
    (tmp_path / "texts").mkdir()
    for name in names:
        rows_in(tmp_path / "texts" / name, {"text": name})
    assert set(text.read_source_text(str(tmp_path / "texts")).split("\n\n")) == wanted


def test_options_that_mean_nothing_are_refused(tmp_path: Path) -> None:
    rows, document = rows_in(tmp_path / "a.jsonl", {"text": "fish", "b": "a"}), tmp_path / "a.txt"
    document.write_text("fish")
    for source, option in ((rows, "split=test"), (str(document), "split=test"), (str(document), "column=b")):
        with pytest.raises(BadOption, match=f"{option.split('=')[0]}: expected none, since") as error:
            text.check_text_source(f"{source}#{option}")
        assert one_line(error)
    assert text.read_source_text(f"{rows}#split=train,column=b") == "a"
    assert json.loads(Path(rows).read_text())["text"] == "fish"
