"""A method from its name and options, as Python code gives them; names and types are checked first."""

from collections.abc import Collection, Mapping
from typing import Any

from prunelit.data.option_types import ClassOptions
from prunelit.pruning.method import PruningMethod
from prunelit.pruning.registry import get_method_name, method_class
from prunelit.runtime.errors import BadOption


def build_method_by_name(
    method: str | type[PruningMethod] | PruningMethod, options: Mapping[str, Any], others: Collection[str] = ()
) -> PruningMethod:
    """Build a method, or take the one that is given.

    Args:
        method: name of a method (`python -m prunelit methods`), import path of a class, class, or instance.
        options: of the method; none with an instance.
        others: names of the caller's own options, for the message about a misspelt one.

    Raises:
        BadOption: no such method; an option that it does not have, of another type or outside its range; or options
            beside an instance.

    Example:
        >>> build_method_by_name("magnitude", {"ratio": 0.5}).ratio
        0.5
        >>> build_method_by_name("magnitude", {"ratoi": 0.5})
        Traceback (most recent call last):
        ...
        prunelit.runtime.errors.BadOption: magnitude: expected options of the method, got 'ratoi'; did you mean 'ratio'?
    """
    if isinstance(method, PruningMethod):
        if options:
            raise BadOption(f"method: expected no options beside an instance, got {', '.join(options)}")
        return method
    kind = method_class(method) if isinstance(method, str) else method
    if not (isinstance(kind, type) and issubclass(kind, PruningMethod)):
        raise BadOption(f"method: expected a name, a subclass of PruningCallback or an instance, got {method!r:.80}")
    name = get_method_name(kind)
    return kind(**parse_method_options(kind, name, options, others))


def parse_method_options(
    kind: type[PruningMethod], where: str, options: Mapping[str, Any], others: Collection[str] = ()
) -> dict[str, Any]:
    """Check names and types of a method's options.

    Args:
        kind: class of the method.
        where: begins the message.
        options: by name.
        others: names of the caller's own options, for the message about a misspelt one.

    Returns:
        The options that were given, in the types of the method.

    Raises:
        BadOption: an option is unknown, missing or of another type.

    Example: see `build_method_by_name`.
    """
    known = ClassOptions(kind, skip=("calibration", *kind.job_options, *kind.ignored_options))
    return known.parse_mapping(options, where, "options of the method", others)
