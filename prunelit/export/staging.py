"""Targets that appear whole or not at all: written at the side, proved there, then moved into place.

The old content of a target stays where it is until then. What a process that was killed left at the side is removed by
the next one that writes to the same target. A folder is replaced only if prunelit wrote it.
"""

import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from prunelit.export.ours import is_ours
from prunelit.runtime.errors import OutputNotWritable
from prunelit.runtime.torch_files import abandoned, beside

_OLD = ".old"


def check_output(
    target: str | os.PathLike[str], overwrite: bool = False, file: bool = False, reads: Collection[str] = ()
) -> None:
    """Create the parents of an output that is written anew and check that it can be, before any work is done.

    Args:
        target: a folder, or a file.
        overwrite: it may be there already: a file, or a folder that prunelit wrote (`ours.is_ours`).
        file: it is a file.
        reads: sources that are read for it; those that are no path of this machine do not matter.

    Raises:
        OutputNotWritable: a file is in the way of a folder or the other way round; something is there, and `overwrite`
            is off, or it is not prunelit's, or holds the working directory or one of `reads`; or writing is refused.
    """
    path = Path(target)
    with _in_one_line(path):
        _check_kind(path, file)
        if path.exists() if file else path.is_dir() and any(path.iterdir()):
            _check_replaceable(path, overwrite, file, reads)
        _try(path)


def check_folder(target: str | os.PathLike[str]) -> None:
    """`check_output` for a folder that files are added to: what else is there stays.

    Raises:
        OutputNotWritable: a file is in its way, or writing is refused.
    """
    path = Path(target)
    with _in_one_line(path):
        _check_kind(path, file=False)
        _try(path)


def _check_kind(path: Path, file: bool) -> None:
    _tidy(path.resolve())
    if path.exists() and path.is_dir() == file:
        wanted, other = ("file", "folder") if file else ("folder", "file")
        raise OutputNotWritable(f"output {str(path)!r}: expected a {wanted}, got a {other}; choose another path")


def _check_replaceable(path: Path, overwrite: bool, file: bool, reads: Collection[str]) -> None:
    name, whole = f"output {str(path)!r}", path.resolve()
    held = {"the working directory": Path.cwd()}
    held |= {f"{source!r}, which is read": Path(source).expanduser() for source in reads}
    for what, place in held.items():
        if os.path.exists(place) and place.resolve().is_relative_to(whole):
            raise OutputNotWritable(f"{name}: expected a place of its own, got that of {what}; choose another path")
    ours = file or is_ours(path)
    if not overwrite:
        expected = "a new file" if file else "a new or empty folder"
        instead = " or pass --overwrite true" if ours else "; --overwrite true replaces only what prunelit wrote"
        raise OutputNotWritable(f"{name}: expected {expected}; choose another path{instead}")
    if not ours:
        raise OutputNotWritable(
            f"{name}: expected an empty folder or one that prunelit wrote, got one without proof.json; choose another "
            "path, or remove it yourself"
        )


def _try(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path if path.is_dir() else path.parent):
        pass


@contextmanager
def _in_one_line(path: Path) -> Iterator[None]:
    """What the system refuses, said of an output."""
    try:
        yield
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
        target: an absolute path; what is there is replaced: `check_output` comes first.
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
