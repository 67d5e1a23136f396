"""Where the YAML files that come with prunelit are, and which of them a name stands for.

A clone has them at its top, in configs/ and callbacks/; the wheel carries the same two folders in prunelit/shipped/.
"""

import difflib
from pathlib import Path, PurePosixPath

from prunelit.runtime.errors import suggest_file

FOLDERS = ("configs", "callbacks")


def get_shipped_folder() -> Path:
    """Return the folder that holds configs/ and callbacks/.

    Example:
        >>> (get_shipped_folder() / "configs" / "quickstart.yaml").is_file()
        True
    """
    package = Path(__file__).resolve().parents[2]
    installed = package / "shipped"
    return installed if installed.is_dir() else package.parent


def list_shipped_names() -> list[str]:
    """List the names that `--config` takes: those of the files in configs/ stand without that folder.

    Example:
        >>> {"quickstart", "methods/flap", "callbacks/flap"} <= set(list_shipped_names())
        True
    """
    root = get_shipped_folder()
    paths = [path.relative_to(root) for folder in FOLDERS for path in sorted((root / folder).rglob("*.yaml"))]
    names = [path.with_suffix("").as_posix().removeprefix("configs/") for path in paths]
    return [name for name in names if not name.startswith("attach/")]  # options of another program


def find_shipped_file(name: str) -> Path | None:
    """Find the file that a name stands for.

    Args:
        name: as `quickstart`, `callbacks/llm_bip` or `configs/quickstart.yaml`; never a path that leads out of the
            folders.

    Returns:
        Its path; None where no file has that name.

    Example:
        >>> find_shipped_file("quickstart").name, find_shipped_file("../README") is None
        ('quickstart.yaml', True)
    """
    stem = name.removesuffix(".yaml")
    parts = PurePosixPath(stem).parts
    if not parts or ".." in parts or stem.startswith(("/", ".", "~")) or "\0" in stem:
        return None
    names = {known: known if known.startswith("callbacks/") else f"configs/{known}" for known in list_shipped_names()}
    path = names.get(PurePosixPath(stem).as_posix().removeprefix("configs/"))
    return None if path is None else get_shipped_folder() / f"{path}.yaml"


def resolve_config_path(value: str) -> str:
    """Replace the name of a file that comes with prunelit by its path. A file of the user's wins over a name.

    Args:
        value: of --config: a file, a name, or YAML text.

    Returns:
        The path; any other value as it is.

    Example:
        >>> resolve_config_path("no/such/file.yaml"), resolve_config_path("{seed: 1}")
        ('no/such/file.yaml', '{seed: 1}')
    """
    path = Path(value)
    try:
        is_taken = "\n" in value or value.lstrip().startswith("{") or (path.exists() and not path.is_dir())
    except (OSError, ValueError):  # longer than the system's paths, or with a null character
        return value
    shipped_file = None if is_taken else find_shipped_file(value)
    return value if shipped_file is None else str(shipped_file)


def suggest_config(value: str) -> str:
    """Suggest the nearest files for one that does not exist, as the end of an error message.

    Args:
        value: of --config.

    Example:
        >>> suggest_config("quikstart")
        "; did you mean 'quickstart'? `prunelit init --list` shows the names that need no file"
    """
    if beside := suggest_file(value):
        return beside
    stem = value.removesuffix(".yaml").removeprefix("./").removeprefix("configs/")
    names = list_shipped_names()
    same_file = [name for name in names if name.rpartition("/")[2] == stem]
    matches = same_file or difflib.get_close_matches(stem, names, n=3, cutoff=0.7)
    hint = f"; did you mean {' or '.join(repr(name) for name in matches)}?" if matches else ";"
    return f"{hint} `prunelit init --list` shows the names that need no file"
