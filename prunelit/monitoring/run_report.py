"""RunReport: measures a `fit` run dense, pruned and recovered, and leaves its folder.

model/        the recovered model, adapters merged, loads with transformers
adapter/      the adapters in PEFT's format, and base/, the cut model that they are for
plan.json     what was cut
report.json   dense, pruned, recovered; protocol, seconds, memory, versions, seed; written as soon as a part is known
report.html   the same for people, with pictures, what layers keep and completions; record.json is what it is drawn from
"""

import json
import logging
import os
import shlex
import sys
import time
from contextlib import AbstractContextManager, nullcontext, suppress
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lightning.pytorch import LightningModule, Trainer
from torch import nn

from prunelit import export
from prunelit.calibration import metrics
from prunelit.core.plan import PruningPlan
from prunelit.evaluation import samples
from prunelit.evaluation.samples import Samples
from prunelit.export import load_commands
from prunelit.model.decoder import Decoder
from prunelit.model.modes import move_to_device
from prunelit.model.stored.disk_size import measure_disk_bytes
from prunelit.monitoring.recorder import Recorder
from prunelit.pruning.callback import find_pruner
from prunelit.pruning.job import (
    check_same_job,
    check_same_on_ranks,
    collect_listeners,
    find_model,
    find_resume_path,
    fingerprint_job,
    read_callback_states,
)
from prunelit.recovery import finish
from prunelit.recovery.datamodule import TextDataModule, WindowLoader
from prunelit.recovery.module import RecoveryModule
from prunelit.report import run_page
from prunelit.report.format_numbers import describe_other_parameters
from prunelit.report.record import Record
from prunelit.runtime import fingerprints
from prunelit.runtime.atomic_files import check_folder
from prunelit.runtime.environment import describe_hardware, get_peak_memory_mib
from prunelit.runtime.errors import BadOption, BadPlan, OutputNotWritable, PrunelitError, describe_error
from prunelit.runtime.events import EventSource
from prunelit.runtime.fingerprints import fingerprint_batches
from prunelit.runtime.messages import log_on_rank_zero
from prunelit.runtime.text_files import JsonObject, escape_controls, write_json
from prunelit.runtime.timing import time_stage
from prunelit.runtime.versions import collect_versions
from prunelit.strategies import sharding

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger("prunelit")
_COMPLETION_TOKENS = 24
_SIZES = ("parameters", "block_parameters", "macs_per_token", "kv_bytes_per_token")


class RunReport(Recorder, EventSource):
    """Measure a run and save what came of it in `trainer.default_root_dir`.

    Args:
        batch_size: windows per forward pass when measuring perplexity.
        format: of the saved model: "auto", or one of those of `python -m prunelit export`.
        save_base: also save the cut model before recovery as base/, which the saved adapters are for.
        prompts: texts that the dense, the cut and the recovered model complete, for report.html; null: a few built-in
            ones; an empty list: none.

    Raises:
        BadOption: an empty prompt.

    Example: see `tests/export/test_overwrite.py`.
    """

    def __init__(
        self, batch_size: int = 4, format: str = "auto", save_base: bool = True, prompts: list[str] | None = None
    ):
        Recorder.__init__(self)
        EventSource.__init__(self)
        self._samples: Samples | None = None
        if prompts is None or prompts:
            self._samples = Samples(tuple(prompts or Samples.prompts), new_tokens=_COMPLETION_TOKENS)
        self.record.kind = "fit"
        self.batch_size = batch_size
        self.format = format
        self.save_base = save_base
        self.report: JsonObject = {}
        self.seconds: dict[str, float] = {}
        self._identity: dict[str, str | None] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Measure the dense model; the command line puts this callback before the ones that cut.

        Raises:
            BadPlan: the checkpoint to resume from is of another model or tokenizer.
            SourceNotFound: it is missing or damaged.
            BadOption: several pruning callbacks, ranks read different text, or the format is not that of the base.
            OutputNotWritable: a folder that the run will write holds what is not prunelit's, or what the run reads.
        """
        if stage != "fit" or self.report:
            return
        find_pruner(trainer)  # several are refused before anything is measured
        self.listeners = collect_listeners(trainer)
        self._folder = Path(trainer.default_root_dir)
        if trainer.is_global_zero:
            self._check_folders(trainer, pl_module)
        if self.format == "w4a16":
            raise BadOption(
                "report.format: expected a format of the trained weights, got w4a16, which rounds them once more; "
                "`python -m prunelit export --format w4a16` writes it from the saved model"
            )
        if self.format == "int4" and pl_module.hparams.get("base") != "int4":
            raise BadOption(
                f"report.format: expected int4 with base int4, got base {pl_module.hparams.get('base')}; "
                "`python -m prunelit export --format int4` rounds the saved model"
            )
        with self._time_stage("load_model"):
            model = find_model(pl_module)
        data = getattr(trainer, "datamodule", None)
        self._identity = fingerprint_job(model, trainer, pl_module)
        if resumed := find_resume_path(trainer):
            check_same_job(read_callback_states(trainer, resumed).get(self.state_key, {}), self._identity)
        self._windows = data.validation if isinstance(data, TextDataModule) else None
        if isinstance(data, TextDataModule):
            parts = [{"input_ids": data.validation}, {"input_ids": data.calibration}]
            training_rows = WindowLoader(data.rows, batch_size=1024, seed=None)  # they may not fit into memory
            check_same_on_ranks("data", fingerprint_batches(chain(parts, training_rows)))
        self.report = {"protocol": self._describe_protocol(model, data), "fingerprints": self._identity}
        self.report |= self._load_earlier_measurements(resumed is not None)
        for name in self.report.keys() & {"dense", "pruned"}:
            self.emit("measured", name=name, row=self.report[name])
        self.record.title = Decoder(model).shape.name
        self._add_disk_bytes("dense", finish.measure_dense_bytes(pl_module))
        with move_to_device(model, trainer.strategy.root_device):
            self._measure_state("dense", model, metrics.measure_model_size(model))
            self.report["tower_parameters"] = finish.count_trained_tower(model)
            self._write_completions("dense", model, trainer)
        self._write_report(trainer)

    def _check_folders(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before anything is measured: what is refused at the end costs a whole run."""
        check_folder(self._folder)
        pruner, data = find_pruner(trainer), getattr(trainer, "datamodule", None)
        named = [pl_module.hparams.get("model"), getattr(pruner, "plan_file", None), *getattr(data, "sources", [])]
        reads = [source for source in named if isinstance(source, str)]
        export.check_export_request(self._folder / "model", self.format, overwrite=True, reads=reads)
        if pl_module.hparams.get("lora_rank", 0):
            for name in ("adapter", "base") if self.save_base else ("adapter",):
                export.check_output(self._folder / name, overwrite=True, reads=reads)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the cut model, without adapters, before the first step.

        Raises:
            DoesNotFit: the format cannot hold it, so nothing is trained.
        """
        plan = self._get_plan(trainer)
        size = {name: self.report["dense"][name] for name in _SIZES}
        if plan is not None:  # adapters are on by now and are merged away in the end: they do not count
            size = {name: int(plan.predicted[name]) for name in _SIZES}
            if trainer.is_global_zero:
                plan.save(self._folder / "plan.json")
        module = cast(RecoveryModule, pl_module)
        adapted = module.model
        if not sharding.is_sharded_strategy(trainer.strategy):  # sharded, it has other shapes
            finish.check_run_format_fits(module, _get_tokenizer(trainer), self.format)
        with adapted.disable_adapter() if hasattr(adapted, "disable_adapter") else nullcontext():
            self._measure_state("pruned", adapted, size)
            self._write_completions("pruned", adapted, trainer)
        self.report["memory"] = module.measure_base_memory()
        _log_memory(self.report["memory"])
        self._write_report(trainer)
        self._started = time.perf_counter()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Merge the adapters, measure, save, show the table."""
        self.seconds["train"] = time.perf_counter() - self._started
        self.emit("stage", name="train", seconds=self.seconds["train"], memory_mib=get_peak_memory_mib())
        module = cast(RecoveryModule, pl_module)
        if sharding.is_sharded_strategy(trainer.strategy):  # gathered, it would be measured on the CPU
            self._measure_state("recovered", module.model, {name: self.report["pruned"][name] for name in _SIZES})
        run = finish.RunFolder(
            self._folder, _get_tokenizer(trainer), self._get_plan(trainer), self.format, self.save_base
        )
        merged = finish.merge_and_save_adapters(module, run, self._windows, self.report, self._time_stage)
        self._measure_state("recovered", merged, metrics.measure_model_size(merged))
        self._write_completions("recovered", merged, trainer)
        if trainer.is_global_zero:
            with self._time_stage("save"):
                written = finish.save_recovered_model(merged, run, self.report)
            self.report |= {"format": written.format, "trained_steps": trainer.global_step}
            self.record.facts["load"] = load_commands.list_load_commands(written.format, written.path, run.plan)
            self._add_disk_bytes("recovered", measure_disk_bytes(written.path))
        trainer.strategy.barrier()
        self._write_report(trainer)
        if trainer.is_global_zero:
            rows = {name: self.report[name] for name in ("dense", "pruned", "recovered")}
            folders = "model/" + " adapter/" * ("merge" in self.report) + " base/" * ("base_format" in self.report)
            files = "report.html report.json plan.json config.yaml"
            others = describe_other_parameters(self.report["recovered"], self.report["tower_parameters"])
            table = metrics.format_text_table(rows)
            sys.stdout.write(escape_controls(f"\n{table}\n\n{others}\n{self._folder}/: {folders} {files}\n"))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave a page that says why the run ended and how it goes on; the error itself is raised by Lightning."""
        if not self.report or not trainer.is_global_zero:
            return
        is_signal = isinstance(exception, KeyboardInterrupt | SystemExit)
        self.record.facts["ended_by"] = "it was stopped" if is_signal else describe_error(exception)
        if isinstance(exception, PrunelitError):  # one line that says what to do
            self.record.facts["ended_by"] = str(exception)
        with suppress(OSError, OutputNotWritable):  # the run ends anyway, by the error that came first
            run_page.write_run_page(self.record, self._folder)

    def state_dict(self) -> dict[str, Any]:
        """Fingerprints of the dense model and the tokenizer, and the curves so far."""
        return {**self._identity, "training": self.record.training}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check the fingerprints, which of a sharded checkpoint cannot be read before; go on with the curves.

        Raises:
            BadPlan: another model or tokenizer.
        """
        check_same_job(state_dict, self._identity)
        self.record.training = list(state_dict.get("training", self.record.training))

    def _measure_state(self, name: str, model: nn.Module, size: dict[str, int]) -> None:
        if name in self.report:
            return
        with self._time_stage(f"evaluate_{name}"):
            row: dict[str, float | None] = {"perplexity": None}
            if self._windows is not None:
                measured = metrics.perplexity(model, self._windows, self.batch_size, f"perplexity, {name}")
                row["perplexity"] = measured["perplexity"]
                self.report["protocol"]["tokens"] = measured["tokens"]
            self.report[name] = row | size
            self.emit("measured", name=name, row=self.report[name])

    def _write_completions(self, name: str, model: nn.Module, trainer: Trainer) -> None:
        """Write completions for the page. They stay in this folder: they are not told to other listeners."""
        tokenizer = _get_tokenizer(trainer)
        if self._samples is None or tokenizer is None or sharding.is_sharded_strategy(trainer.strategy):
            return
        known = {row["prompt"] for row in self.record.completions if name in row}
        if trainer.is_global_zero and not known.issuperset(self._samples.prompts):
            with self._time_stage("write_samples"):
                texts = samples.generate_completions(model, tokenizer, self._samples)
            self.record.on_event("completions", {"prompts": self._samples.prompts, "name": name, "texts": texts})

    def _describe_protocol(self, model: nn.Module, data: object) -> JsonObject:
        if self._windows is None or not isinstance(data, TextDataModule):
            return {}
        sources = data.validation_sources or data.train_sources
        dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        return metrics.describe_protocol(sources, self._windows, dtype) | {
            "fingerprint": fingerprints.fingerprint_token_ids(self._windows)
        }

    def _load_earlier_measurements(self, resumed: bool) -> JsonObject:
        """Measurements of an earlier run in this folder: of the same dense model on the same text; of the cut model
        only where that run is resumed."""
        try:
            earlier = json.loads((self._folder / "report.json").read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            return {}
        current = json.loads(json.dumps(self.report))
        tokens = earlier.get("protocol", {}).get("tokens")
        for part in (earlier.get("protocol", {}), current["protocol"]):
            part.pop("tokens", None)  # known once something is measured
        if any(earlier.get(name) != value for name, value in current.items()):
            return {}
        if "dense" in earlier and tokens is not None:
            self.report["protocol"]["tokens"] = tokens
        if resumed:
            self._resume_record()
        return {name: earlier[name] for name in (("dense", "pruned") if resumed else ("dense",)) if name in earlier}

    def _resume_record(self) -> None:
        """Take over the record of the run that is resumed; a damaged one is begun anew."""
        try:
            earlier = Record.from_json((self._folder / "record.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, KeyError, TypeError, BadPlan):
            return
        prompts = self._samples.prompts if self._samples else ()
        earlier.completions = [row for row in earlier.completions if row["prompt"] in prompts]
        earlier.stages += self.record.stages
        earlier.facts |= self.record.facts
        self.record = earlier

    def _add_disk_bytes(self, state: str, size: int | None) -> None:
        if size is not None:
            self.report.setdefault("disk_bytes", {})[state] = size

    def _get_plan(self, trainer: Trainer) -> PruningPlan | None:
        pruner = find_pruner(trainer)
        return pruner.applied_plan if pruner else None

    def _time_stage(self, name: str) -> AbstractContextManager[None]:
        return time_stage(name, self.seconds, self.emit)

    def _write_report(self, trainer: Trainer) -> None:
        if not trainer.is_global_zero:
            return
        pruner = find_pruner(trainer)
        stages = self.seconds | (pruner.seconds if pruner else {})
        self.report |= {
            "seconds": {name: round(value, 2) for name, value in stages.items()},
            "peak_memory_mib": get_peak_memory_mib(),
            "versions": collect_versions(),
            "seed": int(os.environ.get("PL_GLOBAL_SEED", 0)),
        }
        write_json(self._folder / "report.json", self.report)
        names = ("protocol", "versions", "seed", "memory", "trained_steps", "tower_parameters", "disk_bytes")
        self.record.facts |= {name: self.report[name] for name in names if name in self.report}
        self.record.facts.pop("ended_by", None)  # of an earlier start
        if (config := self._folder / "config.yaml").is_file():
            command = ["python", "-m", "prunelit", "fit", "--config", str(config), "--ckpt_path", "last"]
            self.record.facts["resume"] = shlex.join(command)
        self.record.facts |= {
            "hardware": describe_hardware(trainer.strategy.root_device),
            "completion_tokens": _COMPLETION_TOKENS,
        }
        run_page.write_run_page(self.record, self._folder)


def _get_tokenizer(trainer: Trainer) -> "PreTrainedTokenizerBase | None":
    return getattr(getattr(trainer, "datamodule", None), "tokenizer", None)


def _log_memory(memory: dict[str, float]) -> None:
    trained = memory["trainable_parameters"]
    log_on_rank_zero(
        f"training {int(trained):,} of {int(memory['parameters']):,} parameters "
        f"({trained / memory['parameters']:.2%}); the base takes {memory['bytes_per_base_parameter']:.2f} bytes each"
    )
