"""Targets that appear whole or not at all: written at the side, proved there, then moved into place.

The old content of a target stays where it is until then. What a process that was killed left at the side is removed by
the next one that writes to the same target.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prunelit.errors import OutputNotWritable
from prunelit.whole import abandoned, beside

_OLD = ".old"


def check_output(target: str | os.PathLike[str], overwrite: bool = False, file: bool = False) -> None:
    """Create the parents of an output and check that it can be written, before any work is done.

    Args:
        target: a folder, or a file.
        overwrite: it may be there already.
        file: it is a file.

    Raises:
        OutputNotWritable: a file is in the way of a folder or the other way round, something is there and `overwrite`
            is off, or writing is refused.
    """
    path, wanted, other = Path(target), *(("file", "folder") if file else ("folder", "file"))
    try:
        _tidy(path.resolve())
        if path.exists() and path.is_dir() == file:
            raise OutputNotWritable(f"output {str(path)!r}: expected a {wanted}, got a {other}; choose another path")
        if (path.exists() if file else path.is_dir() and any(path.iterdir())) and not overwrite:
            expected = "a new file" if file else "a new or empty folder"
            raise OutputNotWritable(
                f"output {str(path)!r}: expected {expected}; choose another path or pass --overwrite true"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path if path.is_dir() else path.parent):
            pass
    except (FileExistsError, NotADirectoryError) as error:
        above = next((str(folder) for folder in path.parents if folder.is_file()), str(error.filename))
        raise OutputNotWritable(
            f"output {str(path)!r}: can not be written: {above!r} is a file, not a folder; choose another path"
        ) from error
    except OSError as error:
        raise OutputNotWritable(f"output {str(path)!r}: can not be written: {error.strerror or error}") from error


@contextmanager
def staged(target: Path, file: bool = False) -> Iterator[Path]:
    """A new folder at the side of `target`, moved into place when the block ends, removed when it raises.

    Args:
        target: an absolute path; what is there is replaced.
        file: it is a file; then all files of the folder are moved beside it.

    Raises:
        OutputNotWritable: the folder can not be made or moved.
    """
    staging = beside(target)
    try:
        try:
            _tidy(target)
            staging.mkdir()
        except OSError as error:
            raise OutputNotWritable(f"output {str(target)!r}: can not be written: {error.strerror or error}") from error
        yield staging
        try:
            if file:
                for made in sorted(staging.iterdir(), key=lambda made: made.name != target.name):
                    os.replace(made, target.with_name(made.name))
            else:
                _exchange(staging, target)
        except OSError as error:
            raise OutputNotWritable(
                f"output {str(target)!r}: can not be replaced: {error.strerror or error}"
            ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _exchange(staging: Path, target: Path) -> None:
    old = beside(target, _OLD)
    if target.exists():
        os.replace(target, old)
    try:
        os.replace(staging, target)
    except OSError:
        if old.exists():
            os.replace(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _tidy(target: Path) -> None:
    """Remove what processes that have ended left beside a target; put its old content back if it is nowhere else."""
    if not target.parent.is_dir():
        return
    for left in abandoned(target, _OLD):
        if target.exists():
            shutil.rmtree(left, ignore_errors=True)
        else:
            os.replace(left, target)
    for left in abandoned(target):
        shutil.rmtree(left, ignore_errors=True)
