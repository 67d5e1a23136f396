"""Rows of tables as text: a column of text, chats in the words of the chat template, or token ids."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from prunelit.data.rows.chats import TemplateRefusal, format_chat, handle_refusal, has_template
from prunelit.data.rows.row_shapes import RowShape, find_row_shape, read_chat_row
from prunelit.data.rows.tables import iterate_rows, read_dataset
from prunelit.data.rows.text_rows import BYTES_PER_TOKEN, TextRows
from prunelit.runtime.errors import NotEnoughText, SourceNotFound
from prunelit.runtime.messages import log_on_rank_zero

_SAMPLED_ROWS = 100
_described: set[str] = set()


def find_dataset_shape(dataset: Any, source: str, what: str, column: str | None = None) -> RowShape:
    """Find out what the rows of a dataset are, and say it once.

    Args:
        dataset: a `datasets.Dataset`.
        source: name of the source, for messages.
        what: kind of the source, for messages.
        column: the column that the user names; None: the names decide.

    Raises:
        SourceNotFound: it has no column of text, see `prunelit.data.rows.row_shapes`.

    Example: see `tests/data/rows/test_row_shapes.py`.
    """
    samples = list(iterate_rows(dataset.select(range(min(_SAMPLED_ROWS, len(dataset)))), source, what))
    columns: dict[str, Any] = {}
    for name, feature in dataset.features.items():
        values = [row[name] for row in samples]
        is_text = getattr(feature, "dtype", None) in ("string", "large_string")
        columns[name] = next((value for value in values if value is not None), "" if is_text else None)
    shape = find_row_shape(columns, source, what, column)
    if source not in _described:
        _described.add(source)
        first = repr(columns[shape.columns[0]])
        first = first if len(first) <= 60 else f"{first[:57]}..."
        log_on_rank_zero(f"{what} {source!r}: {shape.describe()}, {len(dataset):,} rows, first: {first}")
    return shape


class TableRows(TextRows):
    """Rows of a file, a folder or a hub dataset, read one by one from the disk.

    Args:
        source: a text source.

    Raises:
        SourceNotFound: it cannot be read, or has no column of text; later, where a row is not as expected.

    Example: see `tests/data/rows/test_row_shapes.py`.
    """

    def __init__(self, source: str):
        super().__init__(source)
        dataset = read_dataset(source)
        if not len(dataset):
            raise NotEnoughText(f"text {source!r}: expected text, got 0 empty rows")
        self.shape = find_dataset_shape(dataset, source, "text", self.options.column)
        self.dataset = dataset.select_columns(list(self.shape.columns))
        self.is_text = self.shape.name == "text"
        self.adds_special_tokens = self.is_text
        self.size_per_token = 1 if self.shape.name == "ids" else BYTES_PER_TOKEN
        self.has_stretches = self.is_text or self.shape.name == "ids"
        if self.shape.columns == ("sentence",):
            self.separator = " "

    def __len__(self) -> int:
        return len(self.dataset)

    def measure_total(self) -> int:
        """See `TextRows`."""
        return int(self.dataset.data.nbytes)

    def measure_rows(self) -> Tensor:
        """See `TextRows`; only the lengths are read. Chats count as equally long."""
        if not self.has_stretches:
            return torch.full((len(self),), self.measure_total() // len(self))
        measure = _measure_text if self.is_text else _measure_lists
        lengths = [measure(chunk) for chunk in self.dataset.data.column(self.shape.columns[0]).chunks]
        if any(chunk is None for chunk in lengths):
            column = self.shape.columns[0]
            expected = "text" if self.is_text else "token ids"
            raise SourceNotFound(
                f"text {self.source!r}: expected rows of {expected}, got {self.dataset.data.schema.field(column).type} "
                f"in the column {column!r}"
            )
        arrays = [chunk.fill_null(0).to_numpy(zero_copy_only=False) for chunk in lengths]
        return torch.cat([torch.tensor(array, dtype=torch.long) for array in arrays])

    def read_text(self, index: int, tokenizer: Any) -> str | None:
        """See `TextRows`.

        Raises:
            SourceNotFound: the row is no text, or the chat template refuses it.
        """
        return self._write_row(index, self._read_row(index), tokenizer)

    def _read_row(self, index: int) -> Mapping[str, Any]:
        # `dataset[index]` is read within `iterate_rows`, which words the error of a row that is no UTF-8.
        return next(iterate_rows((self.dataset[number] for number in (index,)), self.source))

    def _write_row(self, index: int, row: Mapping[str, Any], tokenizer: Any) -> str | None:
        place = f"text {self.source!r}: row {index}"
        if self.is_text:
            text = row[self.shape.columns[0]]
            if text is not None and not isinstance(text, str):
                got = f"a {type(text).__name__}: {text!r:.40}"
                raise SourceNotFound(f"text {self.source!r}: expected rows of text, got {got} in row {index}")
            return text or ""
        if self.shape.name == "ids":
            raise SourceNotFound(f"text {self.source!r}: expected text, got token ids in {self.shape.describe()}")
        chat = read_chat_row(row, self.shape, place)
        if chat is None:
            return None
        try:
            return format_chat(chat, tokenizer, self.options)
        except TemplateRefusal as refusal:
            handle_refusal(refusal, self.options, index, place, self.skipped)
            return None

    def iterate_row_texts(self, tokenizer: Any) -> Iterator[str | None]:
        """See `TextRows`."""
        self._choose_separator(tokenizer)
        for index, row in enumerate(iterate_rows(self.dataset, self.source)):
            yield self._write_row(index, row, tokenizer)

    def _choose_separator(self, tokenizer: Any) -> None:
        """Chats end with a mark of their own, if the template or the tokenizer has one."""
        if not self.is_text:
            has_end = has_template(tokenizer, self.options) or getattr(tokenizer, "eos_token", None)
            self.separator = "" if has_end else "\n\n"

    def read_ids(self, index: int, tokenizer: Any, start: int, length: int) -> list[int]:
        """See `TextRows`; of chats the stretch begins at the start and has any length."""
        if self.shape.name == "ids":
            return self._check_ids(index, self._read_row(index), tokenizer, slice(start, start + length))
        if self.is_text:
            return super().read_ids(index, tokenizer, start, length)
        self._choose_separator(tokenizer)
        text = self.read_text(index, tokenizer)
        if text is None:
            return []
        ids: list[int] = tokenizer(text + self.separator, verbose=False, add_special_tokens=False)["input_ids"]
        return ids

    def iterate_ids(self, tokenizer: Any) -> Iterator[list[int]]:
        """See `TextRows`."""
        if self.shape.name != "ids":
            return super().iterate_ids(tokenizer)
        return (
            self._check_ids(index, row, tokenizer, slice(None))
            for index, row in enumerate(iterate_rows(self.dataset, self.source))
        )

    def _check_ids(self, index: int, row: Mapping[str, Any], tokenizer: Any, places: slice) -> list[int]:
        """The token ids at some places of a row, which the tokenizer must know."""
        ids = (row[self.shape.columns[0]] or [])[places]
        size = len(tokenizer)
        outside = [each for each in ids if not isinstance(each, int) or not 0 <= each < size]
        if outside:
            raise SourceNotFound(
                f"text {self.source!r}: row {index}: expected token ids from 0 to {size - 1:,}, those of the model's "
                f"tokenizer, got {outside[0]!r:.40}"
            )
        self.has_text = self.has_text or bool(ids)
        return list(ids)


def _measure_text(chunk: Any) -> Any:
    """The bytes of each text of a part of a column; None where it is no text."""
    import pyarrow.compute

    kind = chunk.type
    content = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    if pyarrow.types.is_null(kind) or pyarrow.types.is_string_view(kind) or content is not kind:
        if content is not kind and not (pyarrow.types.is_string(content) or pyarrow.types.is_large_string(content)):
            return None
        chunk = chunk.cast(pyarrow.large_string())  # `binary_length` does not know these
    is_text = pyarrow.types.is_string(chunk.type) or pyarrow.types.is_large_string(chunk.type)
    return pyarrow.compute.binary_length(chunk) if is_text else None


def _measure_lists(chunk: Any) -> Any:
    """The length of each list of a part of a column; None where it holds no lists."""
    import pyarrow.compute

    kind = chunk.type
    is_list = pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind) or pyarrow.types.is_fixed_size_list(kind)
    return pyarrow.compute.list_value_length(chunk) if is_list else None
