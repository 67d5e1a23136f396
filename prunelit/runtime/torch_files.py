"""Files that are whole or not there: written to the side, onto the disk, then into place; checked before they are read.

Checkpoints and what is kept of a run are such files. The check is torch's own: its files are zip archives with a CRC-32
for every record.
"""

import zipfile
from functools import lru_cache
from pathlib import Path

import torch

from prunelit.runtime.atomic_files import replace_file
from prunelit.runtime.errors import SourceNotFound


def write_torch_file(path: Path, content: object) -> None:
    """`torch.save` through `replace_file`: a file of this name is complete.

    Raises:
        OutputNotWritable: the disk refuses; the old file is unchanged.

    Example: see `tests/monitoring/test_checkpoints.py`.
    """
    replace_file(path, lambda temporary: _save_or_raise(temporary, content))


def _save_or_raise(path: Path, content: object) -> None:
    try:
        with path.open("wb") as file:
            torch.save(content, file)
    except RuntimeError as error:
        # torch closes its archive after a failed write, and reports that instead of the system's error.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from error
        raise


def find_file_damage(path: Path) -> str | None:
    """What is wrong with a file that `torch.save` wrote: "missing", "cut short", "damaged (where)"; None: it is whole.

    The file is a zip archive with a CRC-32 for every record; all of them are computed again.

    Example: see `tests/monitoring/test_checkpoints.py`.
    """
    try:
        stat = path.stat()
    except OSError:
        return "missing"
    return _find_zip_damage(path, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=64)
def _find_zip_damage(path: Path, mtime_ns: int, size: int) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            record = archive.testzip()
    except zipfile.BadZipFile:
        return "cut short"
    except Exception as error:  # noqa: BLE001  (random bytes fail in many ways)
        return f"damaged ({type(error).__name__})"
    return None if record is None else f"damaged ({record})"


def check_torch_file(path: Path) -> None:
    """Check a checkpoint before anything is read from it.

    Raises:
        SourceNotFound: it is missing, cut short or damaged; names the newest whole one beside it.

    Example: see `prunelit.cli.fit`, which uses it.
    """
    wrong = find_file_damage(path)
    if wrong is None:
        return
    others = sorted(path.parent.glob("*.ckpt"), key=lambda other: other.stat().st_mtime_ns, reverse=True)
    good = next((str(other) for other in others if other != path and find_file_damage(other) is None), None)
    raise SourceNotFound(
        f"checkpoint {str(path)!r}: expected a whole file, got one that is {wrong}; "
        + (f"resume from {good!r}" if good else "there is no other one beside it: start from the beginning")
    )
