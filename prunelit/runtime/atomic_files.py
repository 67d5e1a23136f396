"""Files and folders that are complete or absent: written beside their target, forced onto the disk, then moved there.

Every writer of the package goes through this module. What a killed process left beside a target is removed by the next
process that writes to the same target.
"""

import errno
import itertools
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from prunelit.runtime.errors import OutputNotWritable

_OLD = ".old"
_IS_THERE = (errno.ENOTEMPTY, errno.EEXIST)  # what systems say of a folder that is moved onto one with files
_SCRATCH_NUMBERS = itertools.count()


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside `path`, force it onto the disk, and move it into place.

    A reader sees the old file or the new one, also after a power failure.

    Args:
        path: target; its folder is made if it does not exist.
        write: writes the whole content to the path that it is given.

    Raises:
        OutputNotWritable: the system refuses; the old file is unchanged.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "notes.txt"
        ...     replace_file(path, lambda temporary: temporary.write_text("42"))
        ...     path.read_text(), len(list(path.parent.iterdir()))
        ('42', 1)
    """
    temporary = temporary_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for leftover in find_leftovers(path):
            leftover.unlink(missing_ok=True)
        write(temporary)
        _sync_file(temporary)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise OutputNotWritable(
            f"output {str(path)!r}: cannot be written: {error.strerror or error}; make room or choose another path"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def replace_folder(target: Path, file: bool = False, keep_existing: bool = False) -> Iterator[Path]:
    """Yield a new folder beside `target`; it is moved into place when the block ends, and removed when it raises.

    Args:
        target: an absolute path; its old content stays there until the new one is complete.
        file: `target` is a file; all files of the new folder are moved beside it.
        keep_existing: a folder that another process put in place meanwhile stays, and ours is dropped: for caches,
            where both hold the same.

    Raises:
        OutputNotWritable: the folder cannot be made or moved.

    Example: see `tests/runtime/test_atomic_files.py`.
    """
    staging = temporary_path(target)
    try:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(target)
            staging.mkdir()
        except OSError as error:
            raise OutputNotWritable(f"output {str(target)!r}: cannot be written: {error.strerror or error}") from error
        yield staging
        try:
            for path in staging.rglob("*"):
                if path.is_file():
                    _sync_file(path)
            if file:
                for path in sorted(staging.iterdir(), key=lambda path: path.name != target.name):
                    os.replace(path, target.with_name(path.name))
            elif keep_existing:
                _move_unless_there(staging, target)
            else:
                _exchange_folders(staging, target)
            _sync_folder(target.parent)
        except OSError as error:
            raise OutputNotWritable(f"output {str(target)!r}: cannot be replaced: {error.strerror or error}") from error
    finally:
        _remove_folder(staging)


@contextmanager
def make_scratch_folder(parent: Path, name: str) -> Iterator[Path]:
    """Yield a new folder for files that only this process reads; it is removed when the block ends.

    Args:
        parent: folder that it is made in, and that is made if it does not exist.
        name: what it is for; several of one name may be in use.

    Raises:
        OutputNotWritable: the folder cannot be made.

    Example:
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     with make_scratch_folder(Path(parent), "streams") as folder:
        ...         folder.is_dir()
        ...     list(Path(parent).iterdir())
        True
        []
    """
    target = parent.absolute() / name
    of_process = temporary_path(target)
    folder = of_process / str(next(_SCRATCH_NUMBERS))
    try:
        with explain_refusal(folder):
            remove_leftovers(target)
            folder.mkdir(parents=True)
        yield folder
    finally:
        try:
            _remove_folder(folder)
        finally:
            with suppress(OSError):  # another one is in it
                of_process.rmdir()


def check_folder(target: str | os.PathLike[str]) -> None:
    """Check that files can be added to a folder, before any work is done; what is in the folder stays.

    Raises:
        OutputNotWritable: a file is in the way, or writing is refused.

    Example: see `tests/export/test_overwrite.py`.
    """
    path = Path(target)
    with explain_refusal(path):
        check_kind(path, file=False)
        try_writing(path)


def check_kind(path: Path, file: bool) -> None:
    """Check that a target which exists is of the expected kind, after leftovers of killed processes are removed.

    Raises:
        OutputNotWritable: there is a folder in the place of a file, or the other way round.

    Example: see `prunelit.export.overwrite`, which uses it.
    """
    remove_leftovers(path.resolve())
    if path.exists() and path.is_dir() == file:
        expected, got = ("file", "folder") if file else ("folder", "file")
        raise OutputNotWritable(f"output {str(path)!r}: expected a {expected}, got a {got}; choose another path")


def try_writing(path: Path) -> None:
    """Make the parents of a target and write a file that vanishes: what is refused at the end is refused now.

    Example: see `prunelit.export.overwrite`, which uses it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path if path.is_dir() else path.parent):
        pass


def try_replacing_folder(path: Path) -> None:
    """Try what the end of a job does to a folder: what is refused then, as for a mount point, is refused now.

    The folder stays where it is: it cannot take the name of another one that is not empty, which systems find out last.

    Args:
        path: an absolute path that may exist.

    Raises:
        OutputNotWritable: the folder is a mount point or in use.
        OSError: the system refuses for another reason.

    Example: see `prunelit.export.overwrite`, which uses it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    staging, occupied = temporary_path(path), temporary_path(path, _OLD)
    marker: Path | None = None
    try:
        staging.mkdir()
        if path.is_dir():
            marker = occupied / "a folder that is not empty"
            marker.mkdir(parents=True)
            os.rename(path, occupied)
            os.rename(occupied, path)  # a system that allows it has moved the folder
    except OSError as error:
        if error.errno in (errno.EBUSY, errno.EXDEV):
            raise OutputNotWritable(
                f"output {str(path)!r}: expected a folder that can be replaced as a whole, got a mount point or one "
                "that the system keeps in place; choose a folder inside it"
            ) from error
        if error.errno not in _IS_THERE or not path.is_dir():
            raise
    finally:
        _remove_folder(staging)
        if marker is not None and marker.is_dir():  # nothing else is ever removed here
            _remove_folder(occupied)


@contextmanager
def explain_refusal(path: Path) -> Iterator[None]:
    """Turn what the system says of an output into one `OutputNotWritable`.

    Example: see `prunelit.export.overwrite`, which uses it.
    """
    try:
        yield
    except (FileExistsError, NotADirectoryError) as error:
        blocking = next((str(folder) for folder in path.parents if folder.is_file()), str(error.filename))
        raise OutputNotWritable(
            f"output {str(path)!r}: cannot be written: {blocking!r} is a file, not a folder; choose another path"
        ) from error
    except OSError as error:
        raise OutputNotWritable(f"output {str(path)!r}: cannot be written: {error.strerror or error}") from error


def temporary_path(path: Path, suffix: str = "") -> Path:
    """The path beside `path` that this process writes to.

    Example: `temporary_path` is used further down in this module.
    """
    return path.with_name(f"{_get_prefix(path)}{os.getpid()}{suffix}")


def find_leftovers(path: Path, suffix: str = "") -> list[Path]:
    """What processes of this machine that have ended left beside `path`, under names of `temporary_path`.

    Example: `find_leftovers` is used further down in this module.
    """
    prefix = _get_prefix(path)
    candidates = [left for left in path.parent.iterdir() if left.name.startswith(prefix) and left.name.endswith(suffix)]
    return [left for left in candidates if not _is_running(left.name.removeprefix(prefix).removesuffix(suffix))]


def remove_leftovers(target: Path) -> None:
    """Remove what ended processes left beside a folder; put its old content back if it is nowhere else.

    Example: `remove_leftovers` is used further down in this module.
    """
    if not target.parent.is_dir():
        return
    for left in find_leftovers(target, _OLD):
        if target.exists():
            _remove_folder(left)
        else:
            os.replace(left, target)
    for left in find_leftovers(target):
        _remove_folder(left)


def _remove_folder(folder: Path) -> None:
    """Remove a folder, also where a signal breaks into that: it is raised as an exception, and raised on afterwards."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _move_unless_there(staging: Path, target: Path) -> None:
    try:
        if not target.is_dir():
            os.replace(staging, target)
    except OSError as error:
        if error.errno not in _IS_THERE:
            raise


def _exchange_folders(staging: Path, target: Path) -> None:
    old = temporary_path(target, _OLD)
    if target.exists():
        os.replace(target, old)
    try:
        os.replace(staging, target)
    except OSError as error:
        if error.errno in _IS_THERE:  # another process was faster, and what it wrote is whole
            _remove_folder(old)
            raise OutputNotWritable(
                f"output {str(target)!r}: another process has written it meanwhile, and its result stays; run again "
                "or choose another path"
            ) from error
        if old.exists():
            os.replace(old, target)
        raise
    _remove_folder(old)


def _get_prefix(path: Path) -> str:
    return f".{path.name}.{platform.node()}."


def _is_running(process: str) -> bool:
    """Whether a process of this machine with this number is alive; True where that is unknown."""
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except (ValueError, OSError):
        return True
    return True


def _sync_file(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_folder(folder: Path) -> None:
    """Put the new name itself onto the disk, where the system can do that."""
    with suppress(OSError):
        _sync_file(folder)
