"""`python -m prunelit methods`: a table of all methods, or the card of one, read from the syntax trees of their files.

With `--families` it is a table of the model families. No torch is imported, so the answer comes at once.
"""

import ast
import json
import re
import textwrap

from prunelit.cli.init.files import find_shipped_file
from prunelit.cli.parsing import declarations
from prunelit.cli.parsing.written_options import WrittenOption, list_written_options
from prunelit.pruning.registry import Method, list_broken_files, method_class, methods
from prunelit.report.family_table import list_family_rows, render_family_table
from prunelit.runtime.errors import BadOption

_BASE_REFERENCE = re.compile(r"(see|as in) `PruningCallback`[;,]? ?(or )?")
_NEEDS_BY_IMPORT = {"distill": "trains", "fisher": "backward", "taylor": "backward", "search": "search"}
"""{module that a method imports: what the method needs}; the first match counts."""
_WIDTH = 118
NEEDS = {
    "no text": "reads no text",
    "forward": "reads text in forward passes",
    "backward": "reads text in backward passes too",
    "search": "reads text in hundreds of forward passes",
    "trains": "reads text in backward passes, and trains on it for a short while",
}


def answer_methods_command(arguments: list[str]) -> str:
    """Write what `python -m prunelit methods` prints.

    Args:
        arguments: the command line after `methods`: nothing, a method's name, or `--families` for the table of model
            families; with `--json` as data.

    Raises:
        BadOption: no such method, or more than one name.

    Example:
        >>> json.loads(answer_methods_command(["flap", "--json"]))["class"]
        'prunelit.callbacks.FLAP'
    """
    names = [argument for argument in arguments if argument != "--json"]
    as_data = len(names) < len(arguments)
    if names and names[0] in ("-h", "--help"):
        return (
            "usage: python -m prunelit methods [NAME] [--json]       all methods, or the card of one; as data\n"
            "       python -m prunelit methods --families [--json]   what is cut of each model family, and its formats"
        )
    if names == ["--families"]:
        return json.dumps([row._asdict() for row in list_family_rows()], indent=1) if as_data else render_family_table()
    if len(names) > 1 or (names and names[0].startswith("-")):
        raise BadOption(f"methods: expected no argument, or one method's name and --json, got {' '.join(names)}")
    if not names:
        descriptions = [describe_method(method) for method in methods().values()]
        descriptions += [{"name": name, "error": message} for name, message in list_broken_files().items()]
        return json.dumps(descriptions, indent=1) if as_data else render_method_table()
    if names[0] not in methods():
        if "." in names[0]:
            raise BadOption(f"methods: expected one of {', '.join(methods())}, got {names[0]!r}; a class has no card")
        method_class(names[0])  # raises with the nearest name
    method = methods()[names[0]]
    return json.dumps(describe_method(method), indent=1) if as_data else render_method_card(method)


def render_method_table() -> str:
    """Write one line for each method (needs, paper, purpose) and one line for each file that cannot be read.

    Example:
        >>> render_method_table().splitlines()[0].split()
        ['method', 'needs', 'paper', 'what', 'it', 'does']
    """
    rows = [("method", "needs", "paper", "what it does"), ("", "", "", "")]
    rows += [
        (method.name, determine_needs(method), find_paper(method), _summarize_method(method))
        for method in methods().values()
    ]
    lines = [_wrap_line(f"{name:16} {need:9} {source:11} ", purpose) for name, need, source, purpose in rows]
    lines += [_wrap_line(f"{name:16} {'broken':9} ", message) for name, message in list_broken_files().items()]
    legend = [f"{need:9} {meaning}" for need, meaning in NEEDS.items()]
    return "\n".join(
        [*lines, "", *legend, "", "python -m prunelit methods NAME    the card of one: source, options, commands"]
    )


def render_method_card(method: Method) -> str:
    """Write the card of a method: what it does, its options, and commands that run it.

    Args:
        method: as the registry lists it.

    Example: see `answer_methods_command`.
    """
    options = list_method_options(method.name)
    name_width = max(len(option.name) for option in options)
    parts = [f"{method.name}    {NEEDS[determine_needs(method)]}", method.card, "Options and their defaults"]
    for name, default, documentation in options:
        parts[-1] += "\n" + _wrap_line(
            f"    {name:{name_width}}  {'required' if default is None else default:13} ", documentation
        )
    return "\n\n".join([*parts, _render_commands(method)])


def _render_commands(method: Method) -> str:
    """Write commands that run a method, and where to read more."""
    name, class_path = method.name, f"prunelit.callbacks.{method.class_name}"
    command_7b = find_7b_command(name)
    return "\n".join(
        [
            "Cut a model; cut it and recover it; cut the model of a job of yours, on the command line or in Python",
            f"    python -m prunelit prune --model PATH_OR_ID --method {name} --ratio 0.2 --text FILE_OR_ID --out DIR",
            # A list on the command line replaces the whole list of the file, so ModelCheckpoint is repeated here.
            "    python -m prunelit fit --config configs/recover-lora.yaml --trainer.callbacks ModelCheckpoint \\",
            "        --trainer.callbacks.save_last true --trainer.callbacks.save_on_train_epoch_end false \\",
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
            f"    {f'configs/methods/{name}.yaml':34} on a 7B model{': ' + command_7b if command_7b else ''}",
            f"    {f'docs/methods.md#{name}':34} where each equation comes from",
        ]
    )


def describe_method(method: Method) -> dict[str, object]:
    """Describe a method as data for `--json`.

    Args:
        method: as the registry lists it.

    Example: see `answer_methods_command`.
    """
    return {
        "name": method.name,
        "class": f"prunelit.callbacks.{method.class_name}",
        "summary": method.summary,
        "needs": determine_needs(method),
        "paper": find_paper(method),
        "options": [option._asdict() for option in list_method_options(method.name)],
    }


def determine_needs(method: Method) -> str:
    """Determine what a method does with text, from its class and its imports.

    Args:
        method: as the registry lists it.

    Returns:
        A key of `NEEDS`.

    Example: see `render_method_table`.
    """
    if not declarations.read_class_value(method.module, method.class_name, "reads_text"):
        return "no text"
    tree = ast.parse(method.path.read_text(encoding="utf-8"))
    imported_names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    imported_names |= {
        (node.module or "").rpartition(".")[2] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
    }
    return next((need for module, need in _NEEDS_BY_IMPORT.items() if module in imported_names), "forward")


def find_paper(method: Method) -> str:
    """Find the arXiv number of the source that the card names first.

    Args:
        method: as the registry lists it.

    Returns:
        The number; "ours" for a method of this project; "baseline" where the card names no paper.

    Example: see `render_method_table`.
    """
    source = method.card.partition("Source:")[2].strip()
    number = re.search(r"arXiv\s+(\d{4}\.\d{5})", source.partition("\n\n")[0])
    return "ours" if source.startswith("ours") else number[1] if number else "baseline"


def find_7b_command(name: str) -> str | None:
    """Find the command in the head of a method's 7B config.

    Args:
        name: of the method.

    Returns:
        The command; None where no such file comes with prunelit.

    Example:
        >>> find_7b_command("no such method") is None
        True
    """
    path = find_shipped_file(f"methods/{name}")
    match = re.search(r"python -m prunelit .*", path.read_text(encoding="utf-8")) if path else None
    return match[0] if match else None


def list_method_options(name: str) -> list[WrittenOption]:
    """List the constructor arguments of a method: its own first, then those of its base classes that it uses.

    Args:
        name: of the method.

    Example:
        >>> next(option.default for option in list_method_options("flap") if option.name == "ratio")
        'null'
    """
    base = "prunelit.pruning.callback", "PruningCallback"
    base_options = {option.name: option for option in list_written_options("prunelit.pruning.method", "PruningMethod")}
    for option in list_written_options(*base):
        base_options.setdefault(option.name, option)
    module, class_name = methods()[name].module, methods()[name].class_name
    own_options = {option.name: option for option in list_written_options(module, class_name)}
    for option in own_options.values():
        if reference := _BASE_REFERENCE.match(option.what):
            documentation = f"{base_options[option.name].what} {option.what[reference.end() :]}"
            own_options[option.name] = option._replace(what=documentation)
    repair_choices = declarations.read_class_value(module, class_name, "repair_choices")
    if repair_choices != declarations.read_class_value(*base, "repair_choices"):
        base_options["repair"] = base_options["repair"]._replace(
            what=f"{base_options['repair'].what} Here: {', '.join(repair_choices)}."
        )
    kwargs_docs = declarations.read_documentation(module, class_name).get("kwargs", "")
    unused = re.findall(r"`(\w+)`", kwargs_docs.partition(";")[2])  # named there: those that this method does not use
    unused += declarations.read_class_value(module, class_name, "ignored_options")
    return [
        *own_options.values(),
        *(option for option in base_options.values() if option.name not in (*own_options, *unused)),
    ]


def _wrap_line(head: str, text: str) -> str:
    return textwrap.fill(text, _WIDTH, initial_indent=head, subsequent_indent=" " * len(head)) or head.rstrip()


def _summarize_method(method: Method) -> str:
    """Return the summary without the leading name."""
    summary = method.summary.partition(": ")[2].rstrip(".")
    return summary[:1].upper() + summary[1:]
