"""Draw windows of token ids from text sources, for calibration, training and evaluation alike.

A source is one of
    builtin:python-docs                          documentation topics of the standard library, part of every Python
    path to .parquet, .json, .jsonl or .txt      or gzipped; column `text` or `sentence`; a .txt file is one document
    hub id, hub_id:config, hub_id:config:split   a Hugging Face dataset; split "train" unless given

Protocol, as in the papers: rows of a column `text` are joined by two newlines, rows of a column `sentence` (Penn
Treebank: one sentence a row) by a space. The whole text is tokenised once and cut into windows without overlap; the
remainder is dropped.

Legend: N windows.
"""

import logging
import pydoc_data.topics
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunelit.data.sources import check_hub_access
from prunelit.runtime.errors import BadOption, NotEnoughText, SourceNotFound, suggest_file
from prunelit.runtime.progress import show_stage

BUILTIN_TEXT = "builtin:python-docs"
_JOINED_BY = {"text": "\n\n", "sentence": " "}
_FORMATS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".txt": "text"}


def check_text_source(source: str) -> None:
    """Check a text source without reading it, before a model is loaded.

    Args:
        source: a text source; hub ids are not looked up.

    Raises:
        SourceNotFound: the file does not exist or has an unknown ending, or the built-in text is unknown.

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
    path = Path(source).expanduser()
    if path.is_dir():
        raise SourceNotFound(f"text {source!r}: expected a file, got a folder; name one of its files")
    if path.is_file():
        if _get_suffix(path) not in _FORMATS:
            raise SourceNotFound(f"text {source!r}: expected a file ending in {', '.join(_FORMATS)} (or these + .gz)")
    elif _looks_like_path(source):
        raise SourceNotFound(
            f"text {source!r}: no such file; expected {', '.join(_FORMATS)}, {BUILTIN_TEXT!r} or a hub id"
            f"{suggest_file(source)}"
        )


def read_source_text(source: str) -> str:
    """Read the whole text of a source and join its rows.

    Args:
        source: a text source.

    Raises:
        SourceNotFound: the source is missing, unreadable, or has no column of text.
        NotEnoughText: the source has no text.

    Example: see `tests/data/test_text.py`.
    """
    check_text_source(source)
    if source == BUILTIN_TEXT:
        topics = pydoc_data.topics.topics
        column, rows = "text", [topics[name] for name in sorted(topics)]
    else:
        column, rows = _read_rows(source)
    invalid_row = next((row for row in rows if row is not None and not isinstance(row, str)), None)
    if invalid_row is not None:
        got = f"a {type(invalid_row).__name__}: {invalid_row!r:.40}"
        raise SourceNotFound(f"text {source!r}: expected rows of text, got {got}")
    text = _JOINED_BY[column].join(row or "" for row in rows)
    if not text.strip():
        raise NotEnoughText(f"text {source!r}: expected text, got {len(rows)} empty rows")
    return text


def tokenise_source(source: str, tokenizer: Any) -> Tensor:
    """Tokenise a whole source as one text.

    Args:
        source: a text source.
        tokenizer: a transformers tokenizer.

    Returns:
        [tokens] int64, with the special tokens that the tokenizer adds to one text.

    Raises:
        SourceNotFound, NotEnoughText: as for `read_source_text`.

    Example: see `tests/data/test_text.py`.
    """
    content = read_source_text(source)
    with show_stage(f"tokenising {source}"):
        return torch.tensor(tokenizer(content, verbose=False)["input_ids"], dtype=torch.long)


def draw_windows(
    sources: str | Sequence[str],
    tokenizer: Any,
    seqlen: int,
    count: int | None = None,
    seed: int | None = None,
    stride: int | None = None,
) -> Tensor:
    """Draw windows of token ids from one or several sources, mixed evenly.

    Args:
        sources: one or more text sources.
        tokenizer: a transformers tokenizer.
        seqlen: tokens per window.
        count: number of windows over all sources; None: all windows. A source with fewer windows causes a warning.
        seed: draw windows at random with this seed and keep them in text order; None: take the first ones.
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
    names = [sources] if isinstance(sources, str) else list(sources)
    if not names:
        raise BadOption(f"text: expected at least one source, got none; the built-in one is {BUILTIN_TEXT!r}")
    if seqlen < 2 or (count is not None and count < len(names)):
        raise BadOption(
            f"text: expected seqlen >= 2 and at least one window per text, got seqlen {seqlen}, windows {count}"
        )
    check_stride(stride, seqlen, names)
    windows = []
    for number, source in enumerate(names):
        source_windows = cut_into_windows(tokenise_source(source, tokenizer), seqlen, source, stride)
        if count is not None:
            share = count // len(names) + (number < count % len(names))
            if len(source_windows) < share:
                warnings.warn(
                    f"text {source!r}: {share} windows of {seqlen} tokens asked for, it has {len(source_windows)}",
                    stacklevel=2,
                )
            if seed is None:
                source_windows = source_windows[:share]
            else:
                generator = torch.Generator().manual_seed(seed + number)
                source_windows = source_windows[
                    torch.randperm(len(source_windows), generator=generator)[:share].sort().values
                ]
        windows.append(source_windows)
    return torch.cat(windows)


def check_stride(stride: int | None, seqlen: int, sources: Sequence[str]) -> None:
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
    if len(ids) < seqlen:
        raise NotEnoughText(
            f"text {source!r}: expected at least one window of {seqlen} tokens, got {len(ids)} tokens; "
            "take a longer text or a smaller seqlen"
        )
    return ids.unfold(0, seqlen, stride or seqlen).contiguous()


def _looks_like_path(source: str) -> bool:
    return source.startswith((".", "/", "~")) or _get_suffix(Path(source)) in _FORMATS or source.count("/") > 1


def _get_suffix(path: Path) -> str:
    return Path(path.stem).suffix.lower() if path.suffix.lower() == ".gz" else path.suffix.lower()


def read_dataset(source: str, what: str = "text") -> Any:
    """Read a file or a hub dataset as a `datasets.Dataset`.

    Args:
        source: a text source other than the built-in text.
        what: name of the kind of source in error messages.

    Raises:
        SourceNotFound: the source is missing or unreadable.

    Example: see `prunelit.data.instructions`, which uses it.
    """
    path = Path(source).expanduser()
    with show_stage(f"reading {source}"), silence_datasets():
        import datasets

        try:
            if path.is_file():
                builder = _FORMATS[_get_suffix(path)]
                options = {"sample_by": "document"} if builder == "text" else {}
                return datasets.load_dataset(builder, data_files={"train": str(path)}, split="train", **options)
            name, _, rest = source.partition(":")
            config, _, split = rest.partition(":")
            check_hub_access(name, what, "a .parquet, .json, .jsonl or .txt file")
            return datasets.load_dataset(name, config or None, split=split or "train")
        except (OSError, ValueError, StopIteration, datasets.exceptions.DatasetsError) as error:
            cause = error.__cause__ or error
            raise SourceNotFound(f"{what} {source!r}: cannot be read: {describe_error(cause)}") from error


@contextmanager
def silence_datasets() -> Iterator[None]:
    """Silence the progress bars and the log of `datasets`; callers report errors in one line of their own.

    Example: see `prunelit.evaluation.zero_shot`, which uses it.
    """
    import datasets

    log, had_bars = logging.getLogger("datasets"), datasets.is_progress_bar_enabled()
    level = log.level
    log.setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        log.setLevel(level)
        if had_bars:
            datasets.enable_progress_bars()


def _read_rows(source: str) -> tuple[str, list[Any]]:
    """Read the text column of a dataset: its name and its rows."""
    dataset = read_dataset(source)
    column = next((name for name in _JOINED_BY if name in dataset.column_names), None)
    if column is None:
        raise SourceNotFound(
            f"text {source!r}: expected a column {' or '.join(_JOINED_BY)}, got {dataset.column_names}"
        )
    return column, list(dataset[column])


def describe_error(error: BaseException) -> str:
    """Describe an error by its type and the first line of its message.

    Example:
        >>> describe_error(ValueError("bad row\\nin file 3"))
        'ValueError: bad row'
    """
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
