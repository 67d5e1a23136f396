"""What the command line says: every error in one line, chatter by rule, results on stdout."""

import argparse
import difflib
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from prunelit.errors import PrunelitError


@contextmanager
def one_line_errors(command: str) -> Iterator[None]:
    """Turn what parsers, Lightning and the file system say into one `PrunelitError`."""
    try:
        yield
    except PrunelitError:
        raise
    except ValueError as error:
        raise _own(error) or error from error
    except (argparse.ArgumentError, MisconfigurationException, FileNotFoundError, PermissionError) as error:
        raise PrunelitError(f"{command}: {condense(str(error))}") from error
    except torch.cuda.OutOfMemoryError as error:
        raise PrunelitError(
            f"{command}: the GPU is out of memory; lower data.batch_size or --seqlen, or use bfloat16"
        ) from error


def _own(error: BaseException) -> PrunelitError | None:
    """The `PrunelitError` behind an error: parsers wrap what constructors raise."""
    chain: BaseException | None = error
    while chain is not None and not isinstance(chain, PrunelitError):
        chain = chain.__cause__ or chain.__context__
    return chain


def nearest(name: str, known: Iterable[str]) -> str:
    """ "; did you mean 'x'?", or nothing where no known name is near."""
    near = difflib.get_close_matches(name, sorted(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def condense(message: str) -> str:
    """The one line of a parser's message that says what is wrong."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    if not lines:
        return "unknown error"
    where = next((line for line in lines if line.startswith("Parser key")), "")
    union = {name: line for line in lines for name in ("Subtypes: ", "Given value: ") if line.startswith(name)}
    if len(union) == 2 and not union["Given value: "].startswith("Given value: {"):
        kinds = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", union["Subtypes: "].partition(": ")[2][1:-1])
        return f"{where} expected one of {kinds}; got {union['Given value: '].partition(': ')[2]}".strip()[:400]
    for number, line in enumerate(lines[:-1]):
        if "Problem with given class_path" in line:
            rest = lines[number + 1 :]
            end = next((i for i, said in enumerate(rest) if not said.endswith(":")), len(rest))
            return " ".join([where, line.lstrip("- "), *rest[: end + 1]]).strip()[:400]
    for pattern in ("is not accepted", "unrecognized arguments", "[Nn]o such|does not exist", "Expected a"):
        hit = next((line for line in lines if re.search(pattern, line)), None)
        if hit:
            return (hit if hit == where else f"{where} {hit}").strip()[:400]
    return " ".join(lines)[:400]


class _Stderr(logging.StreamHandler[Any]):
    """Writes to what `sys.stderr` is now, not to what it was when the first command ran."""

    @property
    def stream(self) -> Any:
        return sys.stderr

    @stream.setter
    def stream(self, value: Any) -> None:
        """Of the base class's constructor: not kept."""


def speak_by_rule() -> None:
    """prunelit says what it does; libraries speak up from warnings on."""
    log = logging.getLogger("prunelit")
    if not log.handlers:
        handler = _Stderr()
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
    log.setLevel(logging.INFO if int(os.environ.get("LOCAL_RANK", "0") or 0) == 0 else logging.ERROR)
    for name in ("lightning.pytorch", "lightning.fabric", "datasets", "bitsandbytes.backends.cpu.ops"):
        logging.getLogger(name).setLevel(logging.WARNING if name.startswith("lightning") else logging.ERROR)
    # Notices to the authors of Lightning 2.6 and PEFT 0.21, not to our users.
    for notice in (
        r"`isinstance\(treespec, LeafSpec\)`",
        "`is_gradient_checkpointing`",
        "`gradient_checkpointing_enable`",
    ):
        warnings.filterwarnings("ignore", message=f"{notice} is deprecated")
    shown = warnings.showwarning

    def one_line(message: Warning | str, category: type[Warning], *rest: Any, **named: Any) -> None:
        if issubclass(category, UserWarning) and str(rest[0] if rest else "").find(f"{os.sep}prunelit{os.sep}") >= 0:
            sys.stderr.write(f"prunelit: warning: {message}\n")
        else:
            shown(message, category, *rest, **named)

    warnings.showwarning = one_line


def say(line: str) -> None:
    """A result, on stdout."""
    sys.stdout.write(line + "\n")
