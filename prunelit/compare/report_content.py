"""What compare.json and the files of its cells hold."""

from collections.abc import Mapping, Sequence
from typing import TypedDict

from prunelit.runtime.environment import Hardware
from prunelit.runtime.text_files import JsonObject


class TextResult(TypedDict):
    """Perplexity of one model on one text: None where it exceeds a float; `nll` is the mean, in nats per token.

    Example: see `prunelit.compare.cell`, which uses it.
    """

    perplexity: float | None
    nll: float
    tokens: int


class DenseResult(TypedDict):
    """What was measured of the dense model: each text, and its size.

    Example: see `prunelit.compare.cell`, which uses it.
    """

    texts: dict[str, TextResult]
    size: dict[str, int]


class CellLatency(TypedDict):
    """Seconds of a prefill, dense and pruned, and how many times as fast the pruned model is.

    Example: see `prunelit.compare.cell`, which uses it.
    """

    dense_seconds: float
    seconds: float
    speedup: float


class CellResult(TypedDict, total=False):
    """What is known of a cell: its status is "finished", "failed" or "missing", on which the other names depend.

    Attributes:
        key: everything that determines the result.
        failed: the error of a cell that failed; `traceback` where it is a bug.

    Example: see `prunelit.compare.cell`, which uses it.
    """

    status: str
    key: Mapping[str, object]
    failed: str
    traceback: str
    texts: dict[str, TextResult]
    size: dict[str, int]
    ratio_of_block_parameters: float
    plan: str
    seconds: dict[str, float]
    latency: CellLatency
    versions: dict[str, str]


class CellEntry(CellResult, total=False):
    """A cell in compare.json: its place in the table, and what is known of it.

    Example: see `prunelit.compare.run`, which uses it.
    """

    label: str
    method: str
    ratio: float
    seed: int
    mean_log_ratio: float


class RowEntry(TypedDict):
    """A row of the table.

    Example: see `prunelit.compare.run`, which uses it.
    """

    label: str
    method: str
    options: dict[str, object]


class CalibrationEntry(TypedDict):
    """The text that the methods scored on, with a fingerprint of the windows of each seed.

    Example: see `prunelit.compare.run`, which uses it.
    """

    text: list[str]
    windows: int
    seqlen: int
    fingerprints: dict[str, str]


class ComparisonReport(TypedDict, total=False):
    """The content of compare.json; texts are the protocols of `prunelit.calibration.metrics`.

    Example: see `prunelit.compare.run`, which uses it.
    """

    command: str
    model: str
    source: str
    rows: Sequence[RowEntry]
    ratios: list[float]
    seeds: list[int]
    calibration: CalibrationEntry
    texts: dict[str, JsonObject]
    latency: JsonObject | None
    hardware: Hardware
    versions: dict[str, str]
    options: dict[str, object]
    dense: DenseResult
    cells: list[CellEntry]
