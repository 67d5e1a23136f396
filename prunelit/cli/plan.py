"""`python -m prunelit plan`: what a cut would leave and what serves it, with no weight touched.

    plan --model M --method flap --ratio 0.2 --out plan.json     scores and plans as `prune` with these options
    plan --config configs/recover-lora.yaml                      scores and plans as `fit` with this file
    plan --plan plan.json                                        loads no weights and no text
    plan --model M --memory 12GiB                                what it would take, from config.json alone

`plan show` and `plan diff`, which need files only, are in `prunelit.cli.plan_files`.
"""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from prunelit import export
from prunelit.cli.console import print_result, report_result
from prunelit.cli.method_cards import determine_needs
from prunelit.cli.parsing.fit_options import is_fit_config, split_plan_options
from prunelit.cli.parsing.options import build_method, peek_option
from prunelit.cli.parsing.parsers import parse_command
from prunelit.core.plan import LayerPlan, PruningPlan
from prunelit.core.scores import Unit
from prunelit.data import loading, offloaded, text
from prunelit.data.loading import choose_device, load_on_device
from prunelit.data.model_shape import read_model_shape
from prunelit.data.option_types import Dtype, wrap_in_list
from prunelit.data.sources import check_prunable_source, check_sequence_length
from prunelit.model import surgery
from prunelit.model.decoder import Decoder
from prunelit.model.modes import move_to_device
from prunelit.model.stored.folder import read_model_config
from prunelit.planning import latency
from prunelit.planning.overshoot import describe_overshoot
from prunelit.pruning.callback import PruningCallback, find_pruner
from prunelit.pruning.job import find_model
from prunelit.pruning.registry import methods
from prunelit.report.estimate import ScoringWork, render_estimate
from prunelit.report.plan_card import MeasuredLatency, render_plan_card
from prunelit.runtime.errors import BadOption, BadPlan
from prunelit.runtime.text_files import write_text

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

    from prunelit.recovery.datamodule import TextDataModule


class FitJob(NamedTuple):
    """What `fit` runs: a Trainer, a RecoveryModule and a TextDataModule, built but not run.

    Example: see `prunelit.cli.fit`, which uses it.
    """

    trainer: Any  # a Trainer, whose data module and callbacks Lightning does not declare
    module: "LightningModule"
    data: "TextDataModule"


PlanResult = tuple[PruningPlan, MeasuredLatency | None]


def make_model_plan(
    model: str | None,
    sources: Sequence[str],
    method: PruningCallback,
    dtype: Dtype = "auto",
    device: str = "auto",
    stream: bool = False,
    memory_gib: float | None = None,
    measured: bool = False,
) -> PlanResult:
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

    Example: `make_model_plan` is used further down in this module.
    """
    given_plan: PruningPlan | None = method.given_plan
    if model is not None:
        check_prunable_source(model)
        method.check_source(model)
    if given_plan is not None and not measured:
        if model is not None:
            _check_plan_config(given_plan, model)
        return given_plan, None
    if model is None:
        raise BadOption("model: expected a model source, got none; a plan alone is read with `plan show FILE`")
    offloaded.check_streaming_options(model, stream, memory_gib)
    if method.size_target.is_asked:
        method.check_size_target(read_model_shape(model, dtype, choose_device(device).type == "cpu"))
    if stream and measured:
        raise BadOption("latency: expected a model in memory, got --stream true; leave one of them out")
    reads = method.reads_text and given_plan is None
    batches = []
    if reads:
        check_sequence_length(model, method.seqlen)
        for source in sources:
            text.check_text_source(source)
        batches = method.make_batches(list(sources), loading.load_text_reader(model))
    network = (
        offloaded.load_offloaded(model, dtype, choose_device(device), memory_gib)
        if stream
        else load_on_device(model, dtype, device)
    )
    with nullcontext() if stream else move_to_device(network, choose_device(device)):
        plan = method.plan_model(network, batches) if given_plan is None else given_plan
        return plan, _measure_latency(network, method, plan) if measured else None


def describe_estimate(
    model: str | None, method: PruningCallback, dtype: Dtype = "auto", device: str = "auto", stream: bool = False
) -> str:
    """Describe what a cut would take and leave, from a model's config.json alone: no weight and no text is read.

    Args:
        model: model source; the config of a hub id is fetched.
        method: with the target or ratio, and the options that decide how it is reached.
        dtype: of the weights.
        device: that would score; its speed is measured with one matrix product.
        stream: layers stay on disk while they are scored.

    Raises:
        BadOption: no model, or one whose shape its config does not tell; or the model is small enough.
        InfeasibleBudget: no cut is that small.

    Example: see `tests/planning/test_recipes.py`.
    """
    if model is None:
        raise BadOption("estimate: expected a model source, got none; give --model")
    check_prunable_source(model)
    method.check_source(model)
    target_device = choose_device(device)
    shape = read_model_shape(model, dtype, target_device.type == "cpu", fetch=True)
    if shape is None:
        raise BadOption(f"estimate: expected a model with plain weights, got {model!r}; leave --estimate out")
    needs = determine_needs(methods()[method.name]) if method.name in methods() else None
    scoring = ScoringWork(needs, method.windows * method.seqlen, stream)
    if scoring.passes is not None:
        scoring = scoring._replace(rate=latency.measure_product_rate(target_device, dtype, shape.bytes_per_element))
    return render_estimate(method.estimate_plan(shape), method.size_target, scoring)


def make_job_plan(job: FitJob, measured: bool) -> PlanResult:
    """The plan that `fit` with the same arguments cuts by; scores are kept where that run finds them.

    Raises:
        BadOption: there is not exactly one pruning callback.

    Example: `make_job_plan` is used further down in this module.
    """
    method, source = find_pruner(job.trainer, "plan"), str(job.module.hparams["model"])
    assert method is not None
    if method.given_plan is not None and not measured:
        _check_plan_config(method.given_plan, source)
        return method.given_plan, None
    if method.reads_text and method.given_plan is None:
        job.trainer.datamodule, job.data.trainer = job.data, job.trainer
        job.data.prepare_data()
        job.data.setup("fit")
    plan = method.plan_job(job.trainer, job.module) if method.given_plan is None else method.given_plan
    if not measured:
        return plan, None
    network = find_model(job.module)
    with move_to_device(network, job.trainer.strategy.root_device):
        return plan, _measure_latency(network, method, plan)


def _measure_latency(network: nn.Module, method: PruningCallback, plan: PruningPlan) -> MeasuredLatency:
    """Seconds of the layers at the planned widths, between a few that are measured."""
    decoder = Decoder(network)
    surgery.check_plan_fits(decoder, plan)
    unit: Unit = "query_head" if plan.options.get("unit") == "query_head" else "kv_group"
    table = latency.measure_latency_table(
        decoder, unit, plan.options.get("align") or method.align
    )  # a replay has none of its own
    pairs = list(zip(plan.layers, plan.model.layers, strict=True))
    dense = sum(table.estimate_seconds(shape, *LayerPlan.dense(shape).widths) for _, shape in pairs)
    return MeasuredLatency(
        dense, sum(table.estimate_seconds(shape, *kept.widths) for kept, shape in pairs), table.record
    )


def _check_plan_config(plan: PruningPlan, source: str) -> None:
    """A plan against the config.json of a local folder; other sources are checked when they are cut.

    Raises:
        BadPlan: it was made for another model.
    """
    config = read_model_config(Path(source).expanduser())
    made_for = {"model_type": plan.model.model_type, "hidden_size": plan.model.hidden_size}
    made_for |= {"num_hidden_layers": len(plan.model.layers)}
    for name, expected in made_for.items():
        got = config.get(name, expected)
        if got != expected:
            raise BadPlan(
                f"plan: made for another model: {name} {expected!r} ({plan.model.name}), got {got!r} ({source}); "
                "make a plan for this model, or load the dense one"
            )


def run(command: str, arguments: list[str], job_of: Callable[[list[str]], FitJob]) -> int:
    """`python -m prunelit plan`.

    Args:
        command: "plan".
        arguments: command line after it.
        job_of: what builds the job of a `fit` command line.


    Example: see `tests/cli/test_plan.py`.
    """
    start = time.perf_counter()
    out: str | None
    if is_fit_config(arguments):
        out, measured, overwrite, rest = split_plan_options(arguments)
        out = _check_output_file(out, overwrite)
        plan, time_saved = make_job_plan(job_of(rest), measured)
    else:
        options = parse_command(command, arguments)
        same = ("dtype", "device", "stream", "memory_gib")
        method = build_method(options, (*same, "model", "out", "latency", "overwrite", "estimate"))
        named = {name: options[name] for name in same}
        chosen = options.estimate
        if chosen is None:  # a target alone asks what it would take
            is_scored = any(peek_option(name, arguments) for name in ("method", "text", "out", "latency", "plan"))
            chosen = method.size_target.is_asked and not is_scored
        if chosen:
            print_result(describe_estimate(options.model, method, options.dtype, options.device, options.stream))
            return 0
        out = _check_output_file(options.out, options.overwrite)
        plan, time_saved = make_model_plan(
            options.model, wrap_in_list(options.text), method, measured=options.latency, **named
        )
    print_result(render_plan_card(plan, time_saved))
    if reason := describe_overshoot(plan):
        logging.getLogger("prunelit").warning("%s", reason)
    report_result(command, out=out, method=plan.method, digest=plan.digest, predicted=plan.predicted)
    if out:
        write_text(Path(out), plan.to_json())
        took = time.perf_counter() - start
        print_result(f"\n{out}: the plan, in {took:.0f} s; edit it, then: prune --model M --plan {out} --out DIR")
    return 0


def _check_output_file(out: str | None, overwrite: bool) -> str | None:
    """Before any work is done.

    Returns:
        The file; in a folder plan.json, the name that `prune` gives it.

    Raises:
        OutputNotWritable: a folder or another plan is in the way, or the folder cannot be written.
    """
    if out is not None:
        if Path(out).is_dir() or out.endswith("/"):
            out = str(Path(out) / "plan.json")
        export.check_output(out, overwrite, file=True)
    return out
