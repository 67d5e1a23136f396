"""How much room a saved model takes on the disk."""

from pathlib import Path

_WEIGHT_SUFFIXES = (".safetensors", ".gguf", ".bin")


def measure_disk_bytes(source: str | Path) -> int | None:
    """Add up the weight files of a saved model.

    Args:
        source: the model's folder, or its one file.

    Returns:
        Bytes; None where there are no weight files, as for the id of a hub.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     _ = (Path(folder) / "model.safetensors").write_bytes(bytes(12))
        ...     _ = (Path(folder) / "config.json").write_text("{}")
        ...     measure_disk_bytes(folder)
        12
    """
    place = Path(source).expanduser()
    files = [place] if place.is_file() else sorted(place.glob("*")) if place.is_dir() else []
    return sum(file.stat().st_size for file in files if file.suffix in _WEIGHT_SUFFIXES) or None
