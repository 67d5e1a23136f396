"""Error types, one for every kind of error that a user can cause.

The command line prints the message of a `PrunelitError` on one line and exits with 2; Python code catches the type.
A message says four things: the name of what is wrong, what was expected, what it got, and what to do.
"""

import difflib
from collections.abc import Iterable
from pathlib import Path


def suggest_name(name: str, known: Iterable[str]) -> str:
    """Suggest the known name that is nearest to `name`, as the end of an error message; "" if none is near.

    Example:
        >>> suggest_name("ratoi", ["ratio", "scope"])
        "; did you mean 'ratio'?"
    """
    matches = difflib.get_close_matches(name, sorted(known), n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def get_first_line(error: BaseException) -> str:
    """Get the first line of what an error says; its type where it says nothing.

    Example:
        >>> get_first_line(ValueError("bad row\\nin file 3")), get_first_line(KeyError())
        ('bad row', 'KeyError')
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def describe_error(error: BaseException) -> str:
    """Describe an error by its type and the first line of its message.

    Example:
        >>> describe_error(ValueError("bad row\\nin file 3"))
        'ValueError: bad row'
    """
    return f"{type(error).__name__}: {get_first_line(error) if str(error).strip() else ''}"


def suggest_file(path: str | Path) -> str:
    """Suggest the nearest file beside a path that does not exist, as `suggest_name` does.

    Example:
        >>> suggest_file("/no/such/folder/file.txt")
        ''
    """
    missing = Path(path).expanduser()
    try:
        matches = difflib.get_close_matches(missing.name, sorted(item.name for item in missing.parent.iterdir()), n=1)
    except OSError:
        return ""
    return f"; did you mean {str(Path(path).with_name(matches[0]))!r}?" if matches else ""


class PrunelitError(Exception):
    """Base of all errors raised on purpose.

    Example: see `tests/cli/test_console.py`.
    """


class BadOption(PrunelitError):
    """An option has a value outside its range.

    Example: see `tests/runtime/test_atomic_files.py`.
    """


class UnknownArchitecture(PrunelitError):
    """No declaration exists for this `model_type`.

    Example: see `tests/core/test_architectures.py`.
    """


class DeclarationMismatch(PrunelitError):
    """A declaration names modules or shapes that the loaded model does not have.

    Example: see `tests/core/test_architectures.py`.
    """


class SourceNotFound(PrunelitError):
    """A model or text source cannot be found or read.

    Example: see `tests/callbacks/block_pruner/test_callback.py`.
    """


class NotEnoughText(PrunelitError):
    """A text source is shorter than one window.

    Example: see `tests/calibration/test_metrics.py`.
    """


class NonFinite(PrunelitError):
    """NaN or infinity in weights, activations or scores.

    Example: see `tests/calibration/test_observe.py`.
    """


class InfeasibleBudget(PrunelitError):
    """The budget cannot be met with the units that may be pruned.

    Args:
        message: for people.
        largest_share: share of the layers' cost that can be removed at most, where it is known.

    Example: see `tests/callbacks/block_pruner/test_callback.py`.
    """

    def __init__(self, message: str, largest_share: float | None = None):
        super().__init__(message)
        self.largest_share = largest_share


class BadPlan(PrunelitError):
    """A pruning plan contradicts itself, or does not fit the model it is applied to.

    Example: see `tests/calibration/test_result_cache.py`.
    """


class OutputNotWritable(PrunelitError):
    """An output folder cannot be created, is not empty, or cannot be written.

    Example: see `tests/runtime/test_atomic_files.py`.
    """


class NoModel(PrunelitError):
    """A LightningModule holds no transformers model when callbacks are set up.

    Example: see `tests/pruning/test_attach.py`.
    """


class StaleReference(PrunelitError):
    """Something in a job holds weights that the cut has replaced.

    Example: see `tests/pruning/test_live_references.py`.
    """


class NoCalibration(PrunelitError):
    """No calibration batches: no text source, no `calibration_dataloader()`, no train batches with `input_ids`.

    Example: see `tests/calibration/test_observe.py`.
    """


class BadQuantisation(PrunelitError):
    """A linear cannot be quantised within the error bound, or a quantised model does not support an operation.

    Example: see `tests/quantization/test_int4_folder.py`.
    """


class DoesNotFit(PrunelitError):
    """An export format cannot hold the shapes of a model.

    Example: see `tests/runtime/test_atomic_files.py`.
    """


class NotProved(PrunelitError):
    """An exported model differs from the model in memory; the export was removed.

    Example: see `tests/runtime/test_atomic_files.py`.
    """


class TooOld(PrunelitError):
    """An installed package is older than what prunelit runs on.

    Example: see `tests/runtime/test_versions.py`.
    """


class OutOfMemory(PrunelitError):
    """The GPU or the machine has no memory left.

    Example: see `tests/cli/test_console.py`.
    """


class BadAdapter(PrunelitError):
    """Saved adapters cannot be read, or do not fit the model that they are merged into.

    Example: see `tests/evaluation/test_run.py`.
    """
