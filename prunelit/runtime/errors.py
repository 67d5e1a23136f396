"""Every error that a user can cause, as a type.

The command line prints the message of a `PrunelitError` on one line and exits with 2; Python code catches the type.
A message holds four things: the name of what is wrong, what was expected, what came, what to do.
"""

import difflib
from collections.abc import Iterable
from pathlib import Path


def suggest_name(name: str, known: Iterable[str]) -> str:
    """ "; did you mean 'x'?", or nothing where no known name is near."""
    near = difflib.get_close_matches(name, sorted(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def suggest_file(path: str | Path) -> str:
    """`nearest` among what lies beside a path that is not there."""
    missing = Path(path).expanduser()
    try:
        near = difflib.get_close_matches(missing.name, sorted(item.name for item in missing.parent.iterdir()), n=1)
    except OSError:
        return ""
    return f"; did you mean {str(Path(path).with_name(near[0]))!r}?" if near else ""


class PrunelitError(Exception):
    """Base of all errors raised on purpose."""


class BadOption(PrunelitError):
    """An option has a value outside its range."""


class UnknownArchitecture(PrunelitError):
    """No declaration exists for this `model_type`."""


class DeclarationMismatch(PrunelitError):
    """A declaration names modules or shapes that the loaded model does not have."""


class SourceNotFound(PrunelitError):
    """A model or text source can not be found or read."""


class NotEnoughText(PrunelitError):
    """A text source is shorter than one window."""


class NonFinite(PrunelitError):
    """NaN or infinity in weights, activations or scores."""


class InfeasibleBudget(PrunelitError):
    """The budget can not be met with the units that may be cut."""


class BadPlan(PrunelitError):
    """A pruning plan contradicts itself, or does not fit the model it is applied to."""


class OutputNotWritable(PrunelitError):
    """An output folder can not be created, is not empty, or can not be written."""


class NoModel(PrunelitError):
    """A LightningModule holds no transformers model when callbacks are set up."""


class NoCalibration(PrunelitError):
    """No calibration batches: no text source, no `calibration_dataloader()`, no train batches with `input_ids`."""


class BadQuantisation(PrunelitError):
    """A linear can not be quantised faithfully, or a quantised model can not do what is asked of it."""


class DoesNotFit(PrunelitError):
    """An export format can not hold the shapes of a model."""


class NotProved(PrunelitError):
    """What was written is not the model in memory; it was removed."""


class OutOfMemory(PrunelitError):
    """The GPU or the machine has no memory left."""


class BadAdapter(PrunelitError):
    """Saved adapters can not be read, or do not fit the model that they are to be merged into."""
