"""Files that are whole or not there: written to the side, onto the disk, then into place; checked before they are read.

Checkpoints and what is kept of a run are such files. The check is torch's own: its files are zip archives with a CRC-32
for every record.
"""

import os
import zipfile
from functools import lru_cache
from pathlib import Path
from typing import Any

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
    """What is wrong with a file that `torch.save` wrote; None: it is whole.

    "missing", "cut short", "damaged (where)", or "not a file of torch.save".

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
            if not any(name.endswith("/data.pkl") for name in archive.namelist()):
                return "not a file of torch.save"
            record = archive.testzip()
    except zipfile.BadZipFile:
        with path.open("rb") as file:
            return "cut short" if file.read(2) in (b"", b"P", b"PK") else "not a file of torch.save"
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


_NAMED_PARTS = ("state_dict", "callbacks")  # of a checkpoint: dictionaries


class _StandIn:
    """Takes the place of a class or function that a file names: it accepts anything, and does nothing."""

    def __init__(self, *args: object, **kwargs: object):
        pass

    def __setstate__(self, state: object) -> None:
        pass


def read_checkpoint_file(path: Path, allow_unknown: bool = False) -> dict[str, Any]:
    """Read a checkpoint without running anything that is in it; tensors are mapped, and read where they are used.

    Args:
        path: of a whole file that `torch.save` wrote.
        allow_unknown: put objects that do nothing in place of those that torch does not load by itself, such as the
            hyperparameters of a job in classes of its own, where whoever reads the rest has allowed them.

    Raises:
        SourceNotFound: it is missing, damaged or no checkpoint, or it holds such objects.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     write_torch_file(Path(folder) / "a.ckpt", {"state_dict": {}})
        ...     read_checkpoint_file(Path(folder) / "a.ckpt")
        {'state_dict': {}}
    """
    check_torch_file(path)
    name = f"checkpoint {str(path)!r}: expected a checkpoint of Lightning"
    try:
        unknown = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception as error:  # random bytes fail in many ways
        raise SourceNotFound(f"{name}, got a file that torch cannot read ({type(error).__name__})") from error
    if unknown and not allow_unknown:
        raise SourceNotFound(
            f"{name} that is plain data, got one with objects that loading would run: {', '.join(unknown[:3])}; "
            "if you trust the file, pass weights_only=False to the Trainer"
        )
    try:
        # One class for each name, because torch keeps them by name.
        stand_ins: list[Any] = [(type("StandIn", (_StandIn,), {}), global_name) for global_name in unknown]
        with torch.serialization.safe_globals(stand_ins):
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # of a pickle that torch does not take even so
        raise SourceNotFound(f"{name}, got a file that torch cannot read ({type(error).__name__})") from error
    if not isinstance(content, dict):
        raise SourceNotFound(f"{name}, got a file that holds a {type(content).__name__}")
    for part, value in {"its entries": content, **{key: content.get(key, {}) for key in _NAMED_PARTS}}.items():
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            kind = "other names than text" if isinstance(value, dict) else f"a {type(value).__name__}"
            raise SourceNotFound(f"{name} with names for {part}, got {kind}")
    return content


def read_lightning_file(path: Path, allow_unknown: bool = False) -> dict[str, Any]:
    """`read_checkpoint_file` of a checkpoint that a Trainer can go on from.

    Args:
        path, allow_unknown: see there.

    Raises:
        SourceNotFound: see there; or it holds weights alone.

    Example: see `tests/monitoring/test_untrusted_checkpoints.py`.
    """
    content = read_checkpoint_file(path, allow_unknown)
    if missing := [key for key in ("pytorch-lightning_version", "state_dict") if key not in content]:
        raise SourceNotFound(
            f"checkpoint {str(path)!r}: expected a checkpoint of Lightning, got a file without {missing[0]!r}; give "
            "one that ModelCheckpoint or trainer.save_checkpoint has written"
        )
    return content


def is_pickle_allowed(weights_only: bool | None) -> bool:
    """Whether `torch.load` with this argument runs what is in a file.

    Example:
        >>> is_pickle_allowed(True), is_pickle_allowed(False)
        (False, True)
    """
    forced = os.environ.get("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "").lower() in ("1", "y", "yes", "true")
    return weights_only is False or (weights_only is None and forced)
