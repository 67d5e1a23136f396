"""Every YAML on disk: it is parsed by the command it names, explains every option, and runs on a small random model."""

import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
CALLBACKS = sorted((ROOT / "callbacks").glob("*.yaml"))


def leaves(node: yaml.Node, path: str = "") -> list[tuple[str, int, int]]:
    """(dotted name, first line, last line) of every option: a key with a scalar, or with a collection in one line."""
    found = []
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = f"{path}.{key.value}".lstrip(".")
            inline = isinstance(value, yaml.ScalarNode) or value.flow_style
            if inline:
                found += [(name, key.start_mark.line, value.end_mark.line)]
            elif isinstance(value, yaml.SequenceNode) and all(isinstance(x, yaml.ScalarNode) for x in value.value):
                found += [(name, key.start_mark.line, key.start_mark.line)]
            else:
                found += leaves(value, name)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            found += leaves(item, path)
    return found


def uncommented(text: str) -> list[str]:
    """Options without a comment in their line or on a line of its own right above."""
    lines = text.splitlines()

    def explained(first: int, last: int) -> bool:
        own = any(re.search(r"\s#\s", line) for line in lines[first : last + 1])
        return own or lines[max(0, first - 1)].lstrip().startswith("# ")

    return [name for name, first, last in leaves(yaml.compose(text)) if not explained(first, last)]
