"""`prunelit init DIR`: copies the YAML files that come with prunelit into a folder, to be read and changed."""

import shutil
import textwrap
from pathlib import Path

from prunelit.cli.init.files import FOLDERS, find_shipped_file, get_shipped_folder, list_shipped_names
from prunelit.runtime.atomic_files import replace_file
from prunelit.runtime.errors import BadOption, OutputNotWritable, suggest_name

USAGE = """usage: prunelit init DIR [--overwrite]
       prunelit init --list

Copies configs/ and callbacks/, the YAML files that come with prunelit, into DIR. Files that are there and differ are
an error, before anything is copied; --overwrite replaces them. Every command also takes them by name, without a copy:
--config quickstart, --config callbacks/llm_bip. --list shows the names."""
_OPTIONS = ("--overwrite", "--list", "--help")


def answer_init_command(arguments: list[str]) -> str:
    """Copy the files, or list them.

    Args:
        arguments: command line after `init`.

    Returns:
        What is printed.

    Raises:
        BadOption: not one folder, or an unknown option.
        OutputNotWritable: see `copy_shipped_files`.

    Example:
        >>> answer_init_command(["--list"]).splitlines()[1].split()[0]
        'compare-7b'
    """
    options = [word for word in arguments if word.startswith("-")]
    folders = [word for word in arguments if not word.startswith("-")]
    if not {"-h", "--help"}.isdisjoint(options):
        return USAGE
    for option in options:
        if option not in _OPTIONS:
            raise BadOption(f"init: {option}: expected {' or '.join(_OPTIONS[:2])}{suggest_name(option, _OPTIONS)}")
    if "--list" in options and len(arguments) == 1:
        return _render_list()
    if "--list" in options or len(folders) != 1:
        raise BadOption(
            f"init: expected one folder, as in `prunelit init DIR`, or --list, got {' '.join(arguments) or 'none'}"
        )
    copied, total = copy_shipped_files(Path(folders[0]), overwrite="--overwrite" in options)
    return f"{folders[0]}: {copied} of {total} files copied into {' and '.join(f'{name}/' for name in FOLDERS)}"


def copy_shipped_files(target: Path, overwrite: bool = False) -> tuple[int, int]:
    """Copy configs/ and callbacks/ into a folder. Equal files stay as they are.

    Args:
        target: made if it does not exist.
        overwrite: replace files that differ.

    Returns:
        Number of files that were copied, and of all files.

    Raises:
        OutputNotWritable: a file is there and differs, and nothing was copied; or the system refuses.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     first, total = copy_shipped_files(Path(folder) / "mine")
        ...     first == total, copy_shipped_files(Path(folder) / "mine") == (0, total)
        (True, True)
    """
    root = get_shipped_folder()
    sources = [
        path
        for folder in FOLDERS
        for path in sorted((root / folder).rglob("*"))
        if path.is_file() and path.suffix in (".yaml", ".md", ".py")
    ]
    pairs = [(source, target / source.relative_to(root)) for source in sources]
    try:
        missing = [(source, copy) for source, copy in pairs if not copy.exists()]
        differing = [
            (source, copy) for source, copy in pairs if copy.exists() and copy.read_bytes() != source.read_bytes()
        ]
    except OSError as error:
        name = str(error.filename or target)
        raise OutputNotWritable(f"output {name!r}: cannot be read: {error.strerror}; choose another folder") from error
    if differing and not overwrite:
        names = ", ".join(str(copy.relative_to(target)) for _, copy in differing[:3])
        raise OutputNotWritable(
            f"output {str(target)!r}: expected no other files of these names, got {names}"
            f"{f' and {len(differing) - 3} more' if len(differing) > 3 else ''}; --overwrite replaces them"
        )
    chosen = missing + differing
    for source, copy in chosen:
        replace_file(copy, lambda temporary, source=source: shutil.copyfile(source, temporary))  # type: ignore[misc]
    return len(chosen), len(pairs)


def _render_list() -> str:
    """Write every name with the first line of its file."""
    names = list_shipped_names()
    width = max(map(len, names))
    lines = ["Files that --config takes by name; the first lines of each say which command it is for:"]
    for name in names:
        path = find_shipped_file(name)
        first = path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ") if path else ""
        lines.append(f"  {name:{width}}  {textwrap.shorten(first, 116 - width, placeholder=' ...')}")
    return "\n".join(lines)
