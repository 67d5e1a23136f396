"""`python -m prunelit plan`: what a cut would leave and what serves it, with no weight touched.

    plan --model M --method flap --ratio 0.2 --out plan.json     scores and plans as `prune` with these options
    plan --config configs/recover-lora.yaml                      scores and plans as `fit` with this file
    plan --plan plan.json                                        loads no weights and no text

`plan show` and `plan diff`, which need files only, are in `prunelit.cli.plan_files`.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from prunelit import export
from prunelit.cli.console import say
from prunelit.cli.options import add_method, method_of, parse, parser_of, peek
from prunelit.core.plan import LayerPlan, PruningPlan
from prunelit.core.scores import Unit
from prunelit.data import loading, offloaded, text
from prunelit.data import sources as model_source
from prunelit.data.loading import load_on, place
from prunelit.data.option_types import Dtype, listed
from prunelit.model import surgery
from prunelit.model.decoder import Decoder
from prunelit.model.folder import settings
from prunelit.model.modes import on_device
from prunelit.planning import latency
from prunelit.pruning.callback import pruner_of
from prunelit.pruning.job import find_model
from prunelit.report.plan_card import Measured, card
from prunelit.runtime.errors import BadOption, BadPlan
from prunelit.runtime.text_files import write_text


class Job(NamedTuple):
    """What `fit` runs: a Trainer, a RecoveryModule and a TextDataModule, built but not run."""

    trainer: Any
    module: Any
    data: Any


Made = tuple[PruningPlan, Measured | None]


def make(
    model: str | None,
    sources: Sequence[str],
    method: Any,
    dtype: Dtype = "auto",
    device: str = "auto",
    stream: bool = False,
    memory_gib: float | None = None,
    measured: bool = False,
) -> Made:
    """The plan that `prune` with the same arguments cuts by.

    Args:
        model: model source; with a plan to replay it may be None.
        sources: calibration text sources; read if the scores need text.
        method: a `PruningCallback`.
        dtype: of scoring.
        device: "cpu", "cuda", "cuda:1", ...; "auto" takes a GPU if there is one.
        stream: leave the decoder layers on disk and load one at a time.
        memory_gib: with `stream`, most weights and activations held at once, GiB.
        measured: measure small shapes of the model as well.

    Returns:
        The plan, and the time that it saves if asked for.
    """
    replayed: PruningPlan | None = method.replayed
    if model is not None:
        model_source.check_prunable(model)
    if replayed is not None and not measured:
        if model is not None:
            _check_config(replayed, model)
        return replayed, None
    if model is None:
        raise BadOption("model: expected a model source, got none; a plan alone is read with `plan show FILE`")
    offloaded.check_request(model, stream, memory_gib)
    if stream and measured:
        raise BadOption("latency: expected a model in memory, got --stream true; leave one of them out")
    reads = method.reads_text and replayed is None
    batches = []
    if reads:
        model_source.check_length(model, method.seqlen)
        for source in sources:
            text.check_source(source)
        batches = method.batches_from(list(sources), loading.load_tokenizer(model))
    network = offloaded.load(model, dtype, place(device), memory_gib) if stream else load_on(model, dtype, device)
    with nullcontext() if stream else on_device(network, place(device)):
        plan = method.decide(network, batches) if replayed is None else replayed
        return plan, _measure(network, method, plan) if measured else None


def of_job(job: Job, measured: bool) -> Made:
    """The plan that `fit` with the same arguments cuts by; scores are kept where that run finds them.

    Raises:
        BadOption: there is not exactly one pruning callback.
    """
    method, source = pruner_of(job.trainer, "plan"), str(job.module.hparams["model"])
    assert method is not None
    if method.replayed is not None and not measured:
        _check_config(method.replayed, source)
        return method.replayed, None
    if method.reads_text and method.replayed is None:
        job.trainer.datamodule, job.data.trainer = job.data, job.trainer
        job.data.prepare_data()
        job.data.setup("fit")
    plan = method.decide_for(job.trainer, job.module) if method.replayed is None else method.replayed
    if not measured:
        return plan, None
    network = find_model(job.module)
    with on_device(network, job.trainer.strategy.root_device):
        return plan, _measure(network, method, plan)


def _measure(network: Any, method: Any, plan: PruningPlan) -> Measured:
    """Seconds of the layers at the planned widths, between a few that are measured."""
    decoder = Decoder(network)
    surgery.check_fits(decoder, plan)
    unit: Unit = "query_head" if plan.options.get("unit") == "query_head" else "kv_group"
    table = latency.measure(decoder, unit, plan.options.get("align") or method.align)  # a replay has none of its own
    pairs = list(zip(plan.layers, plan.model.layers, strict=True))
    dense = sum(table.seconds(shape, *LayerPlan.dense(shape).widths) for _, shape in pairs)
    return Measured(dense, sum(table.seconds(shape, *kept.widths) for kept, shape in pairs), table.record)


def _check_config(plan: PruningPlan, source: str) -> None:
    """A plan against the config.json of a local folder; other sources are checked when they are cut.

    Raises:
        BadPlan: it was made for another model.
    """
    config = settings(Path(source).expanduser())
    made_for = {"model_type": plan.model.model_type, "hidden_size": plan.model.hidden_size}
    made_for |= {"num_hidden_layers": len(plan.model.layers)}
    for name, wanted in made_for.items():
        found = config.get(name, wanted)
        if found != wanted:
            raise BadPlan(
                f"plan: made for another model: {name} {wanted!r} ({plan.model.name}), got {found!r} ({source}); "
                "make a plan for this model, or load the dense one"
            )


def run(command: str, arguments: list[str], job_of: Callable[[list[str]], Job]) -> int:
    """`python -m prunelit plan`.

    Args:
        command: "plan".
        arguments: command line after it.
        job_of: what builds the job of a `fit` command line.

    """
    start = time.perf_counter()
    if _is_fit(arguments):
        out, measured, overwrite, rest = _own(arguments)
        _check_out(out, overwrite)
        plan, time_saved = of_job(job_of(rest), measured)
    else:
        parser = parser_of(command, "what a cut would leave, and what serves it; no weight is touched")
        kind = add_method(parser, arguments, "llm_bip")
        needs_model = not peek("plan", arguments)
        parser.add_argument(
            "--model", type=str if needs_model else str | None, required=needs_model, help="model source"
        )
        parser.add_argument("--out", type=str | None, default=None, help="write the plan to this file")
        parser.add_argument("--latency", type=bool, default=False, help="measure small shapes of the model as well")
        parser.add_argument("--overwrite", type=bool, default=False, help="replace the file of --out")
        parser.add_function_arguments(make, None, skip={"model", "method", "sources", "measured"}, sub_configs=False)
        options = parse(parser, arguments)
        out = options.out
        _check_out(out, options.overwrite)
        same = ("dtype", "device", "stream", "memory_gib")
        method = method_of(kind, options, (*same, "model", "out", "latency", "overwrite"))
        named = {name: options[name] for name in same}
        plan, time_saved = make(options.model, listed(options.text), method, measured=options.latency, **named)
    say(card(plan, time_saved))
    if out:
        write_text(Path(out), plan.to_json())
        took = time.perf_counter() - start
        say(f"\n{out}: the plan, in {took:.0f} s; edit it, then: prune --model M --plan {out} --out DIR")
    return 0


def _is_fit(arguments: list[str]) -> bool:
    """Whether the files of --config are those of `fit`: they have a trainer, or a model with options."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", action="append", default=[])
    for path in finder.parse_known_args(arguments)[0].config:
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            continue  # the parser itself says what is wrong with it
        if isinstance(content, dict) and ("trainer" in content or isinstance(content.get("model"), dict)):
            return True
    return False


def _own(arguments: list[str]) -> tuple[str | None, bool, bool, list[str]]:
    """Our own options among those of `fit`: out, latency, overwrite, and the rest."""
    ours = argparse.ArgumentParser(prog="prunelit plan", add_help=False, allow_abbrev=False, exit_on_error=False)
    ours.add_argument("--out")
    for name in ("--latency", "--overwrite"):
        ours.add_argument(name, nargs="?", const="true", default="false", choices=["true", "false"])
    found, rest = ours.parse_known_args(arguments)
    return found.out, found.latency == "true", found.overwrite == "true", rest


def _check_out(out: str | None, overwrite: bool) -> None:
    """Before any work is done.

    Raises:
        OutputNotWritable: a folder or another plan is in the way, or the folder can not be written.
    """
    if out is not None:
        export.check_output(out, overwrite, file=True)
