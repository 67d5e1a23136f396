"""Instruction data as rows of token ids whose labels are the answers.

A source is a file, a folder or a dataset as in `prunelit.data.text`, whose rows are chats, instructions or completions
as in `prunelit.data.rows.row_shapes`. The tokenizer's chat template formats the prompts; without one, they are written
under plain headings.

Legend: N rows, S tokens.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from prunelit.data.rows.chats import (
    Chat,
    Message,
    TemplateRefusal,
    apply_template,
    handle_refusal,
    has_template,
    warn_of_skipped,
    write_or_fold,
    write_untemplated,
)
from prunelit.data.rows.row_shapes import read_chat_row
from prunelit.data.rows.source_options import SourceOptions, parse_source
from prunelit.data.rows.table_rows import find_dataset_shape
from prunelit.data.rows.tables import iterate_rows, read_dataset
from prunelit.runtime.errors import NotEnoughText, SourceNotFound
from prunelit.runtime.progress import track_progress

InstructionRows = dict[str, Tensor]
"""{"input_ids", "labels" (-100: no loss), "attention_mask"}, each [N, S]."""


def read_instructions(source: str, tokenizer: Any, seqlen: int) -> InstructionRows:
    """Read all examples of a source as rows of `seqlen` tokens, padded or truncated on the right.

    Examples whose prompt leaves no room for an answer are left out.

    Args:
        source: a file, a folder or a dataset.
        tokenizer: the model's transformers tokenizer.
        seqlen: tokens per row.

    Returns:
        The rows, each tensor [N, seqlen].

    Raises:
        SourceNotFound: the source is missing, unreadable, or lacks such columns; the template refuses a row.
        NotEnoughText: no example has an answer within `seqlen` tokens.
    """
    examples = []
    for pieces in track_progress(_read_pieces(source, tokenizer), f"tokenising {source}", unit="example"):
        ids: list[int] = []
        labels: list[int] = []
        for piece, is_answer in pieces:
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


def split_chat_pieces(
    chat: Sequence[Message], tokenizer: Any, tools: Any = None, options: SourceOptions | None = None
) -> list[tuple[str, bool]]:
    """Split a chat into pieces of text, and say of each whether it is an answer that the model has to learn.

    An answer includes the end-of-turn mark that the template writes after it.

    Args:
        chat: the messages, in order.
        tokenizer: the model's transformers tokenizer.
        tools: that the messages may call.
        options: of the source; whether the template is used.

    Returns:
        (text, whether it is an answer) of each piece, in order.

    Raises:
        TemplateRefusal: the chat template refuses the chat.

    Example:
        >>> from types import SimpleNamespace
        >>> chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
        >>> pieces = split_chat_pieces(chat, SimpleNamespace(bos_token="<s>", eos_token="</s>"))
        >>> [text for text, is_answer in pieces if is_answer]
        ['Hello</s>']
    """
    if not has_template(tokenizer, options or SourceOptions()):
        return write_untemplated(Chat(chat), tokenizer)

    def format_messages(messages: Sequence[Message], add_prompt: bool) -> str:
        return apply_template(messages, tokenizer, tools, add_prompt)

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


def _read_pieces(source: str, tokenizer: Any) -> Iterator[list[tuple[str, bool]]]:
    """Read the examples of a source one by one, as `split_chat_pieces` gives them."""
    dataset, options = read_dataset(source, "instructions"), parse_source(source)[1]
    shape = find_dataset_shape(dataset, source, "instructions", options.column) if len(dataset) else None
    if shape is None or shape.name in ("text", "ids"):
        raise SourceNotFound(
            f"instructions {source!r}: expected columns instruction, input, output, or messages, or prompt and "
            f"completion; got {sorted(dataset.column_names)}"
        )
    skipped: dict[int, str] = {}
    for number, row in enumerate(iterate_rows(dataset.select_columns(list(shape.columns)), source, "instructions")):
        place = f"instructions {source!r}: row {number}"
        chat = read_chat_row(row, shape, place)
        if chat is None:
            continue
        try:
            yield _split_row(chat, tokenizer, options)
        except TemplateRefusal as refusal:
            handle_refusal(refusal, options, number, place, skipped)
    warn_of_skipped(f"instructions {source!r}", skipped, stacklevel=3)


def _split_row(chat: Chat, tokenizer: Any, options: SourceOptions) -> list[tuple[str, bool]]:
    if chat.is_plain:
        return write_untemplated(chat, tokenizer)
    return write_or_fold(chat, options, lambda each: split_chat_pieces(each.messages, tokenizer, each.tools, options))
