"""Text sources -> windows of token ids. What calibration, training and evaluation all read.

A source is one of
    builtin:python-docs                          documentation topics of the standard library, ships with every Python
    path to .parquet, .json, .jsonl or .txt      gzipped too; column `text` or `sentence`; a .txt file is one document
    hub id, hub_id:config, hub_id:config:split   a Hugging Face dataset; split "train" unless given

Protocol, that of the papers: rows of a column `text` joined by two newlines, of a column `sentence` (Penn Treebank: one
sentence a row) by a space; tokenised once, windows without overlap, remainder dropped.
"""

import hashlib
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
    """Check what can be checked without reading: raise before a model is loaded.

    Raises:
        SourceNotFound: a file that does not exist, an unknown ending, or an unknown built-in.
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
    """The whole text of a source, rows joined as their column's name asks for.

    Raises:
        SourceNotFound: missing, unreadable, or without a column of text.
        NotEnoughText: no text in it.
    """
    check_text_source(source)
    if source == BUILTIN_TEXT:
        topics = pydoc_data.topics.topics
        column, rows = "text", [topics[name] for name in sorted(topics)]
    else:
        column, rows = _read_rows(source)
    wrong = next((row for row in rows if row is not None and not isinstance(row, str)), None)
    if wrong is not None:
        raise SourceNotFound(f"text {source!r}: expected rows of text, got a {type(wrong).__name__}: {wrong!r:.40}")
    text = _JOINED_BY[column].join(row or "" for row in rows)
    if not text.strip():
        raise NotEnoughText(f"text {source!r}: expected text, got {len(rows)} empty rows")
    return text


def tokenise_source(source: str, tokenizer: Any) -> Tensor:
    """Token ids of a whole source [tokens], with the special tokens the tokenizer adds to one text.

    Raises:
        SourceNotFound, NotEnoughText: as `read_source_text`.
    """
    words = read_source_text(source)
    with show_stage(f"tokenising {source}"):
        return torch.tensor(tokenizer(words, verbose=False)["input_ids"], dtype=torch.long)


def draw_windows(
    sources: str | Sequence[str],
    tokenizer: Any,
    seqlen: int,
    count: int | None = None,
    seed: int | None = None,
    stride: int | None = None,
) -> Tensor:
    """Windows of token ids from one or several sources, mixed evenly.

    Args:
        sources: one or more text sources.
        tokenizer: a transformers tokenizer.
        seqlen: tokens per window.
        count: windows in all; None for all there are. Fewer than asked for is a warning, none is an error.
        seed: draw windows at random (in text order); None takes the first ones.
        stride: tokens from the start of one window to the next; None: `seqlen`, they do not overlap.

    Returns:
        [N, seqlen] int64, the windows of the sources one after the other.

    Raises:
        BadOption: no source, or `seqlen` < 2, or `count` < 1, or a stride outside 1 .. seqlen or over several sources.
        NotEnoughText: a source is shorter than one window.
    """
    names = [sources] if isinstance(sources, str) else list(sources)
    if not names:
        raise BadOption(f"text: expected at least one source, got none; the built-in one is {BUILTIN_TEXT!r}")
    if seqlen < 2 or (count is not None and count < len(names)):
        raise BadOption(
            f"text: expected seqlen >= 2 and at least one window per text, got seqlen {seqlen}, windows {count}"
        )
    check_stride(stride, seqlen, names)
    parts = []
    for number, source in enumerate(names):
        found = cut_into_windows(tokenise_source(source, tokenizer), seqlen, source, stride)
        if count is not None:
            wanted = count // len(names) + (number < count % len(names))
            if len(found) < wanted:
                warnings.warn(
                    f"text {source!r}: {wanted} windows of {seqlen} tokens asked for, it has {len(found)}", stacklevel=2
                )
            if seed is None:
                found = found[:wanted]
            else:
                generator = torch.Generator().manual_seed(seed + number)
                found = found[torch.randperm(len(found), generator=generator)[:wanted].sort().values]
        parts.append(found)
    return torch.cat(parts)


def check_stride(stride: int | None, seqlen: int, sources: Sequence[str]) -> None:
    """Check the stride of windows that overlap.

    Raises:
        BadOption: it is outside 1 .. seqlen, or there are several sources, of which each has a first window.
    """
    if stride is not None and (not 1 <= stride <= seqlen or len(sources) > 1):
        raise BadOption(
            f"stride: expected 1 to {seqlen} (the sequence length) and one text source, got {stride} and "
            f"{len(sources)} sources; measure texts under names of their own"
        )


def cut_into_windows(ids: Tensor, seqlen: int, source: str, stride: int | None = None) -> Tensor:
    """Cut token ids [tokens] into windows [N, seqlen], one every `stride` tokens (None: `seqlen`, no overlap); the
    remainder is dropped.

    Raises:
        NotEnoughText: fewer tokens than one window.
    """
    if len(ids) < seqlen:
        raise NotEnoughText(
            f"text {source!r}: expected at least one window of {seqlen} tokens, got {len(ids)} tokens; "
            "take a longer text or a smaller seqlen"
        )
    return ids.unfold(0, seqlen, stride or seqlen).contiguous()


def fingerprint_token_ids(ids: Tensor) -> str:
    """Short hash of token ids."""
    return hashlib.sha256(ids.contiguous().numpy().tobytes()).hexdigest()[:16]


def _looks_like_path(source: str) -> bool:
    return source.startswith((".", "/", "~")) or _get_suffix(Path(source)) in _FORMATS or source.count("/") > 1


def _get_suffix(path: Path) -> str:
    return Path(path.stem).suffix.lower() if path.suffix.lower() == ".gz" else path.suffix.lower()


def read_dataset(source: str, what: str = "text") -> Any:
    """A file or hub dataset as a `datasets.Dataset`.

    Args:
        source: see above; not a built-in text.
        what: name of the source in errors.

    Raises:
        SourceNotFound: missing or unreadable.
    """
    path = Path(source).expanduser()
    with show_stage(f"reading {source}"), silence_datasets():
        import datasets

        try:
            if path.is_file():
                kind = _FORMATS[_get_suffix(path)]
                whole = {"sample_by": "document"} if kind == "text" else {}
                return datasets.load_dataset(kind, data_files={"train": str(path)}, split="train", **whole)
            name, _, rest = source.partition(":")
            config, _, split = rest.partition(":")
            check_hub_access(name, what, "a .parquet, .json, .jsonl or .txt file")
            return datasets.load_dataset(name, config or None, split=split or "train")
        except (OSError, ValueError, StopIteration, datasets.exceptions.DatasetsError) as error:
            cause = error.__cause__ or error
            raise SourceNotFound(f"{what} {source!r}: can not be read: {describe_error(cause)}") from error


@contextmanager
def silence_datasets() -> Iterator[None]:
    """Silence the bars and the log of `datasets`: what goes wrong is said in one line by whoever reads."""
    import datasets

    log, bars = logging.getLogger("datasets"), datasets.is_progress_bar_enabled()
    level = log.level
    log.setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        log.setLevel(level)
        if bars:
            datasets.enable_progress_bars()


def _read_rows(source: str) -> tuple[str, list[Any]]:
    """Name of the text column, and its rows."""
    data = read_dataset(source)
    column = next((name for name in _JOINED_BY if name in data.column_names), None)
    if column is None:
        raise SourceNotFound(f"text {source!r}: expected a column {' or '.join(_JOINED_BY)}, got {data.column_names}")
    return column, list(data[column])


def describe_error(error: BaseException) -> str:
    """Type and first line of an error."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
