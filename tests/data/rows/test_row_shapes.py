"""Rows of every common shape are recognised, said, and written as the model reads them."""

import json
import logging
from pathlib import Path
from typing import Any

import pyarrow
import pytest

from prunelit.data import instructions, text
from prunelit.data.eval_texts import resolve_text_sources
from prunelit.data.rows import table_rows
from prunelit.data.rows.chats import Chat, fold_chat, format_chat
from prunelit.data.rows.source_options import SourceOptions
from prunelit.runtime.errors import BadOption, SourceNotFound
from tests.data.test_instructions import TEMPLATE
from tests.data.test_loading import one_line
from tests.tiny import tiny_tokenizer

STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + TEMPLATE
CHAT = [{"role": "user", "content": "a sea"}, {"role": "assistant", "content": "the red sea"}]
WRITTEN = "<user>a sea</user>\n<assistant>the red sea</assistant>\n"
SHAREGPT = [{"from": "human", "value": "a sea"}, {"from": "gpt", "value": "the red sea"}]
PARTS = [{"role": each["role"], "content": [{"type": "text", "text": each["content"]}]} for each in CHAT]
SYSTEM = [{"role": "system", "content": "be kind"}, *CHAT]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets-cache"))
    monkeypatch.setattr(table_rows, "_described", set())


def rows_in(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def templated(template: str = TEMPLATE) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    "row",
    [
        {"messages": CHAT},
        {"messages": PARTS},
        {"messages": json.dumps(CHAT)},
        {"conversations": SHAREGPT, "id": "x"},
        {"conversations": CHAT},
        {"instruction": "a sea", "input": "", "output": "the red sea"},
        {"question": "a sea", "answer": "the red sea", "id": 3},
        {"prompt": CHAT[:1], "completion": CHAT[1:]},
    ],
)
def test_chats_of_every_shape_are_written_by_the_template(tmp_path: Path, row: dict[str, Any]) -> None:
    source, tokenizer = rows_in(tmp_path / "a.jsonl", row, row), templated()
    assert text.read_source_text(source, tokenizer) == WRITTEN * 2
    assert (
        text.draw_windows(source, tokenizer, 4).flatten().tolist()
        == (tokenizer(WRITTEN * 2, add_special_tokens=False)["input_ids"][: len(WRITTEN) * 2 // 4 * 4])
    )
    labels = instructions.read_instructions(source, tokenizer, 64)["labels"]
    assert tokenizer.decode(labels[0][labels[0] != -100]) == "the red sea</assistant>\n"


def test_without_a_template_chats_stand_under_headings(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    assert "### Instruction:\na sea" in text.read_source_text(
        rows_in(tmp_path / "a.jsonl", {"messages": CHAT}), tokenizer
    )
    source = rows_in(tmp_path / "b.jsonl", {"messages": CHAT}) + "#template=none"
    assert "### Instruction:\na sea" in text.read_source_text(source, templated())


def test_a_completion_follows_its_prompt(tmp_path: Path) -> None:
    source, tokenizer = rows_in(tmp_path / "a.jsonl", {"prompt": "2 + 2 =", "completion": " 4"}), templated()
    assert text.read_source_text(source, tokenizer) == "<s>2 + 2 = 4</s>"
    rows = instructions.read_instructions(source, tokenizer, 32)
    assert tokenizer.decode(rows["labels"][0][rows["labels"][0] != -100]) == " 4</s>"


def test_token_ids_are_taken_as_they_are(tmp_path: Path) -> None:
    source = rows_in(tmp_path / "a.jsonl", {"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]})
    assert text.draw_windows(source, tiny_tokenizer(), 2).tolist() == [[5, 6], [7, 8]]
    source = rows_in(tmp_path / "b.jsonl", {"input_ids": [5, 6]}, {"input_ids": [5, 9_999]})
    with pytest.raises(SourceNotFound, match=r"row 1: expected token ids from 0 to .*, got 9999"):
        text.draw_windows(source, tiny_tokenizer(), 2)


def test_tool_calls_and_tools_reach_the_template_without_empty_entries(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "sea"}}}
    chat = [{"role": "user", "content": "look"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    row = {"messages": chat, "tools": json.dumps([{"type": "function", "function": {"name": "look"}}])}
    other = {"messages": [{"role": "user", "content": "hi"}], "tools": None}
    template = (
        "{{ tools[0].function.name if tools else 'none' }}:{% for m in messages %}{% if m.tool_calls is defined %}"
        "{{ m.tool_calls[0].function | tojson }}{% else %}{{ m.content }},{% endif %}{% endfor %}{{ '\\n' }}"
    )
    found = text.read_source_text(rows_in(tmp_path / "a.jsonl", row, other), templated(template))
    assert found.split("\n")[0] == 'look:look,{"name": "look", "arguments": {"at": "sea"}}'
    assert found.split("\n")[1] == "none:hi,"


@pytest.mark.parametrize(
    ("columns", "option", "wanted"),
    [
        ({"content": "fish", "id": 3}, "", "fish"),
        ({"words": "fish", "id": 3}, "", "fish"),
        ({"text": "no", "summary": "fish"}, "#column=summary", "fish"),
        ({"text": "no", "dialogue": CHAT}, "#column=dialogue", WRITTEN),
    ],
)
def test_a_column_is_found_or_named_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, columns: dict[str, Any], option: str, wanted: str
) -> None:
    source = rows_in(tmp_path / "a.jsonl", columns) + option
    with caplog.at_level(logging.INFO, "prunelit"):
        assert text.read_source_text(source, templated()) == wanted
        assert text.read_source_text(source, templated()) == wanted
    name = option.partition("=")[2] or next(iter(columns))
    (line,) = [record.getMessage() for record in caplog.records]
    assert f"column `{name}`" in line and "1 rows, first: " in line


@pytest.mark.parametrize(
    ("option", "error", "match"),
    [
        ("#column=body2", SourceNotFound, "expected the column 'body2', got .*did you mean 'body'"),
        ("#column_=body", BadOption, "'column_'; did you mean 'column'"),
        ("#refused=drop", BadOption, "refused: expected error or skip or fold, got 'drop'"),
        ("#split=test", BadOption, "split"),
    ],
)
def test_wrong_options_are_refused(tmp_path: Path, option: str, error: type[Exception], match: str) -> None:
    (tmp_path / "texts").mkdir()
    rows_in(tmp_path / "texts" / "a.jsonl", {"body": "a"})
    with pytest.raises(error, match=match) as caught:
        text.read_source_text(str(tmp_path / "texts") + option)
    assert one_line(caught)


def test_rows_that_the_template_refuses_are_named_skipped_or_folded(tmp_path: Path) -> None:
    source, tokenizer = rows_in(tmp_path / "a.jsonl", {"messages": CHAT}, {"messages": SYSTEM}), templated(STRICT)
    for read in (
        lambda name: text.draw_windows(name, tokenizer, 4),
        lambda n: instructions.read_instructions(n, tokenizer, 99),
    ):
        with pytest.raises(
            SourceNotFound, match=r"row 1: the chat template refuses it: no system role; .*#refused=skip"
        ) as error:
            read(source)
        assert one_line(error)
        with pytest.warns(UserWarning, match=r"left out 1 rows .* row 1 \(no system role\)"):
            read(source + "#refused=skip")
    folded = WRITTEN + "<user>be kind\n\na sea</user>\n<assistant>the red sea</assistant>\n"
    assert text.read_source_text(source + "#refused=fold", tokenizer) == folded
    assert len(instructions.read_instructions(source + "#refused=fold", tokenizer, 99)["labels"]) == 2


def test_a_folded_chat_takes_turns() -> None:
    roles = ["assistant", "user", "user", "tool", "assistant", "assistant"]
    folded = fold_chat([{"role": role, "content": str(number)} for number, role in enumerate(roles)])
    assert [(each["role"], each["content"]) for each in folded] == [
        ("user", ""),
        ("assistant", "0"),
        ("user", "1\n\n2\n\n3"),
        ("assistant", "4\n\n5"),
    ]
    strict = templated(STRICT)
    assert "be kind" in format_chat(Chat(SYSTEM), strict, SourceOptions(refused="fold"))


@pytest.mark.parametrize(
    ("chat", "match"),
    [
        ([{"role": "user", "content": [{"type": "image"}]}], "row 0: .* a part of type 'image'"),
        ([{"content": "no role"}], "row 0: expected messages of role and content"),
        ("not json [", "row 0: expected JSON"),
    ],
)
def test_rows_that_are_no_chat_are_named(tmp_path: Path, chat: Any, match: str) -> None:
    with pytest.raises(SourceNotFound, match=match) as error:
        text.read_source_text(
            rows_in(tmp_path / "a.jsonl", {"chat": chat if chat != "not json [" else "[not json"}), templated()
        )
    assert one_line(error)


# Files ------------------------------------------------------------------------------------------------------------


def test_tables_of_other_formats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNELIT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.csv").write_text('id,text\n1,"one, fish"\n2,two\n')
    (tmp_path / "a.tsv").write_text("id\ttext\n1\tone, fish\n2\ttwo\n")
    packed = pyarrow.compress((tmp_path / "a.csv").read_bytes(), "zstd", asbytes=True)
    (tmp_path / "a.csv.zst").write_bytes(packed)
    for name in ("a.csv", "a.tsv", "a.csv.zst"):
        assert text.read_source_text(str(tmp_path / name)) == "one, fish\n\ntwo"
    (tmp_path / "a.md.zst").write_bytes(pyarrow.compress(b"# one\n", "zstd", asbytes=True))
    assert text.read_source_text(str(tmp_path / "a.md.zst")) == "# one\n"


def test_a_folder_is_its_tables_or_its_documents(tmp_path: Path) -> None:
    (tmp_path / "docs" / "more").mkdir(parents=True)
    for name, content in (("b.txt", "two"), ("a.md", "one"), ("more/c.txt", "three"), ("notes.py", "no")):
        (tmp_path / "docs" / name).write_text(content)
    assert text.read_source_text(str(tmp_path / "docs")) == "one\n\ntwo\n\nthree"
    rows_in(tmp_path / "docs" / "train.jsonl", {"text": "train"})
    rows_in(tmp_path / "docs" / "test.jsonl", {"text": "test"})
    assert text.read_source_text(str(tmp_path / "docs")) == "train"
    assert text.read_source_text(str(tmp_path / "docs") + "#split=test") == "test"


def test_a_dataset_saved_to_disk(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    Dataset.from_dict({"text": ["one", "two"]}).save_to_disk(str(tmp_path / "one"))
    assert text.read_source_text(str(tmp_path / "one")) == "one\n\ntwo"
    splits = DatasetDict({"train": Dataset.from_dict({"text": ["a"]}), "test": Dataset.from_dict({"text": ["b"]})})
    splits.save_to_disk(str(tmp_path / "two"))
    assert text.read_source_text(str(tmp_path / "two")) == "a"
    assert text.read_source_text(str(tmp_path / "two") + "#split=test") == "b"
    with pytest.raises(BadOption, match="split: expected train or test, got 'dev'"):
        text.read_source_text(str(tmp_path / "two") + "#split=dev")


def test_a_file_with_a_hash_in_its_name_is_read(tmp_path: Path) -> None:
    (tmp_path / "c#a=b.txt").write_text("sharp")
    assert text.read_source_text(str(tmp_path / "c#a=b.txt")) == "sharp"


def test_the_builtin_text_is_said_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "_notified", set())
    monkeypatch.setattr("pydoc_data.topics.topics", {"fish": "one fish, two fish"})
    with caplog.at_level(logging.INFO, "prunelit"):
        for _ in range(2):
            text.draw_windows(text.BUILTIN_TEXT, tiny_tokenizer(), 8, 1)
    (line,) = [record.getMessage() for record in caplog.records]
    assert "Python's documentation" in line and "nobody's model" in line


def test_options_stay_behind_files_of_a_data_folder(tmp_path: Path) -> None:
    source = rows_in(tmp_path / "a.jsonl", {"body": "fish", "title": "a"})
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.md").write_text("fish")
    found = resolve_text_sources("t", ["a.jsonl#column=body", "texts"], str(tmp_path))
    assert found == [f"{source}#column=body", str(tmp_path / "texts")]
    assert [text.read_source_text(name) for name in found] == ["fish", "fish"]
