"""Files that are whole or not there: written to the side, onto the disk, then into place; checked before they are read.

Checkpoints and what is kept of a run are such files. The check is torch's own: its files are zip archives with a CRC-32
for every record.
"""

import os
import platform
import zipfile
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from prunelit.runtime.errors import OutputNotWritable, SourceNotFound


def write_whole(path: Path, content: Any) -> None:
    """`torch.save` to the side, onto the disk, then into place: a file of this name is whole.

    What a process that was killed left at the side is removed.

    Raises:
        OutputNotWritable: the disk refused; what stood at `path` before still does.
    """
    partial = beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in abandoned(path):
            left.unlink(missing_ok=True)
        with partial.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        # torch closes its archive after a failed write, and reports that instead.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise OutputNotWritable(
            f"output {str(path)!r}: can not be written: {cause.strerror or cause}; make room and start again"
        ) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def beside(path: Path, suffix: str = "") -> Path:
    """A name for this process to write to at the side of `path`."""
    return path.with_name(f"{_prefix(path)}{os.getpid()}{suffix}")


def abandoned(path: Path, suffix: str = "") -> list[Path]:
    """What processes of this machine that have ended left at the side of `path`, under names of `beside`."""
    start = _prefix(path)
    found = [left for left in path.parent.iterdir() if left.name.startswith(start) and left.name.endswith(suffix)]
    return [left for left in found if not _runs(left.name.removeprefix(start).removesuffix(suffix))]


def _prefix(path: Path) -> str:
    return f".{path.name}.{platform.node()}."


def _runs(process: str) -> bool:
    """Whether a process of this machine with this number is alive; in doubt yes."""
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except (ValueError, OSError):
        return True
    return True


def _sync_folder(folder: Path) -> None:
    """Put the new name itself onto the disk, where the system can do that."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def damage(path: Path) -> str | None:
    """What is wrong with a file that `torch.save` wrote: "missing", "cut short", "damaged (where)"; None: it is whole.

    The file is a zip archive with a CRC-32 for every record; all of them are computed again.
    """
    try:
        stat = path.stat()
    except OSError:
        return "missing"
    return _damage(path, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=64)
def _damage(path: Path, mtime_ns: int, size: int) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            record = archive.testzip()
    except zipfile.BadZipFile:
        return "cut short"
    except Exception as error:  # noqa: BLE001  (random bytes fail in many ways)
        return f"damaged ({type(error).__name__})"
    return None if record is None else f"damaged ({record})"


def check_whole(path: Path) -> None:
    """Check a checkpoint before anything is read from it.

    Raises:
        SourceNotFound: it is missing, cut short or damaged; names the newest whole one beside it.
    """
    wrong = damage(path)
    if wrong is None:
        return
    others = sorted(path.parent.glob("*.ckpt"), key=lambda other: other.stat().st_mtime_ns, reverse=True)
    good = next((str(other) for other in others if other != path and damage(other) is None), None)
    raise SourceNotFound(
        f"checkpoint {str(path)!r}: expected a whole file, got one that is {wrong}; "
        + (f"resume from {good!r}" if good else "there is no other one beside it: start from the beginning")
    )
