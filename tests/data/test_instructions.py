"""Rows of questions and answers: the loss is on the answers, whatever the template."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from prunelit.data import instructions
from prunelit.recovery.datamodule import TextDataModule
from prunelit.runtime.errors import BadOption, NotEnoughText, SourceNotFound
from tests.tiny import tiny_tokenizer

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def tokenizer() -> Any:
    return tiny_tokenizer()


def alpaca(tmp_path: Path, rows: list[dict[str, Any]]) -> str:
    path = tmp_path / "alpaca.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


ROWS = [
    {"instruction": "name a sea", "input": "", "output": "the red sea"},
    {"instruction": "add", "input": "one two", "output": "three"},
]


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_labels_are_the_answers(template: str | None, tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = template
    rows = instructions.read_instructions(alpaca(tmp_path, ROWS), tokenizer, 128)
    assert all(value.shape == (2, 128) for value in rows.values())
    for ids, labels, mask, row in zip(rows["input_ids"], rows["labels"], rows["attention_mask"], ROWS, strict=True):
        said = labels != -100
        assert torch.equal(labels[said], ids[said])
        assert not (said & (mask == 0)).any()
        end = "</assistant>\n" if template else tokenizer.eos_token or ""
        wanted = tokenizer(row["output"] + end, add_special_tokens=False)["input_ids"]
        assert labels[said].tolist() == wanted
        prompt = tokenizer.decode(ids[: int(said.nonzero()[0])])
        assert all(word in prompt for word in row["instruction"].split())
        assert all(word in prompt for word in row["input"].split())


def test_every_answer_of_a_chat_is_learnt_and_its_text_is_that_of_the_template(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = TEMPLATE
    chat = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]
    pieces = instructions.split_chat_pieces(chat, tokenizer)
    assert "".join(piece for piece, _ in pieces) == tokenizer.apply_chat_template(chat, tokenize=False)
    assert [piece for piece, answer in pieces if answer] == ["b</assistant>\n", "d</assistant>\n"]
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": chat}))
    assert (instructions.read_instructions(str(path), tokenizer, 128)["labels"] != -100).sum() > 2


def test_a_template_that_rewrites_earlier_turns_still_gives_its_own_text(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{% if loop.last or m.role == 'user' %}[{{ m.content }}]{% else %}[...]{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    chat = [
        {"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    ]
    pieces = instructions.split_chat_pieces(chat, tokenizer)
    assert "".join(piece for piece, _ in pieces).startswith("[a][...][c]")


def test_what_leaves_no_room_for_an_answer_is_left_out(tokenizer: Any, tmp_path: Path) -> None:
    source = alpaca(tmp_path, [{"instruction": "word " * 60, "input": "", "output": "yes"}, ROWS[0]])
    rows = instructions.read_instructions(source, tokenizer, 64)
    assert len(rows["labels"]) == 1
    assert all((labels != -100).any() for labels in rows["labels"])
    with pytest.raises(NotEnoughText, match="answers begin within 3 tokens"):
        instructions.read_instructions(source, tokenizer, 3)


@pytest.mark.parametrize(
    ("row", "match"),
    [({"question": "a"}, "expected columns"), ({"messages": [{"role": "user"}]}, "expected messages of role")],
)
def test_other_columns_are_refused(row: dict[str, Any], match: str, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(SourceNotFound, match=match):
        instructions.read_instructions(alpaca(tmp_path, [row]), tokenizer, 64)


def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> TextDataModule:
    monkeypatch.setattr("prunelit.data.loading.load_tokenizer", lambda source: tiny_tokenizer())
    (tmp_path / "config.json").write_text("{}")
    sizes = {"seqlen": 64, "calibration_windows": 4, "validation_windows": 4, "train_windows": 6}
    found = TextDataModule(str(tmp_path), **(sizes | options))
    found.setup("fit")
    return found


def test_text_and_examples_are_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = alpaca(tmp_path, ROWS * 5)
    mixed = module(tmp_path, monkeypatch, instructions=source, examples=4, batch_size=2)
    assert mixed.rows["labels"].shape == (10, 64)
    batches = list(mixed.train_dataloader())
    assert len(batches) == 5
    assert any(batch["input_ids"].shape[1] < 64 for batch in batches) or all(
        batch["attention_mask"].sum(1).max() == 64 for batch in batches
    )
    alone = module(tmp_path, monkeypatch, instructions=[source], train_windows=0, batch_size=2)
    assert len(alone.rows["labels"]) == 10
    assert all(
        batch["attention_mask"].sum(1).max() == batch["input_ids"].shape[1] for batch in alone.train_dataloader()
    )
    assert torch.equal(alone.calibration, mixed.calibration)


@pytest.mark.parametrize("options", [{"train_windows": 0}, {"examples": 0, "instructions": "builtin:python-docs"}])
def test_nothing_to_train_on_is_refused(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BadOption, match="expected a positive number"):
        module(tmp_path, monkeypatch, **options)
