"""Instruction data -> rows of token ids whose labels are the answers.

A source is a file or a dataset as in `prunelit.data.text`, with columns

    instruction, input (may be empty or missing), output      Alpaca (Stanford)
    messages: [{role, content}, ...]                           chats

Prompts are written by the tokenizer's chat template where it has one, else under plain headings.

Legend: N rows, S tokens.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from prunelit.data import text
from prunelit.runtime.errors import NotEnoughText, SourceNotFound
from prunelit.runtime.progress import track_progress

InstructionRows = dict[str, Tensor]
"""{"input_ids", "labels" (-100: not predicted), "attention_mask"}, each [N, S]."""

Message = Mapping[str, str]


def read_instructions(source: str, tokenizer: Any, seqlen: int) -> InstructionRows:
    """All examples of a source, padded on the right to `seqlen` tokens; longer ones are cut there.

    Examples whose prompt leaves no room for an answer are left out.

    Args:
        source: see above.
        tokenizer: of the model.
        seqlen: tokens per row.

    Raises:
        SourceNotFound: missing, unreadable, or without these columns.
        NotEnoughText: no example has an answer within `seqlen` tokens.
    """
    found = []
    for chat in track_progress(_read_chats(source), f"tokenising {source}", unit="example"):
        ids: list[int] = []
        labels: list[int] = []
        for piece, answer in split_chat_pieces(chat, tokenizer):
            some = tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
            ids += some
            labels += some if answer else [-100] * len(some)
        if any(label != -100 for label in labels[1:seqlen]):
            found.append((ids[:seqlen], labels[:seqlen]))
    if not found:
        raise NotEnoughText(
            f"instructions {source!r}: expected examples whose answers begin within {seqlen} tokens, got none; "
            "take a larger seqlen"
        )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    shape = (len(found), seqlen)
    rows = {
        "input_ids": torch.full(shape, pad),
        "labels": torch.full(shape, -100),
        "attention_mask": torch.zeros(shape, dtype=torch.long),
    }
    for row, (ids, labels) in enumerate(found):
        rows["input_ids"][row, : len(ids)] = torch.tensor(ids)
        rows["labels"][row, : len(ids)] = torch.tensor(labels)
        rows["attention_mask"][row, : len(ids)] = 1
    return rows


def split_chat_pieces(chat: Sequence[Message], tokenizer: Any) -> list[tuple[str, bool]]:
    """A chat as pieces of text, and whether each is an answer: what the model is to write, its end mark included."""
    if not getattr(tokenizer, "chat_template", None):
        return _write_headings(chat, tokenizer)

    def written(messages: Sequence[Message], prompt: bool) -> str:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt))

    pieces: list[tuple[str, bool]] = []
    done = ""
    for turn, message in enumerate(chat):
        if message["role"] != "assistant":
            continue
        before, after = written(chat[:turn], True), written(chat[: turn + 1], False)
        if not (before.startswith(done) and after.startswith(before)):
            # The template rewrites earlier turns (some drop old reasoning): learn this answer from here on only.
            pieces, done = [], ""
        pieces += [(before[len(done) :], False), (after[len(before) :], True)]
        done = after
    return pieces


def _write_headings(chat: Sequence[Message], tokenizer: Any) -> list[tuple[str, bool]]:
    pieces = [(tokenizer.bos_token or "", False)]
    for message in chat:
        answer = message["role"] == "assistant"
        heading = {"assistant": "Response", "system": "System"}.get(message["role"], "Instruction")
        pieces.append((f"### {heading}:\n", False))
        pieces.append((message["content"] + ((tokenizer.eos_token or "") if answer else "\n\n"), answer))
    return pieces


def _read_chats(source: str) -> list[list[Message]]:
    """Every example as messages."""
    data = text.read_dataset(source, "instructions")
    columns = set(data.column_names)
    if "messages" in columns:
        chats = [list(row) for row in data["messages"]]
    elif {"instruction", "output"} <= columns:
        chats = [
            [{"role": "user", "content": _format_prompt(row)}, {"role": "assistant", "content": row["output"] or ""}]
            for row in data
        ]
    else:
        raise SourceNotFound(
            f"instructions {source!r}: expected columns instruction, input, output, or messages; got {sorted(columns)}"
        )
    for number, chat in enumerate(chats):
        if not all(isinstance(m, Mapping) and isinstance(m.get("content"), str) and m.get("role") for m in chat):
            raise SourceNotFound(
                f"instructions {source!r}: row {number}: expected messages of role and content, got {chat!r:.60}"
            )
    return chats


def _format_prompt(row: Mapping[str, Any]) -> str:
    return f"{row['instruction']}\n\n{row['input']}" if row.get("input") else str(row["instruction"])
