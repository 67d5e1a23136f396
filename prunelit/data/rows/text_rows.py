"""Text sources as rows: how many there are, how large, the text of each, and the tokens of all."""

import io
import pydoc_data.topics
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunelit.data.rows.source_options import SourceOptions, parse_source
from prunelit.data.rows.token_pieces import PIECE_LENGTH, iterate_token_pieces
from prunelit.data.rows.unpack import check_is_text, open_bytes
from prunelit.runtime.errors import SourceNotFound

BUILTIN_TEXT = "builtin:python-docs"
BYTES_PER_TOKEN = 16
"""Most text has 3 to 6 bytes a token, so this much for each token of a window gives a whole window."""


class TextRows:
    """The rows of a source whose rows are known; other sources derive from it.

    Attributes:
        source: the source, with its options.
        options: the options.
        separator: what stands between two rows.
        adds_special_tokens: whether the tokenizer adds its special tokens to the whole; chat templates write their own.
        skipped: number of every row that was left out, and why.
        has_rows: whether the text is more than one document.
        has_text: whether anything but spaces was read by now.
        size_per_token: what a token of a window needs of the sizes of `measure_rows`.
        has_stretches: whether a long row can be read in several stretches; else only from its beginning.

    Example:
        >>> rows = TextRows("poems", ["one fish", "two fish"])
        >>> "".join(rows.iterate_texts(None))
        'one fish\\n\\ntwo fish'
    """

    separator = "\n\n"
    adds_special_tokens = True
    size_per_token = BYTES_PER_TOKEN
    has_stretches = True

    def __init__(self, source: str, rows: Sequence[str] = ()):
        self.source, self.rows = source, rows
        self.options: SourceOptions = parse_source(source)[1]
        self.skipped: dict[int, str] = {}
        self.has_text = False
        self.has_rows = True

    def __len__(self) -> int:
        return len(self.rows)

    def measure_total(self) -> int:
        """Measure the rows together, in bytes or more; the same on every machine."""
        return sum(len(row.encode()) for row in self.rows)

    def measure_rows(self) -> Tensor:
        """Measure every row, [rows] int64: bytes, or the number of token ids where rows are these."""
        return torch.tensor([len(row.encode()) for row in self.rows])

    def read_text(self, index: int, tokenizer: Any) -> str | None:
        """Read the text of a row; None where it is left out."""
        return self.rows[index]

    def read_ids(self, index: int, tokenizer: Any, start: int, length: int) -> list[int]:
        """Tokenise a stretch of a row, and what stands behind a row.

        Args:
            index: number of the row.
            tokenizer: a transformers tokenizer.
            start: first byte of the stretch, or first token where rows are token ids.
            length: bytes or tokens of the stretch; a character that it cuts is left out.
        """
        text = self.read_text(index, tokenizer)
        if text is None:
            return []
        data = text.encode()
        stretch = data[start : start + length].decode("utf-8", errors="ignore")
        end = self.separator if start + length >= len(data) else ""
        ids: list[int] = tokenizer(stretch + end, verbose=False, add_special_tokens=False)["input_ids"]
        return ids

    @cached_property
    def row_sizes(self) -> Tensor:
        """What `measure_rows` gives, measured once."""
        return self.measure_rows()

    def iterate_row_texts(self, tokenizer: Any) -> Iterator[str | None]:
        """Iterate over the texts of all rows; None where a row is left out."""
        return (self.read_text(index, tokenizer) for index in range(len(self)))

    def iterate_texts(self, tokenizer: Any) -> Iterator[str]:
        """Iterate over parts of the whole text: rows with their separators between them."""
        is_first = True
        for text in self.iterate_row_texts(tokenizer):
            if text is not None:
                yield text if is_first else self.separator + text
                is_first = False

    def iterate_ids(self, tokenizer: Any) -> Iterator[list[int]]:
        """Iterate over the token ids of the whole text, in pieces."""
        return iterate_token_pieces(self._note_text(tokenizer), tokenizer, self.adds_special_tokens)

    def _note_text(self, tokenizer: Any) -> Iterator[str]:
        for text in self.iterate_texts(tokenizer):
            self.has_text = self.has_text or bool(text.strip())
            # A tokenizer takes hours for one word of this length.
            if len(text) >= PIECE_LENGTH and text[:PIECE_LENGTH].isalnum():
                raise SourceNotFound(
                    f"text {self.source!r}: expected words, got {PIECE_LENGTH:,} letters and digits in a row"
                )
            yield text


class BuiltinRows(TextRows):
    """Python's own documentation, which is part of every Python.

    Example:
        >>> len(BuiltinRows()) > 50
        True
    """

    def __init__(self) -> None:
        topics = pydoc_data.topics.topics
        super().__init__(BUILTIN_TEXT, [topics[name] for name in sorted(topics)])


class DocumentRows(TextRows):
    """Files that are one document each; a file is read in parts.

    Args:
        source: name of the source.
        paths: the files, packed or not.

    Raises:
        SourceNotFound: a file is no text; while it is read, too.

    Example: see `tests/data/test_text.py`.
    """

    def __init__(self, source: str, paths: Sequence[Path]):
        super().__init__(source)
        self.paths = paths
        self.has_rows = len(paths) > 1
        for path in paths:
            check_is_text(path, source)

    def __len__(self) -> int:
        return len(self.paths)

    def measure_total(self) -> int:
        """See `TextRows`; a packed file counts as it is."""
        return sum(path.stat().st_size for path in self.paths)

    def measure_rows(self) -> Tensor:
        """See `TextRows`; a packed file counts as it is."""
        return torch.tensor([path.stat().st_size for path in self.paths])

    def read_text(self, index: int, tokenizer: Any) -> str:
        """See `TextRows`."""
        return "".join(self._read_parts(self.paths[index]))

    def iterate_texts(self, tokenizer: Any) -> Iterator[str]:
        """See `TextRows`."""
        for index, path in enumerate(self.paths):
            if index:
                yield self.separator
            yield from self._read_parts(path)

    def _read_parts(self, path: Path) -> Iterator[str]:
        with open_bytes(path, self.source) as stream:
            reader = io.TextIOWrapper(stream, encoding="utf-8")
            try:
                while part := reader.read(PIECE_LENGTH):
                    if "\0" in part:
                        raise SourceNotFound(
                            f"text {self.source!r}: cannot be read: expected UTF-8 text, got a NUL in {path.name}"
                        )
                    yield part
            except UnicodeDecodeError as error:
                raise SourceNotFound(
                    f"text {self.source!r}: cannot be read: expected UTF-8 text, got {error.reason} in {path.name}"
                ) from error
