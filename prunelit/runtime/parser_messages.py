"""Condenses the error messages of jsonargparse, which have many lines, to the one that says what is wrong."""

import re

from prunelit.runtime.errors import suggest_name


def condense_message(message: str) -> str:
    r"""Condense a parser's error message to one line of at most 400 characters.

    Args:
        message: of jsonargparse.

    Example:
        >>> condense_message('Parser key "n": Expected a <class \'int\'>. Got value: x')
        "n: expected a whole number, got 'x'"
    """
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    if (missing := _MISSING.search(message)) is not None:
        names = re.split(r",\s*", missing[1].strip())
        return f"{', '.join(names)}: expected a value, got none; pass {' and '.join(f'--{name}' for name in names)}"
    condensed = _explain_wrong_value(lines) or _pick_telling_line(lines) or "unknown error"
    return re.sub(r'Parser key "([^"]+)":', r"\1:", condensed)[:400]


def _pick_telling_line(lines: list[str]) -> str:
    """Pick the lines that say what is wrong, as one line; all lines joined if none is known."""
    where = next((line for line in lines if line.startswith("Parser key")), "")
    union = {name: line for line in lines for name in ("Subtypes: ", "Given value: ") if line.startswith(name)}
    if len(union) == 2 and not union["Given value: "].startswith("Given value: {"):
        kinds = _name_types(union["Subtypes: "].partition(": ")[2].strip("()[]"))
        return f"{where} expected one of {kinds}, got {union['Given value: '].partition(': ')[2]}".strip()
    for number, line in enumerate(lines[:-1]):
        if "Problem with given class_path" in line:
            rest = lines[number + 1 :]
            end = next((i for i, following in enumerate(rest) if not following.endswith(":")), len(rest))
            return " ".join([where, *([] if where else [line.lstrip("- ")]), *rest[: end + 1]]).strip()
    for pattern in ("is not accepted", "unrecognized arguments", "[Nn]o such|does not exist", "Expected a"):
        match = next((line for line in lines if re.search(pattern, line)), None)
        if match:
            return (match if match == where else f"{where} {match}").strip()
    return " ".join(lines)


_MISSING = re.compile(r"following arguments are required: ([\w., ]+)")
_VALUE_PATTERN = re.compile(
    r'^Parser key "([^"]+)": Expected an? (typing\.Literal\[(.+)\]|<class \'(?:\w+\.)*(\w+)\'>)\. Got value: (.*)$'
)
_TYPE_WORDS = {"str": "text", "int": "a whole number", "float": "a number", "bool": "true or false", "NoneType": "null"}


def _explain_wrong_value(lines: list[str]) -> str:
    """Explain a value of the wrong type in one line; "" if the message is about something else."""
    match = _VALUE_PATTERN.match(" ".join(lines))
    if match is None:
        return ""
    name, _, choices, kind, value = match.groups()
    if kind in ("Sequence", "list"):
        return f"{name}: expected a list, as [{value}], got {value}"
    if choices is None:
        got = f"nothing; pass --{name}" if value == "None" else repr(value)
        return f"{name}: expected {_TYPE_WORDS.get(kind, kind)}, got {got}"
    known = re.findall(r"'([^']*)'", choices)
    return f"{name}: expected one of {', '.join(known)}, got {value!r}{suggest_name(value, known)}"


def _name_types(types: str) -> str:
    """Replace Python types in a text by the words that people use for them."""
    text = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", types)
    text = re.sub(r"\b(dict|list)\[[^\[\]]*\]", lambda match: {"dict": "a mapping", "list": "a list"}[match[1]], text)
    text = re.sub(r"typing\.Literal\[([^\]]*)\]", r"\1", text)
    text = re.sub(r"(?:collections\.abc\.|typing\.)Sequence\[([^\]]*)\]", r"a list of \1", text)
    return re.sub(r"\b(" + "|".join(_TYPE_WORDS) + r")\b", lambda match: _TYPE_WORDS[match[1]], text)
