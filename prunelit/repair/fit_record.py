"""What a refit did to one linear, or to the experts of one layer: the record for reports."""

import logging
from typing import TypedDict

from prunelit.repair.least_squares import Fit

_log = logging.getLogger("prunelit")


class FitRecord(TypedDict):
    """What a refit did to one linear, for reports: its layer and block, relative errors of its outputs, and the ridge.

    Example: see `apply_least_squares`.
    """

    layer: int
    block: str
    before: float
    after: float
    ridge: float


def record_layer_fit(layer: int, block: str, fit: Fit) -> FitRecord:
    """Log a fit at debug level and return it as a record for reports.

    Args:
        layer: index of the layer.
        block: name of the block.
        fit: the fit of its output projection.

    Example: see `prunelit.callbacks.greedy_output.two_step`, which uses it.
    """
    _log.debug("layer %d: %s: error %.4f -> %.4f (ridge %g)", layer, block, fit.before, fit.after, fit.ridge)
    return {"layer": layer, "block": block, "before": fit.before, "after": fit.after, "ridge": fit.ridge}
