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
    """Base of all errors raised on purpose."""


class BadOption(PrunelitError):
    """An option has a value outside its range."""


class UnknownArchitecture(PrunelitError):
    """No declaration exists for this `model_type`."""


class DeclarationMismatch(PrunelitError):
    """A declaration names modules or shapes that the loaded model does not have."""


class SourceNotFound(PrunelitError):
    """A model or text source cannot be found or read."""


class NotEnoughText(PrunelitError):
    """A text source is shorter than one window."""


class NonFinite(PrunelitError):
    """NaN or infinity in weights, activations or scores."""


class InfeasibleBudget(PrunelitError):
    """The budget cannot be met with the units that may be pruned."""


class BadPlan(PrunelitError):
    """A pruning plan contradicts itself, or does not fit the model it is applied to."""


class OutputNotWritable(PrunelitError):
    """An output folder cannot be created, is not empty, or cannot be written."""


class NoModel(PrunelitError):
    """A LightningModule holds no transformers model when callbacks are set up."""


class NoCalibration(PrunelitError):
    """No calibration batches: no text source, no `calibration_dataloader()`, no train batches with `input_ids`."""


class BadQuantisation(PrunelitError):
    """A linear cannot be quantised within the error bound, or a quantised model does not support an operation."""


class DoesNotFit(PrunelitError):
    """An export format cannot hold the shapes of a model."""


class NotProved(PrunelitError):
    """An exported model differs from the model in memory; the export was removed."""


class OutOfMemory(PrunelitError):
    """The GPU or the machine has no memory left."""


class BadAdapter(PrunelitError):
    """Saved adapters cannot be read, or do not fit the model that they are merged into."""
