"""The parts of a comparison, checked before a model is loaded: rows (a method with options), ratios, seeds, texts.

A *cell* is one row at one ratio and one seed.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

from prunelit.data import text
from prunelit.data.option_types import ClassOptions
from prunelit.planning.targets import TARGET_OPTIONS
from prunelit.pruning.registry import method_class
from prunelit.runtime.errors import BadOption, suggest_name

if TYPE_CHECKING:  # Lightning takes seconds to import, and `evaluate` needs only the texts
    from prunelit.pruning.callback import PruningCallback

Value = TypeVar("Value")
_SET_BY_TABLE = {
    "ratio": "ratios",
    **dict.fromkeys(TARGET_OPTIONS, "ratios, which all rows share"),
    "seed": "seeds",
    "calibration": "calibration.text",
    "windows": "calibration.windows",
    "seqlen": "calibration.seqlen",
    "plan_file": "nothing: a comparison makes its own plans",
}
"""Options that a row may not set, and the setting that sets them for all rows."""


@dataclass(frozen=True)
class Calibration:
    """Calibration text: what the methods score and repair on. At one seed all methods get the same windows.

    Args:
        text: text source(s), mixed evenly.
        windows: number of sequences, drawn with the cell's seed.
        seqlen: tokens per sequence.

    Example:
        >>> Calibration(windows=8).seqlen
        512
    """

    text: str | list[str] = text.BUILTIN_TEXT
    windows: int = 64
    seqlen: int = 512


@dataclass(frozen=True)
class Latency:
    """Timing of prefill: forward passes of the dense and the pruned model in turn; the medians are compared.

    Args:
        tokens: tokens per pass, one sequence.
        repeats: timed passes of each model.

    Raises:
        BadOption: a value below 1.

    Example:
        >>> Latency(tokens=128).repeats
        5
    """

    tokens: int = 512
    repeats: int = 5

    def __post_init__(self) -> None:
        for name, value in (("tokens", self.tokens), ("repeats", self.repeats)):
            if value < 1:
                raise BadOption(f"latency.{name}: expected at least 1, got {value}")


@dataclass(frozen=True)
class MethodRow:
    """A row of the table: a method with its own options, under a label.

    Attributes:
        label: name of the row.
        method: name or import path of the method.
        options: of the method.
        accepts: names of the options that the method has.

    Example:
        >>> [row.label for row in parse_method_rows(["flap", {"method": "random", "label": "chance"}], {})]
        ['flap', 'chance']
    """

    label: str
    method: str
    options: Mapping[str, object]
    accepts: Collection[str]

    def build_method(self, ratio: float, seed: int, calibration: Calibration, **extra: Any) -> "PruningCallback":
        """Build the method of one cell.

        Args:
            ratio: share of the budget to remove.
            seed: of the method.
            calibration: text for scores and repair.
            extra: further options of the method.

        Raises:
            BadOption: an option outside its range.
        """
        kind = method_class(self.method)
        options = {"windows": calibration.windows, "seqlen": calibration.seqlen, **self.options, **extra}
        try:
            return cast("PruningCallback", kind(ratio=ratio, seed=seed, **options))
        except BadOption as error:
            raise BadOption(f"method {self.label!r}: {error}") from error
        except TypeError as error:
            raise BadOption(f"method {self.label!r}: {error}; let it pass **kwargs on to PruningCallback") from error


@dataclass(frozen=True)
class Cell:
    """One row at one ratio and one seed.

    Example:
        >>> (row,) = parse_method_rows(["flap"], {})
        >>> print(Cell(row, ratio=0.2, seed=0))
        flap, 20%, seed 0
    """

    row: MethodRow
    ratio: float
    seed: int

    def __str__(self) -> str:
        return f"{self.row.label}, {100 * self.ratio:g}%, seed {self.seed}"


def parse_method_rows(methods: Sequence[object], common: Mapping[str, object]) -> list[MethodRow]:
    """Check the rows of a table.

    Args:
        methods: a method's name, or {method, label, options}; a method is one of `python -m prunelit methods` or the
            import path of a class.
        common: options for every method that has them.

    Raises:
        BadOption: no such method or option, a value of the wrong type, or two rows with one label.

    Example: see `MethodRow`.
    """
    if not methods:
        raise BadOption("methods: expected at least one method, got none; `python -m prunelit methods` lists them")
    method_rows: list[MethodRow] = []
    used_options: set[str] = set()
    for item in methods:
        entry = {"method": item} if isinstance(item, str) else item
        if not isinstance(entry, Mapping) or not isinstance(entry.get("method"), str):
            raise BadOption(f"methods: expected a method's name or {{method, label, options}}, got {item!r:.80}")
        names = ("method", "label", "options")
        for name in entry:
            if name not in names:
                hint = suggest_name(str(name), names)
                raise BadOption(f"method {entry['method']!r}: expected {', '.join(names)}, got {name!r}{hint}")
        row_options = entry.get("options") or {}
        if not isinstance(row_options, Mapping):
            raise BadOption(f"method {entry['method']!r}: options: expected {{name: value}}, got {row_options!r:.80}")
        label = str(entry.get("label") or entry["method"].rpartition(".")[2])
        if any(row.label == label for row in method_rows):
            raise BadOption(f"methods: expected one row for each label, got {label!r} twice; give one of them a label")
        options, accepted = _parse_row_options(label, entry["method"], row_options, common)
        used_options |= accepted
        method_rows.append(MethodRow(label, entry["method"], options, accepted))
    for name in common:
        if name not in used_options:
            raise BadOption(f"options: no method of this table takes {name!r}{suggest_name(name, used_options)}")
    return method_rows


def _parse_row_options(
    label: str, method: str, row_options: Mapping[str, object], common: Mapping[str, object]
) -> tuple[dict[str, object], frozenset[str]]:
    """Check the types of a row's options; return them and the names that its method accepts."""
    from prunelit.pruning.callback import PruningCallback

    kind = method_class(method)
    if not (isinstance(kind, type) and issubclass(kind, PruningCallback)):
        raise BadOption(f"method {method!r}: expected a subclass of PruningCallback, got {kind!r:.80}")
    for name in (*row_options, *common):
        if not isinstance(name, str):
            raise BadOption(f"method {label!r}: options: expected {{name: value}}, got the name {name!r}")
        if name in _SET_BY_TABLE:
            raise BadOption(f"method {label!r}: options: {name!r} is set for all rows by {_SET_BY_TABLE[name]}")
    known = ClassOptions(kind, skip=(*_SET_BY_TABLE, *kind.ignored_options, *kind.job_options))
    shared = {name: value for name, value in common.items() if name in known.names}
    if shared.get("repair") not in kind.repair_choices:  # a repair for all rows may not suit this method
        shared.pop("repair", None)
    merged = shared | dict(row_options)
    return known.parse_mapping(merged, f"method {label!r}: options", "options of the method"), known.names


def select_method_rows(method_rows: Sequence[MethodRow], labels: Sequence[str] | None) -> list[MethodRow]:
    """Select the rows with certain labels; all rows without labels.

    Args:
        method_rows: of the table.
        labels: of the rows to select.

    Raises:
        BadOption: no row has this label.

    Example:
        >>> [row.label for row in select_method_rows(parse_method_rows(["flap", "random"], {}), ["random"])]
        ['random']
    """
    known = [row.label for row in method_rows]
    for label in labels or ():
        if label not in known:
            raise BadOption(f"only: expected labels of {', '.join(known)}, got {label!r}{suggest_name(label, known)}")
    return [row for row in method_rows if not labels or row.label in labels]


def check_distinct_values(name: str, values: Sequence[Value]) -> list[Value]:
    """Check ratios or seeds: at least one, none twice. The methods check their range.

    Args:
        name: of the setting, for the message.
        values: its values.

    Raises:
        BadOption: no value, or one twice.

    Example:
        >>> check_distinct_values("ratios", (0.1, 0.2))
        [0.1, 0.2]
    """
    if not values or len(set(values)) < len(values):
        raise BadOption(f"{name}: expected at least one, each once, got {list(values)}")
    return list(values)
