"""Chats: messages in one form, written by the tokenizer's chat template.

Templates refuse chats that they were not made for: a system message, two questions in a row, a tool. What to do with
those is an option of the source, see `prunelit.data.rows.source_options`.
"""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from prunelit.data.rows.source_options import SourceOptions
from prunelit.runtime.errors import SourceNotFound, get_first_line

Written = TypeVar("Written")
Message = Mapping[str, Any]
"""{"role", "content"} of one turn of a chat, and what else the template reads, such as "tool_calls"."""

_ROLES = {
    **{"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant"},
    **{"model": "assistant", "bot": "assistant", "function_call": "assistant"},
    **{"observation": "tool", "function_response": "tool", "function": "tool"},
}
"""Roles of ShareGPT and its descendants, in the words of chat templates."""


@dataclass(frozen=True)
class Chat:
    """Messages in order, and the tools that they may call.

    Attributes:
        messages: the turns.
        tools: as chat templates take them; None: there are none.
        is_plain: the messages are a prompt and its completion, which follow each other without a template.

    Example:
        >>> Chat([{"role": "user", "content": "Hi"}]).tools is None
        True
    """

    messages: Sequence[Message]
    tools: Any = None
    is_plain: bool = False


class TemplateRefusal(Exception):
    """A chat template refuses a chat; the message says why.

    Example: see `format_chat`.
    """


def read_messages(messages: Sequence[Any], place: str) -> list[Message]:
    """Bring messages into the form of chat templates: role and content, without empty entries.

    Args:
        messages: with role and content, or from and value; content is text or a list of parts of text.
        place: source and number of the row, for the error message.

    Raises:
        SourceNotFound: a message has no role, or its content is no text.

    Example:
        >>> read_messages([{"from": "human", "value": "Hi"}], "row 0")
        [{'role': 'user', 'content': 'Hi'}]
        >>> read_messages([{"role": "user", "content": [{"type": "text", "text": "Hi"}], "name": None}], "row 0")
        [{'role': 'user', 'content': 'Hi'}]
    """
    chat: list[Message] = []
    for message in messages:
        role = (message.get("role") or message.get("from")) if isinstance(message, Mapping) else None
        if not isinstance(role, str):
            raise SourceNotFound(f"{place}: expected messages of role and content, got {message!r:.60}")
        content = message["content"] if message.get("content") is not None else message.get("value")
        # A table fills the keys that other rows have with None, and templates ask whether a key is there.
        others = {
            name: _drop_missing(value)
            for name, value in message.items()
            if name not in ("role", "from", "content", "value") and value not in (None, [], {})
        }
        if content is None and "tool_calls" in others:
            content = ""
        chat.append({"role": _ROLES.get(role, role), "content": _join_parts(content, place), **others})
    return chat


def _join_parts(content: Any, place: str) -> str:
    """The text of a content that is text or a list of parts."""
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    for part in parts:
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else None
            got = f"a part of type {kind!r}" if kind not in (None, "text") else f"{content!r:.60}"
            raise SourceNotFound(f"{place}: expected messages of role and content that is text, got {got}")
    return "".join(part["text"] for part in parts)


def _drop_missing(value: Any) -> Any:
    """A value without the entries that are None, at any depth."""
    if isinstance(value, Mapping):
        return {name: _drop_missing(item) for name, item in value.items() if item is not None}
    return [_drop_missing(item) for item in value] if isinstance(value, list) else value


def fold_chat(messages: Sequence[Message]) -> list[Message]:
    """Fold a chat into turns of user and assistant by turns, which every chat template takes.

    A system message goes into the first question, a tool's answer counts as a question, and neighbours of one role are
    joined by a blank line. An answer before any question is given an empty one.

    Args:
        messages: the chat.

    Example:
        >>> chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
        >>> fold_chat(chat)
        [{'role': 'user', 'content': 'Be kind.\\n\\nHi'}]
    """
    folded: list[dict[str, Any]] = []
    for message in messages:
        role = "assistant" if message["role"] == "assistant" else "user"
        content = "\n".join(part for part in (message["content"], _write_tool_calls(message)) if part)
        if folded and folded[-1]["role"] == role:
            folded[-1]["content"] = "\n\n".join(part for part in (folded[-1]["content"], content) if part)
        else:
            if not folded and role == "assistant":
                folded.append({"role": "user", "content": ""})
            folded.append({"role": role, "content": content})
    return list(folded)


def _write_tool_calls(message: Message) -> str:
    return "".join(json.dumps(call, default=str) for call in message.get("tool_calls", ()))


def write_or_fold(chat: Chat, options: SourceOptions, write: Callable[[Chat], Written]) -> Written:
    """Write a chat, or the folded one where a template refuses it and the options say so.

    Args:
        chat: the chat.
        options: of the source.
        write: writes a chat, and raises `TemplateRefusal`.

    Raises:
        TemplateRefusal: the chat is refused, and the folded one where folding was asked for.

    Example: see `format_chat`.
    """
    try:
        return write(chat)
    except TemplateRefusal:
        if options.refused != "fold":
            raise
        return write(Chat(fold_chat(chat.messages)))


def handle_refusal(
    refusal: TemplateRefusal, options: SourceOptions, number: int, place: str, skipped: dict[int, str]
) -> None:
    """Note a row that the chat template refuses where such rows are left out; else say what to do.

    Args:
        refusal: why.
        options: of the source.
        number: of the row.
        place: source and number of the row, for the error message.
        skipped: reasons by the numbers of rows that were left out; this one is added.

    Raises:
        SourceNotFound: the options do not leave such rows out.

    Example:
        >>> handle_refusal(TemplateRefusal("no tools"), SourceOptions(refused="skip"), 3, "row 3", skipped := {})
        >>> skipped
        {3: 'no tools'}
    """
    if options.refused != "skip":
        fold = "" if options.refused == "fold" else ", #refused=fold to fold them into turns of user and assistant"
        raise SourceNotFound(
            f"{place}: the chat template refuses it: {refusal}; append #refused=skip to leave such rows out{fold}"
        ) from refusal
    skipped[number] = str(refusal)


def warn_of_skipped(name: str, skipped: Mapping[int, str], stacklevel: int) -> None:
    """Warn of the rows that `handle_refusal` left out, if there are any.

    Args:
        name: kind and name of the source.
        skipped: reasons by the numbers of the rows.
        stacklevel: of the caller, see `warnings.warn`.

    Example:
        >>> warn_of_skipped("text 'a.jsonl'", {}, 1)
    """
    if skipped:
        listed = ", ".join(f"row {number} ({why})" for number, why in list(skipped.items())[:3])
        more = f", and {len(skipped) - 3} more" if len(skipped) > 3 else ""
        warnings.warn(
            f"{name}: left out {len(skipped)} rows that the chat template refuses: {listed}{more}",
            stacklevel=stacklevel + 1,  # this function is one more
        )


def apply_template(
    messages: Sequence[Message], tokenizer: Any, tools: Any = None, add_generation_prompt: bool = False
) -> str:
    """Write messages with the tokenizer's chat template.

    Args:
        messages: in the form of `read_messages`.
        tokenizer: with a chat template.
        tools: that the messages may call.
        add_generation_prompt: end with the mark that begins an answer.

    Raises:
        TemplateRefusal: the template refuses them.

    Example: see `prunelit.data.instructions`, which uses it.
    """
    options: dict[str, Any] = {"tools": tools} if tools else {}
    try:
        return str(
            tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt, **options
            )
        )
    except Exception as error:  # whatever a template does with a chat it was not made for: TypeError, UndefinedError
        raise TemplateRefusal(get_first_line(error)[:200]) from error


def has_template(tokenizer: Any, options: SourceOptions) -> bool:
    """Whether chats are written with the tokenizer's chat template.

    Example:
        >>> has_template(object(), SourceOptions())
        False
    """
    return options.template == "auto" and bool(getattr(tokenizer, "chat_template", None))


def write_untemplated(chat: Chat, tokenizer: Any) -> list[tuple[str, bool]]:
    """Write a chat without a chat template: under plain headings, a plain completion right behind its prompt.

    Args:
        chat: the chat.
        tokenizer: its tokens of beginning and end are used where it has them.

    Returns:
        (text, whether it is an answer) of each piece, in order.

    Example:
        >>> plain = Chat([{"role": "user", "content": "2+2="}, {"role": "assistant", "content": "4"}], is_plain=True)
        >>> write_untemplated(plain, object())
        [('', False), ('2+2=', False), ('4', True)]
    """
    pieces = [(getattr(tokenizer, "bos_token", None) or "", False)]
    for message in chat.messages:
        is_answer = message["role"] == "assistant"
        heading = {"assistant": "Response", "system": "System"}.get(message["role"], "Instruction")
        content = message["content"] or _write_tool_calls(message)
        if not chat.is_plain:
            pieces.append((f"### {heading}:\n", False))
        end = (getattr(tokenizer, "eos_token", None) or "") if is_answer else ("" if chat.is_plain else "\n\n")
        pieces.append((content + end, is_answer))
    return pieces


def format_chat(chat: Chat, tokenizer: Any, options: SourceOptions) -> str:
    """Write a chat as one text, with the tokenizer's chat template or under plain headings.

    Args:
        chat: the chat.
        tokenizer: a transformers tokenizer.
        options: of the source: whether the template is used, and what happens to a chat that it refuses.

    Raises:
        TemplateRefusal: the template refuses the chat, and the folded one where folding was asked for.

    Example:
        >>> format_chat(Chat([{"role": "user", "content": "Hi"}]), object(), SourceOptions())
        '### Instruction:\\nHi\\n\\n'
    """
    if chat.is_plain or not has_template(tokenizer, options):
        return "".join(piece for piece, _ in write_untemplated(chat, tokenizer))
    return write_or_fold(chat, options, lambda each: apply_template(each.messages, tokenizer, each.tools))
