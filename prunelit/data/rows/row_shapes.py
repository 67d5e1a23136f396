"""Shapes of rows: which columns hold text, chats or token ids, and what a row of them says.

| shape | columns |
|---|---|
| text | `text`, `sentence`, or another name such as `content`; else the only column of strings |
| chat | `messages` or `conversations` with role and content, or from and value (ShareGPT); `tools` beside it |
| instruction | `instruction` and `output` (Alpaca), `question` and `answer`, ...; `input` or `context` between |
| completion | `prompt` and `completion`, both text or both messages |
| ids | `input_ids`, token ids of the model's own tokenizer |
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from prunelit.data.rows.chats import Chat, read_messages
from prunelit.data.rows.json_depth import MOST_LEVELS, DepthScan
from prunelit.runtime.errors import SourceNotFound, suggest_name

ShapeName = Literal["text", "chat", "instruction", "completion", "ids"]
TEXT_COLUMNS = ("text", "sentence", "content", "document", "article", "body", "raw_content", "code", "page")
CHAT_COLUMNS = ("messages", "conversations", "conversation", "chat")
QUESTION_PAIRS = (
    *(("instruction", "output"), ("instruction", "response"), ("question", "answer"), ("query", "response")),
    ("question", "response"),
)
_CONTEXT_COLUMNS = ("input", "context")


@dataclass(frozen=True)
class RowShape:
    """Which columns of a source are read, and as what.

    Attributes:
        name: what the rows are.
        columns: the columns that are read, the most important first.

    Example:
        >>> RowShape("text", ("body",)).describe()
        'column `body`'
    """

    name: ShapeName
    columns: tuple[str, ...]

    def describe(self) -> str:
        """Name the columns, for messages."""
        names = ", ".join(f"`{column}`" for column in self.columns)
        return (
            f"column{'s' if len(self.columns) > 1 else ''} {names}{'' if self.name == 'text' else f' as {self.name}'}"
        )


def find_row_shape(columns: Mapping[str, Any], source: str, what: str, column: str | None = None) -> RowShape:
    """Find out what the rows of a source are.

    Args:
        columns: {name: a value of it that is not None, or None where there is none}.
        source: name of the source, for the error message.
        what: kind of the source, for the error message.
        column: the column that the user names; None: the names decide, in the order of the table above.

    Raises:
        SourceNotFound: no column of these is there, or the named one is not.

    Example:
        >>> find_row_shape({"prompt": "2 + 2 =", "completion": " 4"}, "sums.jsonl", "text")
        RowShape(name='completion', columns=('prompt', 'completion'))
        >>> find_row_shape({"id": 7, "body": "a page"}, "pages.jsonl", "text")
        RowShape(name='text', columns=('body',))
    """
    if column is not None:
        if column not in columns:
            raise SourceNotFound(
                f"{what} {source!r}: expected the column {column!r}, got {list(columns)}{suggest_name(column, columns)}"
            )
        return _shape_of_column(column, columns)
    for name in TEXT_COLUMNS[:2]:
        if name in columns:
            return RowShape("text", (name,))
    for name in CHAT_COLUMNS:
        if name in columns:
            return _shape_of_column(name, columns)
    for question, answer in QUESTION_PAIRS:
        if question in columns and answer in columns:
            extra = [name for name in ("system", *_CONTEXT_COLUMNS) if name in columns]
            return RowShape("instruction", (question, answer, *extra))
    if "prompt" in columns and "completion" in columns:
        return RowShape("completion", ("prompt", "completion", *[n for n in ("tools",) if n in columns]))
    if "input_ids" in columns:
        return RowShape("ids", ("input_ids",))
    strings = [name for name, value in columns.items() if isinstance(value, str)]
    named = [name for name in TEXT_COLUMNS if name in strings]
    if named or len(strings) == 1:
        return RowShape("text", ((named or strings)[0],))
    raise SourceNotFound(
        f"{what} {source!r}: expected a column {' or '.join(TEXT_COLUMNS[:2])}, or messages, conversations, "
        f"instruction and output, prompt and completion, or input_ids, got {list(columns)}; append "
        "#column=NAME to name another"
    )


def _shape_of_column(column: str, columns: Mapping[str, Any]) -> RowShape:
    """The shape of one column, by what it holds."""
    value = columns[column]
    if isinstance(value, Sequence) and not isinstance(value, str):
        if value and isinstance(value[0], int):
            return RowShape("ids", (column,))
        return RowShape("chat", (column, *[name for name in ("tools",) if name in columns]))
    is_packed_chat = column in CHAT_COLUMNS and isinstance(value, str) and value.lstrip().startswith("[")
    return RowShape("chat" if is_packed_chat else "text", (column,))


def read_chat_row(row: Mapping[str, Any], shape: RowShape, place: str) -> Chat | None:
    """Read a row of shape chat, instruction or completion as a chat.

    Args:
        row: {column: value}.
        shape: of the rows.
        place: source and number of the row, for the error message.

    Returns:
        The chat; None where the row is empty: its chat, its question or its answer is missing.

    Raises:
        SourceNotFound: the row is not of this shape.

    Example:
        >>> shape = RowShape("instruction", ("question", "answer"))
        >>> read_chat_row({"question": "2 + 2?", "answer": "4"}, shape, "row 0").messages[1]
        {'role': 'assistant', 'content': '4'}
    """
    if shape.name == "instruction":
        texts = {name: _read_string(row[name], name, place) for name in shape.columns}
        question, answer, *others = shape.columns
        if texts[question] is None or texts[answer] is None or not any(texts.values()):
            return None
        context = next((texts[name] for name in others if name != "system" and texts[name]), None)
        prompt = f"{texts[question]}\n\n{context}" if context else texts[question]
        messages = [{"role": "system", "content": texts["system"]}] if texts.get("system") else []
        messages += [{"role": "user", "content": prompt}, {"role": "assistant", "content": texts[answer]}]
        return Chat(messages)
    names = ("prompt", "completion") if shape.name == "completion" else shape.columns[:1]
    if any(row[name] is None for name in names) or not any(row[name] for name in names):
        return None
    tools = _read_json(row.get("tools"), "tools", place) if "tools" in shape.columns else None
    if shape.name == "completion" and isinstance(row["prompt"], str) and isinstance(row["completion"], str):
        turns = (("user", row["prompt"]), ("assistant", row["completion"]))
        return Chat([{"role": role, "content": content} for role, content in turns], is_plain=True)
    parts = [_read_json(row[name], name, place) for name in names]
    for name, part in zip(names, parts, strict=True):
        if not isinstance(part, Sequence) or isinstance(part, str):
            expected = "messages of role and content"
            raise SourceNotFound(f"{place}: expected {expected} in the column {name!r}, got {row[name]!r:.60}")
    return Chat(read_messages([message for part in parts for message in part], place), tools or None)


def _read_string(value: Any, column: str, place: str) -> str | None:
    if value is not None and not isinstance(value, str):
        got = f"a {type(value).__name__}: {value!r:.40}"
        raise SourceNotFound(f"{place}: expected text in the column {column!r}, got {got}")
    return value


def _read_json(value: Any, column: str, place: str) -> Any:
    """A value, parsed where it is JSON in a string: tables cannot hold tools of different shapes otherwise."""
    if not isinstance(value, str):
        return value
    scan = DepthScan()
    scan.read(value.encode("utf-8", errors="replace"))
    if scan.deepest > MOST_LEVELS:
        raise SourceNotFound(
            f"{place}: expected JSON of at most {MOST_LEVELS} levels in the column {column!r}, got {scan.deepest:,}"
        )
    try:
        return json.loads(value)
    except ValueError as error:
        raise SourceNotFound(f"{place}: expected JSON in the column {column!r}, got {value!r:.60}") from error
