"""Options as functions and classes declare them, read from syntax trees: a parser is built without importing torch.

A function that loads models lives in a module that imports torch, transformers or Lightning, which takes seconds. Its
signature and docstring say all that a parser asks for. They are read from the file, and what annotations and defaults
name is looked up in the files that define it. What cannot be read so is imported, which is slow and right.
"""

import ast
import builtins
import dataclasses
import importlib
import importlib.util
import inspect
import re
import sys
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

_READABLE_CALLS = {"get_args": typing.get_args}
_OPERATORS: dict[type, Callable[[Any, Any], Any]] = {ast.BitOr: lambda a, b: a | b, ast.Add: lambda a, b: a + b}


class UnreadableExpression(Exception):
    """An expression needs an import that may be slow; the message names it.

    Example: see `evaluate_expression`.
    """


class _ModuleName(NamedTuple):
    """A module of which names are read, but which is not imported."""

    path: str


@cache
def find_source(module: str) -> Path:
    """Find the file of a module without importing it or its parents.

    Args:
        module: its dotted name.

    Raises:
        UnreadableExpression: it is not installed, or has no Python file.

    Example:
        >>> find_source("prunelit.cli.parsing").name
        '__init__.py'
    """
    top, *parts = module.split(".")
    spec = importlib.util.find_spec(top)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder, *parts)
        for candidate in (path / "__init__.py", path.with_suffix(".py")):
            if candidate.is_file():
                return candidate
    raise UnreadableExpression(f"module {module}")


@cache
def parse_module(module: str) -> Mapping[str, ast.AST]:
    """Read the names that a module defines at its top level, those under `if TYPE_CHECKING` too.

    Args:
        module: its dotted name.

    Returns:
        {name: the definition, or the import}.

    Raises:
        UnreadableExpression: as `find_source`.

    Example:
        >>> type(parse_module("prunelit.data.option_types")["Sources"]).__name__
        'Assign'
    """
    tree = ast.parse(find_source(module).read_text(encoding="utf-8"))
    return dict(_list_definitions(tree.body))


def _list_definitions(statements: list[ast.stmt]) -> Iterator[tuple[str, ast.AST]]:
    for node in statements:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name, node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Name):
                    yield target.id, node
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((alias.asname or alias.name.partition(".")[0], node) for alias in node.names)
        elif isinstance(node, ast.If):
            yield from _list_definitions(node.body)


def evaluate_expression(node: ast.AST, module: str) -> Any:
    """Evaluate an annotation or a default as it stands in a module.

    Args:
        node: the expression.
        module: dotted name of the module, in which its names are looked up.

    Raises:
        UnreadableExpression: it calls something, or names what only a slow import would give.

    Example:
        >>> evaluate_expression(ast.parse("Sources | None", mode="eval").body, "prunelit.data.option_types")
        str | list[str] | None
    """
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        return resolve_name(node.id, module)
    if isinstance(node, ast.Tuple | ast.List):
        values = [evaluate_expression(element, module) for element in node.elts]
        return values if isinstance(node, ast.List) else tuple(values)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -evaluate_expression(node.operand, module)
    if isinstance(node, ast.Attribute):
        owner = evaluate_expression(node.value, module)
        return resolve_name(node.attr, owner.path) if isinstance(owner, _ModuleName) else getattr(owner, node.attr)
    if isinstance(node, ast.Subscript):
        return evaluate_expression(node.value, module)[evaluate_expression(node.slice, module)]
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = evaluate_expression(node.left, module), evaluate_expression(node.right, module)
        return _OPERATORS[type(node.op)](left, right)
    if isinstance(node, ast.Call) and (call := _READABLE_CALLS.get(ast.unparse(node.func))) and not node.keywords:
        return call(*(evaluate_expression(argument, module) for argument in node.args))
    raise UnreadableExpression(f"{module}: {ast.unparse(node)}")


def resolve_name(name: str, module: str) -> Any:
    """Look up what a name means in a module.

    Args:
        name: as it stands in the module.
        module: its dotted name.

    Returns:
        The value; for a dataclass one with the same fields, see `build_real_value`.

    Raises:
        UnreadableExpression: as `evaluate_expression`.

    Example:
        >>> resolve_name("BUILTIN_TEXT", "prunelit.data.text")
        'builtin:python-docs'
    """
    node = parse_module(module).get(name)
    if node is None:
        if hasattr(builtins, name):
            return getattr(builtins, name)
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        if node.value is not None:
            return evaluate_expression(node.value, module)
    elif isinstance(node, ast.ClassDef):
        if any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
            return declare_dataclass(module, name)
    elif isinstance(node, ast.Import | ast.ImportFrom):
        return _resolve_import(name, node)
    raise UnreadableExpression(f"{module}: {name}")


def _resolve_import(name: str, node: ast.Import | ast.ImportFrom) -> Any:
    """Follow an import: into files of prunelit by reading them, into the standard library by importing it."""
    alias = next(alias for alias in node.names if (alias.asname or alias.name.partition(".")[0]) == name)
    if isinstance(node, ast.Import):
        path, member = alias.name, ""
    else:
        path, member = node.module or "", alias.name
    if path.partition(".")[0] in sys.stdlib_module_names:
        imported = importlib.import_module(path)
        return getattr(imported, member) if member else imported
    if path.partition(".")[0] != "prunelit":
        raise UnreadableExpression(f"{path} {member}")
    if not member:
        return _ModuleName(path)
    try:
        find_source(f"{path}.{member}")
    except UnreadableExpression:
        return resolve_name(member, path)
    return _ModuleName(f"{path}.{member}")


@cache
def declare_dataclass(module: str, name: str) -> type:
    """Declare a dataclass with the fields of another one, whose module is not imported.

    Args:
        module: that defines it.
        name: of the class.

    Raises:
        UnreadableExpression: as `evaluate_expression`.

    Example:
        >>> declare_dataclass("prunelit.evaluation.speed", "Speed")(prompt=128).repeats
        7
    """
    node = typing.cast(ast.ClassDef, parse_module(module)[name])
    fields: list[tuple[str, Any, Any]] = []
    for field, (statement, home) in _read_fields(module, name).items():
        kind = evaluate_expression(statement.annotation, home)
        default = dataclasses.MISSING if statement.value is None else evaluate_expression(statement.value, home)
        fields.append((field, kind, dataclasses.field(default=default)))

    # jsonargparse finds a class by its module and name.
    members = {"__doc__": ast.get_docstring(node), "__module__": __name__}
    globals()[name] = declared = dataclasses.make_dataclass(name, fields, namespace=members)
    _HOME_BY_DATACLASS[declared] = module
    return declared


_HOME_BY_DATACLASS: dict[type, str] = {}
"""{declared dataclass: the module of the real one}."""


def build_real_value(value: Any) -> Any:
    """Build the real dataclass of an instance of a declared one; any other value is returned as it is.

    Args:
        value: of an option.

    Example:
        >>> build_real_value(declare_dataclass("prunelit.evaluation.speed", "Speed")(prompt=128)).tokens_in_cache
        128
    """
    module = _HOME_BY_DATACLASS.get(type(value))
    return value if module is None else getattr(importlib.import_module(module), type(value).__name__)(**vars(value))


def list_fields(module: str, name: str) -> list[str]:
    """List the fields of a dataclass, those of its base classes first.

    Args:
        module: that defines it.
        name: of the class.

    Example:
        >>> list_fields("prunelit.evaluation.perplexities", "Text")
        ['text', 'seqlen', 'windows', 'stride', 'file']
    """
    return list(_read_fields(module, name))


def _read_fields(module: str, name: str) -> dict[str, tuple[ast.AnnAssign, str]]:
    """The fields of a class, those of its base classes first, and the modules that declare them."""
    node = typing.cast(ast.ClassDef, parse_module(module)[name])
    fields: dict[str, tuple[ast.AnnAssign, str]] = {}
    for base in _list_bases(node, module):
        fields |= _read_fields(*base)
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            fields[statement.target.id] = statement, module
    return fields


def _list_bases(node: ast.ClassDef, module: str) -> list[tuple[str, str]]:
    """The module and name of every base class that is defined in prunelit."""
    bases = []
    for base in node.bases:
        name, home = ast.unparse(base).rpartition(".")[2], module
        imported = parse_module(module).get(name)
        if isinstance(imported, ast.ImportFrom) and str(imported.module).startswith("prunelit."):
            home = str(imported.module)
        if isinstance(parse_module(home).get(name), ast.ClassDef):
            bases.append((home, name))
    return bases


def declare_function(module: str, name: str, skip: Collection[str] = ()) -> Callable[..., Any]:
    """Declare a function with the signature and docstring of another one, whose module is not imported.

    Args:
        module: that defines it.
        name: of the function, or of a class, whose constructor is declared.
        skip: names of parameters that are left out.

    Returns:
        A function for a parser. It cannot be called.

    Example:
        >>> str(inspect.signature(declare_function("prunelit.data.option_types", "wrap_in_list")))
        '(*, values: str | collections.abc.Sequence[str])'
    """
    try:
        node = parse_module(module)[name]
        is_class = isinstance(node, ast.ClassDef)
        parameters = read_constructor(module, name) if is_class else _read_parameters(node, module, skip)
        return build_function(name, parameters, ast.get_docstring(node) or "")  # type: ignore[arg-type]
    except UnreadableExpression:
        declared: Callable[..., Any] = getattr(importlib.import_module(module), name)
        return declared


def build_function(name: str, parameters: list[inspect.Parameter], documentation: str) -> Callable[..., Any]:
    """Build a function that has a signature and a docstring, and does nothing.

    Args:
        name: of the function.
        parameters: of its signature.
        documentation: its docstring.

    Example: see `declare_function`.
    """

    def declared(**options: Any) -> None:
        raise TypeError(f"{name} is a declaration")

    # jsonargparse looks for the name in the packages around this module, which would import what has it.
    declared.__name__ = declared.__qualname__ = f"declared_{name}"
    declared.__doc__ = documentation
    declared.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return declared


def find_function(module: str, class_name: str, function: str = "__init__") -> ast.FunctionDef | None:
    """Find the definition of a function in the body of a class; None where the class does not define it.

    Args:
        module: that defines the class.
        class_name: of the class.
        function: its name.

    Raises:
        UnreadableExpression: as `find_source`.

    Example:
        >>> find_function("prunelit.callbacks.flap", "FLAP", "no such function") is None
        True
    """
    body = typing.cast(ast.ClassDef, parse_module(module)[class_name]).body
    return next((node for node in body if isinstance(node, ast.FunctionDef) and node.name == function), None)


def read_constructor(module: str, name: str) -> list[inspect.Parameter]:
    """Read the options of a class: those of its constructor, and, behind `**kwargs`, those of its base classes.

    Args:
        module: that defines it.
        name: of the class.

    Raises:
        UnreadableExpression: as `evaluate_expression`.

    Example:
        >>> [option.name for option in read_constructor("prunelit.callbacks.llm_bip", "LLMBIP")][:3]
        ['ratio', 'form', 'propagate_ffn']
    """
    node = typing.cast(ast.ClassDef, parse_module(module)[name])
    constructor = find_function(module, name)
    own = [] if constructor is None else _read_parameters(constructor, module)
    if constructor is not None and constructor.args.kwarg is None:
        return own
    taken = {parameter.name for parameter in own}
    for base in _list_bases(node, module):
        own += [parameter for parameter in read_constructor(*base) if parameter.name not in taken]
    return own


def _read_parameters(node: ast.AST, module: str, skip: Collection[str] = ("self",)) -> list[inspect.Parameter]:
    """Read the parameters of a function but for `*args` and `**kwargs`."""
    arguments = typing.cast(ast.FunctionDef, node).args
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [*[None] * (len(positional) - len(arguments.defaults)), *arguments.defaults, *arguments.kw_defaults]
    return [
        inspect.Parameter(
            argument.arg,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if default is None else evaluate_expression(default, module),
            annotation=Any if argument.annotation is None else evaluate_expression(argument.annotation, module),
        )
        for argument, default in zip([*positional, *arguments.kwonlyargs], defaults, strict=True)
        if argument.arg not in skip
    ]


def read_class_value(module: str, class_name: str, name: str) -> Any:
    """Read what a class, or the first of its base classes that does, sets a name to.

    Args:
        module: that defines the class.
        class_name: of the class.
        name: of the attribute.

    Raises:
        UnreadableExpression: none sets it, or as `evaluate_expression`.

    Example:
        >>> read_class_value("prunelit.callbacks.flap", "FLAP", "cut_options")
        ()
    """
    node = typing.cast(ast.ClassDef, parse_module(module)[class_name])
    for statement in node.body:
        target = statement.targets[0] if isinstance(statement, ast.Assign) else getattr(statement, "target", None)
        value = getattr(statement, "value", None)
        if isinstance(target, ast.Name) and target.id == name and value is not None:
            return evaluate_expression(value, module)
    for base in _list_bases(node, module):
        try:
            return read_class_value(*base, name)
        except UnreadableExpression:
            continue
    raise UnreadableExpression(f"{module}: {class_name}.{name}")


def read_documentation(module: str, name: str) -> dict[str, str]:
    """Read the section `Args:` of a function's or class's docstring.

    Args:
        module: that defines it.
        name: of the function or class.

    Returns:
        {argument: what is said of it, in one line}.

    Example:
        >>> read_documentation("prunelit.data.option_types", "wrap_in_list")
        {}
    """
    node = parse_module(module)[name]
    text = ast.get_docstring(node) or ""  # type: ignore[arg-type]
    if "Args:\n" not in text and isinstance(node, ast.ClassDef) and (constructor := find_function(module, name)):
        text = ast.get_docstring(constructor) or ""
    section = re.search(r"Args:\n(.*?)(\n\S|\Z)", text, re.DOTALL)
    entries = re.split(r"\n(?=\w+: )", inspect.cleandoc("\n" + section[1])) if section else []
    return {name: " ".join(what.split()) for name, _, what in (entry.partition(": ") for entry in entries)}
