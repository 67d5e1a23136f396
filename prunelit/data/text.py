"""Draw windows of token ids from text sources, for calibration, training and evaluation alike.

A source is one of
    builtin:python-docs                          documentation topics of the standard library, part of every Python
    path to .txt or .md                          one document
    path to .parquet, .json, .jsonl, .csv, .tsv  rows, whose columns are recognised, see `prunelit.data.rows.row_shapes`
    folder                                       of such files, or written by `save_to_disk` of `datasets`
    hub id, hub_id:config, hub_id:config:split   a Hugging Face dataset; split "train" unless given

Files may be packed, `.gz` or `.zst`. Behind a `#` stand options, `rows.jsonl#column=body`, see
`prunelit.data.rows.source_options`.

Protocol, as in the papers: rows of text are joined by two newlines, rows of a column `sentence` (Penn Treebank: one
sentence a row) by a space. The whole text is tokenised once and cut into windows without overlap; the remainder is
dropped. Chats are written by the tokenizer's chat template and follow each other. Windows drawn at random from a large
source are made of rows drawn at random, see `prunelit.data.rows.row_windows`.

Legend: N windows.
"""

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunelit.data.rows.chats import warn_of_skipped
from prunelit.data.rows.row_windows import WHOLE_BYTES, draw_row_windows, is_drawn_by_rows
from prunelit.data.rows.source_options import parse_source
from prunelit.data.rows.stored_windows import StoredWindows, store_token_ids
from prunelit.data.rows.table_rows import TableRows
from prunelit.data.rows.tables import (
    DOCUMENT_FORMATS,
    TABLE_FORMATS,
    check_source_options,
    get_ending,
    is_saved_dataset,
    list_documents,
    list_text_files,
)
from prunelit.data.rows.text_rows import BUILTIN_TEXT, BuiltinRows, DocumentRows, TextRows
from prunelit.data.sources import get_cache_folder
from prunelit.runtime.errors import BadOption, NotEnoughText, SourceNotFound, suggest_file
from prunelit.runtime.messages import log_on_rank_zero
from prunelit.runtime.progress import track_progress

_ENDINGS = ", ".join((*TABLE_FORMATS, *DOCUMENT_FORMATS))
_notified: set[str] = set()


def check_text_source(source: str) -> None:
    """Check a text source without reading it, before a model is loaded.

    Args:
        source: a text source; hub ids are not looked up.

    Raises:
        SourceNotFound: the file does not exist or has an unknown ending, or the built-in text is unknown.
        BadOption: an option of the source is unknown, or means nothing for such a source.

    Example:
        >>> check_text_source("builtin:python-docs")
        >>> check_text_source("./missing.txt")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        prunelit.runtime.errors.SourceNotFound: text './missing.txt': no such file; expected ...
    """
    if source == BUILTIN_TEXT:
        return
    if source.startswith("builtin:"):
        raise SourceNotFound(f"text {source!r}: expected {BUILTIN_TEXT!r}, the only built-in text")
    name, _ = parse_source(source)
    path = Path(name).expanduser()
    check_source_options(source)
    if path.is_dir():
        if not is_saved_dataset(path) and not list_text_files(path):
            raise SourceNotFound(f"text {source!r}: expected files ending in {_ENDINGS}, got a folder without")
    elif path.is_file():
        if get_ending(path) not in (*TABLE_FORMATS, *DOCUMENT_FORMATS):
            raise SourceNotFound(f"text {source!r}: expected a file ending in {_ENDINGS} (or these + .gz, .zst)")
    elif _looks_like_path(name):
        raise SourceNotFound(
            f"text {source!r}: no such file; expected {_ENDINGS}, a folder, {BUILTIN_TEXT!r} or a hub id"
            f"{suggest_file(name)}"
        )


def open_text_rows(source: str) -> TextRows:
    """Open a text source as rows; only what is asked for is read.

    Args:
        source: a text source.

    Raises:
        SourceNotFound: the source is missing, unreadable, or has no column of text.
        NotEnoughText: the source has no rows.

    Example:
        >>> len(open_text_rows("builtin:python-docs")) > 50
        True
    """
    check_text_source(source)
    if source == BUILTIN_TEXT:
        return BuiltinRows()
    documents = list_documents(source)
    return DocumentRows(source, documents) if documents else TableRows(source)


def read_source_text(source: str, tokenizer: Any = None) -> str:
    """Read the whole text of a source and join its rows.

    Args:
        source: a text source.
        tokenizer: writes chats; None: they are written under plain headings.

    Raises:
        SourceNotFound: the source is missing, unreadable, or has no column of text.
        NotEnoughText: the source has no text.

    Example: see `tests/data/test_text.py`.
    """
    rows = open_text_rows(source)
    text = "".join(rows.iterate_texts(tokenizer))
    if not text.strip():
        raise NotEnoughText(f"text {source!r}: expected text, got {len(rows)} empty rows")
    return text


def _tokenise_rows(rows: TextRows, tokenizer: Any, most_tokens: int | None) -> Tensor:
    """Tokenise rows as one text, or its beginning of at least `most_tokens` tokens."""
    pieces, count = [], 0
    for ids in _iterate_ids(rows, tokenizer):
        pieces.append(torch.tensor(ids, dtype=torch.long))
        count += len(ids)
        if most_tokens is not None and count >= most_tokens:
            break
    _check_has_text(rows)
    return torch.cat(pieces)


def _iterate_ids(rows: TextRows, tokenizer: Any) -> Iterator[list[int]]:
    _notify_of_builtin(rows.source)
    return track_progress(rows.iterate_ids(tokenizer), f"tokenising {rows.source}", unit="piece")


def _check_has_text(rows: TextRows) -> None:
    """Check that rows which were read held text, and say which were left out."""
    warn_of_skipped(f"text {rows.source!r}", rows.skipped, stacklevel=4)
    if not rows.has_text:
        raise NotEnoughText(f"text {rows.source!r}: expected text, got {len(rows)} empty rows")


def shuffle_source(source: str, tokenizer: Any, seqlen: int, count: int | None, seed: int) -> StoredWindows:
    """Cut a source into windows in random order, for training; memory does not depend on the size of the source.

    A text of more than `MOST_IN_MEMORY` tokens is tokenised into a file. Where rows of a large source suffice for
    `count` windows, only rows that are drawn are read, as in `draw_windows`.

    Args:
        source: a text source.
        tokenizer: a transformers tokenizer.
        seqlen: tokens per window.
        count: number of windows that will be taken, from the front; None: all.
        seed: of the order.

    Returns:
        At least `count` windows, or all of the source.

    Raises:
        SourceNotFound, NotEnoughText: as for `draw_windows`.
        OutputNotWritable: the disk has no room for the file.

    Example: see `prunelit.recovery.datamodule`, which uses it.
    """
    rows = open_text_rows(source)
    drawn = None if count is None else _draw_from_rows(rows, tokenizer, seqlen, count, seed)
    if drawn is not None:
        return StoredWindows([drawn])
    if count is None and rows.has_rows and rows.measure_total() > WHOLE_BYTES:
        log_on_rank_zero(f"text {source!r}: all of it is tokenised; with data.train_windows only as much as is needed")
    ids = store_token_ids(_iterate_ids(rows, tokenizer), get_cache_folder)
    _check_has_text(rows)
    windows = StoredWindows([_view_as_windows(ids, seqlen, source)])
    return windows.select(torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed)))


def _notify_of_builtin(source: str) -> None:
    """Say once what the built-in text is: it is the default, and nobody chose it."""
    if source == BUILTIN_TEXT and source not in _notified:
        _notified.add(source)
        log_on_rank_zero(
            f"text {BUILTIN_TEXT!r}: Python's documentation, which is on every machine and fits nobody's model; name a "
            "text like what your model reads and writes"
        )


def draw_windows(
    sources: str | Sequence[str] | TextRows,
    tokenizer: Any,
    seqlen: int,
    count: int | None = None,
    seed: int | None = None,
    stride: int | None = None,
) -> Tensor:
    """Draw windows of token ids from one or several sources, mixed evenly.

    Args:
        sources: one or more text sources, or the rows of a text.
        tokenizer: a transformers tokenizer.
        seqlen: tokens per window.
        count: number of windows over all sources; None: all windows. A source with fewer windows causes a warning.
        seed: draw windows at random with this seed and keep them in text order; None: take the first ones. From large
            sources rows are drawn, see `prunelit.data.rows.row_windows`.
        stride: tokens from the start of one window to the start of the next; None: `seqlen`, without overlap.

    Returns:
        [N, seqlen] int64, the windows of one source after those of the other.

    Raises:
        BadOption: there is no source, `seqlen` is below 2, `count` is below the number of sources, or a stride is
            outside 1 .. seqlen or given for several sources.
        NotEnoughText: a source is shorter than one window.

    Example:
        >>> def tokenizer(text, verbose):
        ...     return {"input_ids": list(text.encode()[:20])}
        >>> draw_windows("builtin:python-docs", tokenizer, seqlen=8).shape
        torch.Size([2, 8])
    """
    names: list[str | TextRows] = [sources] if isinstance(sources, str | TextRows) else list(sources)
    if not names:
        raise BadOption(f"text: expected at least one source, got none; the built-in one is {BUILTIN_TEXT!r}")
    if seqlen < 2 or (count is not None and count < len(names)):
        raise BadOption(
            f"text: expected seqlen >= 2 and at least one window per text, got seqlen {seqlen}, windows {count}"
        )
    check_stride(stride, seqlen, names)
    windows = []
    for number, source in enumerate(names):
        share = None if count is None else count // len(names) + (number < count % len(names))
        source_windows = _draw_source_windows(
            source, tokenizer, seqlen, share, None if seed is None else seed + number, stride
        )
        if share is not None and len(source_windows) < share:
            name = source if isinstance(source, str) else source.source
            warnings.warn(
                f"text {name!r}: {share} windows of {seqlen} tokens asked for, it has {len(source_windows)}",
                stacklevel=2,
            )
        windows.append(source_windows)
    return torch.cat(windows)


def _draw_source_windows(
    source: str | TextRows, tokenizer: Any, seqlen: int, count: int | None, seed: int | None, stride: int | None
) -> Tensor:
    """`draw_windows` of one source."""
    rows = open_text_rows(source) if isinstance(source, str) else source
    source = rows.source
    if count is not None and seed is not None and stride is None:
        drawn = _draw_from_rows(rows, tokenizer, seqlen, count, seed)
        if drawn is not None:
            return drawn
    # The first windows need the beginning of the text alone.
    most_tokens = seqlen + (count - 1) * (stride or seqlen) if count is not None and seed is None else None
    windows = cut_into_windows(_tokenise_rows(rows, tokenizer, most_tokens), seqlen, source, stride)
    if seed is not None and count is not None:
        generator = torch.Generator().manual_seed(seed)
        windows = windows[torch.randperm(len(windows), generator=generator)[:count].sort().values]
    return windows[:count]


def _draw_from_rows(rows: TextRows, tokenizer: Any, seqlen: int, count: int, seed: int) -> Tensor | None:
    """Draw windows from some rows of a large source.

    Returns:
        `count` windows; None where all of the text is needed: it is small, or the rests of its rows count too.
    """
    if not is_drawn_by_rows(rows, seqlen, count):
        return None
    windows = draw_row_windows(rows, tokenizer, seqlen, count, seed)
    if len(windows) < count:
        return None
    warn_of_skipped(f"text {rows.source!r}", rows.skipped, stacklevel=4)
    return windows


def check_stride(stride: int | None, seqlen: int, sources: Sequence[object]) -> None:
    """Check the stride of overlapping windows.

    Args:
        stride: tokens from one window to the next; None: no overlap.
        seqlen: tokens per window.
        sources: text sources.

    Raises:
        BadOption: the stride is outside 1 .. seqlen, or there are several sources. Perplexity with a stride counts all
            tokens of the first window, and several sources have several first windows.

    Example: see `prunelit.evaluation.perplexities`, which uses it.
    """
    if stride is not None and (not 1 <= stride <= seqlen or len(sources) > 1):
        raise BadOption(
            f"stride: expected 1 to {seqlen} (the sequence length) and one text source, got {stride} and "
            f"{len(sources)} sources; measure texts under names of their own"
        )


def cut_into_windows(ids: Tensor, seqlen: int, source: str, stride: int | None = None) -> Tensor:
    """Cut token ids into windows; the remainder is dropped.

    Args:
        ids: [tokens] token ids.
        seqlen: tokens per window.
        source: name of the text, for the error message.
        stride: tokens from the start of one window to the start of the next; None: `seqlen`, without overlap.

    Returns:
        [N, seqlen].

    Raises:
        NotEnoughText: there are fewer tokens than one window has.

    Example:
        >>> cut_into_windows(torch.arange(7), 3, "numbers")
        tensor([[0, 1, 2],
                [3, 4, 5]])
    """
    return _view_as_windows(ids, seqlen, source, stride).contiguous()


def _view_as_windows(ids: Tensor, seqlen: int, source: str, stride: int | None = None) -> Tensor:
    """`cut_into_windows`, as a view of the ids."""
    if len(ids) < seqlen:
        raise NotEnoughText(
            f"text {source!r}: expected at least one window of {seqlen} tokens, got {len(ids)} tokens; "
            "take a longer text or a smaller seqlen"
        )
    return ids.unfold(0, seqlen, stride or seqlen)


def _looks_like_path(name: str) -> bool:
    endings = (*TABLE_FORMATS, *DOCUMENT_FORMATS)
    return name.startswith((".", "/", "~")) or get_ending(Path(name)) in endings or name.count("/") > 1
