"""Packed and plain files of strangers: opened as streams that stop where a file is no text or grows without end."""

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from prunelit.data.sources import get_cache_folder
from prunelit.runtime.atomic_files import replace_file
from prunelit.runtime.errors import OutputNotWritable, SourceNotFound, describe_error
from prunelit.runtime.fingerprints import compute_digest
from prunelit.runtime.progress import track_progress

PACKED_SUFFIXES = (".gz", ".zst")
GROWTH_LIMIT = 200
"""Bytes that one packed byte of text may become. Text shrinks to a third or a tenth, never to less than a hundredth."""
FREE_BYTES = 64 * 2**20
"""Bytes that are read before `GROWTH_LIMIT` is asked for: short files of one repeated line are harmless."""
_HEAD_BYTES = 2**16
_CHUNK_BYTES = 4 * 2**20


def is_packed(path: Path) -> bool:
    """Whether a file's name says that it is compressed.

    Example:
        >>> is_packed(Path("rows.jsonl.gz")), is_packed(Path("rows.jsonl"))
        (True, False)
    """
    return path.suffix.lower() in PACKED_SUFFIXES


@contextmanager
def open_bytes(path: Path, source: str) -> Iterator[BinaryIO]:
    """Open a file for reading, unpacked where it is packed.

    Args:
        path: the file.
        source: name of the source, for error messages.

    Raises:
        SourceNotFound: the file cannot be read, is damaged, or grows beyond `GROWTH_LIMIT`; from the body too.

    Example: see `prunelit.data.rows.text_rows`.
    """
    try:
        with open(path, "rb") as packed:
            stream: IO[bytes] = packed
            if path.suffix.lower() == ".gz":
                stream = cast(IO[bytes], gzip.GzipFile(fileobj=packed))
            elif is_packed(path):
                import pyarrow

                stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(packed, mode="r"), "zstd")
            yield cast(BinaryIO, io.BufferedReader(_GuardedStream(stream, packed, source), _HEAD_BYTES))
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise SourceNotFound(f"text {source!r}: cannot be read: {error.strerror}") from error


class _GuardedStream(io.RawIOBase):
    """An unpacked stream that ends with one line of error where it is damaged, or few packed bytes become too many."""

    def __init__(self, stream: IO[bytes], packed: IO[bytes], source: str):
        self.stream, self.packed, self.source, self.count = stream, packed, source, 0

    def readable(self) -> bool:
        """Whether it can be read, which `io.BufferedReader` asks."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read into a buffer, as `io.BufferedReader` wants it."""
        try:
            data = self.stream.read(len(buffer))
        except (OSError, EOFError, ValueError, zlib.error) as error:  # those of pyarrow are of these classes too
            raise SourceNotFound(f"text {self.source!r}: cannot be read: {describe_error(error)}") from error
        buffer[: len(data)] = data
        self.count += len(data)
        if self.stream is not self.packed and self.count > max(FREE_BYTES, GROWTH_LIMIT * self.packed.tell()):
            raise SourceNotFound(
                f"text {self.source!r}: expected packed text, got {self.packed.tell():,} bytes that grow to more than "
                f"{self.count:,}; unpack the file yourself if it is what you want to read"
            )
        return len(data)


def check_is_text(path: Path, source: str) -> None:
    """Check that a file begins like UTF-8 text.

    Args:
        path: the file, packed or not.
        source: name of the source, for the error message.

    Raises:
        SourceNotFound: the first bytes hold a NUL or are no UTF-8, or the file cannot be read or grows without end.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a.txt"
        >>> _ = path.write_bytes(b"a" + bytes(9))
        >>> check_is_text(path, "a.txt")
        Traceback (most recent call last):
        ...
        prunelit.runtime.errors.SourceNotFound: text 'a.txt': cannot be read: expected UTF-8 text, got a NUL at byte 1
    """
    with open_bytes(path, source) as stream:
        head = stream.read(_HEAD_BYTES)
        read_bytes = len(head)
        while is_packed(path) and read_bytes <= FREE_BYTES and (chunk := stream.read(_CHUNK_BYTES)):
            read_bytes += len(chunk)  # a file that grows without end is found before its text is worked on
    problem = f"a NUL at byte {head.index(0)}" if 0 in head else ""
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3 or len(head) < _HEAD_BYTES:  # a character may be cut by the end of the head
            problem = problem or f"{head[error.start : error.start + 1]!r} at byte {error.start}"
    if problem:
        raise SourceNotFound(f"text {source!r}: cannot be read: expected UTF-8 text, got {problem}")


def iterate_text_chunks(path: Path, source: str) -> Iterator[tuple[int, bytes]]:
    """Iterate over the bytes of a plain file of text, none of which is a NUL: readers of tables stumble over them late.

    Args:
        path: the file, not packed.
        source: name of the source, for the error message.

    Yields:
        Where a chunk begins, and the chunk.

    Raises:
        SourceNotFound: it holds a NUL, or cannot be read.

    Example: see `prunelit.data.rows.json_depth`, which uses it.
    """
    start = 0
    with open_bytes(path, source) as stream:
        for chunk in _read_chunks(stream):
            if (place := chunk.find(0)) >= 0:
                raise SourceNotFound(
                    f"text {source!r}: cannot be read: expected UTF-8 text, got a NUL at byte {start + place:,}"
                )
            yield start, chunk
            start += len(chunk)


def unpack_file(path: Path, source: str) -> Path:
    """Unpack a file into the cache folder, at the first call.

    Args:
        path: a packed file; one that is not packed is returned as it is.
        source: name of the source, for messages.

    Returns:
        A file whose name is that of `path` without the ending of the packer.

    Raises:
        SourceNotFound: see `open_bytes`; OutputNotWritable: the cache folder has no room.

    Example: see `tests/data/rows/test_unpack.py`.
    """
    if not is_packed(path):
        return path
    facts = path.stat()
    key = compute_digest(f"{path.resolve()} {facts.st_size} {facts.st_mtime_ns}")
    target = get_cache_folder() / "texts" / key / path.stem
    if target.is_file():
        return target

    def write(temporary: Path) -> None:
        with open_bytes(path, source) as stream, open(temporary, "wb") as file:
            for chunk in track_progress(_read_chunks(stream), f"unpacking {path.name}", unit="x 4 MiB"):
                file.write(chunk)

    try:
        replace_file(target, write)
    except OutputNotWritable as error:
        raise OutputNotWritable(f"text {source!r}: cannot be unpacked: {error}") from error
    return target


def _read_chunks(stream: BinaryIO) -> Iterator[bytes]:
    while chunk := stream.read(_CHUNK_BYTES):
        yield chunk
