"""The one line of a parser's message that says what is wrong."""

import re

from prunelit.runtime.errors import suggest_name


def condense_message(message: str) -> str:
    """The one line of a parser's message that says what is wrong."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    found = _explain_wrong_value(lines) or _pick_telling_line(lines) or "unknown error"
    return re.sub(r'Parser key "([^"]+)":', r"\1:", found)[:400]


def _pick_telling_line(lines: list[str]) -> str:
    where = next((line for line in lines if line.startswith("Parser key")), "")
    union = {name: line for line in lines for name in ("Subtypes: ", "Given value: ") if line.startswith(name)}
    if len(union) == 2 and not union["Given value: "].startswith("Given value: {"):
        kinds = _name_types(union["Subtypes: "].partition(": ")[2].strip("()[]"))
        return f"{where} expected one of {kinds}, got {union['Given value: '].partition(': ')[2]}".strip()
    for number, line in enumerate(lines[:-1]):
        if "Problem with given class_path" in line:
            rest = lines[number + 1 :]
            end = next((i for i, said in enumerate(rest) if not said.endswith(":")), len(rest))
            return " ".join([where, *([] if where else [line.lstrip("- ")]), *rest[: end + 1]]).strip()
    for pattern in ("is not accepted", "unrecognized arguments", "[Nn]o such|does not exist", "Expected a"):
        hit = next((line for line in lines if re.search(pattern, line)), None)
        if hit:
            return (hit if hit == where else f"{where} {hit}").strip()
    return " ".join(lines)


_VALUE_PATTERN = re.compile(
    r'^Parser key "([^"]+)": Expected an? (typing\.Literal\[(.+)\]|<class \'(?:\w+\.)*(\w+)\'>)\. Got value: (.*)$'
)
_TYPE_WORDS = {"str": "text", "int": "a whole number", "float": "a number", "bool": "true or false", "NoneType": "null"}


def _explain_wrong_value(lines: list[str]) -> str:
    """The line about a value of the wrong kind; "" where it is about something else."""
    found = _VALUE_PATTERN.match(" ".join(lines))
    if found is None:
        return ""
    name, _, choices, kind, value = found.groups()
    if kind in ("Sequence", "list"):
        return f"{name}: expected a list, as [{value}], got {value}"
    if choices is None:
        instead = f"nothing; pass --{name}" if value == "None" else repr(value)
        return f"{name}: expected {_TYPE_WORDS.get(kind, kind)}, got {instead}"
    known = re.findall(r"'([^']*)'", choices)
    return f"{name}: expected one of {', '.join(known)}, got {value!r}{suggest_name(value, known)}"


def _name_types(types: str) -> str:
    """A list of Python types, as people call them."""
    said = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", types)
    said = re.sub(r"\b(dict|list)\[[^\[\]]*\]", lambda found: {"dict": "a mapping", "list": "a list"}[found[1]], said)
    said = re.sub(r"typing\.Literal\[([^\]]*)\]", r"\1", said)
    return re.sub(r"\b(" + "|".join(_TYPE_WORDS) + r")\b", lambda found: _TYPE_WORDS[found[1]], said)
