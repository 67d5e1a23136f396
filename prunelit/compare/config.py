"""What a comparison is made of: rows (a method with options), ratios, seeds, texts; checked before a model is loaded.

A *cell* is one row at one ratio and one seed.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from jsonargparse import ArgumentParser

from prunelit.data import text
from prunelit.pruning.registry import method_class
from prunelit.runtime.errors import BadOption, suggest_name

if TYPE_CHECKING:  # Lightning takes seconds to import, and `evaluate` needs only the texts
    from prunelit.pruning.callback import PruningCallback
from prunelit.data.option_types import parse_options

_SET_BY_TABLE = {
    "ratio": "ratios",
    "seed": "seeds",
    "calibration": "calibration.text",
    "windows": "calibration.windows",
    "seqlen": "calibration.seqlen",
    "plan_file": "nothing: a comparison makes its own plans",
}
"""Options that a row may not set, and what sets them."""


@dataclass(frozen=True)
class Calibration:
    """Text that the methods score and repair on, the same windows for all methods at one seed.

    Args:
        text: text source(s), mixed evenly.
        windows: sequences, drawn with the cell's seed.
        seqlen: tokens per sequence.
    """

    text: str | list[str] = text.BUILTIN_TEXT
    windows: int = 64
    seqlen: int = 512


@dataclass(frozen=True)
class Latency:
    """A measurement of prefill: forward passes of the dense and the cut model in turn, the medians compared.

    Args:
        tokens: tokens per pass, one sequence.
        repeats: passes of each model.
    """

    tokens: int = 512
    repeats: int = 5

    def __post_init__(self) -> None:
        for name, value in (("tokens", self.tokens), ("repeats", self.repeats)):
            if value < 1:
                raise BadOption(f"latency.{name}: expected at least 1, got {value}")


@dataclass(frozen=True)
class MethodRow:
    """A line of the table: a method with options of its own, under a label.

    `accepts` names the options that the method has.
    """

    label: str
    method: str
    options: Mapping[str, Any]
    accepts: Collection[str]

    def build_method(self, ratio: float, seed: int, calibration: Calibration, **extra: Any) -> "PruningCallback":
        """The method of one cell.

        Raises:
            BadOption: an option outside its range.
        """
        kind = method_class(self.method)
        own = {"windows": calibration.windows, "seqlen": calibration.seqlen, **self.options, **extra}
        try:
            return cast("PruningCallback", kind(ratio=ratio, seed=seed, **own))
        except BadOption as error:
            raise BadOption(f"method {self.label!r}: {error}") from error
        except TypeError as error:
            raise BadOption(f"method {self.label!r}: {error}; let it pass **kwargs on to PruningCallback") from error


@dataclass(frozen=True)
class Cell:
    """One row at one ratio and one seed."""

    row: MethodRow
    ratio: float
    seed: int

    def __str__(self) -> str:
        return f"{self.row.label}, {100 * self.ratio:g}%, seed {self.seed}"


def parse_method_rows(methods: Sequence[Any], common: Mapping[str, Any]) -> list[MethodRow]:
    """The rows of a table.

    Args:
        methods: a method's name, or {method, label, options}; a method is one of `python -m prunelit methods` or the
            import path of a class.
        common: options for every method that takes them.

    Raises:
        BadOption: no such method or option, a value of the wrong type, or two rows under one label.
    """
    if not methods:
        raise BadOption("methods: expected at least one method, got none; `python -m prunelit methods` lists them")
    found: list[MethodRow] = []
    taken: set[str] = set()
    for given in methods:
        entry = {"method": given} if isinstance(given, str) else given
        if not isinstance(entry, Mapping) or not isinstance(entry.get("method"), str):
            raise BadOption(f"methods: expected a method's name or {{method, label, options}}, got {given!r:.80}")
        names = ("method", "label", "options")
        for name in entry:
            if name not in names:
                raise BadOption(
                    f"method {entry['method']!r}: expected {', '.join(names)}, got {name!r}{suggest_name(str(name), names)}"
                )
        own = entry.get("options") or {}
        if not isinstance(own, Mapping):
            raise BadOption(f"method {entry['method']!r}: options: expected {{name: value}}, got {own!r:.80}")
        label = str(entry.get("label") or entry["method"].rpartition(".")[2])
        if any(row.label == label for row in found):
            raise BadOption(f"methods: expected one row for each label, got {label!r} twice; give one of them a label")
        options, accepted = _parse_row_options(label, entry["method"], own, common)
        taken |= accepted
        found.append(MethodRow(label, entry["method"], options, accepted))
    for name in common:
        if name not in taken:
            raise BadOption(f"options: no method of this table takes {name!r}{suggest_name(name, taken)}")
    return found


def _parse_row_options(
    label: str, method: str, own: Mapping[str, Any], common: Mapping[str, Any]
) -> tuple[dict[str, Any], set[str]]:
    """A row's options with their types checked, and the names that its method takes."""
    from prunelit.pruning.callback import PruningCallback

    kind = method_class(method)
    if not (isinstance(kind, type) and issubclass(kind, PruningCallback)):
        raise BadOption(f"method {method!r}: expected a subclass of PruningCallback, got {kind!r:.80}")
    for name in (*own, *common):
        if not isinstance(name, str):
            raise BadOption(f"method {label!r}: options: expected {{name: value}}, got the name {name!r}")
        if name in _SET_BY_TABLE:
            raise BadOption(f"method {label!r}: options: {name!r} is set for all rows by {_SET_BY_TABLE[name]}")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, None, skip=set(_SET_BY_TABLE), sub_configs=False)
    accepted = {str(name) for name in vars(parser.get_defaults())} - {*kind.ignored_options}
    for name in own:
        if name not in accepted:
            raise BadOption(
                f"method {label!r}: options: expected one of {', '.join(sorted(accepted))}, got {name!r}"
                f"{suggest_name(name, accepted)}"
            )
    shared = {name: value for name, value in common.items() if name in accepted}
    if shared.get("repair") not in kind.repair_choices:  # that of the others
        shared.pop("repair", None)
    given = shared | dict(own)
    typed = parse_options(parser, given, f"method {label!r}: options")
    return {name: typed[name] for name in given}, accepted


def select_rows(found: Sequence[MethodRow], labels: Sequence[str] | None) -> list[MethodRow]:
    """The rows with these labels; all of them without any.

    Raises:
        BadOption: no row has this label.
    """
    known = [row.label for row in found]
    for label in labels or ():
        if label not in known:
            raise BadOption(f"only: expected labels of {', '.join(known)}, got {label!r}{suggest_name(label, known)}")
    return [row for row in found if not labels or row.label in labels]


def check_distinct_values(name: str, given: Sequence[Any]) -> list[Any]:
    """Ratios or seeds: at least one, none twice; their range is for the methods to check.

    Raises:
        BadOption: none, or one twice.
    """
    if not given or len(set(given)) < len(given):
        raise BadOption(f"{name}: expected at least one, each once, got {list(given)}")
    return list(given)
