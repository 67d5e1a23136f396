"""What the command line says: every error in one line, chatter by rule, results on stdout.

An error that is the user's to mend is a `PrunelitError`: one line and exit code 2; `--verbose` adds the traceback.
What parsers, Lightning and the system say about input is turned into one here. Everything else is a bug, ours or in a
callback that someone is writing: it keeps its traceback, and Python's exit code 1.
"""

import argparse
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from prunelit.runtime import progress
from prunelit.runtime.errors import OutOfMemory, PrunelitError
from prunelit.runtime.parser_messages import condense_message

_KNOBS = {
    "fit": "--data.batch_size or --data.seqlen, or pass --model.base nf4, --model.gradient_checkpointing true",
    "validate": "--data.batch_size or --data.seqlen",
    "prune": "--seqlen, or pass --dtype bfloat16, or --stream true --memory_gib N, which holds one layer at a time",
    "plan": "--seqlen, or pass --dtype bfloat16, or --stream true --memory_gib N, which holds one layer at a time",
    "evaluate": "--seqlen, texts.NAME.seqlen, --batch_size or speed.batch, or pass --dtype bfloat16",
    "compare": "calibration.seqlen or texts.NAME.seqlen, or pass --dtype bfloat16",
    "export": "the precision with --dtype bfloat16, or take a machine with more memory",
}
"""What a command lowers when memory runs out."""
_EXTRAS = {
    "bitsandbytes": "nf4",
    "gguf": "gguf",
    "lm_eval": "zeroshot",
    "wandb": "wandb",
    "xllamacpp": "llamacpp",
}
"""Packages that are not there for every run, and the extras that bring them."""
_WRAPPED = re.compile(r"Does not validate against|Problem with given class_path '([^']*)'")
_FULL = re.compile(r"can't allocate memory|not enough memory|out of memory", re.IGNORECASE)


@contextmanager
def condense_errors(command: str) -> Iterator[None]:
    """Turn what parsers, Lightning, the file system and the allocators say into one `PrunelitError`."""
    try:
        yield
    except PrunelitError:
        raise
    except Exception as error:  # what is not known here goes on as it is
        found = (_unwrap_parser_error(command, error) if isinstance(error, ValueError) else None) or _translate_error(
            command, error
        )
        if found is None:
            raise
        raise found from error


def _translate_error(command: str, error: Exception) -> PrunelitError | None:
    """The one line for an error that input or the machine causes; None for any other."""
    kind = {base.__name__ for base in type(error).__mro__}
    if isinstance(error, ModuleNotFoundError):
        package = next((name for name in _EXTRAS if re.search(rf"\b{name}\b", str(error))), None)
        if package is None:
            return None
        return PrunelitError(f"{command}: needs the package {package}: pip install 'prunelit[{_EXTRAS[package]}]'")
    if "MemoryError" in kind or "OutOfMemoryError" in kind or ("RuntimeError" in kind and _FULL.search(str(error))):
        where = "the GPU" if "OutOfMemoryError" in kind or "CUDA" in str(error) else "this machine"
        return OutOfMemory(f"{command}: {where} is out of memory; lower {_KNOBS.get(command, 'the batch')}")
    if isinstance(error, argparse.ArgumentError | FileNotFoundError | PermissionError) or (
        "MisconfigurationException" in kind
    ):
        return PrunelitError(f"{command}: {condense_message(str(error))}")
    return None


def _unwrap_parser_error(command: str, error: ValueError) -> PrunelitError | None:
    """The error behind a `ValueError` of the parser, which wraps what constructors raise."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    own = next((one for one in chain if isinstance(one, PrunelitError)), None)
    root = next((one for one in chain if not _WRAPPED.match(str(one).strip())), chain[-1])
    if own is not None or root is error:
        return own
    if isinstance(root, Exception) and (known := _translate_error(command, root)):
        return known
    if not isinstance(root, ValueError | ModuleNotFoundError):
        return None
    path = next((found[1] for one in chain if (found := _WRAPPED.match(str(one))) and found[1]), "")
    return PrunelitError(f"{command}: {path}: {condense_message(str(root))}")


class _StderrHandler(logging.StreamHandler[Any]):
    """Writes to what `sys.stderr` is now, not to what it was when the first command ran; above progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        with tqdm.external_write_mode(file=sys.stderr):
            super().emit(record)

    @property
    def stream(self) -> Any:
        return sys.stderr

    @stream.setter
    def stream(self, value: Any) -> None:
        """Of the base class's constructor: not kept."""


def configure_logging() -> None:
    """prunelit says what it does, libraries speak up from warnings on; with --verbose all say more."""
    log, more = logging.getLogger("prunelit"), progress.is_verbose()
    if not log.handlers:
        handler = _StderrHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
    log.setLevel((logging.DEBUG if more else logging.INFO) if progress.is_rank_zero() else logging.ERROR)
    for name in ("lightning.pytorch", "lightning.fabric", "datasets", "bitsandbytes.backends.cpu.ops"):
        level = logging.WARNING if name.startswith("lightning") else logging.ERROR
        logging.getLogger(name).setLevel(logging.INFO if more else level)
    if not more:
        # Notices to the authors of Lightning 2.6 and PEFT 0.21, not to our users.
        for notice in (
            r"`isinstance\(treespec, LeafSpec\)`",
            "`is_gradient_checkpointing`",
            "`gradient_checkpointing_enable`",
        ):
            warnings.filterwarnings("ignore", message=f"{notice} is deprecated")
    if getattr(warnings.showwarning, "__name__", "") != _show_warning.__name__:
        _original_show_warning.append(warnings.showwarning)
        warnings.showwarning = _show_warning


_original_show_warning: list[Any] = []


def _show_warning(message: Warning | str, category: type[Warning], *rest: Any, **named: Any) -> None:
    """A warning of ours in one line, any other one as Python has it; above progress bars."""
    with tqdm.external_write_mode(file=sys.stderr):
        if issubclass(category, UserWarning) and f"{os.sep}prunelit{os.sep}" in str(rest[0] if rest else ""):
            sys.stderr.write(f"prunelit: warning: {message}\n")
        else:
            _original_show_warning[-1](message, category, *rest, **named)


def print_result(line: str) -> None:
    """A result, on stdout."""
    with tqdm.external_write_mode(file=sys.stdout):
        sys.stdout.write(line + "\n")
