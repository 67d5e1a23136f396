"""Check notebooks: valid, and without paths of the machine they ran on. Their outputs stay, on purpose."""

import re
import sys
from pathlib import Path

import nbformat

PATH = re.compile(r"(?<![\w.])/(home|root|tmp|work|Users|opt|mnt)/|\b[A-Za-z]:\\\\+Users\b")


def wrong(path: Path) -> list[str]:
    """What is wrong with one notebook."""
    text = path.read_text(encoding="utf-8")
    try:
        nbformat.validate(nbformat.reads(text, as_version=nbformat.NO_CONVERT))
    except Exception as error:  # noqa: BLE001  (what is not JSON, and what is not a notebook, fail in many ways)
        return [f"{path}: not a valid notebook: {str(error).splitlines()[0]}"]
    found = [
        f"{path}:{number}: path of a machine: {line.strip()[:120]}"
        for number, line in enumerate(text.splitlines(), 1)
        if "image/png" not in line and PATH.search(line)
    ]
    return found


if __name__ == "__main__":
    sys.exit("\n".join(line for name in sys.argv[1:] for line in wrong(Path(name))) or None)
