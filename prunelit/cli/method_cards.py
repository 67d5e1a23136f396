"""`python -m prunelit methods`: all methods in a table, or the card of one, read off the files' syntax trees.

Nothing is imported but the standard library, so both are there at once.
"""

import ast
import inspect
import json
import re
import textwrap
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

from prunelit.pruning.registry import Method, list_broken_files, method_class, methods
from prunelit.runtime.errors import BadOption

_PACKAGE = Path(__file__).parents[1]
_ROOT = _PACKAGE.parent  # of a clone; an installed package has no configs/ beside it
_SEE_BASE = re.compile(r"(see|as in) `PruningCallback`[;,]? ?(or )?")
_IMPORTED = {"distill": "trains", "fisher": "backward", "taylor": "backward", "search": "search"}
"""What a method imports -> what it needs; the first that is found."""
_WIDTH = 118
NEEDS = {
    "no text": "reads no text",
    "forward": "reads text in forward passes",
    "backward": "reads text in backward passes too",
    "search": "reads text in hundreds of forward passes",
    "trains": "reads text in backward passes, and trains on it for a short while",
}


class Option(NamedTuple):
    """An argument of a method's constructor."""

    name: str
    default: str | None  # as in YAML; None: it must be given
    what: str


def answer_methods_command(arguments: list[str]) -> str:
    """What `python -m prunelit methods` prints.

    Args:
        arguments: the command line after `methods`: nothing, or a method's name; with `--json` as data.

    Raises:
        BadOption: no such method, or more than one.
    """
    names = [argument for argument in arguments if argument != "--json"]
    as_data = len(names) < len(arguments)
    if names and names[0] in ("-h", "--help"):
        return "usage: python -m prunelit methods [NAME] [--json]       all methods, or the card of one; as data"
    if len(names) > 1 or (names and names[0].startswith("-")):
        raise BadOption(f"methods: expected no argument, or one method's name and --json, got {' '.join(names)}")
    if not names:
        found = [describe_method(method) for method in methods().values()]
        found += [{"name": name, "error": said} for name, said in list_broken_files().items()]
        return json.dumps(found, indent=1) if as_data else render_method_table()
    if names[0] not in methods():
        if "." in names[0]:
            raise BadOption(f"methods: expected one of {', '.join(methods())}, got {names[0]!r}; a class has no card")
        method_class(names[0])  # raises with the nearest name
    method = methods()[names[0]]
    return json.dumps(describe_method(method), indent=1) if as_data else render_method_card(method)


def render_method_table() -> str:
    """One line a method: what it needs, its paper, what it does; and one for each file that can not be read."""
    rows = [("method", "needs", "paper", "what it does"), ("", "", "", "")]
    rows += [
        (method.name, determine_needs(method), find_paper(method), _summarize_method(method))
        for method in methods().values()
    ]
    lines = [_wrap_line(f"{name:14} {work:9} {source:11} ", what) for name, work, source, what in rows]
    lines += [_wrap_line(f"{name:14} {'broken':9} ", said) for name, said in list_broken_files().items()]
    legend = [f"{work:9} {meaning}" for work, meaning in NEEDS.items()]
    return "\n".join(
        [*lines, "", *legend, "", "python -m prunelit methods NAME    the card of one: source, options, commands"]
    )


def render_method_card(method: Method) -> str:
    """What a method is and does, its options, and how it is run."""
    options = list_method_options(method.name)
    wide = max(len(option.name) for option in options)
    parts = [f"{method.name}    {NEEDS[determine_needs(method)]}", method.card, "Options and their defaults"]
    for name, default, what in options:
        parts[-1] += "\n" + _wrap_line(f"    {name:{wide}}  {'required' if default is None else default:13} ", what)
    return "\n\n".join([*parts, _render_commands(method)])


def _render_commands(method: Method) -> str:
    name, class_path = method.name, f"prunelit.callbacks.{method.class_name}"
    seven = find_7b_command(name)
    return "\n".join(
        [
            "Cut a model; cut it and recover it; cut the model of a job of yours, on the command line or in Python",
            f"    python -m prunelit prune --model PATH_OR_ID --method {name} --ratio 0.2 --text FILE_OR_ID --out DIR",
            # A list on the command line replaces the file's, with the method in it: so its checkpoints are named again.
            "    python -m prunelit fit --config configs/recover-lora.yaml --trainer.callbacks ModelCheckpoint \\",
            "        --trainer.callbacks.save_last true --trainer.callbacks.every_n_train_steps 50 \\",
            f"        --trainer.callbacks+ {class_path} --trainer.callbacks.ratio 0.2",
            f"    python your_job.py fit --config your_job.yaml --config callbacks/{name}.yaml",
            f"    Trainer(callbacks=[prunelit.{method.class_name}(ratio=0.2)])",
            "",
            "In YAML",
            "    trainer:",
            "      callbacks+:",
            f"        - class_path: {class_path}",
            "          init_args: {ratio: 0.2}",
            "",
            f"    {f'callbacks/{name}.yaml':34} every option, with a comment",
            f"    {f'configs/methods/{name}.yaml':34} on a 7B model{': ' + seven if seven else ''}",
            f"    {f'docs/methods.md#{name}':34} where each equation comes from",
        ]
    )


def describe_method(method: Method) -> dict[str, object]:
    """The same as data."""
    return {
        "name": method.name,
        "class": f"prunelit.callbacks.{method.class_name}",
        "summary": method.summary,
        "needs": determine_needs(method),
        "paper": find_paper(method),
        "options": [option._asdict() for option in list_method_options(method.name)],
    }


def determine_needs(method: Method) -> str:
    """What a method does with text, told from its class and from what it imports."""
    tree = _parse_file(method.path)
    kind = _find_class(method.path, method.class_name)
    if "reads_text = False" in (ast.unparse(node) for node in kind.body):
        return "no text"
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    imported |= {(node.module or "").rpartition(".")[2] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    return next((work for module, work in _IMPORTED.items() if module in imported), "forward")


def find_paper(method: Method) -> str:
    """arXiv number of the source that the card names first; "ours"; or "baseline", where it names none."""
    source = method.card.partition("Source:")[2].strip()
    number = re.search(r"arXiv\s+(\d{4}\.\d{5})", source.partition("\n\n")[0])
    return "ours" if source.startswith("ours") else number[1] if number else "baseline"


def find_7b_command(name: str) -> str | None:
    """The command that the head of a method's 7B config names; None without a clone."""
    path = _ROOT / "configs" / "methods" / f"{name}.yaml"
    found = re.search(r"python -m prunelit .*", path.read_text(encoding="utf-8")) if path.is_file() else None
    return found[0] if found else None


def list_method_options(name: str) -> list[Option]:
    """Constructor arguments of a method, its own first, then those of `PruningMethod` that mean something to it."""
    base = {option.name: option for option in _read_constructor(_PACKAGE / "pruning" / "method.py", "PruningMethod")}
    method = methods()[name]
    kind = _find_class(method.path, method.class_name)
    own = {option.name: option for option in _read_constructor(method.path, method.class_name)}
    for option in own.values():
        if seen := _SEE_BASE.match(option.what):
            whole = f"{base[option.name].what} {option.what[seen.end() :]}"
            own[option.name] = option._replace(what=whole)
    if choices := _read_repair_choices(kind):
        base["repair"] = base["repair"]._replace(what=f"{base['repair'].what} Here: {', '.join(choices)}.")
    rest = _read_argument_docs(ast.get_docstring(kind) or "").get("kwargs", "")
    idle = re.findall(r"`(\w+)`", rest) if "say nothing" in rest else []
    return [*own.values(), *(option for option in base.values() if option.name not in (*own, *idle))]


def _read_repair_choices(kind: ast.ClassDef) -> tuple[str, ...]:
    """What a method's class says that `repair` may be; nothing where it says it in its own `repair`, or not at all."""
    for node in kind.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "repair_choices":
            with suppress(ValueError):  # not spelt out, as where a class adds to those of the base
                return tuple(ast.literal_eval(node.value))
    return ()


def _wrap_line(head: str, text: str) -> str:
    return textwrap.fill(text, _WIDTH, initial_indent=head, subsequent_indent=" " * len(head)) or head.rstrip()


def _summarize_method(method: Method) -> str:
    """The summary without the name in front."""
    said = method.summary.partition(": ")[2].rstrip(".")
    return said[:1].upper() + said[1:]


@cache
def _parse_file(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _find_class(path: Path, name: str) -> ast.ClassDef:
    return next(node for node in _parse_file(path).body if isinstance(node, ast.ClassDef) and node.name == name)


def _read_constructor(path: Path, class_name: str) -> list[Option]:
    """Arguments of a class's `__init__` with their defaults, and what its docstring says of them."""
    kind = _find_class(path, class_name)
    made = next((node for node in kind.body if isinstance(node, ast.FunctionDef) and node.name == "__init__"), None)
    if made is None:
        return []
    said = _read_argument_docs(ast.get_docstring(kind) or "")
    arguments = [*made.args.args[1:], *made.args.kwonlyargs]
    given = [None if node is None else _format_default(node) for node in (*made.args.defaults, *made.args.kw_defaults)]
    defaults = [*[None] * (len(arguments) - len(given)), *given]
    return [Option(a.arg, value, said.get(a.arg, "")) for a, value in zip(arguments, defaults, strict=True)]


def _read_argument_docs(docstring: str) -> dict[str, str]:
    """The section `Args:` of a docstring, one entry an argument, in one line each."""
    section = re.search(r"Args:\n(.*?)(\n\n|\Z)", docstring, re.DOTALL)
    entries = re.split(r"\n(?=\w+: )", inspect.cleandoc("\n" + section[1])) if section else []
    parts = (entry.partition(": ") for entry in entries)
    return {name: re.sub(r"\bNone\b", "null", " ".join(what.split())) for name, _, what in parts}


def _format_default(node: ast.expr) -> str:
    """A default as it stands in YAML."""
    try:
        value = ast.literal_eval(node)
    except ValueError:  # a name or a call
        return ast.unparse(node)
    return value if isinstance(value, str) else json.dumps(value)
