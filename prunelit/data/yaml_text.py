"""YAML that anybody may have written: what is nested without end, or stands for endlessly many values, is an error."""

from typing import Any

import yaml

_DEEPEST = 64
_MOST_VALUES = 100_000


def parse_yaml(text: str) -> Any:
    """Parse YAML as `yaml.safe_load` does, but refuse what takes minutes or no end afterwards.

    Aliases are counted as what they stand for: ten lines of them stand for 10^10 values, which whoever walks through
    the result would visit one by one.

    Args:
        text: the content of a file.

    Raises:
        yaml.YAMLError: no YAML; nested more than 64 levels deep; more than 100,000 values; or an alias inside of what
            it stands for.

    Example:
        >>> parse_yaml("a: &x [1, 2]\\nb: *x")
        {'a': [1, 2], 'b': [1, 2]}
        >>> parse_yaml("a: &x [*x]")
        Traceback (most recent call last):
        yaml.constructor.ConstructorError: expected plain values, got an alias inside of what it stands for
          in "<unicode string>", line 1, column 8:
            a: &x [*x]
                   ^
    """
    values_by_anchor: dict[str, int] = {}
    open_nodes: list[tuple[str | None, int]] = []  # anchor, and how many values came before the node
    count = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, count))
            count += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            if anchor:
                values_by_anchor[anchor] = count - before
        elif isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, _ in open_nodes):
                raise _build_error("an alias inside of what it stands for", event)
            count += values_by_anchor.get(str(event.anchor), 1)
        elif isinstance(event, yaml.ScalarEvent):
            count += 1
        if len(open_nodes) > _DEEPEST:
            raise _build_error(f"more than {_DEEPEST} levels", event)
        if count > _MOST_VALUES:
            raise _build_error(f"more than {_MOST_VALUES:,} of them, aliases included", event)
    return yaml.safe_load(text)


def _build_error(problem: str, event: yaml.Event) -> yaml.YAMLError:
    mark: Any = event.start_mark
    return yaml.constructor.ConstructorError(problem=f"expected plain values, got {problem}", problem_mark=mark)
