"""Rows of tables: files, folders and hub datasets that `datasets` reads."""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prunelit.data.rows.json_depth import check_structure
from prunelit.data.rows.source_options import parse_source
from prunelit.data.rows.unpack import check_is_text, is_packed, unpack_file
from prunelit.data.sources import check_hub_access
from prunelit.runtime.errors import BadOption, SourceNotFound, describe_error, suggest_name
from prunelit.runtime.progress import show_stage

TABLE_FORMATS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv"}
"""Endings of files with rows, and the builders of `datasets` that read them."""
DOCUMENT_FORMATS = (".txt", ".md")
"""Endings of files that are one document each."""
_SPLITS = {"train": {"train", "training"}, "test": {"test"}, "validation": {"validation"}}
"""Splits, and the words in names of files and folders that say them."""
_SAVED = ("dataset_info.json", "dataset_dict.json")
"""Files by which a folder of `Dataset.save_to_disk` or `DatasetDict.save_to_disk` is known."""


def get_ending(path: Path) -> str:
    """Return the ending of a file's name in small letters, without that of a packer.

    Example:
        >>> get_ending(Path("rows.JSONL.gz")), get_ending(Path("pages.zst"))
        ('.jsonl', '')
    """
    return Path(path.stem).suffix.lower() if is_packed(path) else path.suffix.lower()


def list_text_files(folder: Path) -> list[Path]:
    """List the files of a folder that are read as its text, in the order of their names.

    Args:
        folder: searched with the folders in it; hidden files are left out.

    Returns:
        Its tables; where it has none, its documents. A README beside tables describes them.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> for name in ("b.txt", "a.md", "c.py"):
        ...     _ = (folder / name).write_text("text")
        >>> [path.name for path in list_text_files(folder)]
        ['a.md', 'b.txt']
    """
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    tables = [path for path in files if get_ending(path) in TABLE_FORMATS]
    return tables or [path for path in files if get_ending(path) in DOCUMENT_FORMATS]


def list_documents(source: str) -> list[Path]:
    """List the files of a source that are one document each; none where it is a table, or no file or folder.

    Example:
        >>> list_documents("owner/name")
        []
    """
    path = Path(parse_source(source)[0]).expanduser()
    files = [path] if path.is_file() else []
    if path.is_dir() and not is_saved_dataset(path):
        files = list_text_files(path)
    return [file for file in files if get_ending(file) in DOCUMENT_FORMATS]


def is_saved_dataset(folder: Path) -> bool:
    """Whether a folder was written by `save_to_disk` of `datasets`.

    Example:
        >>> is_saved_dataset(Path("/no/such/folder"))
        False
    """
    return any((folder / name).is_file() for name in _SAVED)


def check_source_options(source: str, what: str = "text") -> None:
    """Check that a source's options can mean something: files have no splits, and documents no columns.

    Args:
        source: a text source other than the built-in text.
        what: name of the kind of source in error messages.

    Raises:
        BadOption: an option asks for what such a source cannot have.

    Example:
        >>> check_source_options("owner/name#split=test")
    """
    name, options = parse_source(source)
    documents = list_documents(source)
    if (documents or Path(name).expanduser().is_file()) and options.split not in (None, "train"):
        kind = "documents have" if documents else "a file has"
        raise BadOption(f"{what} {source!r}: split: expected none, since {kind} no splits, got {options.split!r}")
    if documents and options.column is not None:
        raise BadOption(
            f"{what} {source!r}: column: expected none, since documents have no columns, got {options.column!r}"
        )


def read_dataset(source: str, what: str = "text") -> Any:
    """Read a file, a folder or a hub dataset as a `datasets.Dataset`.

    Args:
        source: a text source other than the built-in text.
        what: name of the kind of source in error messages.

    Raises:
        SourceNotFound: the source is missing or unreadable.
        BadOption: an option of the source is none, or it has no such split.

    Example: see `prunelit.data.instructions`, which uses it.
    """
    name, options = parse_source(source)
    path = Path(name).expanduser()
    check_source_options(source, what)
    if path.is_file():
        return _read_tables([path], source, what)
    if path.is_dir() and is_saved_dataset(path):
        return _read_saved(path, options.split, source, what)
    if path.is_dir():
        return _read_folder(path, options.split, source, what)
    repository, _, rest = name.partition(":")
    config, _, split = rest.partition(":")
    check_hub_access(repository, what, "a .parquet, .json, .jsonl or .txt file")
    with _explain_refusal(source, what) as datasets:
        return datasets.load_dataset(repository, config or None, split=options.split or split or "train")


def _read_tables(paths: Sequence[Path], source: str, what: str) -> Any:
    """Read files of one format as one dataset."""
    endings = {get_ending(path) for path in paths}
    builders = {TABLE_FORMATS.get(ending, "text") for ending in endings}
    if len(builders) > 1 or (len(endings) > 1 and ".tsv" in endings):
        raise SourceNotFound(f"{what} {source!r}: expected files of one format, got {', '.join(sorted(endings))}")
    (builder,) = builders
    options: dict[str, Any] = {"sample_by": "document"} if builder == "text" else {}
    if endings == {".tsv"}:
        options["sep"] = "\t"
    if builder != "parquet":
        for path in paths:
            check_is_text(path, source)
    files = [unpack_file(path, source) for path in paths]
    if builder != "parquet":
        for file in files:
            check_structure(file, source, is_json=builder == "json")
    with _explain_refusal(source, what) as datasets:
        return datasets.load_dataset(builder, data_files={"train": list(map(str, files))}, split="train", **options)


def _read_folder(folder: Path, split: str | None, source: str, what: str) -> Any:
    """Read the tables of a folder; where their names or places say a split, those of one split."""
    files = list_text_files(folder)
    names = {path: "/".join(path.relative_to(folder).parts).lower() for path in files}
    words = {path: set(re.split("[^a-z]+", name)) for path, name in names.items()}  # of `latest.jsonl`, not `test`
    splits = {name for name, others in _SPLITS.items() if any(others & each for each in words.values())}
    if splits:
        split_name = split or "train"
        if split_name not in splits:
            raise BadOption(f"{what} {source!r}: split: expected {' or '.join(sorted(splits))}, got {split_name!r}")
        files = [path for path in files if _SPLITS[split_name] & words[path]]
    elif split not in (None, "train"):
        raise BadOption(f"{what} {source!r}: split: expected none, since no file's name says one, got {split!r}")
    return _read_tables(files, source, what)


def _read_saved(folder: Path, split: str | None, source: str, what: str) -> Any:
    """Read a folder of `save_to_disk`."""
    with _explain_refusal(source, what) as datasets:
        content = datasets.load_from_disk(str(folder))
    if not isinstance(content, datasets.DatasetDict):
        if split not in (None, "train"):
            raise BadOption(f"{what} {source!r}: split: expected none, since the folder holds no splits, got {split!r}")
        return content
    split_name = split or "train"
    if split_name not in content:
        raise BadOption(
            f"{what} {source!r}: split: expected {' or '.join(content)}, got {split_name!r}"
            f"{suggest_name(split_name, content) or '; append #split=NAME'}"
        )
    return content[split_name]


def iterate_rows(dataset: Iterable[Mapping[str, Any]], source: str, what: str = "text") -> Iterator[Mapping[str, Any]]:
    """Iterate over the rows of a dataset.

    Args:
        dataset: a `datasets.Dataset`, or rows of it that are read one by one.
        source: name of the source, for the error message.
        what: kind of the source, for the error message.

    Raises:
        SourceNotFound: a row is no UTF-8: the readers of tables do not look at that.

    Example: see `prunelit.data.instructions`, which uses it.
    """
    try:
        yield from dataset
    except UnicodeDecodeError as error:
        raise SourceNotFound(f"{what} {source!r}: cannot be read: expected UTF-8 text, got {error.reason}") from error


@contextmanager
def _explain_refusal(source: str, what: str) -> Iterator[Any]:
    """Provide the module `datasets`, quiet, and turn its errors into one line."""
    with show_stage(f"reading {source}"), silence_datasets():
        import datasets

        try:
            yield datasets
        except (
            OSError,
            ValueError,
            KeyError,
            StopIteration,
            RecursionError,
            datasets.exceptions.DatasetsError,
        ) as error:
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
