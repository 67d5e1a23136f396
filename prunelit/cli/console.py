"""Output of the command line: errors in one line, log messages by level, results on stdout; no control characters.

An error that the user can fix is a `PrunelitError`: one line and exit code 2; `--verbose` adds the traceback. Messages
of parsers, Lightning and the system about bad input are turned into a `PrunelitError` here. Everything else is a bug,
in prunelit or in a callback that the user is writing: it keeps its traceback and Python's exit code 1.
"""

import argparse
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from tqdm import tqdm

from prunelit.runtime import progress
from prunelit.runtime.errors import OutOfMemory, PrunelitError
from prunelit.runtime.parser_messages import condense_message
from prunelit.runtime.text_files import escape_controls

_MEMORY_OPTIONS = {
    "fit": "--data.batch_size or --data.seqlen, or pass --model.base nf4, --model.gradient_checkpointing true",
    "validate": "--data.batch_size or --data.seqlen",
    "prune": "--seqlen, or pass --dtype bfloat16, or --stream true --memory_gib N, which holds one layer at a time",
    "plan": "--seqlen, or pass --dtype bfloat16, or --stream true --memory_gib N, which holds one layer at a time",
    "evaluate": "--seqlen, texts.NAME.seqlen, --batch_size or speed.batch, or pass --dtype bfloat16",
    "compare": "calibration.seqlen or texts.NAME.seqlen, or pass --dtype bfloat16",
    "export": "the precision with --dtype bfloat16, or take a machine with more memory",
}
"""What the user can lower when memory runs out, for each command."""
_EXTRAS = {
    "bitsandbytes": "nf4",
    "gguf": "gguf",
    "lm_eval": "zeroshot",
    "mlflow": "mlflow",
    "trackio": "trackio",
    "wandb": "wandb",
    "xllamacpp": "llamacpp",
}
"""Optional packages, and the extras that install them."""
_WRAPPED_ERROR = re.compile(r"Does not validate against|Problem with given class_path '([^']*)'")
_OUT_OF_MEMORY = re.compile(r"can't allocate memory|not enough memory|out of memory", re.IGNORECASE)
_LOST_RANK = re.compile(
    r"Connection (closed|reset) by peer|remote process exited|Timed out waiting \d+ms", re.IGNORECASE
)
"""What gloo and NCCL say when another rank is gone."""


@contextmanager
def condense_errors(command: str) -> Iterator[None]:
    """Turn errors of parsers, Lightning, the file system and memory allocators into one `PrunelitError`.

    Args:
        command: name of the command, for the message.

    Raises:
        PrunelitError: the error in one line.

    Example:
        >>> with condense_errors("prune"):
        ...     raise MemoryError  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        prunelit.runtime.errors.OutOfMemory: prune: this machine is out of memory; ...
    """
    try:
        yield
    except PrunelitError:
        raise
    except Exception as error:  # an unknown error is a bug and is raised again
        translated = (
            _unwrap_parser_error(command, error) if isinstance(error, ValueError) else None
        ) or _translate_error(command, error)
        if translated is None:
            raise
        raise translated from error


def _translate_error(command: str, error: Exception) -> PrunelitError | None:
    """Translate an error that input or the machine causes; None for any other error."""
    class_names = {base.__name__ for base in type(error).__mro__}
    if isinstance(error, ModuleNotFoundError):
        package = next((name for name in _EXTRAS if re.search(rf"\b{name}\b", str(error))), None)
        if package is None:
            return None
        return PrunelitError(f"{command}: needs the package {package}: pip install 'prunelit[{_EXTRAS[package]}]'")
    if (
        "MemoryError" in class_names
        or "OutOfMemoryError" in class_names
        or ("RuntimeError" in class_names and _OUT_OF_MEMORY.search(str(error)))
    ):
        place = "the GPU" if "OutOfMemoryError" in class_names or "CUDA" in str(error) else "this machine"
        return OutOfMemory(f"{command}: {place} is out of memory; lower {_MEMORY_OPTIONS.get(command, 'the batch')}")
    if isinstance(error, RuntimeError) and _LOST_RANK.search(str(error)):
        return PrunelitError(
            f"{command}: another process of this job has ended, so this one ends too; see what that one said, or "
            "whether the system has killed it for its memory"
        )
    if isinstance(error, argparse.ArgumentError | FileNotFoundError | PermissionError) or (
        "MisconfigurationException" in class_names
    ):
        return PrunelitError(f"{command}: {condense_message(str(error))}")
    return None


def _unwrap_parser_error(command: str, error: ValueError) -> PrunelitError | None:
    """Find the error behind a `ValueError` of the parser, which wraps errors of constructors."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    prunelit_error = next((link for link in chain if isinstance(link, PrunelitError)), None)
    root = next((link for link in chain if not _WRAPPED_ERROR.match(str(link).strip())), chain[-1])
    if prunelit_error is not None or root is error:
        return prunelit_error
    if isinstance(root, Exception) and (translated := _translate_error(command, root)):
        return translated
    if not isinstance(root, ValueError | ModuleNotFoundError):
        return None
    class_path = next((match[1] for link in chain if (match := _WRAPPED_ERROR.match(str(link))) and match[1]), "")
    return PrunelitError(f"{command}: {class_path}: {condense_message(str(root))}")


class _EscapedFormatter(logging.Formatter):
    """Writes messages and tracebacks without the control characters that names and texts in them may hold."""

    def format(self, record: logging.LogRecord) -> str:
        return escape_controls(super().format(record))


class _JsonFormatter(logging.Formatter):
    """Writes a message as one JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        event = "warning" if record.levelno >= logging.WARNING else "message"
        content = {"event": event, "time": round(record.created, 3), "message": super().format(record)}
        return json.dumps(content)


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Writes above progress bars, to the `sys.stderr` of now: tests and notebooks replace it between commands."""

    def emit(self, record: logging.LogRecord) -> None:
        with tqdm.external_write_mode(file=sys.stderr):
            super().emit(record)

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, value: TextIO) -> None:
        """Ignore the stream that the base class's constructor sets."""


def configure_logging() -> None:
    """Set log levels: prunelit logs what it does, libraries only warn; with --verbose all log more, with --quiet less.

    Example: see `prunelit.cli.dispatch.run_command`.
    """
    logger, is_verbose = logging.getLogger("prunelit"), progress.is_verbose()
    if not logger.handlers:
        logger.addHandler(_StderrHandler())
    formatter = _JsonFormatter if progress.writes_json() else _EscapedFormatter
    for handler in logger.handlers:
        if isinstance(handler, _StderrHandler):
            handler.setFormatter(formatter("%(message)s"))
    level = logging.DEBUG if is_verbose else logging.WARNING if progress.is_quiet() else logging.INFO
    logger.setLevel(level if progress.is_rank_zero() else logging.ERROR)
    for name in ("lightning.pytorch", "lightning.fabric", "datasets", "bitsandbytes.backends.cpu.ops"):
        level = logging.WARNING if name.startswith("lightning") else logging.ERROR
        logging.getLogger(name).setLevel(logging.INFO if is_verbose else level)
    if not is_verbose:
        # Deprecation notices that Lightning 2.6 and PEFT 0.21 cause; our users cannot act on them.
        for notice in (
            r"`isinstance\(treespec, LeafSpec\)`",
            "`is_gradient_checkpointing`",
            "`gradient_checkpointing_enable`",
        ):
            warnings.filterwarnings("ignore", message=f"{notice} is deprecated")
    if getattr(warnings.showwarning, "__name__", "") != _show_warning.__name__:
        _original_show_warning.append(warnings.showwarning)
        warnings.showwarning = _show_warning


_original_show_warning: list[Callable[..., None]] = []


def _show_warning(message: Warning | str, category: type[Warning], *location: Any, **options: Any) -> None:
    """Show a warning of prunelit in one line, any other one as Python does; above progress bars."""
    message = escape_controls(str(message))
    if progress.writes_json():
        progress.write_event("warning", message=message)
        return
    with tqdm.external_write_mode(file=sys.stderr):
        if issubclass(category, UserWarning) and f"{os.sep}prunelit{os.sep}" in str(location[0] if location else ""):
            sys.stderr.write(f"prunelit: warning: {message}\n")
        else:
            _original_show_warning[-1](message, category, *location, **options)


def print_result(line: str) -> None:
    """Print a result on stdout, above progress bars.

    Args:
        line: the text, without the newline at its end; control characters in it are written as escapes.

    Example:
        >>> print_result("done")
        done
    """
    with tqdm.external_write_mode(file=sys.stdout):
        sys.stdout.write(escape_controls(line) + "\n")


def report_result(command: str, /, **facts: object) -> None:
    """Write the result of a command as one JSON object on stderr, with --log json; without it do nothing.

    Args:
        command: its name.
        facts: of the result, as the command's files hold them.

    Example:
        >>> report_result("prune", out="runs/a")
    """
    if progress.writes_json():
        progress.write_event("result", **{**facts, "command": command})  # evaluate.json has a `command` of its own
