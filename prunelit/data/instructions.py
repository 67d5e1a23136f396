"""Instruction data as rows of token ids whose labels are the answers.

A source is a file or a dataset as in `prunelit.data.text`, with these columns:

    instruction, input (may be empty or missing), output      Alpaca (Stanford)
    messages: [{role, content}, ...]                           chats

The tokenizer's chat template formats the prompts; without one, they are written under plain headings.

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
"""{"input_ids", "labels" (-100: no loss), "attention_mask"}, each [N, S]."""

Message = Mapping[str, str]
"""{"role", "content"} of one turn of a chat."""


def read_instructions(source: str, tokenizer: Any, seqlen: int) -> InstructionRows:
    """Read all examples of a source as rows of `seqlen` tokens, padded or truncated on the right.

    Examples whose prompt leaves no room for an answer are left out.

    Args:
        source: a file or a dataset with the columns above.
        tokenizer: the model's transformers tokenizer.
        seqlen: tokens per row.

    Returns:
        The rows, each tensor [N, seqlen].

    Raises:
        SourceNotFound: the source is missing, unreadable, or lacks these columns.
        NotEnoughText: no example has an answer within `seqlen` tokens.
    """
    examples = []
    for chat in track_progress(_read_chats(source), f"tokenising {source}", unit="example"):
        ids: list[int] = []
        labels: list[int] = []
        for piece, is_answer in split_chat_pieces(chat, tokenizer):
            piece_ids = tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
            ids += piece_ids
            labels += piece_ids if is_answer else [-100] * len(piece_ids)
        # The first label is never predicted: a causal LM's loss shifts the labels by one.
        if any(label != -100 for label in labels[1:seqlen]):
            examples.append((ids[:seqlen], labels[:seqlen]))
    if not examples:
        raise NotEnoughText(
            f"instructions {source!r}: expected examples whose answers begin within {seqlen} tokens, got none; "
            "take a larger seqlen"
        )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    shape = (len(examples), seqlen)
    rows = {
        "input_ids": torch.full(shape, pad),
        "labels": torch.full(shape, -100),
        "attention_mask": torch.zeros(shape, dtype=torch.long),
    }
    for row, (ids, labels) in enumerate(examples):
        rows["input_ids"][row, : len(ids)] = torch.tensor(ids)
        rows["labels"][row, : len(ids)] = torch.tensor(labels)
        rows["attention_mask"][row, : len(ids)] = 1
    return rows


def split_chat_pieces(chat: Sequence[Message], tokenizer: Any) -> list[tuple[str, bool]]:
    """Split a chat into pieces of text, and say of each whether it is an answer that the model has to learn.

    An answer includes the end-of-turn mark that the template writes after it.

    Args:
        chat: the messages, in order.
        tokenizer: the model's transformers tokenizer.

    Returns:
        (text, whether it is an answer) of each piece, in order.

    Example:
        >>> from types import SimpleNamespace
        >>> chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
        >>> pieces = split_chat_pieces(chat, SimpleNamespace(bos_token="<s>", eos_token="</s>"))
        >>> [text for text, is_answer in pieces if is_answer]
        ['Hello</s>']
    """
    if not getattr(tokenizer, "chat_template", None):
        return _write_headings(chat, tokenizer)

    def format_messages(messages: Sequence[Message], add_prompt: bool) -> str:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=add_prompt))

    pieces: list[tuple[str, bool]] = []
    covered = ""  # the part of the formatted chat that `pieces` hold
    for turn, message in enumerate(chat):
        if message["role"] != "assistant":
            continue
        before, after = format_messages(chat[:turn], True), format_messages(chat[: turn + 1], False)
        if not (before.startswith(covered) and after.startswith(before)):
            # Some templates rewrite earlier turns (they drop old reasoning); then only answers from here on count.
            pieces, covered = [], ""
        pieces += [(before[len(covered) :], False), (after[len(before) :], True)]
        covered = after
    return pieces


def _write_headings(chat: Sequence[Message], tokenizer: Any) -> list[tuple[str, bool]]:
    """Split a chat as `split_chat_pieces` does, for a tokenizer without a chat template."""
    pieces = [(tokenizer.bos_token or "", False)]
    for message in chat:
        is_answer = message["role"] == "assistant"
        heading = {"assistant": "Response", "system": "System"}.get(message["role"], "Instruction")
        pieces.append((f"### {heading}:\n", False))
        pieces.append((message["content"] + ((tokenizer.eos_token or "") if is_answer else "\n\n"), is_answer))
    return pieces


def _read_chats(source: str) -> list[list[Message]]:
    """Read the examples of a source as lists of messages."""
    dataset = text.read_dataset(source, "instructions")
    columns = set(dataset.column_names)
    if "messages" in columns:
        chats = [list(row) for row in dataset["messages"]]
    elif {"instruction", "output"} <= columns:
        chats = [
            [{"role": "user", "content": _format_prompt(row)}, {"role": "assistant", "content": row["output"] or ""}]
            for row in dataset
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
